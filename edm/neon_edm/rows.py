"""EDM's rows for `neon reproduce`: the recipes with the paper's FIDs and the ranges it searched; and the digits."""

from neon_edm.backbone import EDMBackbone
from neon_edm.quickstart.recipes import DEFAULT, GUIDED
from neon_edm.recipes import RECIPES, w_grid
from neon_run.rows import Grid, Row


def _row(name: str, base_fid: float, neon_fid: float) -> Row:
    return Row(
        id=f"edm/{name}",
        recipe=RECIPES[name],
        backbone=EDMBackbone,
        w_range=(0.0, 3.0),
        grid=Grid(w_grid(name)),
        base_fid=base_fid,
        neon_fid=neon_fid,
        evaluations=lambda settings: 2 * settings["num_steps"] - 1,  # Heun; the last step is Euler's
    )


ROWS = (
    _row("cifar10_cond", 1.78, 1.38),
    _row("cifar10_uncond", 1.97, 1.38),
    _row("ffhq64", 2.39, 1.12),
    DEFAULT.row(),
    GUIDED.row(),
)
