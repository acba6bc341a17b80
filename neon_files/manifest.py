"""Every file that a row of the table needs: where it is published, where it goes here, what is known of its bytes.

Sizes and hashes are those of the publishers' pages; `confirmed=False` marks a hash that only third parties state. It
is a hint then: what the hub says of its own file counts. No hash: the hub's own is used where there is one.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from neon_files.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
MIT = "MIT"
NON_COMMERCIAL = "CC BY-NC-SA 4.0: research and other non-commercial use only"
DERIVED = f"derived from {NON_COMMERCIAL}, whatever its model card says"
NOT_STATED = "no licence stated by its publisher"
_SUFFIXES = (".pth", ".pkl", ".pt", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Entry:
    """One published file: on the hub (`repo` and `path`) or at a plain `url`."""

    name: str  # what it is called on disk
    folder: str  # under the root of the checkout
    repo: str = ""  # hub repository
    path: str = ""  # in the repository; default: name
    url: str = ""
    revision: str = "main"
    size: int | None = None  # bytes
    sha256: str = ""
    confirmed: bool = True
    licence: str = MIT
    aliases: tuple[str, ...] = ()  # other spellings that commands use

    @property
    def destination(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def source(self) -> str:
        return self.url or f"hub {self.repo}, {self.path or self.name}"

    @property
    def restricted(self) -> bool:
        return NON_COMMERCIAL in self.licence


_NEON, _VAR, _IMM, _XAR = "sinaalemohammad/Neon", "FoundationVision/var", "lumaai/imm", "OliverRen/xAR"
_SD_VAE = "stabilityai/sd-vae-ft-ema"
_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"

OFFICIAL = (
    Entry("Neon_xARL_imagenet256.pth", "checkpoints", _NEON),
    Entry("Neon_xARB_imagenet256.pth", "checkpoints", _NEON),
    Entry("Neon_VARd16_imagenet256.pth", "checkpoints", _NEON),
    Entry("Neon_VARd36_imagenet512.pth", "checkpoints", _NEON),
    Entry("Neon_EDM_conditional_CIFAR10.pkl", "checkpoints", _NEON, licence=DERIVED),
    Entry("Neon_EDM_unconditional_CIFAR10.pkl", "checkpoints", _NEON, licence=DERIVED),
    Entry("Neon_EDM_FFHQ.pkl", "checkpoints", _NEON, licence=DERIVED),
    Entry("Neon_imm_imagenet256.pkl", "checkpoints", _NEON, licence=DERIVED, aliases=("Neon_IMM_imagenet256.pth",)),
    Entry("adm_in256_stats.npz", "fid_stats", _NEON),
    Entry("adm_in512_stats.npz", "fid_stats", _NEON),
)

OTHERS = (
    Entry("xAR-L.pth", "xAR/pretrained", _XAR, licence=NOT_STATED, aliases=("xAR_L.pth",)),
    Entry("xAR-B.pth", "xAR/pretrained", _XAR, licence=NOT_STATED, aliases=("xAR_B.pth",)),
    Entry("xAR-H.pth", "xAR/pretrained", _XAR, licence=NOT_STATED, aliases=("xAR_H.pth",)),
    Entry(
        "kl16.ckpt",
        "xAR/pretrained",
        "xwen99/mar-vae-kl16",
        size=265_900_046,
        sha256="34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f",
        confirmed=False,  # of a copy in another repository
    ),
    Entry(
        "var_d16.pth",
        "checkpoints",
        _VAR,
        sha256="4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
        confirmed=False,  # as users of the file record it
    ),
    Entry("var_d36.pth", "checkpoints", _VAR),
    Entry(
        "vae_ch160v4096z32.pth",
        "checkpoints",
        _VAR,
        size=436_075_834,
        sha256="7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
    ),
    Entry(
        "edm-cifar10-32x32-cond-vp.pkl",
        "checkpoints",
        url=f"{_EDM}/pretrained/edm-cifar10-32x32-cond-vp.pkl",
        licence=NON_COMMERCIAL,
    ),
    Entry(
        "edm-cifar10-32x32-uncond-vp.pkl",
        "checkpoints",
        url=f"{_EDM}/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
        licence=NON_COMMERCIAL,
    ),
    Entry(
        "edm-ffhq-64x64-uncond-vp.pkl",
        "checkpoints",
        url=f"{_EDM}/pretrained/edm-ffhq-64x64-uncond-vp.pkl",
        licence=NON_COMMERCIAL,
    ),
    Entry("cifar10-32x32.npz", "fid_stats", url=f"{_EDM}/fid-refs/cifar10-32x32.npz", licence=NON_COMMERCIAL),
    Entry("ffhq-64x64.npz", "fid_stats", url=f"{_EDM}/fid-refs/ffhq-64x64.npz", licence=NON_COMMERCIAL),
    Entry("imagenet256_ts_a2.pkl", "checkpoints", _IMM, licence=NON_COMMERCIAL),
    Entry("imagenet256_s_a1.pkl", "checkpoints", _IMM, licence=NON_COMMERCIAL),
    Entry("cifar10.pt", "checkpoints", _IMM, licence=NON_COMMERCIAL),
    Entry("config.json", "checkpoints/sd-vae-ft-ema", _SD_VAE, size=547),
    Entry("diffusion_pytorch_model.safetensors", "checkpoints/sd-vae-ft-ema", _SD_VAE),
    Entry(
        "weights-inception-2015-12-05-6726825d.pth",
        "checkpoints",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        licence="Apache 2.0",
    ),
    Entry("VIRTUAL_imagenet256_labeled.npz", "fid_stats", url=f"{_ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    Entry("VIRTUAL_imagenet512.npz", "fid_stats", url=f"{_ADM}/512/VIRTUAL_imagenet512.npz"),
)

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_SD_VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")

# A word on the command line -> all that its row needs: Neon's and the base checkpoint, tokenizer, reference.
ROWS = {
    "xarl": ("Neon_xARL_imagenet256.pth", "xAR-L.pth", "kl16.ckpt", "adm_in256_stats.npz"),
    "xarb": ("Neon_xARB_imagenet256.pth", "xAR-B.pth", "kl16.ckpt", "adm_in256_stats.npz"),
    "xarh": ("xAR-H.pth", "kl16.ckpt", "adm_in256_stats.npz"),  # no Neon weights are published for this size
    "vard16": ("Neon_VARd16_imagenet256.pth", "var_d16.pth", "vae_ch160v4096z32.pth", "adm_in256_stats.npz"),
    "vard36": ("Neon_VARd36_imagenet512.pth", "var_d36.pth", "vae_ch160v4096z32.pth", "adm_in512_stats.npz"),
    "edm-cifar10-cond": ("Neon_EDM_conditional_CIFAR10.pkl", "edm-cifar10-32x32-cond-vp.pkl", "cifar10-32x32.npz"),
    "edm-cifar10-uncond": (
        "Neon_EDM_unconditional_CIFAR10.pkl",
        "edm-cifar10-32x32-uncond-vp.pkl",
        "cifar10-32x32.npz",
    ),
    "edm-ffhq": ("Neon_EDM_FFHQ.pkl", "edm-ffhq-64x64-uncond-vp.pkl", "ffhq-64x64.npz"),
    "imm": ("Neon_imm_imagenet256.pkl", "imagenet256_ts_a2.pkl", *_SD_VAE_FILES, "adm_in256_stats.npz"),
    "inception": (),
}
ROWS = {row: (*names, _INCEPTION) for row, names in ROWS.items()}  # every evaluation needs it


@dataclass(frozen=True)
class Manifest:
    """Files, and the words that stand for groups of them."""

    entries: tuple[Entry, ...]
    rows: dict[str, tuple[str, ...]]
    default: tuple[str, ...]  # names fetched where no word is given

    def entry(self, name: str) -> Entry | None:
        """By name or alias, whatever the case; a folder before it is ignored."""
        wanted = name.replace("\\", "/").rsplit("/", 1)[-1].lower()
        for entry in self.entries:
            if wanted in (entry.name.lower(), *(alias.lower() for alias in entry.aliases)):
                return entry
        return None

    def select(self, words: tuple[str, ...]) -> list[Entry]:
        """The files that the words (rows or file names) stand for, each once. Raises UserError for an unknown word."""
        names: list[str] = [] if words else list(self.default)
        for word in words:
            if word.lower() in self.rows:
                names += self.rows[word.lower()]
            elif self.entry(word):
                names.append(word)
            else:
                raise UserError(f"{word}: neither a row nor a file; rows: {', '.join(self.rows)}; files: see --list")
        return list(dict.fromkeys(self.entry(name) for name in names))

    def command(self, name: str) -> str | None:
        """The shortest command that fetches a file of this name, None where it is not published."""
        entry = self.entry(name)
        if entry is None:
            return None
        rows = [row for row, names in self.rows.items() if entry.name in names]
        return f"bash download_models.sh {shlex.quote(rows[0] if len(rows) == 1 else entry.name)}"


MANIFEST = Manifest(OFFICIAL + OTHERS, ROWS, tuple(entry.name for entry in OFFICIAL))


def find_file(path: str | Path) -> Path:
    """`path`, or the file that is meant: beside it, same name but for case and a weight file's ending; this is said.

    Raises UserError that names the command to fetch the file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if path.exists():
        return path
    known = MANIFEST.entry(path.name)
    names = {path.name, *((known.name, *known.aliases) if known else ())}
    alike = [other for other in _files_beside(path) if any(_same_file_name(other.name, name) for name in names)]
    if len(alike) == 1:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"{path}: not there; using {alike[0]}", err=True)
        return alike[0]
    if alike:
        raise UserError(f"{path}: does not exist; name one of {', '.join(str(other) for other in alike)}")
    if known is None:
        raise UserError(
            f"{path}: does not exist; name another file (`bash download_models.sh --list`: what is published)"
        )
    raise UserError(f"{path}: does not exist; `{MANIFEST.command(path.name)}` puts {known.name} into {known.folder}/")


def _files_beside(path: Path) -> list[Path]:
    try:
        return sorted(other for other in path.parent.iterdir() if other.is_file())
    except OSError:
        return []


def _same_file_name(one: str, other: str) -> bool:
    (stem, suffix), (other_stem, other_suffix) = (os.path.splitext(name.lower()) for name in (one, other))
    return stem == other_stem and (suffix == other_suffix or {suffix, other_suffix} <= set(_SUFFIXES))
