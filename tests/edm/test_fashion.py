"""The row on Fashion-MNIST, prepared from a few made-up images with a miniature network."""

import dataclasses

import pytest
import torch

from neon_core.finetune import open_set
from neon_edm.fashion import FASHION, PrepareEDM
from neon_edm.guidance import GuidedBackbone
from neon_files.checkpoint import read_checkpoint
from neon_run.backbones import find_row
