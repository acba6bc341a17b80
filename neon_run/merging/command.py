"""`neon merge`: two files, folders or adapters -> the merged one.

neon merge base.pth synthetic.safetensors -w 1.5 -o neon.safetensors
"""

from __future__ import annotations

from pathlib import Path

import click

from neon_core.merge import check_w
from neon_files.errors import UserError
from neon_files.manifest import find_file
from neon_run.cli import run
from neon_run.merging import folders
from neon_run.merging.files import merge_files
from neon_run.merging.rules import NEON


def merge_paths(base: Path, syn: Path, w: float, out: Path, rule: str = "neon") -> None:
    """`merge_files`, or its counterpart for two folders or two LoRA adapters, as the inputs are."""
    if base.is_dir() or syn.is_dir():
        merge = folders.merge_folders
    else:
        base, syn = find_file(base), find_file(syn)
        if not any(map(folders.is_adapter_file, (base, syn))):
            merge_files(base, syn, w, out, rule)
            return
        merge = folders.merge_adapter_files
    if rule != "neon":
        raise UserError(f"--rule {rule}: only for two checkpoint files, not for folders and LoRA adapters")
    merge(base, syn, w, out)


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path), required=False)
@click.argument("syn", type=click.Path(path_type=Path), required=False)
@click.option(
    "--lora",
    type=click.Path(path_type=Path),
    help="Instead of BASE and SYN: a LoRA adapter trained on synthetic data, file or folder; reversed.",
)
@click.option(
    "-w", "--w", type=float, required=True, help="Merge weight; 0 gives BASE, -1 gives SYN, the paper's rows use w > 0."
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Safetensors file to write; folder for folders."
)
@click.option(
    "--rule",
    default=NEON,
    show_default=True,
    help="neon, or official-NAME: what the official script of that backbone computes.",
)
def merge_command(base: Path | None, syn: Path | None, lora: Path | None, w: float, out: Path, rule: str) -> None:
    """BASE and SYN, checkpoints of one network -> base - w (syn - base).

    Files in any published container; folders (diffusers pipelines, sharded checkpoints): every weight file is merged,
    everything else copied; LoRA adapters: the products up @ down are merged.
    """
    if lora is not None:
        if base is not None or rule != "neon":
            raise UserError("--lora: takes the place of BASE and SYN, and knows no --rule")
        check_w(w)
        folders.reverse_adapter(lora, w, out)
        click.echo(f"{out} | w={w:g} | lora={lora.name}")
        return
    if base is None or syn is None:
        raise click.UsageError("BASE and SYN are needed, two files or two folders; or --lora ADAPTER")
    check_w(w)
    merge_paths(base, syn, w, out, rule)
    click.echo(f"{out} | w={w:g} | rule={rule} | base={base.name} | syn={syn.name}")


if __name__ == "__main__":
    run(merge_command)
