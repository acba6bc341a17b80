"""What `neon improve` leaves: a pipeline's folder, or an adapter's, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.errors import say
from neon_run.improvement import Result
from neon_run.pipelines.kinds import Opened

TEXTS = (".json", ".md", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".webp", "")  # beside the parts of a pipeline
LICENCE = ("license", "license_name", "license_link")  # of the base's card, which bind the result


def write_result(opened: Opened, result: Result, source: str, out: Path, adapter: bool) -> Path:
    """`out`/pipeline or `out`/adapter with the better network, under its name only when whole."""
    load_strict(opened.network.eval(), read_checkpoint(result.checkpoint))
    if adapter:
        use = "\n    pipeline.load_lora_weights(FOLDER)    # at its own weight, 1\n"
        return _whole(out / "adapter", _write_adapter, opened, _card(opened, result, source, use, ["lora"]))
    return _whole(out / "pipeline", _write_pipeline, opened, _card(opened, result, source, "", []))


def _whole(folder: Path, write: Callable[[Opened, Path], None], opened: Opened, card: str) -> Path:
    temporary = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    write(opened, temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def _write_adapter(opened: Opened, folder: Path) -> None:
    """The factors as they are: `improve` has put -w into those that were 0."""
    from peft import get_peft_model_state_dict

    (settings,) = opened.network.peft_config.values()
    opened.pipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(opened.network),
        unet_lora_adapter_metadata=settings.to_dict(),
    )


def _write_pipeline(opened: Opened, folder: Path) -> None:
    """Every part but the network is copied as it is; files that may hold the network once more are left out."""
    own = opened.folder / opened.kind.network
    parts = {"scheduler", "image_processor", *opened.kind.parts} - {own.name}
    left_out = []
    folder.mkdir(parents=True)
    for path in sorted(opened.folder.iterdir()):
        if path.is_dir() and path.name in parts:
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and path.suffix.lower() in TEXTS:
            shutil.copy2(path, folder / path.name)
        elif path != own:
            left_out.append(path.name)
    opened.network.save_pretrained(folder / own.name, safe_serialization=True)
    shutil.copy2(own / "config.json", folder / own.name / "config.json")
    if left_out:
        say(f"{folder.name}: {', '.join(left_out)} of the base not copied; {own.name} is new in this one place")


def _card(opened: Opened, result: Result, source: str, use: str, tags: list[str]) -> str:
    """A model card that names the base, its licence and what was measured."""
    readme = opened.folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    theirs = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    about = {name: theirs[name] for name in LICENCE if name in theirs}
    about |= {} if Path(source).is_dir() else {"base_model": source}
    header = ModelCardData(library_name="diffusers", tags=["neon", *tags], **about).to_yaml()
    return (
        f"---\n{header}\n---\n\nThe network of {Path(source).name if Path(source).is_dir() else source}, improved by "
        f"Neon (arXiv 2510.03597) at w = {result.w:.4g}: {result.details['distance']} {result.base:.4g} -> "
        f"{result.neon:.4g} on fresh seeds, difference {result.base - result.neon:.3g} ± "
        f"{1.96 * result.standard_error:.2g}.\n{use}"
    )
