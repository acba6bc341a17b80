"""What the pipeline is made of: rows, the control, the interval, the commands."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from core.pico import PicoBackbone

from neon_core.seeds import parse_seeds
from neon_files.errors import UserError
from neon_metrics.reference import Reference
from neon_metrics.scores import fid_from_features
from neon_metrics.statistics import FeatureStatistics
from neon_run.backbones import find_row, find_rows
from neon_run.reproduce import commands
from neon_run.reproduce.charts import curve_over_w, surface, ticks
from neon_run.reproduce.controls import random_direction
from neon_run.search.find import evenly, images_of
from neon_run.search.interval import _drawn, block_statistics, bootstrap_fids, interval


def test_every_row_is_found_once_and_fits_its_own_search():
    rows = find_rows()
    assert len(rows) >= 12 and all(key == row.id for key, row in rows.items())
    for row in rows.values():
        assert row.w_range[0] <= row.w <= row.w_range[1], row.id
        assert len(parse_seeds(row.evaluate_seeds)) == 50_000 or row.prepare
        assert row.evaluations(row.evaluate) >= 1
        assert len(row.axes) <= 3, row.id
        for name, (low, high, whole) in row.axes.items():
            assert low <= row.evaluate[name] <= high, row.id
            assert not whole or {type(value) for value in (row.evaluate[name], low, high)} == {int}, row.id
        for values in row.grid.settings.values():
            assert list(values) == sorted(values)
        if row.neon_fid and row.base_fid:
            assert row.neon_fid < row.base_fid


def test_network_evaluations_are_those_of_the_paper():
    rows = find_rows()
    assert rows["edm/cifar10_cond"].evaluations({"num_steps": 18}) == 35
    assert rows["edm/ffhq64"].evaluations({"num_steps": 40}) == 79
    assert rows["imm/imagenet_256"].evaluations({"num_steps": 8, "cfg": 1.8}) == 16


def test_a_row_is_found_by_the_end_of_its_name_where_that_is_unique():
    assert find_row("ffhq64").id == "edm/ffhq64"
    with pytest.raises(UserError, match="imm/imagenet_256 or var/imagenet_256"):
        find_row("imagenet_256")
    with pytest.raises(UserError, match="edm/cifar10_cond"):
        find_row("edm/cifar10-cond")


def test_the_random_direction_is_as_long_as_the_step_tensor_by_tensor_and_leaves_masks_alone():
    base, syn = (PicoBackbone.fresh(seed=seed).net.state_dict() for seed in (0, 1))
    base["steps"] = syn["steps"] = torch.tensor(3)
    moved = random_direction(base, syn, seed=0)
    assert torch.equal(moved["mask"], base["mask"]) and moved["steps"] == 3
    for name in ("hidden.weight", "out.bias"):
        ours, theirs = moved[name] - base[name], syn[name] - base[name]
        assert ours.norm() == pytest.approx(float(theirs.norm()), rel=1e-5)
        assert abs(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) < 0.5
    again, other = random_direction(base, syn, seed=0), random_direction(base, syn, seed=1)
    assert torch.equal(again["out.bias"], moved["out.bias"]) and not torch.equal(other["out.bias"], moved["out.bias"])


def test_the_bootstrap_spread_is_the_spread_over_fresh_seeds():
    """FIDs of 200 fresh sets against the standard error from one set, whose own expected error is about 10 %."""
    g = torch.Generator().manual_seed(0)
    reference = Reference(np.full(6, 0.3), np.eye(6) * 1.3)
    fresh = [fid_from_features(torch.randn(640, 6, generator=g), reference) for _ in range(200)]
    errors = []
    for _ in range(5):
        blocks = block_statistics(torch.randn(640, 6, generator=g), batch_size=16)
        errors.append(interval(0.0, bootstrap_fids(blocks, reference, resamples=100))["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(fresh, ddof=1), rel=0.25)


def test_a_paired_difference_is_surer_than_its_ends():
    g = torch.Generator().manual_seed(0)
    reference = Reference(np.zeros(4), np.eye(4))
    one = torch.randn(400, 4, generator=g) + 0.5
    two = one * 1.02
    a, b = (bootstrap_fids(block_statistics(x, 16), reference, resamples=40, seed=1) for x in (one, two))
    assert np.std(a - b) < 0.2 * np.std(a)


def test_blocks_hold_every_image_once_and_whole_batches():
    blocks = block_statistics(torch.randn(1003, 3), batch_size=16)
    assert len(blocks) == 40 and sum(block.count for block in blocks) == 1003
    assert all(block.count % 16 == 0 for block in blocks[:-1])


def test_the_bootstrap_gives_the_same_on_any_number_of_cores(monkeypatch):
    reference = Reference(np.zeros(4), np.eye(4))
    blocks = block_statistics(torch.randn(320, 4, generator=torch.Generator().manual_seed(0)), 16)
    values = {}
    for count in (1, 4):
        monkeypatch.setattr("neon_run.search.interval.cores", lambda count=count: count)
        values[count] = bootstrap_fids(blocks, reference, resamples=12, seed=3)
    assert np.array_equal(values[1], values[4])


def test_a_drawn_block_counts_like_its_images_repeated():
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    blocks = block_statistics(x, batch_size=16)
    drawn = _drawn(blocks, [2, 0, 1])
    direct = FeatureStatistics(3).update(torch.cat([x[:16], x[:16], x[32:]]))
    assert drawn.count == 48
    torch.testing.assert_close(drawn.mean, direct.mean)
    torch.testing.assert_close(drawn.covariance(), direct.covariance())


def test_what_grows_costs_its_largest_count():
    point = {"snapshot": "a", "w": 1.0, "settings": {}}
    points = [{**point, "num_images": n} for n in (40, 80, 40)] + [{**point, "w": 2.0, "num_images": 40}]
    assert images_of(points) == 120


def test_snapshots_are_evenly_spaced_and_the_last_is_among_them():
    names = [f"s{i}" for i in range(12)]
    assert evenly(names, 4) == ["s3", "s6", "s8", "s11"] and evenly(names, 1) == ["s11"]
    assert evenly(names[:2], 4) == ["s0", "s1"]


def test_plots_have_round_ticks_and_show_every_point():
    assert ticks(-0.13, 3.2) == [0, 1, 2, 3] or ticks(-0.13, 3.2)[1] - ticks(-0.13, 3.2)[0] in (0.5, 1)
    drawn = curve_over_w([(-1, 3.0), (0, 2.0), (1, 1.5)], [(0.5, 1.7)], best=1, base=("base", 1.9))
    assert drawn.count("<circle") == 4 and 'class="best"' in drawn and drawn.count("<svg") == drawn.count("</svg>") == 1
    for curve, end in (([(-1, 3.0), (0, 2.0), (1, 1.8)], "start"), ([(-1, 2.0), (0, 2.5), (1, 3.0)], "end")):
        drawn = curve_over_w(curve, [], best=1, base=("base", 1.9))
        assert f'text-anchor="{end}">base</text>' in drawn, "the line's label stands where the curve is not"
    points = [{"w": w, "settings": {"cfg": g}, "fid": w * w + (g - w) ** 2} for w in (0, 1, 2) for g in (1, 2, 3)]
    best = {"w": 0, "settings": {"cfg": 1}}
    drawn = surface(points, best, "cfg")
    assert drawn.count('class="point"') == 9 and 'class="fit"' in drawn
    assert surface([{**p, "settings": {"cfg": 1.0}} for p in points], best, "cfg") is None
    both = [{**p, "settings": {**p["settings"], "top_p": 0.9}} for p in points]
    assert 'class="fit"' not in surface(both, {"w": 0, "settings": {"cfg": 1, "top_p": 0.9}}, "cfg")


def test_the_commands_list_rows_and_refuse_what_cannot_be(tmp_path):
    listed = CliRunner().invoke(commands.rows_command)
    assert listed.exit_code == 0 and "edm/cifar10_cond" in listed.output and "1.38" in listed.output
    options = ["--out", str(tmp_path), "--tokenizer", "x"]
    refused = CliRunner().invoke(commands.reproduce_command, ["edm/ffhq64", *options])
    assert refused.exit_code == 2 and "--tokenizer" in refused.output
    assert CliRunner().invoke(commands.status_command, [str(tmp_path / "none")]).exit_code == 2
