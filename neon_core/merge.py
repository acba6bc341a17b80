"""theta_neon = theta_base - w (theta_syn - theta_base): for tensors, state dicts, a live module, and files.

python -m neon_core.merge base.pth synthetic.safetensors -w 1.5 -o neon.safetensors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from neon_core.errors import UserError
from neon_core.files.atomic import sha256_file
from neon_core.files.checkpoint import describe_mismatch, is_finite, open_checkpoint, pack_metadata
from neon_core.files.manifest import find_file
from neon_core.files.safetensors_file import read_header, write_safetensors


def extrapolate(base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The paper's merge of one tensor, in the dtype of `base`; half precision is computed in float32."""
    if w == 0:
        return base.clone()  # bit for bit, also where base is -0.0 or syn overflows the difference
    exact = torch.promote_types(base.dtype, torch.float32)
    theta_base, theta_syn = base.to(exact), syn.to(base.device, exact)
    theta_neon = theta_base - w * (theta_syn - theta_base)
    return theta_neon.to(base.dtype)


def neon_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """`extrapolate` for numbers with a fraction; whole numbers, and masks (-inf, equal in both), stay as in the base.

    Raises UserError naming the tensor where either side, or the result, is otherwise not finite.
    """
    if not base.is_floating_point():
        return base.clone()
    if not (is_finite(base) and is_finite(syn)):
        if torch.equal(base, syn.to(base.device, base.dtype)):  # false if there is a NaN
            return base.clone()
        culprits = [side for side, tensor in (("base", base), ("synthetic", syn)) if not is_finite(tensor)]
        raise UserError(f"{name}: not finite in the {' and the '.join(culprits)} checkpoint; one of them is broken")
    theta_neon = extrapolate(base, syn, w)
    if not is_finite(theta_neon):
        raise UserError(f"{name}: w = {w:g} leads beyond the range of {base.dtype}; choose a smaller w")
    return theta_neon


# What the official scripts compute, where it differs; for comparison with their outputs.


def official_var_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """VAR: in the tensor's own dtype, whole numbers too (to float32); a base tensor with any infinity is kept whole."""
    return base.clone() if torch.isinf(base).any() else base + w * (base - syn)


def official_imm_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """IMM: floating tensors, only the entries that are finite in both."""
    if not base.is_floating_point() or w == 0:
        return base.clone()
    syn = syn.to(base.dtype)
    return torch.where(torch.isfinite(base) & torch.isfinite(syn), base - w * (syn - base), base)


def official_edm_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """EDM: (1 + w) base - w syn for everything."""
    return (1 + w) * base - w * syn


Rule = Callable[[str, Tensor, Tensor, float], Tensor]
RULES: dict[str, Rule] = {
    "neon": neon_rule,
    "official-var": official_var_rule,
    "official-imm": official_imm_rule,
    "official-edm": official_edm_rule,
}


def neon_merge(
    base: Mapping[str, Tensor], syn: Mapping[str, Tensor], w: float, rule: str = "neon", keep: Collection[str] = ()
) -> dict[str, Tensor]:
    """The merged state dict, in new memory; names in `keep` (buffers, say) are copied from the base.

    Raises UserError naming tensors that are missing, extra, of another shape or not finite. The official rules take
    a missing tensor from the base and drop an extra one, as the scripts do.
    """
    check_w(w)
    check_names(rule, {k: tuple(v.shape) for k, v in base.items()}, {k: tuple(v.shape) for k, v in syn.items()})
    with torch.no_grad():
        return {
            name: RULES[rule](name, value, syn[name], w) if name in syn and name not in keep else value.clone()
            for name, value in base.items()
        }


def check_w(w: float) -> None:
    if not math.isfinite(w):
        raise UserError(f"w = {w}: must be a finite number; the paper's rows use 0.1 to 3")


def check_names(rule: str, base: Mapping[str, tuple], syn: Mapping[str, tuple]) -> None:
    """UserError where the two tables name -> shape do not belong to one network."""
    if rule not in RULES:
        raise UserError(f"--rule {rule}: unknown; choose one of {', '.join(RULES)}")
    if rule != "neon":
        base, syn = ({name: side[name] for name in base if name in syn} for side in (base, syn))
    problems = describe_mismatch("the base", base, "the synthetic checkpoint", syn)
    if problems:
        raise UserError(f"the two checkpoints are not of one network: {problems}")


class NeonWeights:
    """A module whose parameters move along theta_base - w (theta_syn - theta_base).

    Every `set` starts from the two given ends, so moving back and forth does not drift, and `set(0)` is the base bit
    for bit. The ends are held by reference in their own dtype (mapped files stay mapped), or copied to `device` where
    that is given. Buffers are left alone, whole numbers too.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Mapping[str, Tensor],
        syn: Mapping[str, Tensor],
        device: torch.device | str | None = None,
    ):
        parameters = dict(module.named_parameters())
        self.parameters = {name: value for name, value in parameters.items() if value.is_floating_point()}
        shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        for side, state in (("base", base), ("synthetic", syn)):
            found = {name: tuple(state[name].shape) for name in shapes if name in state}
            problems = describe_mismatch("the network", shapes, f"the {side} checkpoint", found)
            if problems:
                raise UserError(f"{type(module).__name__} cannot be moved: {problems}")
        held = self._apart(base), self._apart(syn)
        if device is not None:
            held = tuple({name: value.to(device) for name, value in state.items()} for state in held)
        self.base, self.syn = held
        self.w: float | None = None

    def _apart(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ends, none of them in the memory of the live parameters, which `set` overwrites."""
        live = {value.untyped_storage().data_ptr() for value in self.parameters.values()}
        ends = {name: state[name].detach() for name in self.parameters}
        return {k: v.clone() if v.untyped_storage().data_ptr() in live else v for k, v in ends.items()}

    @torch.no_grad()
    def set(self, w: float) -> None:
        """Move the module to `w`. On an error it is back at the base."""
        check_w(w)
        try:
            for name, parameter in self.parameters.items():
                ends = (state[name].to(parameter.device) for state in (self.base, self.syn))
                parameter.copy_(neon_rule(name, *ends, w))
        except UserError:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.base[name])
            self.w = 0.0
            raise
        self.w = w

    @torch.no_grad()
    def distance(self) -> float:
        """L2 norm of theta_syn - theta_base over the parameters; `w` times this is the length of the step."""
        total = 0.0
        for name, base in self.base.items():
            difference = self.syn[name].to(base.device, torch.float32) - base.to(torch.float32)
            difference = torch.where(torch.isfinite(difference), difference, 0.0)  # masks: inf - inf
            total += difference.square().sum(dtype=torch.float64).item()
        return math.sqrt(total)


def merge_files(base: str | Path, syn: str | Path, w: float, out: str | Path, rule: str = "neon") -> Path:
    """Merge two checkpoints of any container into the safetensors file `out`, one tensor in memory at a time.

    The header of `out` records the inputs with their hashes, w and the rule, and the base's configuration. Raises
    UserError as `neon_merge`, before anything is written wherever names and shapes tell.
    """
    check_w(w)
    out = Path(out)
    theta_base, theta_syn = open_checkpoint(base), open_checkpoint(syn)
    for end in (theta_base, theta_syn):
        if out.exists() and out.samefile(end.path):
            raise UserError(f"-o {out}: is one of the inputs; name another file")
    layouts = theta_base.layout(), theta_syn.layout()
    check_names(rule, *({name: shape for name, (_, shape) in layout.items()} for layout in layouts))

    def merged(name: str) -> Tensor:
        tensor = theta_base.loaders[name]()
        return RULES[rule](name, tensor, theta_syn.loaders[name](), w) if name in theta_syn.loaders else tensor

    def merged_dtype(name: str) -> torch.dtype:
        if name not in theta_syn.loaders:
            return layouts[0][name][0]
        return RULES[rule](name, *(torch.empty(0, dtype=layout[name][0]) for layout in layouts), w).dtype

    layout = {name: (merged_dtype(name), shape) for name, (_, shape) in layouts[0].items()}
    inputs = {
        side: {"file": end.path.name, "sha256": sha256_file(end.path), "metadata": end.metadata}
        for side, end in (("base", theta_base), ("synthetic", theta_syn))
    }
    record = {"neon": {"w": w, "rule": rule, **inputs}}
    if theta_base.container == "safetensors":  # entries as they are: other libraries look for some
        metadata = {**read_header(theta_base.path)[1], **pack_metadata(None, record)}
    else:
        metadata = pack_metadata(theta_base.config, {**theta_base.metadata, **record})
    with torch.no_grad():
        write_safetensors(out, layout, merged, metadata)
    return out


def merge_paths(base: Path, syn: Path, w: float, out: Path, rule: str = "neon") -> None:
    """`merge_files`, or its counterpart for two folders or two LoRA adapters, as the inputs are."""
    from neon_core.files import folders  # which imports this module

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
    type=click.Choice(list(RULES)),
    default="neon",
    show_default=True,
    help="Ours, or that of an official script.",
)
def merge_command(base: Path | None, syn: Path | None, lora: Path | None, w: float, out: Path, rule: str) -> None:
    """BASE and SYN, checkpoints of one network -> base - w (syn - base).

    Files in any published container; folders (diffusers pipelines, sharded checkpoints): every weight file is merged,
    everything else copied; LoRA adapters: the products up @ down are merged.
    """
    if lora is not None:
        from neon_core.files.folders import reverse_adapter

        if base is not None or rule != "neon":
            raise UserError("--lora: takes the place of BASE and SYN, and knows no --rule")
        check_w(w)
        reverse_adapter(lora, w, out)
        click.echo(f"{out} | w={w:g} | lora={lora.name}")
        return
    if base is None or syn is None:
        raise click.UsageError("BASE and SYN are needed, two files or two folders; or --lora ADAPTER")
    check_w(w)
    merge_paths(base, syn, w, out, rule)
    click.echo(f"{out} | w={w:g} | rule={rule} | base={base.name} | syn={syn.name}")


if __name__ == "__main__":
    merge_command()
