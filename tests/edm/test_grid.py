"""The sweep's grid: which weights are evaluated, what is kept, what is refused."""

import pytest
import torch
from edm.conftest import pico_backbone

from neon_core.errors import UserError
from neon_core.files.checkpoint import write_checkpoint
from neon_core.merge import neon_merge
from neon_edm.grid import find_snapshots, search_grid

IDENTITY = {"base": "abc", "seeds": "0-9"}


class Bench:
    """A base, two snapshots, and an evaluation that notes the weights it sees; its FID is lowest at w = 1."""

    def __init__(self, folder):
        self.folder = folder
        self.backbone = pico_backbone()
        self.base = {k: v.clone() for k, v in self.backbone.net.state_dict().items()}
        self.syn = []
        for number, seed in ((1000, 1), (2000, 2)):
            state = {k: v + 0.1 * torch.randn_like(v) for k, v in pico_backbone(seed).net.state_dict().items()}
            write_checkpoint(folder / f"snapshot-{number:09d}.safetensors", state)
            self.syn.append(state)
        self.snapshots = list(find_snapshots(folder).values())
        self.seen = []

    def evaluate(self):
        self.seen.append({k: v.clone() for k, v in self.backbone.net.state_dict().items()})
        at_zero = torch.equal(self.seen[-1]["model.map_layer0.weight"], self.base["model.map_layer0.weight"])
        return {"fid": 5.0 if at_zero else 1.0 + len(self.seen)}

    def run(self, weights, identity=IDENTITY, **options):
        out = self.folder / "sweep"
        return search_grid(self.backbone, self.snapshots, weights, self.evaluate, out, identity=identity, **options)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def same(a, b):
    return all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_every_point_is_the_paper_s_merge_and_the_base_comes_once(bench):
    points = bench.run([0.0, 0.5, 2.0])
    assert [(p.snapshot, p.w) for p in points] == [
        (None, 0.0),
        ("snapshot-000001000.safetensors", 0.5),
        ("snapshot-000001000.safetensors", 2.0),
        ("snapshot-000002000.safetensors", 0.5),
        ("snapshot-000002000.safetensors", 2.0),
    ]
    buffers = [name for name, _ in bench.backbone.net.named_buffers()]
    expected = [bench.base] + [neon_merge(bench.base, s, w, keep=buffers) for s in bench.syn for w in (0.5, 2.0)]
    assert len(bench.seen) == 5
    assert all(same(a, b) for a, b in zip(bench.seen, expected, strict=True))
    assert same(bench.backbone.net.state_dict(), bench.base), "the base is back in place"


def test_finished_points_are_found_and_kept(bench):
    first = bench.run([0.0, 1.0])
    assert len(bench.seen) == 3
    assert bench.run([0.0, 1.0]) == first and len(bench.seen) == 3
    (bench.folder / "sweep" / "snapshot-000002000" / "w=1.json").unlink()
    bench.run([0.0, 1.0, 2.0])
    assert len(bench.seen) == 6, "the lost point and two new ones"


def test_points_of_another_sweep_are_not_mistaken_for_ours(bench):
    bench.run([1.0])
    with pytest.raises(UserError, match=r"w=1\.json: made with another base"):
        bench.run([1.0], identity=IDENTITY | {"seeds": "0-99"})
    state = {k: v + 1 for k, v in bench.syn[0].items()}
    write_checkpoint(bench.snapshots[0], state)
    with pytest.raises(UserError, match=r"w=1\.json: made with another base"):
        bench.run([1.0])


def test_a_rise_ends_a_snapshot_but_not_the_sweep(bench):
    points = bench.run([0.5, 1.0, 1.5], stop_rise=0.5)
    assert [p.w for p in points] == [0.5, 1.0, 0.5, 1.0]


def test_a_weight_that_is_no_number_is_refused(bench):
    with pytest.raises(UserError, match="w = nan"):
        bench.run([float("nan")])
    assert not bench.seen


def test_snapshots_of_both_kinds_are_found_in_order(tmp_path):
    for name in ("network-snapshot-000551.pkl", "network-snapshot-000050.pkl", "training-state-000551.pt"):
        (tmp_path / name).touch()
    assert list(find_snapshots(tmp_path)) == [50_000, 551_000]
    assert list(find_snapshots(tmp_path, 51)) == [551_000]
    with pytest.raises(UserError, match="no snapshots"):
        find_snapshots(tmp_path, 600)
