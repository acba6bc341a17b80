"""The scripts of a backbone: generate, finetune, sweep, calculate_fid as click commands over `neon_run.stages`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from neon_core.backbone import TrainSettings
from neon_core.distributed import is_main, session
from neon_core.schedules import Ema, LinearRamp
from neon_core.seeds import parse_seeds
from neon_files.errors import UserError, say
from neon_files.published import find_all
from neon_files.tracking import tracking
from neon_metrics.detector import WEIGHTS_NAME, default_weight_paths
from neon_metrics.detectors import is_detector_name
from neon_metrics.evaluate import Evaluator
from neon_run import flags as f
from neon_run import stages
from neon_run.backbones import BackboneCommands
from neon_run.cli import measured_line, run, write_result
from neon_run.row import Row
from neon_run.search.axes import check_varied, chosen_axes
from neon_run.search.find import SearchPlan
from neon_run.search.sweep import find_checkpoints

Values = Mapping[str, Any]  # of click's parameters: name -> value
HELP = {"help_option_names": ["-h", "--help"]}


def run_script(stage: str, commands: BackboneCommands, preset: str | None = None) -> None:
    """Main function of a script: the command of `stage` on the process's arguments. `preset` is its default row."""
    script = command(stage, commands, preset)
    name = Path(sys.argv[0]).name
    run(click.Command(stage, callback=lambda: run_words(script, commands, stage, sys.argv[1:], name)), [])


def run_words(
    script: click.Command, commands: BackboneCommands, stage: str, words: Sequence[str], program: str
) -> None:
    """The command on `words`, which may have the form of the backbone's official command line. `program` is what the
    user typed before them, for help and errors. Raises UserError."""
    script.main(commands.words(stage, words), prog_name=program, standalone_mode=False)


def command(stage: str, commands: BackboneCommands, preset: str | None = None) -> click.Command:
    """The click command of one of the four stages."""
    parameters, action, text = STAGES[stage]
    default = preset or (commands.default_fid if stage == "calculate_fid" else commands.default)

    def callback(**values: Any) -> None:
        action(commands, default, values)

    preset_flag = f.flag(
        "--preset", *commands.preset, "preset", default=default, metavar="ROW",
        help=f"{', '.join(row.name for row in commands.rows)}: defaults for every flag left out.",
    )  # fmt: skip
    options = [preset_flag, *parameters(commands)]
    taken = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    ignored = [option for option in commands.ignored if not taken.intersection(option.opts)]
    refused = [f.refused(name, advice) for name, advice in commands.refused.items() if name not in taken]
    return click.Command(stage, params=[*options, *ignored, *refused], callback=callback, help=text,
                         context_settings=HELP)  # fmt: skip


# Shared by the stages


def chosen_row(commands: BackboneCommands, default: str | None, values: Values, stage: str) -> Row:
    """The row of --preset with the settings of the command line; `stage` is the field with its sampler settings."""
    row = commands.find_row(values["preset"], default)
    given, own = f.given(values, (*commands.sample, *commands.generate)), getattr(row, stage)
    given = {name: value for name, value in given.items() if value != commands.neutral.get(name) or name in own}
    settings = commands.sampler_settings({**own, **given}, given)
    tf32 = {None: None, True: "all", False: "none"}[values["tf32"]]  # None: the row's
    return stages.with_settings(
        row, **{stage: settings}, batch_size=values["batch_size"], tf32=tf32, generate_tf32=tf32
    )


def base_flag(commands: BackboneCommands, any_checkpoint: bool = False) -> click.Option:
    """The flag that names the checkpoint: theta_base, by default the row's, or with `any_checkpoint` a required one."""
    if any_checkpoint:
        text = "Checkpoint: base, fine-tuned or merged; path or URL."
        return f.flag(*commands.checkpoint, "checkpoint", required=True, metavar="PATH|URL", help=text)
    names = (*commands.checkpoint, "--base", *commands.base)
    return f.flag(*names, "checkpoint", metavar="PATH|URL", help="theta_base: path or URL.  [default: the row's]")


def find_model(
    commands: BackboneCommands, row: Row, values: Values, device: torch.device, others: Mapping[str, Any] | None = None
) -> tuple[stages.Model, dict[str, Path]]:
    """The model of the command line, and the files of `others` (flag -> path or URL): all there, or one UserError that
    names every one that is missing."""
    flag = commands.checkpoint[0]
    checkpoint = values["checkpoint"] or row.base
    if not checkpoint:
        raise UserError(f"{flag} is missing; give it, or a --preset")
    options = f.given(values, (*commands.load, f.ENTRY))
    needed = row.backbone.frozen_files(Path(checkpoint), **{**row.load, **options})
    sources = {flag: checkpoint, **{f"--{name}": path for name, path in needed.items()}, **(others or {})}
    files = find_all({name: path for name, path in sources.items() if path})
    model = stages.Model(
        row,
        files[flag],
        device,
        frozen={name: files[f"--{name}"] for name in needed},
        options={name: value for name, value in options.items() if name not in needed},
        training=f.given(values, commands.load_training),
    )
    return model, files


def measurement_files(row: Row, values: Values) -> dict[str, Any]:
    """Flag -> file of the measurement: the reference, and Inception's weights where they are not present."""
    reference = values["reference"] or row.fid_stats
    if not reference:
        raise UserError("--ref is missing; give it, or a --preset")
    detector = values["detector"]
    if detector is not None and is_detector_name(detector):
        detector = None  # no file of ours
    elif detector is None and not any(path.exists() for path in default_weight_paths()):
        detector = f"checkpoints/{WEIGHTS_NAME}"
    return {"--fid_stats": reference, "--detector": detector}


def make_evaluator(files: Mapping[str, str | Path], values: Values, device: torch.device) -> Evaluator:
    """With --metrics; where that is not given and has no default, with every available metric."""
    options = {"detector": files.get("--detector", values["detector"]), "real_images": values["real_images"]}
    if values["metrics"] is None and not values["no_isc"]:
        return stages.open_evaluator(files["--fid_stats"], device, **options)
    metrics = tuple(name for name in values["metrics"] or ("fid",) if not (values["no_isc"] and name == "is"))
    return Evaluator(files["--fid_stats"], device=device, metrics=metrics, **options)


def chosen_seeds(commands: BackboneCommands, values: Values, default: Sequence[int], num_classes: int) -> Sequence[int]:
    """The seeds of --num_images, --per_class, --seed or --seeds; UserError where they contradict each other."""
    count, per_class, seed, seeds = (values[option.name] for option in f.IMAGES)
    if sum(value is not None for value in (count, per_class, seeds)) > 1:
        raise UserError("--num_images, --per_class and --seeds all set the number of images; give one of them")
    if seeds is not None:
        if seed is not None:
            raise UserError("--seed and --seeds both select the images; give one of them")
        return seeds
    if per_class is not None:
        if not num_classes:
            raise UserError("--per_class: this network has no classes; use --num_images")
        count = per_class * num_classes
    start = default[0] if seed is None else seed * commands.seed_block
    if seed is None and count is None:
        return default
    return range(start, start + (count or len(default)))


@contextmanager
def prepared(commands: BackboneCommands, values: Values) -> Iterator[torch.device]:
    """A session on the device of --device, after the notes on flags without effect."""
    for option in commands.ignored:
        if values.get(option.name) and option.help:
            say(f"{option.opts[0]}: {option.help}")
    out = values.get("out_dir") or Path("evaluation")  # a set's folder, for one, holds images only
    with session(values["device"]) as device, tracking(values["log"], out.with_name(f"{out.name}.logs"), is_main()):
        yield device


# The four commands


def _generate(commands: BackboneCommands, default: str | None, values: Values) -> None:
    row = chosen_row(commands, default, values, "generate")
    row = stages.with_settings(row, subfolders=values["subfolders"])
    with prepared(commands, values) as device:
        model, _ = find_model(commands, row, values, device)
        stages.check_settings(model, row.generate)
        if values["img_size"] or values["class_num"]:
            stages.check_image_size(model.backbone, values["img_size"], values["class_num"])
        default_seeds = range(row.synthetic_seed, row.synthetic_seed + row.num_synthetic)
        seeds = chosen_seeds(commands, values, default_seeds, model.backbone.num_classes if values["per_class"] else 0)
        if values["num_images"] and values["num_images"] < model.backbone.num_classes:
            say(f"note: --num_images {values['num_images']} is the number of all images; of each class: --per_class")
        manifest = stages.generate(model, values["out_dir"], seeds)
        settings = commands.result_settings({**manifest, "network_config": model.backbone.network_config()})
        line = [f"{len(seeds)} images", str(values["out_dir"]), *settings, f"base={model.checkpoint.name}"]
        write_result({"outdir": str(values["out_dir"]), **manifest}, " | ".join(line), values["json_path"])


def common_training(row: Row, values: Values) -> TrainSettings:
    """The row's training settings with those of `flags.TRAINING` that are given. Where a batch is given alone, the
    micro batch becomes the largest divisor of it that is no larger than the row's."""
    changes = {name: value for name, value in values.items() if name not in ("ramp_images", "ema_decay")}
    batch, multiple = changes.get("batch_size"), row.micro_batch_multiple
    if batch is not None and "micro_batch_size" not in changes:
        fitting = [n for n in range(row.train.micro_batch_size, 0, -1) if batch % n == 0 and n % multiple == 0]
        if not fitting:
            raise UserError(f"--batch_size {batch}: must be a multiple of {multiple}, which this loss takes together")
        changes["micro_batch_size"] = fitting[0]
    if "ramp_images" in values:
        changes["schedule"] = LinearRamp(values["ramp_images"])
    if "ema_decay" in values:
        changes["ema"] = Ema(decay=values["ema_decay"]) if values["ema_decay"] else None
    return replace(row.train, **changes)


def _finetune(commands: BackboneCommands, default: str | None, values: Values) -> None:
    row = commands.find_row(values["preset"], default, training=True)
    row = replace(row, train=common_training(row, f.given(values, f.TRAINING)))
    if commands.train_settings is not None:
        row = replace(row, train=commands.train_settings(row, f.given(values, (*f.TRAINING, *commands.train))))
    row = replace(row, train_tf32={None: row.train_tf32, True: "all", False: "none"}[values["tf32"]])
    training_run = stages.TrainingRun(**f.given(values, f.TRAINING_RUN))
    with prepared(commands, values) as device:
        model, _ = find_model(commands, row, values, device)
        claims = f.given(values, commands.check)
        if claims:
            commands.check_claims(model.backbone, claims)
        snapshots = stages.finetune(model, values["data"], values["out_dir"], training_run)
        last = max(snapshots)
        line = f"{len(snapshots)} snapshots | {values['out_dir']} | {last} images | last={snapshots[last].name}"
        record = {"row": row.id, "snapshots": {n: str(path) for n, path in snapshots.items()}}
        write_result(record, line, values["json_path"])


def _sweep(commands: BackboneCommands, default: str | None, values: Values) -> None:
    row = chosen_row(commands, default, values, "evaluate")
    row = replace(row, grid=chosen_grid(commands, row, values))
    if values["axes"]:
        check_varied(values["kind"])
        row = replace(row, axes=chosen_axes(row, values["axes"], commands.sample))
    if not values["snapshots"] and not values["synthetic"]:
        raise UserError("--snapshots is missing; name the folder of a fine-tune, or checkpoints as --synthetic")
    seeds, final_seeds, plan = search_images(row, values)
    with prepared(commands, values) as device:
        given_files = {f"--synthetic {path}": path for path in values["synthetic"]}
        model, files = find_model(commands, row, values, device, {**measurement_files(row, values), **given_files})
        stages.check_settings(model, row.evaluate)
        if values["synthetic"]:
            snapshots = {files[name].stem: files[name] for name in given_files}
        else:
            snapshots = find_checkpoints(values["snapshots"], row.grid.first_images, row.grid.last_images)
        if values["metrics"] is not None and "fid" not in values["metrics"]:
            raise UserError("--metrics: a search compares FIDs; add fid")
        evaluator = make_evaluator(files, values, device)
        images = stages.SearchImages(seeds, final_seeds)
        result = stages.sweep(model, evaluator, snapshots, values["out_dir"], plan, images)
        best = result["result"]
        line = f"best: {best['snapshot']} | w={best['w']:g} | {result_line(commands, {**best, 'w': None})}"
        write_result(result, line, values["json_path"])


def search_images(row: Row, values: Values) -> tuple[Sequence[int], Sequence[int], SearchPlan]:
    """(seeds of the search, of its best point, the plan). The search uses the first seeds of the row's evaluation, the
    best point those behind them, which no search has seen."""
    evaluation = parse_seeds(row.evaluate_seeds)
    quick = values["kind"] == "quick"
    count = len(evaluation) if quick and values["num_images"] is None else row.grid.num_images
    seeds = values["search_seeds"] or evaluation[:count]
    deciding = min(SearchPlan().deciding_images, len(seeds))
    plan = SearchPlan(values["kind"], 4, min(SearchPlan().ranking_images, deciding), deciding)
    if not values["final"] or values["final_images"] == 0:
        return seeds, (), plan
    final = range(max(evaluation) + 1, max(evaluation) + 1 + (values["final_images"] or len(evaluation)))
    return seeds, values["final_seeds"] or final, plan


def grid_setting(commands: BackboneCommands) -> str | None:
    """The setting of the sampler that the official grid of this backbone varies, if there is one."""
    return next((name for row in commands.rows if not row.prepare for name in row.grid.settings), None)


def chosen_grid(commands: BackboneCommands, row: Row, values: Values) -> Any:
    """The row's grid with the changes of the command line."""
    grid = row.grid
    name = grid_setting(commands)
    guidances = values.get("guidances")
    changes = {
        "ws": values["ws"] and tuple(values["ws"]),
        "settings": guidances and {name: tuple(guidances)},
        "tolerance": values["tolerance"],
        "num_images": values["num_images"],
        "first_images": values["min_training_step"] and 1000 * values["min_training_step"],
        "last_images": values["max_training_step"] and 1000 * values["max_training_step"],
    }
    grid = replace(grid, **{name: value for name, value in changes.items() if value is not None})
    if values["refine"] is not None:
        grid = replace(grid, refine=(grid.refine or 0.1) if values["refine"] else None)
    return grid


def _calculate_fid(commands: BackboneCommands, default: str | None, values: Values) -> None:
    row = chosen_row(commands, default, values, "evaluate")
    row = stages.with_settings(row, w=values["w"])
    if values["w"] is not None and not values["synthetic"]:
        raise UserError("--w: needs --synthetic, the fine-tuned checkpoint to step away from")
    with prepared(commands, values) as device:
        others = {**measurement_files(row, values), "--synthetic": values["synthetic"]}
        model, files = find_model(commands, row, values, device, others)
        stages.check_settings(model, row.evaluate)
        preset = commands.find_row(values["preset"], default)
        if row.evaluate != preset.evaluate and preset is not commands.without_row:
            settings = ", ".join(f"{name} {value}" for name, value in preset.evaluate.items())
            say(f"note: the settings of {row.id} are {settings}")
        evaluator = make_evaluator(files, values, device)
        stages.check_image_size(model.backbone, values["img_size"], values["class_num"])
        seeds = chosen_seeds(commands, values, parse_seeds(row.evaluate_seeds), model.backbone.num_classes)
        result = stages.calculate_fid(
            model, evaluator, seeds, work_dir=values["work_dir"], save_images=values["save_images"],
            synthetic=files.get("--synthetic"),
        )  # fmt: skip
        write_result(result, result_line(commands, result), values["json_path"])
        evaluator.clear()


def result_line(commands: BackboneCommands, result: Mapping[str, Any]) -> str:
    """The metrics and their settings, in the form of the backbone's official script."""
    return measured_line(result, commands.result_settings(result), commands.digits)


# Their flags


def _generate_flags(commands: BackboneCommands) -> list[click.Option]:
    subfolders = f.flag("--subdirs", "subfolders", is_flag=True, default=None, help="A folder per 1000 seeds.")
    return [
        base_flag(commands), f.ENTRY, *commands.load, f.OUT_DIR, *f.IMAGES, f.BATCH_SIZE, *commands.sample,
        *commands.generate, subfolders,
        *f.CHECKED, f.TF32, f.DEVICE, f.LOG, f.JSON,
    ]  # fmt: skip


def _finetune_flags(commands: BackboneCommands) -> list[click.Option]:
    names = {option.name for option in commands.train}
    return [
        base_flag(commands), f.ENTRY, *commands.load, f.DATA, f.OUT_DIR, *commands.load_training,
        *(option for option in f.TRAINING if option.name not in names), *commands.train, *commands.check,
        *f.TRAINING_RUN, f.TF32, f.DEVICE, f.LOG, f.JSON,
    ]  # fmt: skip


def _sweep_flags(commands: BackboneCommands) -> list[click.Option]:
    synthetic = f.flag("--synthetic", "--aux_resume", *commands.synthetic, "synthetic", type=f.FILE, multiple=True,
                       help="Or fine-tuned checkpoints one by one.")  # fmt: skip
    guidance = grid_setting(commands)
    guidances = f.flag(f"--{guidance}s", f"--{guidance}", "guidances", callback=f.parse_numbers,
                       help="Guidance values.  [default: the row's]")  # fmt: skip
    return [
        base_flag(commands), f.ENTRY, *commands.load, f.SNAPSHOTS, synthetic, f.KIND, f.AXIS, *f.GRID,
        *([guidances] if guidance else []), f.GRID_IMAGES,
        f.flag("--search_seeds", *commands.search_seeds, "search_seeds", callback=f.parse_seed_list,
               help="Of the search.  [default: the first of the row's evaluation]"),
        *f.FINAL,
        f.flag("--final_seeds", *commands.final_seeds, "final_seeds", callback=f.parse_seed_list,
               help="Of the best point.  [default: those behind the row's evaluation]"),
        f.BATCH_SIZE, *(option for option in commands.sample if option.name != guidance),
        *f.metric_flags(None),
        f.flag("--out_dir", "--outdir", "--out_dir_fid", "out_dir", required=True, type=f.FOLDER,
               help="Folder of the results."),
        f.TF32, f.DEVICE, f.LOG, f.JSON,
    ]  # fmt: skip


def _calculate_fid_flags(commands: BackboneCommands) -> list[click.Option]:
    return [
        base_flag(commands, any_checkpoint=True), f.ENTRY, *commands.load,
        f.flag("--synthetic", "--aux_resume", *commands.synthetic, "synthetic", type=f.FILE,
               help="theta_syn: measure base - w (synthetic - base)."),
        f.flag("--w", "--neon_w", "w", type=float, callback=f.parse_finite, help="That w.  [default: the row's]"),
        *f.IMAGES, f.BATCH_SIZE, *commands.sample, *f.metric_flags(commands.metrics), *f.KEPT, *f.CHECKED,
        f.TF32, f.DEVICE, f.LOG, f.JSON,
    ]  # fmt: skip


STAGES = {
    "generate": (_generate_flags, _generate, "Draw the synthetic set S from theta_base."),
    "finetune": (_finetune_flags, _finetune, "Fine-tune theta_base briefly on S: theta_syn, in snapshots."),
    "sweep": (_sweep_flags, _sweep, "Find snapshot, w and settings of the sampler with the lowest FID."),
    "calculate_fid": (_calculate_fid_flags, _calculate_fid, "Sample, extract features, compare with the reference."),
}
