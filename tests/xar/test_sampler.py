"""Cell-wise sampling: equal to the plain path, no wasted halves, noise that belongs to the image."""

import pytest
import torch
from torch._dynamo.utils import counters
from xar.pico import pico_net, pico_vae
from xar.reference_path import sample_latents_plainly

from neon_core.seeds import PerImageRandom
from neon_files.errors import UserError
from neon_run.compiling import compile_network
from neon_xar.backbone import XARBackbone
from neon_xar.flow import euler_maruyama, sde_times, time_index
from neon_xar.sampler import sample_latents
from neon_xar.vae import to_uint8


@pytest.mark.parametrize(("cfg", "grid"), [(0.5, 16), (1.0, 16), (3.8, 16), (1.0, 4), (3.8, 4)])
def test_the_product_gives_the_numbers_of_the_plain_path(cfg, grid):
    net, labels, seeds = pico_net(grid=grid), torch.tensor([0, 4, 9]), range(3)
    ours = sample_latents(net, labels, 5, cfg, PerImageRandom(seeds).randn)
    plain = sample_latents_plainly(net, labels, 5, cfg, PerImageRandom(seeds).randn)
    assert torch.allclose(ours, plain, atol=1e-5)
    assert plain.std() > 0.1


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, [2, 2, 2, 2]), (2.0, [2, 4, 4, 4])])
def test_the_unconditional_half_runs_only_where_guidance_needs_it(cfg, rows):
    net, seen = pico_net(), []
    net.z_proj.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[:2])))
    sample_latents(net, torch.tensor([0, 1]), 4, cfg, PerImageRandom([0, 1]).randn)
    lengths = [64] * 4 + 3 * [128, 64, 64, 64]  # the finished cell is encoded once, in the next one's first call
    assert seen == list(zip([r for r in rows for _ in range(4)], lengths, strict=True))


def test_time_is_embedded_once_per_step_for_all_cells():
    net, seen = pico_net(), []
    net.time_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].tolist()))
    sample_latents(net, torch.tensor([0]), 4, 2.0, PerImageRandom([0]).randn)
    assert seen == [[1000, 680, 360, 40, 0]]


def test_times_are_truncated_from_float32_products():
    assert time_index(sde_times(4)).tolist() == [1000, 680, 360, 40, 0]  # 0.68 is 679.99.. in float64
    assert 950 in time_index(sde_times(40)).tolist()  # 950.77: truncated, not rounded


def test_the_integrator_ends_near_the_data_of_a_perfect_velocity_without_noise_in_its_last_step():
    data, draws = torch.randn(2, 5), []

    def randn():
        draws.append(torch.randn(2, 5, dtype=torch.float64))
        return draws[-1]

    out = euler_maruyama(lambda x, t, first: (x - data) / t, torch.randn(2, 5), 200, randn)
    assert out.dtype == torch.float64 and len(draws) == 199
    # At t = 0.04 the state is data + 0.04 eps, and the last step takes 0.04 (data + 2 eps) off it.
    assert ((out - data).abs() < 0.04 * (data.abs() + 4)).all()


@pytest.mark.parametrize("steps", [-1, 1, 2])
def test_fewer_than_three_steps_are_refused(steps):
    with pytest.raises(ValueError, match="at least 3"):
        sample_latents(pico_net(), torch.tensor([0]), steps, 1.0, PerImageRandom([0]).randn)
    backbone = XARBackbone(pico_net(), pico_vae())
    with pytest.raises(UserError, match=f"--flow_steps {steps}: .* at least 3"):
        backbone.sample([0], None, cfg=1.0, flow_steps=steps)


def test_an_image_depends_on_its_seed_and_label_and_not_on_its_neighbours():
    backbone = XARBackbone(pico_net(), pico_vae())
    settings = {"cfg": 2.0, "flow_steps": 3}
    labels = backbone.assign_labels([5, 6, 7], **settings)
    together = backbone.sample([5, 6, 7], labels, **settings)
    alone = torch.cat([backbone.sample([s], labels[i : i + 1], **settings) for i, s in enumerate([5, 6, 7])])
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1  # products round differently in other batch sizes
    assert not torch.equal(together[0], together[1])
    other = backbone.sample([5], labels[1:2], **settings)
    assert not torch.equal(other[0], together[0])


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_stays_close(precision, limit):
    net = pico_net()
    exact = sample_latents(net, torch.tensor([0, 1]), 10, 2.0, PerImageRandom([0, 1]).randn)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast("cpu", dtype):
        half = sample_latents(net, torch.tensor([0, 1]), 10, 2.0, PerImageRandom([0, 1]).randn)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < limit


def test_compiled_blocks_give_the_same_latents_and_stay_compiled():
    """With the real tracer and an eager backend: graphs, guards and the cache's in-place writes are what may break."""
    net, keys, graphs = pico_net(), list(pico_net().state_dict()), []
    draw = lambda: (net, torch.tensor([0, 1]), 3, 2.0, PerImageRandom([0, 1]).randn)  # noqa: E731
    exact = sample_latents(*draw())
    compile_network(net, net.blocks, torch.device("cpu"), dynamic=True, backend="eager")
    for _ in range(2):
        assert torch.allclose(sample_latents(*draw()), exact, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] and list(net.state_dict()) == keys


def test_pixels_are_truncated_unless_rounding_is_asked_for():
    x = torch.tensor([-1.2, -1.0, 0.999, 1.0, 3.0, 2 * 10.6 / 255 - 1])
    assert to_uint8(x).tolist() == [0, 0, 254, 255, 255, 10]
    assert to_uint8(x, "round").tolist() == [0, 0, 255, 255, 255, 11]
