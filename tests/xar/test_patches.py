"""xAR on pixels: patches as latents, and the same loss and sampler on a smaller grid."""

import numpy as np
import pytest
import torch
from PIL import Image
from xar.pico import NET, pico_net

from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_xar.loss import draw_randomness, noised
from neon_xar.patches import SCALE, Patches, PatchXAR
from neon_xar.vae import from_uint8
from neon_xar.xar import XAR, to_cells

CPU = torch.device("cpu")
LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


@pytest.fixture
def backbone():
    return PatchXAR(pico_net(grid=4))


@pytest.fixture
def checkpoint(tmp_path, backbone):
    write_checkpoint(tmp_path / "base.safetensors", backbone.net.state_dict(), backbone.network_config())
    return tmp_path / "base.safetensors"


def test_every_grey_level_comes_back_exactly():
    patches = Patches(4)
    latents = patches.encode(LEVELS)
    assert latents.shape == (1, 16, 4, 4) and torch.equal(patches.decode(latents, "round"), LEVELS)
    assert (patches.decode(latents + 2, "round") >= LEVELS).all()  # beyond the range: clamped


def test_a_position_of_the_grid_holds_the_pixels_of_its_patch_by_row():
    latents, patch = Patches(4).encode(LEVELS), LEVELS[0, 0, 4:8, 8:12]
    assert torch.equal(latents[0, :, 1, 2], SCALE * from_uint8(patch.flatten()))


@pytest.mark.parametrize("side", [2, 6])
def test_every_cell_is_noised_at_its_own_time(side):
    latents = torch.randn(3, 4, side, side)
    random = draw_randomness(latents.shape, torch.Generator().manual_seed(0))
    x, target = noised(latents, random.t, random.noise)
    per_token = random.t.t().repeat_interleave(side**2 // 4, dim=1)[..., None]  # [B, g g, 1]
    assert torch.allclose(x - per_token * target, to_cells(latents), atol=1e-5)
    assert torch.allclose(target + to_cells(latents), random.noise.transpose(0, 1).flatten(1, 2), atol=1e-5)


def test_the_loss_trains_on_images(backbone):
    """A few steps on one batch, with the same randomness before and after."""
    images, labels = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.arange(32) % 10
    net, x = backbone.net, backbone.encode(backbone.prepare(images), torch.Generator().manual_seed(0))
    loss = lambda: backbone.self_training_loss(x, labels, torch.Generator().manual_seed(1))  # noqa: E731
    before, optimizer = loss().item(), torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before


def test_images_are_mirrored_only_where_asked(backbone):
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(100, -1, -1, -1)
    draw = lambda: backbone.encode(images, torch.Generator().manual_seed(0))  # noqa: E731
    plain, mirrored = (backbone.autoencoder.encode(each[:1]) for each in (images, images.flip(-1)))
    assert (draw() == plain).all()
    backbone.flip = True
    is_plain, is_mirrored = ((draw() == each).flatten(1).all(1) for each in (plain, mirrored))
    assert (is_plain ^ is_mirrored).all() and 30 < is_mirrored.sum() < 70


def test_grey_images_come_from_the_file_alone(backbone, checkpoint):
    settings = {"cfg": 2.0, "flow_steps": 3, "rounding": "round"}
    images = backbone.sample([5, 6], None, **settings)
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.uint8 and not PatchXAR.frozen_files(checkpoint)
    assert torch.equal(PatchXAR.load(checkpoint, CPU).sample([5, 6], None, **settings), images)
    darker = backbone.sample([5, 6], None, **{**settings, "rounding": "truncate"})
    assert set((images.int() - darker.int()).unique().tolist()) == {0, 1}


def test_networks_sets_and_flags_that_do_not_fit_are_refused(backbone, checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"--vae_path kl16.ckpt: .* leave the flag out"):
        PatchXAR.load(checkpoint, CPU, vae_path="kl16.ckpt")
    with pytest.raises(UserError, match=r"tokens of 5 channels, and a patch 2x2 pixels; .* another row"):
        PatchXAR(XAR(**{**NET, "vae_embed_dim": 5}))
    (tmp_path / "colour").mkdir()
    Image.fromarray(np.full((8, 8, 3), [9, 0, 0], dtype=np.uint8)).save(tmp_path / "colour" / "0.png")
    with pytest.raises(UserError, match=r"colour: images of shape \(3, 8, 8\), but this network makes \(1, 8, 8\)"):
        backbone.check_set(ImageSet(tmp_path / "colour", use_labels=False))
