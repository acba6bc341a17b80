"""Published files: fetched, checked, and then used without a network. `bash download_models.sh --help`.

The hub reports a file's hash (through its client: mirrors, tokens and offline mode work as usual), then
`neon_files.receive` downloads it. A verified file is recorded in `.NAME.verified`, so that later runs need neither
network nor hashing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import click

from neon_files.atomic import write_json
from neon_files.errors import UserError
from neon_files.home import cache_dir, home
from neon_files.kinds import stand_in
from neon_files.lock import Unwritable, one_process, sidecar
from neon_files.manifest import MANIFEST, Entry, Manifest, Missing, find_file, read_manifest
from neon_files.receive import Source, Unreachable, compare, download, forget, hub_client

Say = Callable[[str], None]


def is_offline() -> bool:
    """The hub client's switches, honoured for every source."""
    switches = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(switch.lower() in {"1", "true", "yes", "on"} for switch in switches)


@dataclass(frozen=True)
class State:
    """Of one file on the disk. `text` is "verified", "unverified" (nothing to compare with), "missing" or a defect."""

    text: str
    usable: bool  # no defect detected
    settled: bool  # no request could change that


VERIFIED = State("verified", usable=True, settled=True)
UNVERIFIED = State("unverified", usable=True, settled=False)
RECORDED = State("as first fetched; its publisher gives no hash", usable=True, settled=True)
MISSING = State("missing", usable=False, settled=False)


def known_source(entry: Entry) -> Source:
    """The source as the manifest states it, with its hash only where it is confirmed."""
    return Source(entry.url, size=entry.size, sha256=entry.sha256 if entry.confirmed else "")


def state_of(entry: Entry, path: Path, rehash: bool = False) -> State:
    """Reads the disk only. `rehash` ignores the record of an earlier check. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where a file of this name belongs; move it away")
    if not path.is_file():
        return MISSING
    try:
        with open(path, "rb") as file:
            problem = stand_in(file.read(100))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend that or move it away") from error
    if problem:  # recorded or not: web pages were once recorded as verified
        return State(problem, usable=False, settled=False)
    record = _read_record(path)
    facts = path.stat()
    if record and not rehash and (record.get("size"), record.get("mtime_ns")) == (facts.st_size, facts.st_mtime_ns):
        agrees = not (entry.confirmed and entry.sha256) or record.get("sha256") == entry.sha256
        if agrees:
            return VERIFIED if record.get("checked") else RECORDED
    problem, digest = compare(known_source(entry), path)
    if problem:
        return State(problem, usable=False, settled=False)
    if entry.sha256 and digest == entry.sha256:
        _write_record(path, digest, checked="manifest")
        return VERIFIED
    if record.get("sha256"):
        if record["sha256"] != digest:
            text = f"has the sha256 {digest} instead of {record['sha256']}, which it had when it was fetched"
            return State(text, usable=False, settled=False)
        _write_record(path, digest, checked=record.get("checked", ""))
        return VERIFIED if record.get("checked") else RECORDED
    return UNVERIFIED


def ensure(entry: Entry, path: Path, force: bool = False, say: Say = lambda text: None, offline: str = "") -> None:
    """`path` holds the published file when this returns. Makes no request where it is present and verified.

    A file there that is not the published one is kept as NAME.old. Raises UserError; a file that only cannot be
    verified now (no network, a folder of another user) is accepted with a note. `offline`: why no request may be made.
    """
    state = state_of(entry, path)
    if state.settled and not force:
        return
    if is_offline():
        offline = "HF_HUB_OFFLINE is set"
    if offline:
        if not state.usable or force:
            raise Unreachable(f"{entry.name}: {state.text}; {offline}")
        say(f"{path}: present, not verified ({offline})")
        return
    with ExitStack() as lock:
        try:
            lock.enter_context(one_process(path))
            state = state_of(entry, path)  # another process may have fetched it meanwhile
            if state.settled and not force:
                return
            source = resolve(entry, say)
        except (Unreachable, Unwritable) as error:
            if not state.usable or force:
                raise
            say(f"{path}: present, not verified ({error.message})")
            return
        if state.usable and not force:
            problem, digest = compare(source, path)
            if not problem:
                _write_record(path, digest, _checked(source), source.version)
                return
            state = State(problem, usable=False, settled=False)
        _replace(entry, source, path, state, say)


def _replace(entry: Entry, source: Source, path: Path, state: State, say: Say) -> None:
    if entry.restricted:
        say(f"{entry.name}: {entry.licence}")
    say(f"{entry.name}: fetching {_bytes(source.size)} from {entry.source} into {path.parent}")
    part = sidecar(path, "part")
    digest = download(source, part, entry.name)
    if path.exists() and not state.usable:
        old = path.with_name(f"{path.name[:240]}.old")
        say(f"{path}: {state.text}; kept as {old.name}")
        os.replace(path, old)
    os.replace(part, path)
    forget(part)
    _write_record(path, digest, _checked(source), source.version)


def _checked(source: Source) -> str:
    return "publisher" if source.sha256 or source.git_sha1 else ""


def resolve(entry: Entry, say: Say = lambda text: None) -> Source:
    """The source of an entry, with its publisher's size and hashes. One request for files on the hub."""
    if entry.url:
        return known_source(entry)
    hub = hub_client()
    errors = hub.errors
    endpoint = os.environ.get("HF_ENDPOINT") or None
    address = functools.partial(hub.hf_hub_url, entry.repo, entry.path or entry.name, endpoint=endpoint)
    try:
        facts = hub.get_hf_file_metadata(address(revision=entry.revision), endpoint=endpoint)
    except errors.GatedRepoError as error:
        raise UserError(
            f"{entry.name}: {entry.repo} asks for a login; accept its conditions, then `hf auth login`"
        ) from error
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as error:
        raise UserError(f"{entry.name}: not at {entry.source} (revision {entry.revision})") from error
    except errors.HfHubHTTPError as error:
        raise Unreachable(f"{entry.name}: the hub answers {str(error).splitlines()[0]}") from error
    except Exception as error:  # connection errors: their classes depend on the client's version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreachable(f"{entry.name}: no connection to the hub ({reason})", connected=False) from error
    etag = facts.etag or ""
    sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else ""
    git_sha1 = etag if re.fullmatch(r"[0-9a-f]{40}", etag) else ""
    if sha256 and entry.sha256 and sha256 != entry.sha256:
        if entry.confirmed:
            raise UserError(
                f"{entry.name}: the hub now has other bytes (sha256 {sha256}) than the published {entry.sha256}"
            )
        say(f"{entry.name}: the hub's hash {sha256} differs from the one that others report; the hub's counts")
    size = facts.size if sha256 and sha256 != entry.sha256 else entry.size or facts.size
    headers = tuple(hub.utils.build_hf_headers().items())
    confirmed = known_source(entry).sha256
    url = address(revision=facts.commit_hash or entry.revision)  # what a commit names does not change
    version = f"{facts.commit_hash} {etag}" if facts.commit_hash else ""
    return Source(url, headers, size, confirmed or sha256, git_sha1, version, xet=getattr(facts, "xet_file_data", None))


def _read_record(path: Path) -> dict:
    try:
        record = json.loads(sidecar(path, "verified").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(path: Path, digest: str, checked: str, version: str = "") -> None:
    facts = path.stat()
    record = {"sha256": digest, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "checked": checked}
    with suppress(UserError):  # in a folder of another user: the next run hashes again
        write_json(sidecar(path, "verified"), record | ({"version": version} if version else {}))


# For the scripts


def is_url(text: str | Path) -> bool:
    return re.match(r"https?://", str(text)) is not None


def local_copy(url: str) -> tuple[Entry, Path]:
    """The manifest's entry of a URL (a new one for any other URL), and the path of its file, present or not."""
    published = next((entry for entry in MANIFEST.entries if entry.url == url), None)
    last = re.sub(r"[^\w.-]+", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1]) or "file"
    entry = published or Entry(last[:60] + last[60:][-20:], "cache", url=url, licence="")  # its ending names its kind
    cached = cache_dir() / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{entry.name}"
    if not published:
        return entry, cached
    official = home() / entry.destination
    usable = [path for path in (official, cached) if state_of(entry, path).usable]
    return entry, usable[0] if usable else official


def fetch(path_or_url: str | Path) -> Path:
    """The local file of a path, or of a URL: fetched once, checked, then used without a network.

    A URL of the manifest goes where the download command puts it, any other into the cache. Every rank may call it:
    one process of a node downloads, the others wait. Raises UserError.
    """
    if not is_url(path_or_url):
        return find_file(path_or_url)
    entry, path = local_copy(str(path_or_url))
    try:
        ensure(entry, path, say=_say)
    except Unreachable as error:
        command = MANIFEST.command(entry.name) if entry in MANIFEST.entries else None
        remedy = f"where there is a network, run `{command}`" if command else f"put the file at {path} yourself"
        reason = error.message.removeprefix(f"{entry.name}: ")
        raise Missing(path_or_url, reason, remedy, entry if command else None) from error
    return path


def _say(text: str) -> None:
    click.echo(text, err=True)


# The command


def _bytes(size: int | None) -> str:
    return "? bytes" if size is None else f"{size / 1e6:,.1f} MB" if size > 1e5 else f"{size:,} bytes"


_HELP = f"""Fetch published files; without words, the {len(MANIFEST.default)} official checkpoints and references.

ROW: all that a row's commands need; one of {", ".join(MANIFEST.rows)}. FILE: the name of a single file.
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured.
"""


@click.command("download", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, metavar="[ROW | FILE]...")
@click.option("--list", "list_", is_flag=True, help="List the published files and which are present; makes no request.")
@click.option("--dry_run", "--dry-run", is_flag=True, help="List what would be fetched; makes no request.")
@click.option("--verify", is_flag=True, help="Hash the present files again; makes no request.")
@click.option("--force", is_flag=True, help="Fetch files again that are present.")
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where checkpoints/ and fid_stats/ are.  [default: NEON_HOME, else the checkout, else the user's cache]",
)
@click.option(
    "--manifest",
    "manifest_path",
    type=click.Path(path_type=Path),
    help="Another list of files (JSON), for your own mirror.",
)
def main(
    words: Sequence[str],
    list_: bool,
    dry_run: bool,
    verify: bool,
    force: bool,
    root: Path | None,
    manifest_path: Path | None,
) -> None:
    root = root or home()
    manifest = read_manifest(manifest_path) if manifest_path else MANIFEST
    entries = manifest.select(tuple(words)) if words or not (list_ or verify) else list(manifest.entries)
    if list_:
        _list(manifest, entries, root)
    elif dry_run:
        _dry_run(entries, root, force)
    elif verify:
        _verify(entries, root, all_named=bool(words))
    else:
        try:
            _fetch_all(entries, root, force)
        except KeyboardInterrupt:
            _say("stopped; received bytes are kept, and the same command continues")
            raise SystemExit(130) from None


def _list(manifest: Manifest, entries: list[Entry], root: Path) -> None:
    _say(f"below {root}:")
    for entry in entries:
        presence = "here" if (root / entry.destination).is_file() else "-"
        rows = ", ".join(row for row, names in manifest.rows.items() if entry.name in names) or "no row"
        click.echo(f"{presence:5} {_bytes(entry.size):>12}  {entry.destination}  <- {entry.source}")
        click.echo(f"{'':20}{rows}; {entry.licence}")


def _dry_run(entries: list[Entry], root: Path, force: bool) -> None:
    for entry in entries:
        state = state_of(entry, root / entry.destination)
        action = "keep" if state.settled and not force else "check" if state.usable and not force else "fetch"
        click.echo(f"{action:5} {_bytes(entry.size):>12}  {entry.destination}  <- {entry.source}  ({state.text})")


def _verify(entries: list[Entry], root: Path, all_named: bool) -> None:
    bad = 0
    for entry in entries:
        state = state_of(entry, root / entry.destination, rehash=True)
        if state is MISSING and not all_named:
            continue
        bad += not state.usable
        click.echo(f"{'ok ' if state.usable else 'BAD'}  {entry.destination}  {state.text}")
    if bad:
        raise UserError(f"{bad} of these files are missing or damaged; the same command without --verify mends them")


def _fetch_all(entries: list[Entry], root: Path, force: bool) -> None:
    failed: list[tuple[Entry, UserError]] = []
    down: dict[str, str] = {}  # hosts that did not answer: one time-out is enough
    for entry in entries:
        path, host = root / entry.destination, urllib.parse.urlsplit(entry.url).netloc or "the hub"
        try:
            ensure(entry, path, force, _say, offline=down.get(host, ""))
            click.echo(f"{entry.destination}: {state_of(entry, path).text}")
        except UserError as error:
            failed.append((entry, error))
            if isinstance(error, Unreachable) and not error.connected:
                down[host] = f"no connection to {host}"
    if failed:
        reasons = [(entry, error.message.removeprefix(f"{entry.name}: ")) for entry, error in failed]
        lines = [f"  {entry.destination} <- {entry.source}: {reason}" for entry, reason in reasons]
        raise UserError(f"{len(failed)} of {len(entries)} files are not here, below {root}:\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
