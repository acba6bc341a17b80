"""EDM: networks, preconditioners, sampler, losses, augmentation, data, loop. An adapter maps a case to public calls."""

from __future__ import annotations

import inspect
import io
import json
import math
import tempfile
import zipfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from golden.adapters.merges import merge_edm
from golden.adapters.pickles import read_edm_pickle, refuse_hostile
from golden.case import Case, mismatch
from golden.official.edm import evaluate_batches, generate_batches
from golden.official.metrics import edm_sweep_covariance
from neon_core.backbone import TrainSettings
from neon_core.data_order import windowed_shuffle
from neon_core.schedules import Ema, LinearRamp
from neon_core.seeds import PerImageRandom, parse_seeds
from neon_core.selftrain import FineTune
from neon_edm import official
from neon_edm.augment import AugmentPipe
from neon_edm.backbone import EDMBackbone, load_network, network_config
from neon_edm.data import labels_of_names
from neon_edm.layers import Conv2d
from neon_edm.loss import EDMLoss, VELoss, VPLoss, loss_map
from neon_edm.networks import DhariwalUNet, SongUNet
from neon_edm.precond import build_network, preconditioner
from neon_edm.sampler import edm_sampler, time_steps, to_uint8
from neon_files.image_set import ImageSet
from neon_metrics.neighbours import prdc
from neon_metrics.scores import frechet_distance
from neon_metrics.statistics import FeatureStatistics
from neon_run.check.numbers import fill

UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
LOSSES = {"EDMLoss": EDMLoss, "VPLoss": VPLoss, "VELoss": VELoss}


def unet(config: dict) -> nn.Module:
    config = dict(config)
    return fill(UNETS[config.pop("class")](**config)).eval()


def numbers(config: dict) -> dict:
    """JSON has no infinity: it is written as text."""
    return {k: float(v) if v in ("inf", "-inf") else v for k, v in config.items()}


def precond(config: dict, default_class: str = "EDMPrecond") -> nn.Module:
    config = numbers(config)
    return fill(build_network(config.pop("class", default_class), config)).eval()


def set_freqs(net: nn.Module, case: Case) -> None:
    """The Fourier buffer is a constant of the case, not a parameter that fill() knows."""
    if case.has("fourier_freqs"):
        getattr(net, "model", net).map_noise.freqs.copy_(case.tensor("fourier_freqs"))


class Replay:
    """The recorded draws of a case, in order, each asked for by kind and shape."""

    def __init__(self, case: Case, draws: list[str]):
        self.draws = [(text, case.tensor(f"draw_{i:02d}")) for i, text in enumerate(draws)]

    def _next(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        text, values = self.draws.pop(0)
        assert text == f"{kind} {list(shape)}", f"asked for {kind} {list(shape)}, the case drew {text}"
        return values

    def randn(self, shape):
        return self._next("randn", shape)

    def rand(self, shape):
        return self._next("rand", shape)

    def randint(self, high, shape):
        return self._next(f"randint({high})", shape)


# Networks


@torch.no_grad()
def run_unet(case: Case) -> dict:
    net = unet(case.config)
    set_freqs(net, case)
    x, noise = case.tensor("x"), case.tensor("noise_labels")
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    out = {"f": net(x, noise, labels), "param_count": sum(p.numel() for p in net.parameters())}
    if case.has("augment_labels"):
        out["f_augment"] = net(x, noise, labels, augment_labels=case.tensor("augment_labels"))
    if labels is not None:
        out["f_zero_label"] = net(x, noise, torch.zeros_like(labels))
    return out


@torch.no_grad()
def run_unet_eps(case: Case) -> dict:
    net = unet(case.config["net"])
    set_freqs(net, case)
    for name, factor in case.config["multiply_weight_and_bias_of"].items():
        layer = net.get_submodule(name)
        layer.weight *= factor
        layer.bias *= factor
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    return {"f": net(case.tensor("x"), case.tensor("noise_labels"), labels)}


@torch.no_grad()
def run_unet_train_mode(case: Case) -> dict:
    out = {}
    for i, variant in enumerate(case.config["variants"]):
        variant = dict(variant)
        seed = variant.pop("seed")
        net = unet(case.config["net"] | variant).train()
        set_freqs(net, case)
        seen = []
        if net.map_label is not None:
            net.map_label.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        labels = case.tensor("class_labels") if case.has("class_labels") else None
        torch.manual_seed(seed)
        out[f"f_{i}"] = net(case.tensor("x"), case.tensor("noise_labels"), labels)
        if seen:
            out[f"label_kept_{i}"] = (seen[0] != 0).any(dim=1).long()
    return out


@torch.no_grad()
def run_conv_resample(case: Case) -> dict:
    layers = [fill(Conv2d(**row)) for row in case.config["rows"]]
    return {f"y_{i}": layer(case.tensor(f"x_{i}")) for i, layer in enumerate(layers)}


def run_init_scale(case: Case) -> dict:
    torch.manual_seed(0)
    config = dict(case.config["net"])
    make = UNETS.get(config["class"])
    kwargs = {k: v for k, v in config.items() if k != "class"}
    nets = [make(**kwargs) if make else build_network(config["class"], kwargs)
            for _ in range(case.config["constructions"])]  # fmt: skip
    pooled = [
        torch.stack([dict(net.named_parameters())[name].detach().double().flatten() for net in nets])
        for name in case.config["param_names_in_order"]
    ]
    return {
        "rms": np.array([float(p.square().mean().sqrt()) for p in pooled]),
        "max_abs": np.array([float(p.abs().max()) for p in pooled]),
        "mean": np.array([float(p.mean()) for p in pooled]),
        "count": np.array([p.shape[1] for p in pooled]),
    }


def compare_init_scale(case: Case, output: str, ours: np.ndarray) -> str | None:
    """The case asks for equal distributions: constants exactly, the rest within what pooling leaves of chance."""
    golden = case.expected[output]
    if output == "count":
        return mismatch(case, output, ours)
    rms, mean, count = (case.expected[name] for name in ("rms", "mean", "count"))
    constant = (rms == 0) | ((rms == 1) & (mean == 1))
    chance = 1 / np.sqrt(case.config["constructions"] * count)  # relative error of a pooled rms is about half of it
    if output == "rms":
        limit = np.where(count >= 8, case.tolerance(output)[0], 2 * chance) * golden
        wrong = np.abs(ours - golden) > np.where(constant, 0, limit)
    elif output == "max_abs":
        uniform = golden <= 1.001 * math.sqrt(3) * rms * (1 + 2 * chance)
        wrong = np.where(uniform, ours > 1.001 * math.sqrt(3) * rms * (1 + 2 * chance), ours > 2 * golden)
    else:
        wrong = np.abs(ours - golden) > np.where(constant, 0, 8 * rms * chance)
    return f"{output}: {wrong.sum()} of {wrong.size} distributions differ" if wrong.any() else None


# Preconditioners


@torch.no_grad()
def run_edm_precond(case: Case) -> dict:
    net = precond(case.config)
    set_freqs(net, case)
    x, sigma = case.tensor("x"), case.tensor("sigma")
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    out = {
        "d": net(x, sigma, labels),
        "d_no_label": net(x, sigma),
        "d_scalar_sigma_f64": net(x.double(), sigma[1].double(), labels),
        "round_sigma": net.round_sigma(sigma),
        "sigma_min_max": np.array([net.sigma_min, net.sigma_max], dtype=np.float64),
    }
    if case.has("augment_labels"):
        out["d_augment"] = net(x, sigma, labels, augment_labels=case.tensor("augment_labels"))
    return out


@torch.no_grad()
def run_fp16_flag(case: Case) -> dict:
    net = precond(case.config)
    set_freqs(net, case)
    x, sigma = case.tensor("x"), case.tensor("sigma")
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    return {
        "d": net(x, sigma, labels),
        "d_force_fp32": net(x, sigma, labels, force_fp32=True),
        "d_int_labels": net(x, sigma, None if labels is None else labels.long()),
    }


@torch.no_grad()
def run_other_preconditioners(case: Case) -> dict:
    x, sigma = case.tensor("x"), case.tensor("sigma")
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    out = {}
    for short, name in (("vp", "VPPrecond"), ("ve", "VEPrecond"), ("iddpm", "iDDPMPrecond")):
        extra = case.config.get("extra", {})  # for one class under its name, or for all that know the argument
        known = inspect.signature(preconditioner(name)).parameters
        shared = {k: v for k, v in extra.items() if k in known}
        net = precond(case.config["common"] | shared | extra.get(short, {}) | extra.get(name, {}), name)
        set_freqs(net, case)
        out[f"{short}_d"] = net(x, sigma, labels)
        out[f"{short}_sigma_min_max"] = np.array([net.sigma_min, net.sigma_max], dtype=np.float64)
        out[f"{short}_round"] = net.round_sigma(case.tensor("round"))
        if short == "vp":
            out["vp_sigma_of_t"], out["vp_t_of_sigma"] = net.sigma(case.tensor("t")), net.sigma_inv(sigma)
        if short == "iddpm":
            out["iddpm_u"], out["iddpm_round_index"] = net.u, net.sigma_index(case.tensor("round"))
    return out


def run_precond_tables(case: Case) -> dict:
    vp, iddpm = precond(case.config["vp"]), precond(case.config["iddpm"])
    return {
        "vp_sigma_min_max": np.array([vp.sigma_min, vp.sigma_max]),
        "vp_sigma_of_t": vp.sigma(case.tensor("t")),
        "vp_t_of_sigma": vp.sigma_inv(case.tensor("sigma")),
        "iddpm_u": iddpm.u,
        "iddpm_sigma_min_max": np.array([iddpm.sigma_min, iddpm.sigma_max]),
        "iddpm_round_index": iddpm.sigma_index(case.tensor("round")),
        "iddpm_round": iddpm.round_sigma(case.tensor("round")),
    }


# Sampler


class Recorded:
    """A denoiser that notes the noise level of every call."""

    def __init__(self, denoise, sigma_min: float, sigma_max: float, round_sigma=torch.as_tensor):
        self.denoise, self.round_sigma = denoise, round_sigma
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.calls: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        self.calls.append(float(sigma))
        return self.denoise(x, sigma, class_labels)


def run_t_steps(case: Case) -> dict:
    out = {}
    for i, row in enumerate(case.config["rows"]):
        row = numbers(row)
        settings = {k: v for k, v in row.items() if not k.startswith("net_")}
        net = Recorded(lambda x, sigma, labels: x * 0, row["net_sigma_min"], row["net_sigma_max"])
        out[f"t_{i}"] = time_steps(net, **settings)
        edm_sampler(net, torch.zeros(1, 1, 1, 1), **settings)
        out[f"nfe_{i}"] = len(net.calls)
    return out


@torch.no_grad()
def run_sampler(case: Case) -> dict:
    config = case.config["net"]
    if "s" in config:
        s, mean = config["s"], case.tensor("mean")
        net = Recorded(
            lambda x, t, labels: mean + (x - mean) * (s**2 / (s**2 + t**2)), config["sigma_min"], config["sigma_max"]
        )
    else:
        module = precond(config)
        set_freqs(module, case)
        net = Recorded(module, module.sigma_min, module.sigma_max, module.round_sigma)
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    noise = (n.double() for n in case.tensor("noise")) if case.has("noise") else iter(())
    settings = numbers(case.config["sampler"])
    x = edm_sampler(net, case.tensor("latents"), labels, lambda: next(noise), **settings)
    return {"x": x, "uint8": to_uint8(x), "sigma_calls": np.array(net.calls)}


def compare_sampler(case: Case, output: str, ours: np.ndarray) -> str | None:
    """Pixels may be off by one in at most 0.1 % of the values; noise levels hold to 1e-6 (1e-12 if analytic)."""
    ours = ours.numpy() if isinstance(ours, Tensor) else ours
    golden = case.expected[output]
    if output == "x" and ours.dtype != golden.dtype:
        return f"x: {ours.dtype}, golden {golden.dtype}"
    if output == "uint8" and ours.shape == golden.shape:
        off = np.abs(ours.astype(int) - golden.astype(int))
        return f"uint8: {np.count_nonzero(off)} differ" if off.max() > 1 or (off > 0).mean() > 1e-3 else None
    if output == "sigma_calls" and ours.shape == golden.shape:
        rtol = 1e-12 if "s" in case.config["net"] else 1e-6
        return None if np.allclose(ours, golden, rtol=rtol, atol=0) else "sigma_calls: levels differ"
    return mismatch(case, output, ours)


def run_to_uint8(case: Case) -> dict:
    return {"uint8": to_uint8(case.tensor("x"))}


# Seeds


def run_stacked_rng(case: Case) -> dict:
    seeds, side = case.config["seeds"], case.config["resolution"]
    shape = (case.config.get("channels", 3), side, side)
    random, unlabelled = PerImageRandom(seeds), PerImageRandom(seeds)
    out = {"latents": random.randn(*shape), "labels": random.randint(case.config["label_dim"])}
    for i in range(sum(name.startswith("step_noise_") for name in case.expected) - 1):
        out[f"step_noise_{i}"] = random.randn(*shape, dtype=torch.float64)
    unlabelled.randn(*shape)
    out["step_noise_0_without_label_draw"] = unlabelled.randn(*shape, dtype=torch.float64)
    return out


def run_parse_int_list(case: Case) -> dict:
    return {str(i): np.array(parse_seeds(text), dtype=np.int64) for i, text in enumerate(case.config["strings"])}


def run_seed_batches(case: Case) -> dict:
    out = {}
    for i, row in enumerate(case.config["rows"]):
        for short, split in (("generate", generate_batches), ("fid", evaluate_batches)):
            ranks = split(parse_seeds(row["seeds"]), row["max_batch_size"], row["world_size"])
            for rank, batches in enumerate(ranks):
                out[f"{short}_{i}_rank{rank}"] = np.array([seed for batch in batches for seed in batch], dtype=np.int64)
                out[f"{short}_{i}_rank{rank}_sizes"] = np.array([len(batch) for batch in batches], dtype=np.int64)
    return out


# Losses and augmentation


def gradient_outputs(case: Case, net: nn.Module, loss: Tensor) -> dict:
    """Norms in the order of the case, and the unit vectors that it names."""
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    out = {"grad_norms": np.array([float(grads[n].double().norm()) for n in case.config["param_names_sorted"]])}
    for output in case.expected:
        kind, _, name = output.partition("__")
        if kind == "grad_dir":
            out[output] = grads[name] / grads[name].norm()
    return out


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def run_loss(case: Case) -> dict:
    net = precond(case.config["net"]).train()
    set_freqs(net, case)
    loss_fn = LOSSES[case.config["loss"]](**case.config["loss_kwargs"])
    sigma = loss_fn.sigma(case.tensor("sigma_draw"))
    augment_labels = case.tensor("augment_labels") if case.has("augment_labels") else None
    y, noise, labels = scaled(case.tensor("images_uint8")), case.tensor("noise"), case.tensor("labels")
    loss = loss_map(net, y, sigma, loss_fn.weight(sigma), noise, labels, augment_labels)
    scalar = loss.sum() / len(y)
    return {"loss": loss, "loss_scalar": scalar} | gradient_outputs(case, net, scalar)


def run_loss_augment(case: Case) -> dict:
    net = precond(case.config["net"]).train()
    set_freqs(net, case)
    pipe = AugmentPipe(**{k: v for k, v in case.config["augment"].items() if k != "class"})
    loss_fn = LOSSES[case.config["loss"]](**case.config.get("loss_kwargs", {}))
    replay = Replay(case, case.config["draws"])
    loss = loss_fn(net, scaled(case.tensor("images_uint8")), case.tensor("labels"), replay, pipe)
    assert not replay.draws, "draws left over"
    return {"loss": loss} | gradient_outputs(case, net, loss.sum() / len(loss))


def run_augment(case: Case) -> dict:
    pipe = AugmentPipe(**{k: v for k, v in case.config.items() if k not in ("class", "draws")})
    replay = Replay(case, case.config["draws"])
    images, labels = pipe(case.tensor("images"), replay)
    assert not replay.draws, "draws left over"
    return {"images": images, "labels": labels}


# Data and schedules


def image_set(case: Case, names: list[str], pictures: list[np.ndarray], as_zip: bool) -> ImageSet:
    """The set of the case, written to a temporary place and read whole."""
    with tempfile.TemporaryDirectory() as folder:
        listing = json.dumps({"labels": case.config["dataset_json_labels"]}).encode()
        files = {"dataset.json": listing}
        for name, picture in zip(names, pictures, strict=True):
            buffer = io.BytesIO()
            PIL.Image.fromarray(picture).save(buffer, format="PNG")
            files[name] = buffer.getvalue()
        path = Path(folder, "set.zip" if as_zip else "set")
        if as_zip:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
        else:
            for name, data in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(data)
        images = ImageSet(path, **case.config["dataset_kwargs"])
        images.images(range(len(images)))  # decoded and kept before the folder goes, as are the labels
        assert images.has_labels
        return images


def run_dataset_order(case: Case) -> dict:
    names = case.config["names"]
    side = case.expected["first_image"].shape[1:]
    pictures = []
    for i in range(len(names)):
        picture = np.zeros((*side, 3), dtype=np.uint8)
        picture[:, :, 0], picture[:, 0, 1] = i, 200
        pictures.append(picture)
    images = image_set(case, names, pictures, as_zip=False)
    arrays = images.images(range(len(images)))
    out = {
        "order": arrays[:, 0, 0, 0].long(),
        "labels": images.label_rows,
        "first_image": arrays[0],
        "last_image": arrays[-1],
        "label_dim": images.label_rows.shape[1],
    }
    for i, sampler in enumerate(case.config.get("samplers", [])):
        order = windowed_shuffle(sampler["size"], sampler["seed"])
        mine = islice(order, sampler["rank"], None, sampler["num_replicas"])  # what the official sampler gives a rank
        out[f"sampler_{i}"] = np.array(list(islice(mine, sampler["take"])), dtype=np.int64)
    return out


def run_dataset_zip(case: Case) -> dict:
    height, width = case.expected["images"].shape[2:]
    position = np.arange(height * width).reshape(height, width)
    names = case.config["files"]
    pictures = [((position + 10 * i) % 256).astype(np.uint8) for i in range(len(names))]
    images = image_set(case, names, pictures, as_zip=True)
    arrays = images.images(range(len(images)))
    rows = images.label_rows
    return {"images": arrays, "labels": rows, "label_dim": rows.shape[1], "channels": arrays.shape[1]}


def run_make_labels(case: Case) -> dict:
    entries = labels_of_names(case.config["names"])
    index = [case.config["names"].index(name) for name, _ in entries]
    return {"index": np.array(index, dtype=np.int64), "label": np.array([k for _, k in entries], dtype=np.int64)}


def run_schedules(case: Case) -> dict:
    out = {}
    for i, row in enumerate(case.config["rows"]):
        batch, duration = row["batch"], official.duration_images(row["duration_mimg"])
        ends, ticks = official.snapshot_images(duration, batch, row["tick_kimg"] * 1000, row["snap_ticks"])
        ramp = LinearRamp(row["lr_rampup_kimg"] * 1000 if "lr_rampup_kimg" in row else official.LR_RAMP_IMAGES)
        ema = Ema(halflife_images=official.kimg(row["ema_mimg"]), rampup_ratio=row["ema_rampup_ratio"])
        seen = [iteration * batch for iteration in row["probe_iterations"]]
        out[f"{i}_lr"] = np.array([row["lr"] * ramp(n) for n in seen])
        out[f"{i}_ema_beta"] = np.array([ema.beta(n, batch) for n in seen])
        out[f"{i}_snapshot_kimg"] = np.array(ends, dtype=np.int64) // 1000
        out[f"{i}_iterations"], out[f"{i}_ticks"], out[f"{i}_images"] = ends[-1] // batch, ticks, ends[-1]
    return out


# Training


class ReplayBackbone(EDMBackbone):
    """Draws from the case instead of a generator, and notes what goes in and comes out of every loss."""

    def prepare_replay(self, draws) -> None:
        self.draws, self.loss_sums, self.image_means = draws, [], []

    def random(self, generator):
        draw, noise = next(self.draws)
        return SimpleNamespace(randn=lambda shape: draw if shape == draw.shape else noise)

    def self_training_loss(self, x, labels, generator):
        loss = super().self_training_loss(x, labels, generator)
        self.loss_sums.append(float(loss.detach()) * len(x))
        self.image_means.append(x.mean(dim=(1, 2, 3)))
        return loss


def run_training_steps(case: Case) -> dict:
    config, loop = case.config["net"], case.config["loop"]
    net = precond(config)
    set_freqs(net, case)
    backbone = ReplayBackbone(net, {"class": config["class"], "kwargs": {}})
    sigma_draws, noise = case.tensor("sigma_draw"), case.tensor("noise")  # [steps, rounds, B, ...]
    steps, rounds = sigma_draws.shape[:2]
    backbone.prepare_replay((sigma_draws[i, j], noise[i, j]) for i in range(steps) for j in range(rounds))
    settings = TrainSettings(
        images=steps * loop["batch_size"],
        batch_size=loop["batch_size"],
        micro_batch_size=loop["batch_gpu"] or loop["batch_size"],
        lr=loop["lr"],
        schedule=LinearRamp(max(loop["lr_rampup_kimg"] * 1000, 1e-8)),
        nonfinite_gradients="zero",
        ema=Ema(halflife_images=loop["ema_halflife_kimg"] * 1000, rampup_ratio=loop["ema_rampup_ratio"]),
    )
    run = FineTune(backbone, settings, torch.device("cpu"))
    names = case.config["param_names_in_order"]
    parameters = dict(net.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    images = case.tensor("images")  # [n, H, W, C] or [n, H, W]
    images = (images[..., None] if images.ndim == 3 else images).permute(0, 3, 1, 2)
    classes = case.tensor("labels") if case.has("labels") else None
    if classes is not None and classes.ndim == 2:
        classes = classes.argmax(dim=1)
    order = backbone.data_order(len(images), loop["batch_size"], loop["seed"])
    injection = case.config.get("gradient_injection")
    out = {"lr": [], "net_update_norm": [], "ema_update_norm": [], "grad_norm": []}
    norms = lambda values: [float(values[name].double().norm()) for name in names]  # noqa: E731
    generator = torch.Generator()
    for step in range(steps):
        hooks = []
        if injection and injection["iteration"] == step:
            hooks = [inject(parameters[injection["parameter"]], injection["round"], injection["values"])]
        micro_batches = []
        for part in torch.from_numpy(next(order)).chunk(rounds):
            labels = None if classes is None else classes[part].long()
            micro_batches.append((backbone.encode(images[part], generator), labels, generator))
        out["lr"].append(run.lr)
        run.step(micro_batches)
        for hook in hooks:
            hook.remove()
        average = run.theta_syn()
        out["net_update_norm"].append(norms({name: parameters[name].detach() - start[name] for name in names}))
        out["ema_update_norm"].append(norms({name: average[name] - start[name] for name in names}))
        out["grad_norm"].append(norms({name: parameters[name].grad for name in names}))
    for name in loop["full_params"]:
        out[f"net_final__{name}"], out[f"ema_final__{name}"] = parameters[name], average[name]
    for name, _ in net.named_buffers():
        out[f"ema_buffer__{name}"] = average[name]
    out["loss_sum"] = np.array(backbone.loss_sums).reshape(steps, rounds)
    out["batch_image_means"] = torch.stack(backbone.image_means).reshape(steps, rounds, -1)
    return {name: np.array(value) if isinstance(value, list) else value for name, value in out.items()}


def inject(parameter: nn.Parameter, in_round: int, values: list):
    """A hook that overwrites entries of the gradient in one accumulation round."""
    calls = iter(range(10**6))

    def overwrite(grad: Tensor) -> Tensor:
        if next(calls) == in_round:
            grad = grad.clone()
            for index, text in values:
                grad.view(-1)[index] = float(text)
        return grad

    return parameter.register_hook(overwrite)


# Files and metrics


def run_frechet(case: Case) -> dict:
    ours, theirs = (FeatureStatistics(case.array("features").shape[1]) for _ in range(2))
    ours.update(case.tensor("features"))
    theirs.update(case.tensor("features_ref"))
    reference = (theirs.mean.numpy(), theirs.covariance().numpy())
    mu, sigma, slip = ours.mean.numpy(), ours.covariance().numpy(), edm_sweep_covariance(ours).numpy()
    distance = frechet_distance(mu, sigma, *reference)
    return {
        "mu": mu,
        "sigma": sigma,
        "mu_ref": reference[0],
        "sigma_ref": reference[1],
        "fid": distance,
        "fid_metrics_all": distance,
        "sigma_metrics_all": slip,
        "fid_metrics_all_own_sigma": frechet_distance(mu, slip, *reference),
    }


def run_frechet_given_stats(case: Case) -> dict:
    return {"fid": frechet_distance(*(case.array(name) for name in ("mu", "sigma", "mu_ref", "sigma_ref")))}


def run_prdc(case: Case) -> dict:
    scores = prdc(real=case.tensor("real"), generated=case.tensor("fake"), k=case.config["nearest_k"])
    return {
        "precision": scores.precision_strict,
        "recall": scores.recall_strict,
        "density": scores.density,
        "coverage": scores.coverage,
    }


def run_pickle(case: Case) -> dict:
    return read_edm_pickle(case, lambda read: load_network(read, network_config(read)))


ADAPTERS = {
    "unet": run_unet,
    "unet_eps": run_unet_eps,
    "unet_train_mode": run_unet_train_mode,
    "conv_resample": run_conv_resample,
    "init_scale": run_init_scale,
    "edm_precond": run_edm_precond,
    "edm_precond_fp16_flag": run_fp16_flag,
    "other_preconditioners": run_other_preconditioners,
    "precond_tables": run_precond_tables,
    "t_steps": run_t_steps,
    "sampler_deterministic": run_sampler,
    "sampler_churn": run_sampler,
    "sampler_exact": run_sampler,
    "sampler_iddpm": run_sampler,
    "to_uint8": run_to_uint8,
    "stacked_rng": run_stacked_rng,
    "parse_int_list": run_parse_int_list,
    "seed_batches": run_seed_batches,
    "loss": run_loss,
    "loss_augment": run_loss_augment,
    "augment": run_augment,
    "dataset_order": run_dataset_order,
    "dataset_zip": run_dataset_zip,
    "make_labels": run_make_labels,
    "schedules": run_schedules,
    "training_steps": run_training_steps,
    "pickle": run_pickle,
    "pickle_hostile": refuse_hostile,
    "merge": lambda case: merge_edm(case, precond),
    "frechet": run_frechet,
    "frechet_given_stats": run_frechet_given_stats,
    "prdc": run_prdc,
}

COMPARE = {
    "init_scale": compare_init_scale,
    "sampler_deterministic": compare_sampler,
    "sampler_churn": compare_sampler,
    "sampler_exact": compare_sampler,
    "sampler_iddpm": compare_sampler,
}


def KEY_LISTS(file_name: str, spec: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        net = build_network(spec["class_name"], spec["constructor_kwargs"])
    assert sum(p.numel() for p in net.parameters()) == spec["total_parameters"]
    assert [name for name, _ in net.named_buffers()] == spec["buffers"]
    return {name: value.shape for name, value in net.state_dict().items()}
