"""An evaluation counts every seed once, keeps images if asked, and checks its inputs before it samples."""

import numpy as np
import pytest
import torch
from core.pico import TRAIN, PicoBackbone, PixelMoments

from neon_core.merge import NeonWeights
from neon_core.selftrain import self_train
from neon_core.synthetic import generate_set
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.evaluate import Evaluator, evaluate
from neon_metrics.reference import Reference
from neon_run.merging.files import merge_files
from neon_run.search.sweep import Sweep, early_stopped_grid, find_checkpoints

CPU = torch.device("cpu")


def moments(backbone, seeds, batch_size):
    make = lambda: MetricAccumulator(PixelMoments(), len(seeds), ("fid",))  # noqa: E731
    return evaluate(backbone, seeds, make, settings={}, batch_size=batch_size, progress=False).feature_statistics


def reference(num=64):
    return Reference.from_statistics(moments(PicoBackbone.fresh(seed=9), list(range(1000, 1000 + num)), 16))


def test_repeats_count_as_often_as_they_stand():
    backbone = PicoBackbone.fresh()
    images = backbone.sample([4, 4, 5], backbone.assign_labels([4, 4, 5]))
    features = PixelMoments()(images)["features"].double()
    torch.testing.assert_close(moments(backbone, [4, 4, 5], 2).mean, features.mean(0), rtol=1e-12, atol=1e-12)


def test_images_are_saved_if_asked(tmp_path):
    evaluator = Evaluator(reference(), device=CPU, metrics=("fid",), detector=PixelMoments())
    backbone = PicoBackbone.fresh()
    evaluator(backbone, range(20), settings={}, batch_size=8, save_images=tmp_path, progress=False)
    saved = ImageSet(tmp_path, use_labels=False)
    assert torch.equal(saved.images(range(20)), backbone.sample(range(20), backbone.assign_labels(range(20))))


def test_a_set_against_itself_is_at_distance_zero():
    backbone = PicoBackbone.fresh()
    own = Reference.from_statistics(moments(backbone, list(range(50)), 16))
    evaluator = Evaluator(own, device=CPU, metrics=("fid",), detector=PixelMoments())
    assert abs(evaluator(backbone, range(50), settings={}, batch_size=16, progress=False)["fid"]) < 1e-6


def test_inputs_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="real_images"):
        Evaluator(reference(), device=CPU, metrics=("kid",), detector=PixelMoments())
    with pytest.raises(UserError, match=r"none\.npz"):
        Evaluator(tmp_path / "none.npz", device=CPU, detector=PixelMoments())
    with pytest.raises(UserError, match="3 features"):
        Evaluator(Reference(np.zeros(3), np.eye(3)), device=CPU, detector=PixelMoments())


def test_precision_and_recall_use_the_real_images(tmp_path):
    generate_set(PicoBackbone.fresh(seed=9), list(range(30)), tmp_path, settings={}, batch_size=8)
    metrics = ("fid", "is", "prdc")
    evaluator = Evaluator(reference(), device=CPU, metrics=metrics, detector=PixelMoments(), real_images=tmp_path)
    result = evaluator(PicoBackbone.fresh(), range(30), settings={}, batch_size=8, progress=False)
    assert 0 <= result["precision"] <= 1 and 0 <= result["recall"] <= 1 and result["is_mean"] >= 1
    same = evaluator(PicoBackbone.fresh(seed=9), range(30), settings={}, batch_size=8, progress=False)
    assert same["coverage"] == 1.0


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    from core.test_selftrain import data

    self_train(PicoBackbone.fresh(), data(), TRAIN, folder, device=CPU)
    return find_checkpoints(folder)


def test_a_sweep_moves_in_place_without_drift_and_keeps_its_points(snapshots, tmp_path):
    backbone = PicoBackbone.fresh()
    before = {k: v.clone() for k, v in backbone.net.state_dict().items()}
    evaluator = Evaluator(reference(), device=CPU, metrics=("fid",), detector=PixelMoments())
    options = {"settings": {}, "batch_size": 16, "identity": {"base": "pico"}}
    sweep = Sweep(backbone, evaluator, snapshots, tmp_path, **options)
    first = [sweep.measure(name, w, range(40))["fid"] for name in snapshots for w in (0.0, 0.5, 2.0)]
    sweep.restore()
    assert all(torch.equal(before[k], v) for k, v in backbone.net.state_dict().items())
    assert len(list((tmp_path / "points").glob("*.json"))) == 5  # the base once, two weights for two snapshots

    def never(*args, **kwargs):
        raise AssertionError("a finished point was made again")

    again = Sweep(backbone, evaluator, snapshots, tmp_path, **options)
    backbone.sample = never
    assert [again.measure(name, w, range(40))["fid"] for name in snapshots for w in (0.0, 0.5, 2.0)] == first


def test_the_written_network_is_the_measured_one(snapshots, tmp_path):
    from neon_files.checkpoint import read_checkpoint, write_checkpoint

    backbone = PicoBackbone.fresh()
    write_checkpoint(tmp_path / "base.safetensors", backbone.net.state_dict(), config=backbone.network_config())
    evaluator = Evaluator(reference(), device=CPU, metrics=("fid",), detector=PixelMoments())
    sweep = Sweep(backbone, evaluator, snapshots, tmp_path, settings={}, batch_size=16, identity={})
    name = list(snapshots)[-1]
    sweep.move(name, 1.5)
    written = read_checkpoint(merge_files(tmp_path / "base.safetensors", snapshots[name], 1.5, tmp_path / "neon")).state
    assert all(torch.equal(written[k], v) for k, v in backbone.net.state_dict().items())
    base = PicoBackbone.fresh()
    NeonWeights(base.net, base.net.state_dict(), read_checkpoint(snapshots[name]).state).set(1.5)
    assert torch.equal(base.net.out.weight, backbone.net.out.weight)


def test_the_ends_of_the_merge_stay_on_the_host(snapshots, tmp_path):
    backbone = PicoBackbone.fresh()
    evaluator = Evaluator(reference(), device=CPU, metrics=("fid",), detector=PixelMoments())
    sweep = Sweep(backbone, evaluator, snapshots, tmp_path, settings={}, batch_size=16, identity={})
    live = {value.untyped_storage().data_ptr() for value in backbone.net.state_dict().values()}
    sweep.move(list(snapshots)[-1], 1.5)
    for end in (sweep.theta_base, sweep._weights.base, sweep._weights.syn):
        assert all(value.device == CPU and value.untyped_storage().data_ptr() not in live for value in end.values())
    # held once: the sweep's base is the one the merge reads
    assert all(
        value is sweep.theta_base[name] or value.data_ptr() == sweep.theta_base[name].data_ptr()
        for name, value in sweep._weights.base.items()
    )


def test_the_early_stop_follows_the_official_rule():
    fids = {
        0.5: [5.0, 4.0, 4.5, 1.0],  # the fourth guidance is never tried
        1.0: [3.0, 3.5],
        2.0: [9.0, 9.5],  # worse than w = 1 by more than the tolerance: w = 3 is never tried
        3.0: [0.0],
    }
    asked = []

    def measure(snapshot, w, settings):
        asked.append((w, settings["g"]))
        return fids[w][settings["g"] - 1]

    assert early_stopped_grid(["a"], list(fids), {"g": [1, 2, 3, 4]}, measure, 0.03) == ("a", 1.0, {"g": 1})
    assert asked == [(0.5, 1), (0.5, 2), (0.5, 3), (1.0, 1), (1.0, 2), (2.0, 1), (2.0, 2)]


def test_snapshots_of_all_loops_are_found_in_order(tmp_path):
    for name in ("snapshot-000000080.safetensors", "network-snapshot-000001.pkl", "ar-ckpt-images_2000.pth", "x.pth"):
        (tmp_path / name).touch()
    assert list(find_checkpoints(tmp_path)) == ["snapshot-000000080", "network-snapshot-000001", "ar-ckpt-images_2000"]
    assert list(find_checkpoints(tmp_path, first=1000, last=1500)) == ["network-snapshot-000001"]
    with pytest.raises(UserError, match="no snapshots"):
        find_checkpoints(tmp_path / "none")
