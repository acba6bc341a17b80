"""The last check before images become uint8, which would silently turn NaN into black pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_files.errors import UserError


class NotFiniteImages(UserError):
    """A network gave NaN or infinity; `row` is the first such image of the batch."""

    def __init__(self, message: str, row: int = 0):
        super().__init__(message)
        self.row = row


def check_finite(images: Tensor) -> Tensor:
    """`images` [B, ...] as they are. Raises NotFiniteImages where a value is not finite. Costs one sync of the device,
    so call it once for a whole batch."""
    finite = torch.isfinite(images)
    if bool(finite.all()):
        return images
    row = int((~finite).reshape(len(images), -1).any(dim=1).nonzero()[0])
    raise NotFiniteImages(f"image {row} of the batch has pixels that are not finite", row)


def sample(backbone: Backbone, seeds: Sequence[int], labels: Tensor | None, settings: dict) -> Tensor:
    """`backbone.sample`; its NotFiniteImages names the seed."""
    try:
        return backbone.sample(seeds, labels, **settings)
    except NotFiniteImages as error:
        raise NotFiniteImages(
            f"seed {seeds[error.row]}: the network gave pixels that are not finite (NaN or infinity); use a smaller "
            "w, another checkpoint, or a higher precision",
            error.row,
        ) from error
