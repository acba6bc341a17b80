"""Neon: Negative Extrapolation from Self-Training (arXiv 2510.03597), for any generator.

Sample a synthetic set S from theta_base, fine-tune briefly on it to theta_syn, and step the other way:
theta_neon = theta_base - w (theta_syn - theta_base), w > 0.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neon_core.backbone import Backbone, Recipe, TrainSettings
    from neon_core.merge import NeonWeights, neon_merge

__all__ = ["Backbone", "NeonWeights", "Recipe", "TrainSettings", "neon_merge"]

_HOMES = {
    "Backbone": "neon_core.backbone",
    "Recipe": "neon_core.backbone",
    "TrainSettings": "neon_core.backbone",
    "NeonWeights": "neon_core.merge",
    "neon_merge": "neon_core.merge",
}


def __getattr__(name: str):
    """The public names, imported when first used: downloading files needs no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
