"""The search over w and guidance: the official early stop, kept points, the merged file."""

import math

import pytest
import torch
from xar.pico import write_pico

from neon_core.errors import UserError
from neon_core.evaluate import Evaluator
from neon_core.files.checkpoint import read_checkpoint, write_checkpoint
from neon_core.merge import neon_merge
from neon_core.metrics.detector import FunctionDetector
from neon_core.metrics.reference import Reference
from neon_xar.backbone import XARBackbone
from neon_xar.evaluate import Sweep, check_model, early_stopped_grid, images_seen, neighbours, result_line, sweep
from neon_xar.recipes import RECIPES, SEARCHES

CPU = torch.device("cpu")


def pixel_means(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255


@pytest.fixture
def place(tmp_path):
    """(backbone, evaluator, base, folder of one snapshot)."""
    base, vae = write_pico(tmp_path)
    state = read_checkpoint(base).state
    noise = torch.Generator().manual_seed(0)
    moved = {k: v + 0.01 * torch.randn(v.shape, generator=noise) if v.isfinite().all() else v for k, v in state.items()}
    moved |= {k: state[k] for k in state if "rope" in k}
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run" / "snapshot-000000064.safetensors", moved)
    detector = FunctionDetector("pixel means", 12, pixel_means)
    reference = Reference(torch.full([12], 0.4).double().numpy(), torch.eye(12).double().numpy() * 1e-3, "unit")
    evaluator = Evaluator(reference, device=CPU, metrics=("fid",), detector=detector)
    backbone = XARBackbone.load(base, RECIPES["xar_base"], CPU, vae_path=vae)
    return backbone, evaluator, base, tmp_path / "run"


def test_the_grid_is_left_where_the_official_search_leaves_it():
    asked = []

    def fid(w, cfg):
        asked.append((w, cfg))
        return (w - 1) ** 2 + (cfg - 2) ** 2

    best = early_stopped_grid([0, 1, 2, 3], [1, 2, 3, 4], fid, tolerance=0.02)
    assert best == (1, 2)
    assert asked == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    asked.clear()
    assert early_stopped_grid([0, 1, 2, 3], [1, 2, 3, 4], fid) == (1, 2) and len(asked) == 16


def test_neighbours_are_the_eight_around_that_are_positive():
    assert len(neighbours(1.6, 2.7)) == 8 and (1.7, 2.6) in neighbours(1.6, 2.7)
    assert neighbours(0.1, 0.1) == [(0.1, 0.2), (0.2, 0.1), (0.2, 0.2)]


def test_the_official_grids():
    assert SEARCHES["xar_large"].ws[0] == 0.8 and SEARCHES["xar_large"].ws[-1] == 2.8
    assert SEARCHES["xar_base"].cfgs == (2.8, 3.0, 3.2, 3.4, 3.6, 3.8, 4.0, 4.2, 4.4, 4.6)


def test_a_sweep_keeps_its_points_merges_the_best_and_leaves_the_base_in_place(place, tmp_path):
    backbone, evaluator, base, run = place
    before = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    options = {"seeds": range(20), "settings": {"cfg": 1.0, "flow_steps": 3}, "batch_size": 10}
    out = tmp_path / "sweep"
    result = sweep(backbone, evaluator, base, run, out, ws=[0.5, 2.0], cfgs=[1.0], **options)
    assert all(torch.equal(a, before[k]) for k, a in backbone.net.state_dict().items())
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.json"))
    assert files == ["64/cfg=1.000_w=0.500_n=20.json", "64/cfg=1.000_w=2.000_n=20.json"]
    best = result["best"]
    syn = read_checkpoint(run / "snapshot-000000064.safetensors").state
    wanted = neon_merge(read_checkpoint(base).state, syn, best["w"])
    merged = read_checkpoint(out / "neon.safetensors")
    assert all(torch.allclose(merged.state[k], wanted[k], atol=1e-6) for k in wanted if k != "mask")
    assert torch.equal(merged.state["mask"], wanted["mask"])
    vae = base.parent / "vae.ckpt"
    neon = XARBackbone.load(out / "neon.safetensors", RECIPES["xar_base"], CPU, vae_path=vae)
    again = evaluator(neon, range(20), settings=best["settings"], batch_size=10)
    assert again["fid"] == pytest.approx(best["fid"], rel=1e-4)

    def never(*_, **__):
        raise AssertionError("measured again")

    evaluator.__class__ = type("Never", (Evaluator,), {"__call__": never})
    assert sweep(backbone, evaluator, base, run, out, ws=[0.5, 2.0], cfgs=[1.0], **options)["best"] == best
    with pytest.raises(UserError, match=r"cfg=1.000_w=0.500_n=20.json: measured with another base"):
        sweep(backbone, evaluator, base, run, out, ws=[0.5], cfgs=[1.0], **options | {"seeds": range(5, 25)})


def test_w_zero_is_the_base_and_shared_by_all_snapshots(place, tmp_path):
    backbone, evaluator, _, run = place
    options = {"settings": {"cfg": 1.0, "flow_steps": 3}, "batch_size": 10, "identity": {}}
    runner = Sweep(backbone, evaluator, {64: run / "snapshot-000000064.safetensors"}, tmp_path / "s", **options)
    found = runner.point(64, 0.0, 1.0, range(8))
    assert (tmp_path / "s" / "base" / "cfg=1.000_w=0.000_n=8.json").exists() and found["checkpoint"] == "base"
    plain = evaluator(backbone, range(8), settings=options["settings"], batch_size=10)
    assert plain["fid"] == found["fid"]
    for w in (math.nan, math.inf):
        with pytest.raises(UserError, match="must be a finite number"):
            runner.point(64, w, 1.0, range(8))


def test_flags_that_contradict_the_model_are_refused(place):
    backbone = place[0]
    check_model(backbone, 32, 10)
    with pytest.raises(UserError, match="--img_size 256: this model makes 32 x 32 images only"):
        check_model(backbone, 256, None)
    with pytest.raises(UserError, match="--class_num 1000: this model has 10 classes"):
        check_model(backbone, None, 1000)


def test_snapshot_names_and_the_result_line(tmp_path):
    assert images_seen(tmp_path / "checkpoint-checkpoint-250112.pth") == 250112
    with pytest.raises(UserError, match="must end with the number of images seen"):
        images_seen(tmp_path / "last.pth")
    result = {"fid": 1.02, "is_mean": 300.5, "is_std": 2.25, "settings": {"cfg": 2.7, "flow_steps": 50}}
    result |= {"num_images": 50000, "model": "xar_large", "checkpoint": "Neon", "detector_is_official": True}
    line = "FID=1.0200 | IS=300.5000±2.2500 | cfg=2.7 | steps=50 | n=50000 | model=xar_large | ckpt=Neon"
    assert result_line(result) == line
