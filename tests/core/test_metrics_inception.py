"""The FID network and its weight file: fast form equal to the plain one, official weights told from any other."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file

from neon_files.atomic import sha256_file
from neon_files.errors import UserError
from neon_metrics import FunctionDetector, InceptionDetector, load_inception
from neon_metrics import detector as detector_module
from neon_metrics.inception import FEATURES, InceptionV3, normalise, resize_tf1
from neon_run.check.numbers import fill


@pytest.fixture(scope="module")
def net():
    """Filled by name, with batch norm statistics of noise images, so that the features depend on the image."""
    net = fill(InceptionV3())
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(normalise(resize_tf1(noise(2, 40, 40, seed=9))))
    return net.eval()


@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def noise(count, height, width, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_the_fast_form_is_as_exact_as_the_network_as_published(net):
    """Folded batch norm, channels last, any chunking: as near to float64 as the modules as they are loaded. These
    weights amplify rounding, so there is no fixed bound to hold."""
    images = noise(2, 32, 50)
    x = normalise(resize_tf1(images))
    exact, plain = copy.deepcopy(net).double()(x.double(), FEATURES), net(x, FEATURES)
    for chunk in (1, 2):
        found = InceptionDetector(net, "test", official=False, chunk_images=chunk).extract(images, FEATURES)
        assert list(found) == list(FEATURES)
        for name in FEATURES:
            spread = (exact[name][0] - exact[name][1]).abs().max()
            error, usual = ((y[name] - exact[name]).abs().max() / spread for y in (found, plain))
            assert error < max(4 * usual, 1e-6) and error < 1e-3, name
            assert found[name].dtype == torch.float32
    assert net.Conv2d_1a_3x3.conv.bias is None  # the given network is left as it was


def test_a_detector_call_gives_features_and_biasless_logits(net):
    detector = InceptionDetector(net, "test", official=False)
    images = noise(1, 20, 20)
    found, taps = detector(images), detector.extract(images, ("2048", "logits_unbiased", "logits"))
    assert torch.equal(found["features"], taps["2048"]) and torch.equal(found["logits"], taps["logits_unbiased"])
    torch.testing.assert_close(taps["logits"] - taps["logits_unbiased"], net.fc.bias[None], rtol=1e-4, atol=1e-5)
    assert (detector.num_features, detector.num_classes) == (2048, 1008)


def test_features_stay_float32_inside_autocast(net):
    detector = InceptionDetector(net, "test", official=False)
    images = noise(1, 20, 20)
    expected = detector.extract(images, ("192",))["192"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(detector.extract(images, ("192",))["192"], expected)


def test_one_channel_is_grey(net):
    detector = InceptionDetector(net, "test", official=False)
    grey = noise(1, 16, 16, channels=1)
    found = [detector.extract(images, ("64",))["64"] for images in (grey, grey.expand(-1, 3, -1, -1))]
    assert torch.equal(*found)


def test_images_of_another_kind_are_refused(net):
    detector = InceptionDetector(net, "test", official=False)
    for images in (noise(1, 8, 8).float(), noise(1, 8, 8, channels=4), noise(1, 8, 8)[0]):
        with pytest.raises(ValueError, match="must be uint8"):
            detector(images)
    with pytest.raises(ValueError, match="unknown features"):
        detector.extract(noise(1, 8, 8), ("2049",))


def test_resize_keeps_an_image_of_the_target_size_and_never_averages():
    images = noise(2, 12, 17)
    assert torch.equal(resize_tf1(images, (12, 17)), images.float())
    assert torch.equal(resize_tf1(images, (6, 17)), images[:, :, ::2].float())  # every other row, no antialiasing


# ----------------------------------------------------------------------------------------------------- the weight file


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No official weights in any of the default places; the folder of the first of them."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("NEON_HOME", str(tmp_path / "project"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "project/checkpoints"


def test_missing_weights_say_where_they_were_sought_and_how_to_get_them(nowhere):
    with pytest.raises(UserError, match="Inception weights are missing") as error:
        load_inception()
    for text in (str(nowhere), "hub/checkpoints", "`bash download_models.sh inception`"):
        assert text in error.value.message
    with pytest.raises(UserError, match=r"mine\.pth: no such file"):
        load_inception("mine.pth")


def test_damaged_default_weights_are_refused(nowhere):
    nowhere.mkdir(parents=True)
    (nowhere / detector_module.WEIGHTS_NAME).write_bytes(b"not the weights")
    with pytest.raises(UserError, match=r"sha256 is [0-9a-f]{64}, not 6726825d0af5f729"):
        load_inception()


def test_only_the_published_digest_is_official(nowhere, weights, monkeypatch):
    other = load_inception(weights)
    assert not other.official and "unofficial" in other.name
    monkeypatch.setattr(detector_module, "WEIGHTS_SHA256", sha256_file(weights))
    (nowhere).mkdir(parents=True)
    (nowhere / detector_module.WEIGHTS_NAME).write_bytes(weights.read_bytes())
    official = load_inception()
    assert official.official and official.name == "inception-v3-compat"
    assert load_inception(weights).official
    images = noise(1, 16, 16)
    assert torch.equal(official.extract(images, ("64",))["64"], other.extract(images, ("64",))["64"])


def test_safetensors_and_files_without_counters_are_read(net, tmp_path):
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, str(tmp_path / "weights.safetensors"))
    images = noise(1, 16, 16)
    expected = InceptionDetector(net, "test", official=False).extract(images, ("64",))["64"]
    assert torch.equal(load_inception(tmp_path / "weights.safetensors").extract(images, ("64",))["64"], expected)


def test_weights_that_do_not_fit_are_named(net, tmp_path):
    state = net.state_dict()
    lacking = {name: value for name, value in state.items() if name != "fc.bias"}
    wider = {**state, "fc.weight": torch.zeros(1000, 2048)}
    spoilt = {**state, "Mixed_7c.branch1x1.bn.running_var": torch.full((320,), torch.nan)}
    for changed, message in ((lacking, "fc.bias"), (wider, "fc.weight"), (spoilt, "running_var")):
        torch.save(changed, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=message) as error:
            load_inception(tmp_path / "weights.pth")
        assert str(tmp_path / "weights.pth") in error.value.message


class Bomb:
    """Its pickle writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_detectors_are_never_run(tmp_path):
    """NVIDIA's inception-2015-12-05.pkl carries code."""
    path, trace = tmp_path / "inception-2015-12-05.pkl", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"net": Bomb(trace)}))
    with pytest.raises(UserError, match="inception-2015-12-05"):
        load_inception(path)
    torch.save({"net": Bomb(trace)}, path)
    with pytest.raises(UserError, match="inception-2015-12-05"):
        load_inception(path)
    assert not trace.exists()


def test_any_function_can_be_a_detector():
    images = noise(4, 3, 3)
    pixels = FunctionDetector("pixels", 27, lambda images: images.flatten(1).float())
    assert set(pixels(images)) == {"features"} and pixels(images)["features"].shape == (4, 27)
    pair = FunctionDetector("pair", 2, lambda images: (torch.zeros(4, 2), torch.ones(4, 3)), num_classes=3)
    assert pair(images)["logits"].shape == (4, 3) and not pair.official
