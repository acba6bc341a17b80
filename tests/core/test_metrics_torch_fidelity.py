"""Our numbers are torch-fidelity's, end to end from images and a weight file. Runs where torch-fidelity is installed
(`pip install torch-fidelity==0.4.0`); nothing else in the project needs it.
"""

import pytest
import torch

from neon_metrics import MetricAccumulator, MetricSettings, Reference, extract_features, load_inception
from neon_metrics.inception import InceptionV3, normalise, resize_tf1
from neon_metrics.statistics import FeatureStatistics
from neon_run.check.numbers import fill

torch_fidelity = pytest.importorskip("torch_fidelity")


class Images(torch.utils.data.Dataset):
    """uint8 [n, 3, H, W] as torch-fidelity takes it."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def calibrated_network(images) -> InceptionV3:
    """Filled by name, batch norm statistics taken from `images`, so that the features depend on the image."""
    net = fill(InceptionV3())
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(normalise(resize_tf1(images)))
    return net.eval()


@pytest.mark.slow
def test_fid_is_and_kid_equal_torch_fidelity(tmp_path):
    """Both networks see 40 images: 15 CPU seconds. The tolerance is torch-fidelity's: with fewer images than features
    its square root, from eigenvalues of a singular product, is off by about 1e-5 of the value."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(40, 3, 6, 5, generator=generator)
    images = torch.nn.functional.interpolate(smooth, size=(48, 40), mode="bicubic").clamp(0, 1).mul(255).byte()
    generated, real = images[:20], images[20:]
    weights = tmp_path / "weights.pth"
    torch.save(calibrated_network(real[:8]).state_dict(), weights)

    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        isc=True,
        fid=True,
        kid=True,
        isc_splits=4,
        kid_subsets=7,
        kid_subset_size=15,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=8,
    )

    detector = load_inception(weights)
    settings = MetricSettings(is_splits=4, kid_subsets=7, kid_subset_size=15)
    accumulator = MetricAccumulator(detector, len(generated), ("fid", "is", "kid"), settings)
    for start in range(0, len(generated), 8):
        accumulator.update(generated[start : start + 8], range(start, min(start + 8, len(generated))))
    real_features = extract_features(detector, real.split(8))
    reference = Reference.from_statistics(FeatureStatistics(2048).update(real_features))
    with pytest.warns(UserWarning, match="covariance is singular"):
        ours = accumulator.compute(reference, real_features)

    pairs = {
        "fid": "frechet_inception_distance",
        "is_mean": "inception_score_mean",
        "is_std": "inception_score_std",
        "kid_mean": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
    }
    for mine, name in pairs.items():
        print(f"{mine:9s} ours {ours[mine]:.9g} torch-fidelity {theirs[name]:.9g}")
        assert ours[mine] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), mine
