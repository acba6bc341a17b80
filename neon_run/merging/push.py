"""`neon push`: merged weights on the hub, with a model card of their origin and their metrics.

The card is written from the weights' own header (or a folder's neon_merge.json) and from a results.json; only what
neither of them holds is asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from neon_files.atomic import sha256_file
from neon_files.errors import UserError
from neon_files.manifest import MANIFEST, MIT, NON_COMMERCIAL
from neon_files.safetensors_file import read_header
from neon_run.merging.folders import PROVENANCE
from neon_run.merging.lora import is_adapter
from neon_run.merging.weight_file import ADAPTER_CONFIG
from neon_run.results import upgraded

MARK = "<!-- written by `neon push` -->"
SHARE_ALIKE = "cc-by-nc-sa-4.0"
_LICENCES = {MIT: "mit", "Apache 2.0": "apache-2.0"}
METRICS = {
    "fid": "FID",
    "is_mean": "Inception score",
    "kid_mean": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


@dataclass(frozen=True)
class Weights:
    """What is to be pushed: `files` by their path in the repository, and the record of their merge."""

    path: Path
    files: dict[str, Path]
    record: dict[str, Any]  # {"w", "rule", "base", "synthetic"}
    sha256: str = ""  # of a single file
    adapter: bool = False

    @property
    def w(self) -> float:
        return self.record["w"]

    @property
    def sources(self) -> set[str]:
        """Names of the files that the weights come from, as far back as the records go."""
        return {Path(value).name for key, value in _walk(self.record) if key in ("file", "base", "init")}


def read_weights(path: Path) -> Weights:
    """A merged safetensors file, or a folder that `neon merge` made. UserError where no merge is on record."""
    if path.is_dir():
        if not (path / PROVENANCE).is_file():
            raise UserError(f"{path}: has no {PROVENANCE}; give a folder that `neon merge` made")
        record = _read_json(path / PROVENANCE)
        files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
        own_card = files.pop("README.md", None)  # the base's, which would speak for other weights
        if own_card:
            click.echo(f"{own_card}: not pushed, the new model card takes its place", err=True)
        return Weights(path, files, record, adapter=ADAPTER_CONFIG in files)
    if not path.is_file():
        raise UserError(f"{path}: does not exist; name merged weights")
    try:
        names, header = read_header(path)
    except (UserError, OSError) as error:
        raise UserError(f"{path}: is no safetensors file; merge with `neon merge`, which writes one") from error
    if "neon" not in header:
        raise UserError(f"{path}: its header records no merge; give weights that `neon merge` wrote")
    record = json.loads(header["neon"])
    return Weights(path, {path.name: path}, record, sha256_file(path), is_adapter(names))


@dataclass(frozen=True)
class Results:
    """Metrics and their settings: of a row's results.json, or of the file that a calculate_fid.py wrote with --json."""

    neon: dict[str, Any] = field(default_factory=dict)  # metric -> value
    base: dict[str, Any] = field(default_factory=dict)
    interval: dict[str, float] | None = None  # of Neon's FID
    row: str = ""
    paper_fid: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    seeds: str = ""


def read_results(path: Path, weights: Weights) -> Results:
    """The metrics in `path`. UserError where they are of other weights, or no results."""
    results = _read_json(path)
    hashes = {value for key, value in _walk(results) if key.endswith("sha256")}
    if weights.sha256 and hashes and weights.sha256 not in hashes:
        raise UserError(f"--results {path}: measured other weights than {weights.path}; evaluate these")
    if "final" in results:
        w, final = results["best"]["w"], results["final"]
        if w != weights.w:
            raise UserError(f"--results {path}: is of w = {w:g}, {weights.path} of w = {weights.w:g}")
        provenance = results.get("provenance", {})
        measured = provenance.get("evaluate", {})
        return Results(
            neon=_metrics(final["neon"]),
            base=_metrics(final.get("base", {})),
            interval=(results.get("intervals") or {}).get("neon"),
            row=results.get("row", ""),
            paper_fid=(results.get("paper") or {}).get("neon_fid"),
            settings=dict(measured.get("settings", {})) | upgraded(results)["best"]["settings"],
            reference=Path(provenance.get("files", {}).get("reference", {}).get("path", "")).name,
            seeds=final["neon"].get("seeds", measured.get("seeds", "")),
        )
    if not _metrics(results):
        raise UserError(f"--results {path}: holds no metric that we know ({', '.join(METRICS)})")
    return Results(
        neon=_metrics(results),
        settings=results.get("settings", {}),
        reference=str(results.get("reference", "")),
        seeds=results.get("seeds", ""),
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: values[name] for name in METRICS if isinstance(values.get(name), int | float)}


def choose_licence(weights: Weights, licence: str | None) -> str:
    """The hub's name of the licence: that of the published sources where they prescribe one, else the user's.

    UserError where neither is given, and where the user's is less strict than the sources'.
    """
    entries = [entry for entry in map(MANIFEST.entry, sorted(weights.sources)) if entry] if weights.sha256 else []
    bound = [entry for entry in entries if NON_COMMERCIAL in entry.licence]
    if bound:
        if licence and not licence.startswith("cc-by-nc-sa"):
            reason = f"{bound[0].name}, from which these weights derive, is {NON_COMMERCIAL}"
            raise UserError(f"--licence {licence}: {reason}; leave the flag out")
        return licence or SHARE_ALIKE
    licences = {_LICENCES[entry.licence] for entry in entries if entry.licence in _LICENCES}
    if licence or len(licences) == 1:
        return licence or licences.pop()
    raise UserError("--licence: say under which licence the base allows these weights, like mit or openrail")


def model_card(weights: Weights, results: Results | None, licence: str, name: str, base_model: str | None) -> str:
    """README.md: front matter for the hub, then row, w, metrics, provenance, licence."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = results or Results()
    dataset = measured.reference or "reference statistics"
    evaluated = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=Path(dataset).stem,
            dataset_name=dataset,
            metric_type=metric.removesuffix("_mean"),
            metric_name=METRICS[metric],
            metric_value=value,
        )
        for metric, value in measured.neon.items()
    ]
    data = ModelCardData(
        license=licence,
        base_model=base_model,
        tags=["neon", "negative-extrapolation", "arxiv:2510.03597", *(["lora"] if weights.adapter else [])],
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )
    sections = [f"---\n{data.to_yaml()}\n---", MARK, _introduction(weights, measured, name)]
    sections += [_measured(measured)] if measured.neon else ["## Metrics\n\nNot measured."]
    sections += [_provenance(weights, measured), f"## Licence\n\n`{licence}`{_why(weights)}"]
    return "\n\n".join(sections) + "\n"


def _introduction(weights: Weights, measured: Results, name: str) -> str:
    row = f" Row of the paper's table: `{measured.row}`." if measured.row else ""
    if weights.record["base"] == "no adapter":
        formula = f"This adapter adds -w (theta_syn - theta_base) to the base, w = {weights.w:g}"
    else:
        formula = f"theta_neon = theta_base - w (theta_syn - theta_base), w = {weights.w:g}"
    return (
        f"# {name}\n\n{formula}, by Neon (Negative Extrapolation from Self-Training, "
        "[arXiv 2510.03597](https://arxiv.org/abs/2510.03597)): theta_syn is theta_base after a short fine-tune on its "
        f"own samples.{row} {'Loaded like any LoRA' if weights.adapter else 'Loaded like the base'}; nothing changes "
        "at inference."
    )


def _measured(measured: Results) -> str:
    head = ["metric", *(["base"] if measured.base else []), "Neon"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for metric, value in measured.neon.items():
        cells = [METRICS[metric], *([f"{measured.base.get(metric, float('nan')):.4g}"] if measured.base else [])]
        lines.append(f"| {' | '.join([*cells, f'{value:.4g}'])} |")
    text = f"Reference: `{measured.reference}`; seeds {measured.seeds}; sampler {_code(measured.settings)}."
    if measured.interval:
        text += f" 95 % interval of Neon's FID: {measured.interval['low']:.4g} to {measured.interval['high']:.4g}."
    if measured.paper_fid is not None:
        text += (
            f" The paper reports {measured.paper_fid:g} for this row; the numbers above were measured on these weights."
        )
    return "\n".join(["## Metrics", "", *lines, "", text])


def _provenance(weights: Weights, measured: Results) -> str:
    lines = ["| | file | sha256 |", "|---|---|---|"]
    for side in ("base", "synthetic"):
        end = weights.record.get(side)
        if isinstance(end, str):
            lines.append(f"| {side} | {end} | |")
        elif isinstance(end, Mapping):
            pairs = [(end["file"], end.get("sha256", ""))] if "file" in end else end.items()
            lines += [f"| {side} | `{file}` | `{digest}` |" for file, digest in pairs]
    if weights.sha256:
        lines.append(f"| these weights | `{weights.path.name}` | `{weights.sha256}` |")
    record = json.dumps(weights.record, indent=1, sort_keys=True, ensure_ascii=False)
    details = f"<details><summary>The whole record</summary>\n\n```json\n{record}\n```\n\n</details>"
    steps = f"w = {weights.w:g}" + "".join(
        f"; `{name}`: w = {w:g}" for name, w in weights.record.get("w_by_pattern", [])
    )
    steps += "".join(f"; `{pattern}` from the base" for pattern in weights.record.get("keep", []))
    return "\n".join(["## Provenance", "", f"{steps}.", "", *lines, "", details])


def _why(weights: Weights) -> str:
    if not weights.sha256:
        return ""
    entries = [entry for entry in map(MANIFEST.entry, sorted(weights.sources)) if entry]
    return "".join(f"\n\n`{entry.name}`: {entry.licence}." for entry in entries)


def _code(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "as in the record"


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested JSON with its key."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _walk(part, key)
    elif isinstance(value, str):
        yield key, value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another file") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a table of results")
    return content


def push(repo: str, files: Mapping[str, Path | bytes], message: str, private: bool, replace_card: bool) -> str:
    """All `files` in one commit to the hub's `repo`, which is made if need be; gives the commit's address.

    A model card that someone wrote there stays, unless `replace_card`. Raises UserError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if not replace_card and api.file_exists(repo, "README.md"):
            with tempfile.TemporaryDirectory() as folder:
                there = Path(api.hf_hub_download(repo, "README.md", local_dir=folder)).read_text(encoding="utf-8")
            if MARK not in there:
                raise UserError(f"{repo}: has a model card that somebody wrote; --replace_card puts ours in its place")
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
            for name, file in files.items()
        ]
        return api.create_commit(repo, operations, commit_message=message).commit_url
    except UserError:
        raise
    except Exception as error:  # of the client: classes and their bases change with its version
        raise UserError(_explained(error, repo)) from error


def _explained(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return f"{repo}: the hub asks for a login; `hf auth login` with a token that may write"
    if status == 403:
        return f"{repo}: your token may not write there; name a repository of yours or another token"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{repo}: not pushed, HF_HUB_OFFLINE is set"
    return f"{repo}: not pushed ({type(error).__name__}: {reason})"


@click.command("push")
@click.argument("weights", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option(
    "--results", type=click.Path(path_type=Path), help="results.json of a row, or --json of calculate_fid.py."
)
@click.option("--licence", "--license", help="The hub's name of it.  [default: what the base's publisher states]")
@click.option("--base_model", help="The base's repository on the hub.  [default: of a published base]")
@click.option("--private/--public", default=True, show_default=True, help="Of a repository that is new.")
@click.option("--replace_card", is_flag=True, help="Also where somebody wrote the model card that is there.")
@click.option("--dry_run", is_flag=True, help="Print the model card and the files; send nothing.")
def push_command(
    weights: Path,
    repo: str,
    results: Path | None,
    licence: str | None,
    base_model: str | None,
    private: bool,
    replace_card: bool,
    dry_run: bool,
) -> None:
    """WEIGHTS, a file or folder that `neon merge` wrote, to the hub's REPO (NAME/MODEL), with a model card."""
    merged = read_weights(weights)
    measured = read_results(results, merged) if results else None
    chosen = choose_licence(merged, licence)
    published = [entry for entry in map(MANIFEST.entry, sorted(merged.sources)) if entry and entry.repo]
    if base_model is None and merged.sha256 and len(published) == 1:
        base_model = published[0].repo
    card = model_card(merged, measured, chosen, repo.split("/")[-1], base_model)
    files: dict[str, Path | bytes] = {**merged.files, "README.md": card.encode()}
    if results:
        files |= {name: results.with_name(name) for name in ("report.html",) if results.with_name(name).is_file()}
        files["results.json"] = results
    if dry_run:
        click.echo(card)
        click.echo("\n".join(f"{name} <- {'this card' if isinstance(p, bytes) else p}" for name, p in files.items()))
        return
    click.echo(f"{repo} | w={merged.w:g} | {push(repo, files, f'Neon, w = {merged.w:g}', private, replace_card)}")
