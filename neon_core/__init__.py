"""Neon: Negative Extrapolation from Self-Training (arXiv 2510.03597), for any generator.

Sample a synthetic set S from theta_base, fine-tune briefly on it to theta_syn, and step the other way:
theta_neon = theta_base - w (theta_syn - theta_base), w > 0.
"""

from neon_core.backbone import Backbone, TrainSettings
from neon_core.merge import NeonWeights, neon_merge

__all__ = ["Backbone", "NeonWeights", "TrainSettings", "neon_merge"]
