"""The published networks: what their files do not say about themselves."""

from __future__ import annotations

from dataclasses import dataclass

VAE_FILE = "vae_ch160v4096z32.pth"  # one tokenizer for both resolutions


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network, which a published file does not record."""

    patch_nums: tuple[int, ...]
    depth: int
    shared_aln: bool = False

    def network(self, depth: int | None = None) -> dict:
        """Constructor arguments of `VAR`, of another depth if wanted. Heads are 64 wide in every size."""
        depth = depth or self.depth
        return {
            "vocab_size": 4096,
            "Cvae": 32,
            "num_classes": 1000,
            "depth": depth,
            "embed_dim": 64 * depth,
            "num_heads": depth,
            "drop_path_rate": 0.1 * depth / 24,
            "shared_aln": self.shared_aln,
            "attn_l2_norm": True,
            "patch_nums": self.patch_nums,
        }

    @property
    def img_size(self) -> int:
        return 16 * self.patch_nums[-1]


def tokenizer(patch_nums: tuple[int, ...]) -> dict:
    """Constructor arguments of the published VQVAE."""
    return {"vocab_size": 4096, "z_channels": 32, "ch": 160, "share_quant_resi": 4, "v_patch_nums": patch_nums}


ARCHITECTURES = {
    "imagenet_256": Architecture((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16),
    "imagenet_512": Architecture((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), depth=36, shared_aln=True),
}
