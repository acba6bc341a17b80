"""Its flag."""

from neon_fifth.rows import ROWS
from neon_run.backbones import BackboneCommands
from neon_run.flags import flag

COMMANDS = BackboneCommands(
    name="fifth",
    rows=ROWS,
    default="tiny",
    default_fid="tiny",
    checkpoint=("--checkpoint",),
    sample=(flag("--contrast", type=float, help="Of the images.  [default: the row's]"),),
)
