"""VAR behind the core's contract: labels, tokens for the loss, and one fine-tuning step in every mode."""

import dataclasses
from collections import Counter

import pytest
import torch
from var.tiny import VAR_KWARGS, random_tokens, tiny_backbone, tiny_vae, tiny_var, write_tiny

from neon_core.selftrain import FineTune
from neon_files.errors import UserError
from neon_run.commands import common_training
from neon_var import official, preprocessing
from neon_var.backbone import VARBackbone
from neon_var.commands import train_settings
from neon_var.rows import ROWS
from neon_var.sampler import to_uint8

TRAIN = dataclasses.replace(ROWS[0].train, images=64, batch_size=8, micro_batch_size=8, lr=1e-3, precision="fp32")


def images(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 48, 48), generator=generator, dtype=torch.uint8)


def test_labels_are_balanced_and_depend_on_the_seed_alone():
    backbone = tiny_backbone()
    labels = backbone.assign_labels(range(30))
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 3)
    assert torch.equal(backbone.assign_labels(range(20)), labels[:20])
    assert torch.equal(backbone.assign_labels([7, 25]), labels[[7, 25]])


def test_official_labels_are_those_of_the_official_script():
    labels = tiny_backbone().assign_labels(range(3, 33), official_seeds=True)
    assert torch.equal(labels, official.balanced_labels(30, 10, 3))
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 3)


def test_training_tokens_are_those_of_a_random_crop_of_the_enlarged_image():
    backbone = tiny_backbone()
    prepared = backbone.prepare(images(3))
    assert prepared.shape == (3, 3, 54, 54) and prepared.dtype == torch.uint8
    tokens = backbone.encode(prepared, torch.Generator().manual_seed(5))
    crops = preprocessing.random_crops(prepared, 48, torch.Generator().manual_seed(5))
    assert torch.equal(tokens, backbone._tokens(crops)) and tokens.shape == (3, 14)
    assert not torch.equal(tokens, backbone.encode(prepared, torch.Generator().manual_seed(6)))


def test_an_image_passes_the_tokenizer_again_as_the_middle_of_its_enlarged_form():
    backbone = tiny_backbone()
    again = backbone.through_tokenizer(images(3))
    assert again.shape == (3, 3, 48, 48) and again.dtype == torch.uint8
    middle = backbone.prepare(images(3))[..., 3:51, 3:51]
    expected = backbone.vae.decode_tokens(backbone.vae.encode(preprocessing.to_unit_range(middle)))[-1]
    assert (again.float() - (expected + 1) * 127.5).abs().max() < 1.01
    assert torch.equal(again, tiny_backbone(token_crops=2).through_tokenizer(images(3)))


def test_without_crops_it_passes_as_it_is_and_tokens_pass_none():
    backbone = VARBackbone(tiny_var(), tiny_vae(), VAR_KWARGS, crop="none")
    assert torch.equal(backbone.through_tokenizer(images(3)), backbone.redraw(images(3)))
    assert backbone.through_tokenizer(torch.zeros(3, 1, 1, 14)) is None


def test_random_crops_reach_every_place_and_are_cut_out_whole():
    large = torch.arange(36).view(1, 1, 6, 6).expand(400, -1, -1, -1)
    found = preprocessing.random_crops(large, 4, torch.Generator().manual_seed(0))
    corners = Counter(found[:, 0, 0, 0].tolist())
    assert set(corners) == {6 * top + left for top in range(3) for left in range(3)} and min(corners.values()) > 20
    top, left = divmod(int(found[0, 0, 0, 0]), 6)
    assert torch.equal(found[0], large[0, :, top : top + 4, left : left + 4])


def test_kept_token_crops_spare_the_tokenizer_and_are_the_same_every_time(monkeypatch):
    backbone = tiny_backbone(token_crops=3)
    prepared = backbone.prepare(images(4))
    assert prepared.shape == (4, 3, 14)
    assert torch.equal(prepared, backbone.prepare(images(4)))
    assert torch.equal(prepared[2:3], backbone.prepare(images(4)[2:3]))
    monkeypatch.setattr(backbone.vae, "features", None)  # encode must not need it
    tokens = backbone.encode(prepared, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(row, kept) for kept in three) for row, three in zip(tokens, prepared, strict=True))
    assert backbone.prepared_key.startswith("var-tokens3-") and not tiny_backbone().prepared_key


def test_without_crops_the_tokens_are_those_of_the_image_itself():
    backbone = tiny_backbone(crop="none")
    prepared = backbone.prepare(images(4))
    assert prepared.shape == (4, 1, 14) and backbone.prepared_key.startswith("var-uncropped-")
    assert torch.equal(backbone.encode(prepared, torch.Generator()), backbone._tokens(images(4)))
    with pytest.raises(UserError, match="--token_crops 3 needs official"):
        tiny_backbone(token_crops=3, crop="none")


def test_tokens_that_were_drawn_are_trained_on_as_they_are():
    backbone = tiny_backbone()
    drawn = backbone.sample([0, 1], None, tokens=True, top_k=9)
    assert drawn.shape == (2, 1, 1, 14) and drawn.dtype == torch.float32 and backbone.arrays(tokens=True)
    scales = torch.split(drawn[:, 0, 0].long(), [1, 4, 9], dim=1)
    decoded = to_uint8((backbone.vae.decode_tokens(scales)[-1] + 1) * 0.5)
    assert torch.equal(decoded, backbone.sample([0, 1], None, top_k=9))
    assert torch.equal(backbone.encode(backbone.prepare(drawn), torch.Generator()), drawn[:, 0, 0].long())


def test_the_loss_is_a_function_of_the_generator_and_reaches_every_parameter():
    backbone = tiny_backbone(cond_drop_rate=0.5)
    backbone.net.train()
    tokens, labels = random_tokens(16), torch.arange(16) % 10

    def loss(seed):
        return backbone.self_training_loss(tokens, labels, torch.Generator().manual_seed(seed))

    assert loss(0) == loss(0) != loss(1)
    loss(0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.net.parameters())


def test_matrices_are_decayed_and_tables_vectors_and_gates_are_not():
    backbone = tiny_backbone(shared_aln=True)
    names = {id(p): name for name, p in backbone.net.named_parameters()}
    decayed, free = ([names[id(p)] for p in group["params"]] for group in backbone.parameter_groups(0.1))
    assert len(decayed) + len(free) == len(names)
    assert "blocks.0.attn.mat_qkv.weight" in decayed and "class_emb.weight" in decayed
    assert {"pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.ada_gss", "blocks.0.attn.scale_mul_1H11"} <= set(free)


def losses(backbone: VARBackbone, steps: int = 3, settings=TRAIN, **options) -> list[float]:
    run = FineTune(backbone, settings, torch.device("cpu"), **options)
    labels = torch.arange(8) % 10
    return [
        run.step([(random_tokens(8, step), labels, torch.Generator().manual_seed(step))]).item()
        for step in range(steps)
    ]


def test_activation_checkpointing_does_not_change_the_losses():
    plain = losses(tiny_backbone())
    assert losses(tiny_backbone(), activation_checkpointing=True) == pytest.approx(plain, rel=1e-6)
    assert plain[-1] != plain[0]


def test_bfloat16_training_stays_close_to_float32():
    half = losses(tiny_backbone(), settings=dataclasses.replace(TRAIN, precision="bf16"))
    assert half == pytest.approx(losses(tiny_backbone()), rel=0.02)


def test_a_written_snapshot_says_what_network_it_is(tmp_path):
    from neon_files.checkpoint import write_checkpoint

    backbone = tiny_backbone(depth=2, shared_aln=True)
    path = tmp_path / "snapshot.safetensors"
    write_checkpoint(path, backbone.net.state_dict(), config=backbone.network_config())
    _, vae = write_tiny(tmp_path)
    again = VARBackbone.load(path, torch.device("cpu"), architecture="imagenet_256", vae_ckpt=vae)
    assert again.net.depth == 2 and again.img_size == 48
    assert all(torch.equal(v, again.net.state_dict()[k]) for k, v in backbone.net.state_dict().items())


def test_batches_repeat_a_set_that_is_smaller_than_one():
    order = official.global_batches(3, 8)
    assert all(set(next(order).tolist()) == {0, 1, 2} for _ in range(4))
    order = official.global_batches(20, 8)
    first = [next(order) for _ in range(3)]
    assert {i for batch in first for i in batch.tolist()} == set(range(20)) and all(len(b) == 8 for b in first)


def test_the_rows_are_those_of_the_paper():
    small, large, *_ = ROWS
    assert (small.num_synthetic, small.train.lr, small.train.batch_size, small.w) == (750_000, 1e-5, 768, 1.0)
    assert (large.num_synthetic, large.train.lr, large.train.batch_size, large.w) == (90_000, 1e-6, 24, 0.6)
    assert small.train.schedule(0) == 0 and small.train.schedule(3_750_000) == 0.5
    assert (small.evaluate["cfg"], large.evaluate["cfg"]) == (2.8, 3.2)


def test_a_smaller_batch_gets_micro_batches_that_divide_it():
    for batch in (8, 12, 100, 768):
        train = common_training(ROWS[0], {"batch_size": batch})
        assert train.batch_size % train.micro_batch_size == 0


def test_the_official_total_is_also_the_length_of_the_ramp():
    row = dataclasses.replace(ROWS[0], train=common_training(ROWS[0], {"lr": 1e-4}))
    train = train_settings(row, {"total_images": 1000, "lr": 1e-4})
    assert (train.images, train.schedule(500), train.lr) == (1000, 0.5, 1e-4)
    train = train_settings(row, {"total_images": 1000, "ramp_images": 2000})
    assert (train.images, train.schedule(500)) == (1000, 0.25)


def test_images_of_another_size_are_enlarged_to_the_same_crop():
    small = torch.randint(256, (1, 1, 28, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert tiny_backbone().prepare(small).shape == (1, 3, 54, 77)


def test_the_grids_of_the_search_are_the_official_ones():
    small, large = (row.grid for row in ROWS[:2])
    few, more = (grid.settings["cfg"] for grid in (small, large))
    assert (len(small.ws), len(few), len(large.ws), len(more)) == (10, 14, 11, 13)
    assert small.ws[:3] == (0.1, 0.4, 0.6) and few[:3] == (1.35, 1.6, 1.8)
    assert large.ws[:2] == (0.0, 0.2) and more[:2] == (2.0, 2.2)
    assert few[-1] == 4.0 and more[-1] == 4.4 and small.ws[-1] == large.ws[-1] == 2.0
