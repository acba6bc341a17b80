"""The transformer: published keys and sizes, what a token may see, the cache, the guards of the constructor."""

import json

import pytest
import torch
from xar.pico import NET, pico_net

from neon_files.checkpoint import Checkpoint, load_strict
from neon_xar.xar import CELLS, SIZES, XAR, Rope, build, from_cells, to_cells


@pytest.mark.parametrize("name", SIZES)
def test_published_keys_load_strictly_into_a_network_on_the_meta_device(name, golden_data):
    spec = json.loads((golden_data / "xar" / f"keys_{name}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        net = build(name)
        state = {key: torch.empty(shape) for key, shape in (spec.get("keys") or spec["state_dict"]).items()}
    load_strict(net, Checkpoint(f"{name}.pth", "torch", state), allow_nonfinite=True)
    assert sum(p.numel() for p in net.parameters()) == spec["total_parameters"]
    assert [key for key, _ in net.named_buffers()] == spec["buffers"]


@pytest.mark.parametrize(
    ("side", "some", "positions"),
    [(16, [0, 1, 8, 64, 128, 255], [0, 1, 16, 8, 128, 255]), (4, [0, 1, 2, 4, 8, 15], [0, 1, 4, 2, 8, 15])],
)
def test_cell_order_and_its_inverse(side, some, positions):
    grid = torch.arange(float(side**2)).view(1, 1, side, side)
    tokens = to_cells(grid)
    assert tokens[0, some, 0].tolist() == positions
    assert torch.equal(from_cells(tokens), grid)


def test_half_precision_is_turned_in_float32_as_in_the_original():
    x = torch.randn(1, 2, 64, 8).bfloat16()
    assert torch.equal(Rope(8)(x, 64), Rope(8)(x.float(), 64)) and Rope(8)(x, 0).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("grid", [16, 4])
def test_a_token_sees_its_own_cell_and_those_before(grid):
    net = pico_net(grid=grid)
    tokens, labels, k = torch.randn(1, grid**2, 4), torch.tensor([3]), torch.tensor([[100, 400, 700, 900]])
    before = net(tokens, labels, k)
    for cell in range(CELLS):
        changed = tokens.clone()
        changed[:, net.cell_tokens * cell] += 1
        difference = (net(changed, labels, k) - before).abs().amax(-1)[0].unflatten(0, (CELLS, -1)).amax(-1)
        assert (difference[:cell] == 0).all() and (difference[cell:] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("grid", [16, 6, 2])
def test_cells_through_the_cache_are_the_cells_of_one_masked_pass(grid):
    """With every earlier cell clean, that is at time 0, both must give the same velocity."""
    net, tokens, labels = pico_net(grid=grid), torch.randn(2, grid**2, 4), torch.tensor([1, 7])
    cells = tokens.split(net.cell_tokens, dim=1)
    cache = net.new_cache(2)
    for cell in range(CELLS):
        k = torch.zeros(2, CELLS, dtype=torch.int64)
        k[:, cell:] = 321
        whole = net(tokens, labels, k).split(net.cell_tokens, dim=1)[cell]
        classes = net.class_emb(labels)[:, None]
        given, times = cells[cell], net.time_embed(torch.tensor([321]))
        if cell:
            given, times = torch.cat(cells[cell - 1 : cell + 1], dim=1), net.time_embed(torch.tensor([0, 321]))
        first = net.velocity(given, classes + times, cell, cache)[:, -net.cell_tokens :]
        again = net.velocity(cells[cell], classes + times[-1:], cell, cache)
        assert torch.allclose(first, whole, atol=1e-5) and torch.allclose(again, whole, atol=1e-5)


def test_a_cell_without_the_ones_before_it_in_the_cache_is_refused():
    net = pico_net()
    with pytest.raises(ValueError, match="needs 64 cached tokens, the cache holds 0"):
        net.velocity(torch.zeros(1, 64, 4), torch.zeros(1, 1, 16), cell=1, cache=net.new_cache(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 64}, "img_size 64: the model makes 16x16 latents, 32 pixels wide"),
        ({"grid": 4}, "img_size 32: the model makes 4x4 latents, 8 pixels wide"),
        ({"grid": 5, "img_size": 10}, "grid 5: an even side is required, for 2x2 cells"),
        ({"decoder_embed_dim": 32}, "must be equal"),
        ({"encoder_num_heads": 8}, "not a multiple of 4"),
    ],
)
def test_the_constructor_refuses_what_the_model_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        XAR(**{**NET, **change})


@pytest.mark.parametrize("grid", [16, 4])
def test_the_configuration_builds_the_same_network(grid):
    """It names the grid only where it is not the published one: files written before there was a choice say nothing."""
    net = pico_net(grid=grid)
    twin = XAR(**json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    assert twin.config == net.config and net.config.get("grid", 16) == twin.grid == grid
    assert ("grid" in net.config) == (grid != 16)


def test_half_precision_keeps_attention_and_cache_in_half_precision():
    net = pico_net()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = net.new_cache(1)
        out = net.velocity(torch.randn(1, 64, 4), torch.randn(1, 1, 16), 0, cache)
    assert cache.keys[0].dtype == torch.bfloat16 and out.shape == (1, 64, 4) and torch.isfinite(out).all()
