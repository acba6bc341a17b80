"""The flags that the commands of all backbones share, and the parsing of their values.

A backbone adds further ones in `neon_<name>/commands.py`. Where an official script spells a flag otherwise, both work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from neon_core.parallel import MODES
from neon_core.precision import PRECISIONS
from neon_core.seeds import parse_seeds
from neon_core.selftrain import OPTIMIZERS
from neon_files.errors import UserError
from neon_files.tracking import KINDS

COUNT = click.IntRange(1)
TWO_OR_MORE = click.IntRange(2)
POSITIVE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(0, 1)
PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def flag(*names: str, **settings: Any) -> click.Option:
    """A click option; its default is shown where it has one."""
    shown = settings.get("default") is not None and not settings.get("hidden")
    return click.Option(list(names), **{"show_default": shown, **settings})


def precision_flag(name: str, text: str) -> click.Option:
    """A flag of a sampler's setting that names a precision; auto leaves it to the row, and else to the backbone."""
    return flag(
        name, type=click.Choice(["auto", *PRECISIONS]), help=f"{text}  [default: auto]",
        callback=lambda context, parameter, value: None if value == "auto" else value,
    )  # fmt: skip


def refused(name: str, advice: str) -> click.Option:
    """An unsupported official flag, with or without a value: its use is a UserError that ends in `advice`."""

    def refuse(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise UserError(f"{name}: {advice}")

    destination = f"refused_{name.strip('-').replace('-', '_')}"
    return click.Option([name, destination], is_flag=False, flag_value="", hidden=True, is_eager=True,
                        expose_value=False, callback=refuse)  # fmt: skip


def given(values: Mapping[str, Any], options: Sequence[click.Option]) -> dict[str, Any]:
    """Those of `values` that belong to `options` and are not None."""
    names = [option.name for option in options]
    return {name: values[name] for name in names if values.get(name) is not None}


# Reading values


def parse_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    """Callback of a flag that takes a list of numbers like 0,0.25,0.5; repeats are dropped."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{parameter.opts[0]} {text}: not a list of numbers like 0,0.25,0.5") from error
    for number in numbers:
        if not math.isfinite(number):
            raise UserError(f"{parameter.opts[0]} {text}: {number} is not a finite number")
    return list(dict.fromkeys(numbers))


def parse_seed_list(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Callback of a flag that takes a seed list like 0-49999; at least one seed."""
    if text is None:
        return None
    seeds = parse_seeds(text)
    if not seeds:
        raise UserError(f"{parameter.opts[0]} {text}: names no seed; a range runs upwards, like 0-49999")
    return seeds


def parse_names(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Callback of a flag that takes names with commas between them."""
    if text is None:
        return None
    return tuple(dict.fromkeys(text.replace(" ", "").split(",")))


def parse_finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Callback of a flag that takes a number, but neither NaN nor an infinity."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"{parameter.opts[0]} {value}: a finite number is required")
    return value


def parse_tolerance(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Callback of --tolerance: 0 or more, infinity too."""
    if value is not None and not value >= 0:
        raise UserError(f"{parameter.opts[0]} {value}: a rise of FID is required, 0 or more")
    return value


# Of every command

BATCH_SIZE = flag(
    "--batch_size", "--max_batch_size", "--batch", "batch_size", type=COUNT,
    help="Images sampled at once by one process.  [default: the row's]",
)  # fmt: skip
DEVICE = flag("--device", default="auto", help="auto, cpu or cuda; each local rank takes its own GPU.")
LOG = flag(
    "--log", type=click.Choice(KINDS), default="none",
    help="Also track loss, rate, search points, metrics, samples with this package, in OUT.logs.",
)  # fmt: skip
JSON = flag("--json", "json_path", type=FILE, help="Also write the result and every setting.")
TF32 = flag(
    "--tf32/--no_tf32", " /--no-tf32", "tf32", default=None,
    help="Round float32 products to TF32 on NVIDIA GPUs, everywhere or nowhere.  [default: the row's, as officially]",
)  # fmt: skip
COMPILE = flag("--compile/--no_compile", "compiled", default=None, help="torch.compile the network: minutes, once.")
ENTRY = flag(
    "--entry", help="State dict to take, where the checkpoint holds several: ema, model, a.b, or . for the top."
)
OUT_DIR = flag(
    "--outdir",
    "--out_dir",
    "--output_dir",
    "--local_out_dir_path",
    "out_dir",
    required=True,
    type=FOLDER,
    help="Folder to write.",
)

# Which images

NUM_IMAGES = flag(
    "--num_images", "--N", "num_images", type=COUNT, help="Number of images in all.  [default: the row's]"
)
PER_CLASS = flag(
    "--per_class",
    "--per_class_count",
    "per_class",
    type=COUNT,
    help="Number of images per class, instead of --num_images.",
)
SEED = flag("--seed", type=click.IntRange(0), help="First seed.  [default: the row's]")
SEEDS = flag("--seeds", callback=parse_seed_list, help="A list like 0-9999,20000, one image each, instead of those.")
IMAGES = (NUM_IMAGES, PER_CLASS, SEED, SEEDS)

# The fine-tune

DATA = flag("--data", "--data_path", "data", required=True, type=PATH, help="The synthetic set, folder or .zip.")
TRAINING = (  # -> TrainSettings
    flag("--images", type=COUNT, help="Length, in images seen.  [default here and below: the row's]"),
    flag("--batch_size", "--bs", "--batch", "batch_size", type=COUNT, help="Images per step, over all processes."),
    flag(
        "--micro_batch_size", "--micro_batch", "--batch-gpu", "micro_batch_size", type=COUNT,
        help="Images per forward pass; changes the random numbers, the number of processes does not.",
    ),
    flag("--lr", "--target_lr", "lr", type=POSITIVE, help="Learning rate at the end of the ramp."),
    flag("--ramp_images", type=COUNT, help="Length of the linear ramp from 0, in images seen."),
    flag("--optimizer", type=click.Choice(list(OPTIMIZERS)), help="Optimizer."),
    flag("--ema_decay", "--ema_rate", "ema_decay", type=SHARE, help="Average of the weights, per step; 0: none."),
    flag("--weight_decay", type=click.FloatRange(0), help="Of matrices and embeddings."),
    flag("--clip_norm", "--grad_clip", "clip_norm", type=POSITIVE, help="Limit of the gradient's norm."),
    flag("--precision", type=click.Choice(list(PRECISIONS)), help="Of the forward passes."),
    flag(
        "--snapshot_images", "--save_interval", "--save_img_interval", "snapshot_images", type=COUNT,
        help="Between two snapshots.",
    ),
)  # fmt: skip
TRAINING_RUN = (  # -> TrainingRun
    flag("--xflip", type=bool, is_flag=False, flag_value=True, default=False, help="Also train on the mirror images."),
    flag("--max_size", type=COUNT, help="Train on this many random images of the set only."),
    flag("--cached_path", "cache_dir", type=FOLDER, help="Folder of prepared images.  [default: <data>.prepared]"),
    flag("--parallel", "mode", type=click.Choice(MODES), default="ddp", help="Replicate or shard over processes."),
    flag("--activation_checkpointing", is_flag=True, help="Less memory, a third more time."),
    flag("--seed", type=click.IntRange(0), default=0, help="Of the fine-tune."),
)

# The search

SNAPSHOTS = flag(
    "--snapshots", "--network_pkl_aux_dir", "snapshots", type=FOLDER, help="Folder of the fine-tune: its snapshots."
)
KIND = flag(
    "--search", "kind", type=click.Choice(["official", "quick"]), default="official",
    help="The official grid, or the quick search with a tenth of its images.",
)  # fmt: skip
AXIS = flag(
    "--axis", "axes", multiple=True, metavar="NAME[=LOW:HIGH]",
    help="A setting of the sampler that the quick search varies together with w, like top_p=0.8:1; repeat it for up to "
    "three.  [default: the row's]",
)  # fmt: skip
GRID = (
    flag("--w", "--differential_weights", "ws", callback=parse_numbers, help="Merge weights.  [default: the row's]"),
    flag("--tolerance", type=float, callback=parse_tolerance,
         help="Stop once FID is worse than the best by more than this; inf: never.  [default: the row's]"),
    flag("--refine/--no_refine", default=None, help="Also the neighbours of the best point.  [default: the row's]"),
    flag("--min_training_step", type=click.IntRange(0), help="Earliest snapshot, thousands of images."),
    flag("--max_training_step", type=click.IntRange(0), help="Latest snapshot, thousands of images."),
)  # fmt: skip
GRID_IMAGES = flag(
    "--num_images", "--N", "num_images", type=TWO_OR_MORE, help="Per point of the search.  [default: the row's]"
)
FINAL = (
    flag("--final/--no_final", default=True, help="Evaluate the best point on other seeds too."),
    flag(
        "--final_images", type=click.IntRange(0), help="Number of those; 0: none.  [default: as the row's evaluation]"
    ),
)

# Metrics


DETECTOR = flag(
    "--detector", type=FILE, metavar="NAME|FILE",
    help="inception, dinov2, timm:NAME, or a file of Inception weights.  [default: inception]",
)  # fmt: skip


def metric_flags(metrics: str | None) -> tuple[click.Option, ...]:
    """The metrics and their reference: arguments of `evaluate.Evaluator`."""
    return (
        flag("--fid_stats", "--ref", "reference", metavar="PATH|URL",
             help="Reference statistics, .npz.  [default: the row's]"),
        flag("--metrics", default=metrics, callback=parse_names,
             help="Of fid, is, kid, prdc; the last two need --real_images.  [default of sweep: all available]"),
        flag("--no_isc", is_flag=True, help="Leave the Inception Score out."),
        flag("--real_images", type=PATH, help="Real images, folder or .zip, for kid and prdc."),
        DETECTOR,
    )  # fmt: skip


KEPT = (
    flag("--work_dir", type=FOLDER, help="Keep partial sums there, to continue after a kill."),
    flag("--save_images", type=FOLDER, help="Also write the images as PNG."),
)
CHECKED = (
    flag("--img_size", type=COUNT, help="Side in pixels; only checked."),
    flag("--class_num", type=COUNT, help="Number of classes; only checked."),
)
