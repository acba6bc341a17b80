"""xAR's rows for `neon reproduce`: the recipes with the paper's FIDs and the ranges it searched."""

from neon_run.rows import Grid, Row
from neon_xar.backbone import DEFAULT_VAE, XARBackbone
from neon_xar.recipes import RECIPES, SEARCHES


def _passes(cfg: float) -> int:
    """Per step, over the four cells: with and, where guidance needs it, without the class. The first never needs it."""
    return 7 if cfg > 1 else 4


def _row(name: str, base_fid: float | None, neon_fid: float | None, cfg_range: tuple[float, float]) -> Row:
    official = SEARCHES[name]
    return Row(
        id=f"xar/{name}",
        recipe=RECIPES[name],
        backbone=XARBackbone,
        w_range=(0.0, 3.0),
        grid=Grid(official.ws, official.cfgs, official.tolerance, official.num_images),
        base_fid=base_fid,
        neon_fid=neon_fid,
        guidance="cfg",
        guidance_range=cfg_range,
        tokenizer="vae_path",
        files=(DEFAULT_VAE.name,),
        evaluations=lambda settings: _passes(settings["cfg"]) * settings["flow_steps"],
    )


ROWS = (
    _row("xar_large", 1.28, 1.02, (2.3, 5.0)),
    _row("xar_base", 1.72, 1.31, (2.7, 5.0)),
    _row("xar_huge", None, None, (2.2, 5.0)),
)
