"""Golden cases of the metrics: each kind in terms of `neon_metrics`."""

import numpy as np
import torch

from golden.case import Case
from golden.official.metrics import edm_sweep_covariance, fid_infinity_fit, kernel_by_name
from neon_metrics import FeatureStatistics, InceptionDetector, Reference, fid, kid, prdc
from neon_metrics.inception import INPUT_SIZE, InceptionV3, normalise, resize_tf1
from neon_metrics.scores import frechet_terms, inception_score, mmd2
from neon_run.check.numbers import fill


def frechet(case: Case) -> dict:
    terms = frechet_terms(*(case.array(name) for name in ("mu1", "sigma1", "mu2", "sigma2")))
    return {
        "fid": terms.distance,
        "tr_sqrt": terms.trace_sqrt,
        "mean_term": terms.mean_term,
        "trace_sum": terms.trace_sum,
    }


def statistics_of(*batches: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def stats(case: Case) -> dict:
    sizes = case.array("batch_sizes").tolist() if case.has("batch_sizes") else case.config["batches"]
    statistics = statistics_of(*case.tensor("features").split(sizes))
    return {"mu": statistics.mean, "sigma": statistics.covariance()}


def fid_from_features(case: Case) -> dict:
    statistics = statistics_of(case.tensor("features1"))
    reference = Reference(case.array("mu2_f32").astype(np.float64), case.array("sigma2").astype(np.float64))
    return {"fid": fid(statistics, reference), "mu1": statistics.mean, "sigma1": statistics.covariance()}


def edm_cov_variants(case: Case) -> dict:
    statistics = statistics_of(case.tensor("features"))
    return {"sigma_unbiased": statistics.covariance(), "sigma_sweep_slip": edm_sweep_covariance(statistics)}


def isc(case: Case) -> dict:
    config = case.config
    mean, std = inception_score(
        case.tensor("logits"),
        splits=config.get("isc_splits", 10),
        shuffle=config.get("samples_shuffle", True),
        seed=config.get("rng_seed", 2020),
    )
    return {"mean": mean, "std": std}


def kid_case(case: Case) -> dict:
    config = case.config
    name, settings = config.get("kid_kernel", "poly"), {}
    prefix = f"kid_kernel_{name}_"
    settings = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    kernel = kernel_by_name(name, **settings)
    generated, real = case.tensor("features1"), case.tensor("features2")
    if "mmd2" in case.expected:
        return {"mmd2": mmd2(generated, real, kernel)}
    mean, std = kid(
        generated=generated,
        real=real,
        subsets=config.get("kid_subsets", 100),
        subset_size=config.get("kid_subset_size", 1000),
        kernel=kernel,
        seed=config.get("rng_seed", 2020),
    )
    return {"mean": mean, "std": std, "mean_f64": mean, "std_f64": std}


def prc(case: Case) -> dict:
    scores = prdc(real=case.tensor("real"), generated=case.tensor("generated"), k=case.config["k"])
    return vars(scores)


def infinity(case: Case) -> dict:
    intercept, slope = fid_infinity_fit(case.array("n"), case.array("fid"))
    return {"intercept": intercept, "slope": slope}


def resize(case: Case) -> dict:
    resized = resize_tf1(case.tensor("images"), tuple(case.config.get("size", (INPUT_SIZE, INPUT_SIZE))))
    return {"resized": resized, "normalised": normalise(resized)}


def extractor(case: Case) -> dict:
    net = fill(InceptionV3())
    assert net.Conv2d_1a_3x3.bn.eps == case.config.get("batch_norm_eps", 1e-3)
    for statistic in ("running_mean", "running_var"):
        buffers = [buffer for name, buffer in net.named_buffers() if name.endswith(statistic)]
        for buffer, values in zip(buffers, case.tensor(statistic).split([len(b) for b in buffers]), strict=True):
            buffer.copy_(values)
    detector = InceptionDetector(net, "filled by name", official=False)
    features = tuple(case.config["features_list"])
    outputs = {}
    for name in sorted(array for array in case.arrays if array.startswith("in_images")):
        number = name.removeprefix("in_images")
        found = detector.extract(case.tensor(f"images{number}"), features)
        outputs.update({f"{feature}_{number}": value for feature, value in found.items()})
    return outputs


ADAPTERS = {
    "frechet": frechet,
    "stats": stats,
    "fid_from_features": fid_from_features,
    "edm_cov_variants": edm_cov_variants,
    "isc": isc,
    "kid": kid_case,
    "prc": prc,
    "fid_infinity_fit": infinity,
    "resize": resize,
    "extractor": extractor,
}


def KEY_LISTS(name: str, spec: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net = InceptionV3()
    assert sum(parameter.numel() for parameter in net.parameters()) == spec["parameters"]
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}
