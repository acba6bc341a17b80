"""The search over w and guidance: the official early stop, kept points, the merged file."""

import pytest
import torch
from xar.pico import write_pico

from neon_core.merge import neon_merge
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_metrics.detector import FunctionDetector
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference
from neon_xar.backbone import XARBackbone
from neon_xar.evaluate import check_model, neighbours, result_line, sweep
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
    snapshots = {"snapshot-000000064": run / "snapshot-000000064.safetensors"}
    result = sweep(backbone, evaluator, base, snapshots, out, ws=[0.5, 2.0], cfgs=[1.0], **options)
    assert all(torch.equal(a, before[k]) for k, a in backbone.net.state_dict().items())
    points = {path.name[:-18] for path in out.rglob("points/*.json")}
    assert points == {f"{name}-cfg1.0-n20" for name in ("snapshot-000000064-w0.5", "snapshot-000000064-w2")}
    assert set(result["best_of_each"]) == set(snapshots)
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
    assert sweep(backbone, evaluator, base, snapshots, out, ws=[0.5, 2.0], cfgs=[1.0], **options)["best"] == best


def test_where_the_base_is_best_no_network_is_written(place, tmp_path):
    backbone, evaluator, base, run = place
    snapshots = {"snapshot-000000064": run / "snapshot-000000064.safetensors"}
    options = {"seeds": range(4), "settings": {"cfg": 1.0, "flow_steps": 3}, "batch_size": 4}
    result = sweep(backbone, evaluator, base, snapshots, tmp_path / "s", ws=[0.0], cfgs=[1.0], **options)
    plain = evaluator(backbone, range(4), settings=options["settings"], batch_size=4)
    assert result["best"]["snapshot"] == "base" and result["best"]["fid"] == plain["fid"]
    assert "network" not in result and not list(tmp_path.rglob("neon.safetensors"))


def test_refining_measures_the_neighbours_of_the_best_point(place, tmp_path):
    backbone, evaluator, base, run = place
    snapshots = {"snapshot-000000064": run / "snapshot-000000064.safetensors"}
    options = {"seeds": range(4), "settings": {"cfg": 1.0, "flow_steps": 3}, "batch_size": 4, "refine": True}
    result = sweep(backbone, evaluator, base, snapshots, tmp_path / "s", ws=[1.0], cfgs=[1.0], **options)
    measured = {path.name.split("-n4-")[0] for path in tmp_path.rglob("points/*.json")}
    assert len(measured) == 9 and "snapshot-000000064-w1.1-cfg0.9" in measured
    assert result["best"]["fid"] == min(p["fid"] for p in result["best_of_each"].values())


def test_flags_that_contradict_the_model_are_refused(place):
    backbone = place[0]
    check_model(backbone, 32, 10)
    with pytest.raises(UserError, match="--img_size 256: this model makes 32 x 32 images only"):
        check_model(backbone, 256, None)
    with pytest.raises(UserError, match="--class_num 1000: this model has 10 classes"):
        check_model(backbone, None, 1000)


def test_the_result_line_is_the_official_one():
    result = {"fid": 1.02, "is_mean": 300.5, "is_std": 2.25, "settings": {"cfg": 2.7, "flow_steps": 50}}
    result |= {"num_images": 50000, "model": "xar_large", "checkpoint": "Neon", "detector_is_official": True}
    line = "FID=1.0200 | IS=300.5000±2.2500 | cfg=2.7 | steps=50 | n=50000 | model=xar_large | ckpt=Neon"
    assert result_line(result) == line
