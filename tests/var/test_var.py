"""The transformer: one network, read all at once in training and scale by scale with a cache in sampling."""

import pytest
import torch
from torch._dynamo.utils import counters
from var.tiny import PATCH_NUMS, random_tokens, tiny_vae, tiny_var

from neon_run.compiling import compile_network
from neon_var.var import VAR

SIZES = [p * p for p in PATCH_NUMS]
VARIANTS = {
    "plain": {},
    "shared_aln": {"shared_aln": True},
    "no_l2": {"attn_l2_norm": False, "mlp_ratio": 3.0},
}


def inputs_of(tokens):
    return tiny_vae().quantize.teacher_input(torch.split(tokens, SIZES, dim=1))


def cached_logits(net: VAR, labels, tokens):
    """Raw logits of all scales, made one after the other."""
    quantizer, context, out = tiny_vae().quantize, net.begin(labels), []
    f_hat, following = torch.zeros(len(tokens), 8, 3, 3), None
    for i, part in enumerate(torch.split(tokens, SIZES, dim=1)):
        out.append(net.next_logits(context, following))
        f_hat, following = quantizer.add_scale(i, f_hat, quantizer.maps(part))
    return torch.cat(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_equal_teacher_forcing(variant):
    net, labels, tokens = tiny_var(**VARIANTS[variant]), torch.tensor([0, 4, 9]), random_tokens(3)
    torch.testing.assert_close(cached_logits(net, labels, tokens), net(labels, inputs_of(tokens)), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_autocast_stays_close_to_float32():
    net, labels, tokens = tiny_var(), torch.tensor([1, 2]), random_tokens(2)
    exact = cached_logits(net, labels, tokens)
    for dtype, limit in ((torch.bfloat16, 0.06), (torch.float16, 0.01)):
        with torch.autocast("cpu", dtype):
            assert net.begin(labels).caches[0][0].dtype == dtype
            half, trained = cached_logits(net, labels, tokens), net(labels, inputs_of(tokens))
        assert half.dtype == trained.dtype == torch.float32
        assert (half - exact).abs().max() < limit * exact.abs().max()
        assert (trained - exact).abs().max() < 2 * limit * exact.abs().max()


@torch.no_grad()
def test_compiled_blocks_give_the_same_logits_from_the_same_graphs_for_a_smaller_batch():
    plain, compiled = tiny_var(depth=2), tiny_var(depth=2)
    compile_network(compiled, compiled.blocks, torch.device("cpu"), dynamic=True, backend="eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    graphs = []
    for labels in (torch.tensor([3, 5, 1]), torch.tensor([3, 5])):
        tokens = random_tokens(len(labels))
        torch.testing.assert_close(
            cached_logits(compiled, labels, tokens), cached_logits(plain, labels, tokens), atol=2e-5, rtol=1e-4
        )
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


@torch.no_grad()
def test_a_scale_does_not_see_finer_ones():
    net, tokens = tiny_var(), random_tokens(2)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 64  # the last scale: nothing but itself could depend on it
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(net(labels, inputs_of(tokens)), net(labels, inputs_of(other)))
    other[:, 1:5] = (other[:, 1:5] + 1) % 64
    changed = (net(labels, inputs_of(tokens)) - net(labels, inputs_of(other))).abs().amax(dim=(0, 2))
    assert changed[:5].max() < 1e-5 < 1e-3 < changed[5:].min()


@torch.no_grad()
def test_a_dropped_label_is_the_unconditional_class():
    net, inputs = tiny_var(cond_drop_rate=0.5), inputs_of(random_tokens(2))
    dropped = net(torch.tensor([3, 3]), inputs, torch.tensor([0.49, 0.5]))
    torch.testing.assert_close(dropped[0], net(torch.tensor([10, 10]), inputs)[0])
    torch.testing.assert_close(dropped[1], net(torch.tensor([3, 3]), inputs)[1])


@torch.no_grad()
def test_drop_path_draws_have_the_rate_of_their_block_and_spare_the_first():
    net = tiny_var(depth=4, drop_path_rate=0.6)
    assert net.drop_path_blocks == [1, 2, 3]
    keep = net.draw_drop_path(20000, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.8, 0.8, 0.6, 0.6, 0.4, 0.4])
    assert keep.shape == (6, 20000) and (keep.mean(dim=1) - expected).abs().max() < 0.02


@torch.no_grad()
def test_dropping_a_branch_of_every_image_removes_it():
    net, labels, inputs = tiny_var(), torch.tensor([0, 1]), inputs_of(random_tokens(2))
    keep = torch.ones(4, 2)
    scaled = net(labels, inputs, None, keep)
    for block in net.blocks:
        block.drop_path = 0.0
    net.blocks[2].attn.proj.weight.mul_(0).add_(7)
    assert not torch.allclose(net(labels, inputs), scaled)  # the kept branch was scaled by 1 / (1 - p)


def test_published_initialisation_has_the_published_spreads():
    net = VAR(vocab_size=64, Cvae=8, num_classes=20, depth=8, embed_dim=512, num_heads=8, patch_nums=PATCH_NUMS)
    net.init_weights(torch.Generator().manual_seed(0))
    std = (1 / 3 / 512) ** 0.5
    block = net.blocks[3]
    expected = {
        net.word_embed.weight: std,
        net.head.weight: 0.02 * std,
        net.head_nm.ada_lin[1].weight: 0.5 * std,
        block.attn.proj.weight: std / 4,
        block.ffn.fc2.weight: std / 4,
        block.ada_lin[1].weight[:1024]: 1e-5 * std,
        block.ada_lin[1].weight[1024:]: 0.5 * std,
    }
    for tensor, spread in expected.items():
        assert abs(tensor.std().item() / spread - 1) < 0.05
