"""Networks of a few thousand parameters."""

import pytest
import torch

from neon_edm.backbone import EDMBackbone
from neon_edm.precond import build_network
from neon_files.checkpoint import write_checkpoint

PICO = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "augment_dim": 9,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 1],
    "channel_mult_emb": 2,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
}


def pico_net(seed: int = 0, class_name: str = "EDMPrecond", **changes):
    """A fresh network whose last layers are not almost 0, so that its output depends on everything before them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build_network(class_name, PICO | changes)
        for name, parameter in net.named_parameters():
            if name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
                torch.nn.init.normal_(parameter, std=0.2)
    return net


def pico_backbone(seed: int = 0, augment=None, **changes) -> EDMBackbone:
    return EDMBackbone(pico_net(seed, **changes), {"class": "EDMPrecond", "kwargs": PICO | changes}, augment=augment)


@pytest.fixture
def backbone() -> EDMBackbone:
    return pico_backbone()


def write_pico(path, seed: int = 0, **changes):
    """A checkpoint of ours with a pico network."""
    backbone = pico_backbone(seed, **changes)
    write_checkpoint(path, backbone.net.state_dict(), config=backbone.network_config())
    return path
