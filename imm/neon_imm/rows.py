"""IMM's rows for `neon reproduce`: the recipes with the paper's FIDs and the ranges it searched."""

from collections.abc import Mapping
from typing import Any

from neon_imm.backbone import IMMBackbone
from neon_imm.recipes import RECIPES, cfg_grid, w_grid
from neon_run.rows import Grid, Row


def _evaluations(settings: Mapping[str, Any]) -> int:
    """Passes per image: one per step, two where guidance needs the unconditional one too."""
    steps = settings.get("num_steps") or 1 + len(settings.get("mid_nt", ()))
    return steps * (1 if settings.get("cfg") in (None, 1) else 2)


def _row(name: str, base_fid: float | None, neon_fid: float | None) -> Row:
    recipe = RECIPES[name]
    guided = recipe.evaluate["cfg"] is not None
    steps = recipe.evaluate.get("num_steps")
    return Row(
        id=f"imm/{name}",
        recipe=recipe,
        backbone=IMMBackbone,
        w_range=(0.0, 5.0),
        grid=Grid(w_grid(steps), cfg_grid(steps) if guided else (None,)),
        base_fid=base_fid,
        neon_fid=neon_fid,
        guidance="cfg" if guided else None,
        guidance_range=(1.0, 3.0) if guided else None,
        settings={"label_rule": "balanced"},  # the official rule ties a class to the length of the list
        tokenizer="vae" if recipe.latent else None,
        files=("config.json", "diffusion_pytorch_model.safetensors") if recipe.latent else (),
        evaluations=_evaluations,
    )


ROWS = (
    _row("imagenet_256", 1.99, 1.46),
    _row("imagenet_256_t4", None, 1.69),
    _row("imagenet_256_t2", None, 2.89),
    _row("imagenet_256_t1", 7.77, 6.67),
    _row("cifar10", None, None),
)
