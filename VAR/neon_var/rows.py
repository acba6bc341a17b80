"""VAR's rows for `neon reproduce`: the recipes with the paper's FIDs and the ranges it searched."""

from neon_run.rows import Grid, Row
from neon_var.backbone import VARBackbone
from neon_var.recipes import ARCHITECTURES, RECIPES, VAE_FILE


def _from(first: float, low: float, high: float) -> tuple[float, ...]:
    """first, then low, low + 0.2, ..., high."""
    return (first, *(round(low + 0.2 * i, 1) for i in range(round((high - low) / 0.2) + 1)))


GRIDS = {  # of the official scripts
    "imagenet_256": Grid(ws=_from(0.1, 0.4, 2.0), guidances=_from(1.35, 1.6, 4.0)),
    "imagenet_512": Grid(ws=_from(0.0, 0.2, 2.0), guidances=_from(2.0, 2.2, 4.4)),
}


def _row(name: str, base_fid: float, neon_fid: float, cfg_range: tuple[float, float]) -> Row:
    scales = len(ARCHITECTURES[name].patch_nums)
    return Row(
        id=f"var/{name}",
        recipe=RECIPES[name],
        backbone=VARBackbone,
        w_range=(0.0, 2.0),
        grid=GRIDS[name],
        base_fid=base_fid,
        neon_fid=neon_fid,
        guidance="cfg",
        guidance_range=cfg_range,
        tokenizer="vae_ckpt",
        files=(VAE_FILE,),
        tf32=True,
        evaluations=lambda settings: 2 * scales,  # one pass per scale, with and without the class
    )


ROWS = (_row("imagenet_256", 3.30, 2.01, (1.25, 4.0)), _row("imagenet_512", 2.63, 1.70, (2.0, 4.5)))
