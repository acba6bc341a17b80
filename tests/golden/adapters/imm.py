"""IMM: networks, wrapper, samplers, loss, latents and orders."""

import dataclasses
import json
import re
import zipfile
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch

from golden.adapters import merges, pickles
from golden.case import Case, mismatch
from golden.official import imm as official
from neon_core.backbone import Backbone, TrainSettings
from neon_core.data_order import windowed_shuffle
from neon_core.kl_vae import AutoencoderKL, posterior, to_diffusers_names, to_ldm_names
from neon_core.merge import neon_merge
from neon_core.schedules import Ema
from neon_core.selftrain import FineTune
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.image_set import ImageSet
from neon_imm.dit import DiT, sincos_grid
from neon_imm.labels import image_name, label_plan, labels_from_names
from neon_imm.latent_set import encode_images
from neon_imm.latents import RgbCodec, VaeCodec, to_pixels
from neon_imm.loss import IMMLoss
from neon_imm.precond import IMMPrecond, NoiseSchedule, build_network
from neon_imm.sampler import pushforward, restart, time_grid
from neon_imm.songunet import SongUNet, positional_table
from neon_run.check.numbers import fill, tensor_for
from neon_run.merging.rules import find_rule

PRECISION = {"f32": torch.float32, "f64": torch.float64}


def filled_net(config: dict, **overrides) -> IMMPrecond:
    return fill(IMMPrecond(**{**config, **overrides})).eval()


def maybe(case: Case, name: str) -> torch.Tensor | None:
    return case.tensor(name) if case.has(name) else None


def column(case: Case, name: str) -> torch.Tensor:
    """A time per sample, [B, 1, 1, 1]."""
    return case.tensor(name).reshape(-1, 1, 1, 1)


# Networks.


@torch.no_grad()
def dit(case: Case) -> dict:
    net = fill(DiT(**case.config["model"])).train(case.config.get("train", False))
    for name in ("t_freqs", "s_freqs"):
        if case.has(name):
            getattr(net, f"{name[0]}_embedder").freqs.copy_(case.tensor(name))
    if "dropout_seed" in case.config:
        torch.manual_seed(case.config["dropout_seed"])
    labels, u_class = maybe(case, "labels"), maybe(case, "u_class")
    return {"y": net(case.tensor("x"), case.tensor("t"), maybe(case, "s"), class_labels=labels, u_class=u_class)}


@torch.no_grad()
def dit_parts(case: Case) -> dict:
    net = fill(DiT(**case.config["model"])).eval()
    tokens, c = net.x_embedder(case.tensor("x")), case.tensor("c")
    final = net.final_layer(tokens, c)
    return {
        "tokens": tokens,
        "freq_embedding": net.t_embedder.sinusoid(case.tensor("t")),
        "t_embedding": net.t_embedder(case.tensor("t")),
        "block0": net.blocks[0](tokens, c),
        "final": final,
        "unpatchified": net.unpatchify(final),
        "label_index": net.y_embedder.index(case.tensor("labels")),
    }


def dit_init(case: Case) -> dict:
    net = DiT(**case.config["model"])
    return {
        "pos_embed": net.pos_embed,
        "is_nonzero": np.array([float(bool(p.any())) for p in net.parameters()]),
        "pos_embed_xl_rows": sincos_grid(1152, 16)[case.tensor("rows")],
    }


def init_spread(case: Case) -> dict:
    torch.manual_seed(case.config["seed"])
    state = IMMPrecond(**case.config["net"]).state_dict()
    weights = [state[name] for name in case.config["names"]]
    stds = [w.double().std(correction=0).item() for w in weights]
    peaks = [w.abs().max().item() / std if std else 0.0 for w, std in zip(weights, stds, strict=True)]
    return {"std": np.array(stds), "peak": np.array(peaks)}


@torch.no_grad()
def songunet(case: Case) -> dict:
    net = fill(SongUNet(**case.config["model"])).eval()
    t, s = case.tensor("t"), maybe(case, "s")
    labels, augment = maybe(case, "labels"), maybe(case, "augment_labels")
    emb = net.embed(t, s, labels, augment)
    out = {
        "y": net(case.tensor("x"), t, s, class_labels=labels, augment_labels=augment),
        "noise_embedding_swapped": positional_table(t, net.noise_channels),
        "emb": emb,
    }
    if "affine_of" in case.config:
        side, name = case.config["affine_of"].split(".")
        out["affine"] = getattr(net, side)[name].affine(emb)
    return out


# The wrapper.


def schedules(case: Case) -> dict:
    schedule = NoiseSchedule(case.config["noise_schedule"], case.config["eps"], case.config["T"])
    out = {"nt_low_high": np.array([schedule.nt_low, schedule.nt_high])}
    for suffix, dtype in PRECISION.items():
        t, nt = case.tensor("t").to(dtype), case.tensor("nt").to(dtype)
        alpha, sigma = schedule.alpha_sigma(t)
        inside = t[(case.tensor("t") > 0) & (case.tensor("t") < 1)]
        values = {"alpha": alpha, "sigma": sigma, "logsnr": schedule.logsnr(t), "log_nt": schedule.log_nt(t),
                  "nt_to_t": schedule.nt_to_t(nt), "logsnr_prime": schedule.logsnr_prime(inside)}  # fmt: skip
        out.update({f"{name}_{suffix}": value for name, value in values.items()})
    return out


@torch.no_grad()
def precond(case: Case) -> dict:
    net = filled_net(case.config["net"])
    x, y, noise, labels = (maybe(case, name) for name in ("x", "y", "noise", "labels"))
    t, s = column(case, "t"), column(case, "s")
    noised = net.add_noise(y, t, noise)
    out = {
        "F": net.network(x, t, s, net.label_rows(labels, x.device), False),
        "forward_f64": net(x.double(), t, s, labels),
        "forward_f32": net(x.float(), t.float(), s.float(), labels),
        "add_noise": noised,
        "ddim_noise": net.add_noise(y, s, noise),
        "ddim": net.ddim(noised, y, t, s),
    }
    for g in case.config["cfg_scales"]:
        name = "cfg_none" if g is None else f"cfg_{g}"
        out[name] = net.cfg_forward(x.double(), case.tensor("t0"), case.tensor("s0"), labels, g)
    return out


class StubNetwork(torch.nn.Module):
    """Keeps its arguments and returns given rows."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, x, t, s, class_labels=None):
        self.seen = {"net_x": x, "time1": t, "time2": s, "labels": class_labels}
        return self.rows[: len(x)]


@torch.no_grad()
def net_stub(case: Case) -> dict:
    net = IMMPrecond(**case.config["net"]).eval()
    x, labels = case.tensor("x"), case.tensor("labels")
    t, s, t0, s0 = column(case, "t"), column(case, "s"), case.tensor("t0"), case.tensor("s0")
    scales, out = case.config["cfg_scales"], {}
    for suffix, dtype in (("f32_F", torch.float32), ("bf16_F", torch.bfloat16)):
        net.model = stub = StubNetwork(case.tensor("F").to(dtype))
        out[f"forward_{suffix}"] = net(x, t, s, labels)
        out.update({name: stub.seen[name] for name in ("net_x", "time1", "time2")})
        for g in scales:
            out[f"cfg_{g}_{suffix}"] = net.cfg_forward(x, t0, s0, labels, g)
            out.update({f"cfg_{name}": value for name, value in stub.seen.items()})
        out[f"cfg_f32_state_{suffix}"] = net.cfg_forward(x.float(), t0.float(), s0.float(), labels, scales[0])
        net.cfg_forward(x, t0, s0, None, None)
        out["nolabel_labels"] = stub.seen["labels"]
    return out


@torch.no_grad()
def autocast_dit(case: Case) -> dict:
    net = filled_net(case.config["net"])
    plain = filled_net(case.config["net"], mixed_precision=None)
    x, labels, t, s = case.tensor("x"), case.tensor("labels"), column(case, "t"), column(case, "s")
    F = net.network(x, t, s, net.label_rows(labels, x.device), False)
    with torch.autocast("cpu", torch.bfloat16):
        under_outer = plain(x, t, s, labels)
    return {
        "F": F.float(),
        "F_is_bfloat16": np.array(float(F.dtype == torch.bfloat16)),
        "forward": net(x, t, s, labels),
        "forward_force_fp32": net(x, t, s, labels, force_fp32=True),
        "forward_none_under_outer_autocast": under_outer,
    }


# Samplers.


def run_grid(schedule: NoiseSchedule, run: dict, dtype: torch.dtype) -> torch.Tensor:
    kind = run.get("discretization") or "mid_nt"
    return time_grid(schedule, kind, run.get("num_steps") or 1, run.get("mid_nt") or (), dtype)


def t_grid(case: Case) -> dict:
    schedule = NoiseSchedule(case.config["noise_schedule"], case.config["eps"], case.config["T"])
    out = {}
    for prefix, dtype in (("luma", torch.float64), ("neon", torch.float32)):
        runs = {f"{kind}_{n}": {"discretization": kind, "num_steps": n}
                for kind in ("uniform", "edm") for n in case.config["num_steps"]}  # fmt: skip
        for mid in case.config["mid_nt"]:
            runs["mid_" + ("none" if mid is None else "_".join(str(nt) for nt in mid))] = {"mid_nt": mid}
        for name, run in runs.items():
            grid = run_grid(schedule, run, dtype)
            out[f"{prefix}_{name}"] = torch.stack([grid[:-1], grid[1:]], dim=1)
    return out


def sample_pushforward(case: Case) -> dict:
    net = filled_net(case.config["net"])
    out = {}
    for run in case.config["runs"]:
        grid = run_grid(net.schedule, run, PRECISION[run["precision"]])
        out[run["name"]] = pushforward(net, case.tensor("latents"), grid, maybe(case, "labels"), run.get("cfg_scale"))
    return out


def sample_restart(case: Case) -> dict:
    net = filled_net(case.config["net"])
    out = {}
    for run in case.config["runs"]:
        grid = run_grid(net.schedule, run, PRECISION[run.get("precision", "f64")])
        noises, labels = case.tensor("noises"), maybe(case, "labels")
        out[run["name"]] = restart(net, case.tensor("latents"), grid, noises, labels, run.get("cfg_scale"))
    return out


# The loss.


def loss_settings(config: dict) -> IMMLoss:
    assert config.get("sample_repeat", 1) == 1, "sample_repeat other than 1 is broken in the release"
    return IMMLoss(**{name: value for name, value in config.items() if name != "sample_repeat"})


def kernel_weight(case: Case) -> dict:
    config = case.config
    names = ("noise_schedule", "f_type", "T", "eps", "sigma_data")
    shape = {
        "img_resolution": 4,
        "img_channels": 1,
        "model_type": "DiT",
        "hidden_size": 8,
        "num_heads": 1,
        "depth": 0,
        "num_classes": 1,
    }
    net = IMMPrecond(**shape, **{name: config[name] for name in names if name in config})
    loss = IMMLoss(a=config["a"], b=config["b"])
    t, s = case.tensor("t"), case.tensor("s")
    return {"w": loss.kernel_weight(net, t, s), "wout": loss.outer_weight(net, t)}


def sample_trs(case: Case) -> dict:
    net = case.config["net"]
    schedule = NoiseSchedule(net.get("noise_schedule", "fm"), net.get("eps", 0.0), net.get("T", 0.994))
    times = loss_settings(case.config["loss"]).sample_times(schedule, case.tensor("u_t"), case.tensor("u_s"))
    return dict(zip(("t", "r", "s"), times, strict=True))


def mmd(case: Case) -> dict:
    f_st = case.tensor("f_st").requires_grad_(True)
    loss, sims = loss_settings(case.config["loss"]).moment_distance(
        f_st, case.tensor("f_sr"), case.tensor("w"), case.tensor("wout")
    )
    loss.mean().backward()
    return {"loss": loss.detach(), "grad": f_st.grad, **sims}


def given_loss(case: Case, loss: IMMLoss, net: IMMPrecond, step=slice(None)) -> tuple[torch.Tensor, dict]:
    """The loss of the case's random numbers; `step` picks one of several."""

    def pick(name: str) -> torch.Tensor | None:
        return case.tensor(name)[step] if case.has(name) else None

    return loss.from_draws(
        net, pick("images"), pick("labels"), u_t=pick("u_t"), u_s=pick("u_s"), noise=pick("noise"),
        u_drop=pick("u_drop"), augment_labels=pick("augment_labels"),
    )  # fmt: skip


def whole_loss(case: Case) -> dict:
    net = filled_net(case.config["net"]).train().requires_grad_(True)
    if "dropout_seed" in case.config:
        torch.manual_seed(case.config["dropout_seed"])
    loss, logs = given_loss(case, loss_settings(case.config["loss"]), net)
    loss.mean().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    norms = [grads[name].double().norm().item() for name in case.config["grad_names"]]
    return {
        "loss": loss.detach(),
        "grad_norm": np.array(norms),
        **{f"log_{name}": value for name, value in logs.items()},
        **{f"grad/{name}": grads[name] for name in case.config["full_grads"]},
    }


def nan_loss(case: Case) -> dict:
    net = IMMPrecond(**case.config["net"])
    loss, out = loss_settings(case.config["loss"]), {}
    for name in ("a", "b"):
        raw = case.tensor(f"raw_{name}")
        groups, B = len(raw), len(raw) * loss.matrix_size
        images = torch.zeros(B, net.img_channels, net.img_resolution, net.img_resolution)
        with patch.object(IMMLoss, "moment_distance", lambda *_, raw=raw: (raw, {})):
            out[f"loss_{name}"], logs = loss.from_draws(
                net, images, None, u_t=torch.full([groups], 0.7), u_s=torch.full([groups], 0.5), noise=images
            )
        out[f"log_{name}"] = logs["loss"]
    return out


class GivenDraws(Backbone):
    """A backbone whose loss takes step k's random numbers from the case; `x` is k."""

    def __init__(self, case: Case):
        self.case, self.net = case, filled_net(case.config["net"])
        self.loss = loss_settings(case.config["loss"])

    def self_training_loss(self, x, labels, generator):
        return given_loss(self.case, self.loss, self.net, int(x))[0].mean()


def train_steps(case: Case) -> dict:
    config, backbone = case.config, GivenDraws(case)
    optimizer = config["optimizer"]
    batch = case.array("images").shape[1]
    settings = TrainSettings(
        images=batch * config["steps"], batch_size=batch, micro_batch_size=batch, lr=optimizer["lr"],
        optimizer=optimizer["class_name"].rsplit(".", 1)[1].lower(), betas=tuple(optimizer["betas"]),
        eps=optimizer["eps"], weight_decay=optimizer.get("weight_decay", 0.0), ema=Ema(decay=config["ema_beta"]),
    )  # fmt: skip
    run = FineTune(backbone, settings, torch.device("cpu"))
    losses = [run.step([(torch.tensor(k), None, torch.Generator())]).item() for k in range(config["steps"])]
    net, ema = backbone.net.state_dict(), run.theta_syn()
    out = {"loss": np.array(losses)}
    for name in config["watch"]:
        out[f"net/{name}"], out[f"ema/{name}"] = net[name], ema[name]
    return out


# Latents.


def filled_vae(config: dict) -> AutoencoderKL:
    """Filled under its diffusers names and shapes."""
    vae = AutoencoderKL.from_diffusers_config(config)
    shapes = {name: tuple(value.shape) for name, value in to_diffusers_names(vae.state_dict()).items()}
    vae.load_state_dict(
        to_ldm_names({name: torch.from_numpy(tensor_for(name, shape)) for name, shape in shapes.items()})
    )
    return vae.eval()


@torch.no_grad()
def vae(case: Case) -> dict:
    net = filled_vae(case.config["vae"])
    if case.has("quant_conv_bias"):
        net.quant_conv.bias.copy_(case.tensor("quant_conv_bias"))
    moments = net.encode(case.tensor("img"))
    gaussian = posterior(moments)
    out = {"enc_moments": moments, "enc_mean": gaussian.mean, "enc_std": gaussian.std, "enc_logvar": gaussian.logvar}
    if case.has("z"):
        out["decoded"] = net.decode(case.tensor("z"))
    return out


def codec(case: Case, vae) -> VaeCodec:
    """The settings under their names in the published configuration."""
    config = case.config["encoder"]
    names = {"raw_mean": "raw_mean", "raw_std": "raw_std", "final_mean": "final_mean", "final_std": "final_std",
             "batch_size": "chunk"}  # fmt: skip
    return VaeCodec(vae, **{ours: config[theirs] for theirs, ours in names.items() if theirs in config})


def stability_encoder(case: Case) -> dict:
    ours = codec(case, filled_vae(case.config["vae"]))
    return {
        "scale": ours.scale,
        "bias": ours.bias,
        "mean_std": ours.moments(case.tensor("pixels").to(torch.uint8)),
        "latents": ours.scale_moments(case.tensor("mean_std"), case.tensor("noise")),
        "raw_latents": ours.unscale(case.tensor("lat")),
        "pixels": ours.decode(case.tensor("lat")).long(),
    }


def nearly_equal_pixels(case: Case, output: str, ours) -> str | None:
    """The case's text: at most 0.2 percent of the decoded values may differ, by 1."""
    if output != "pixels":
        return mismatch(case, output, ours)
    difference = np.abs(np.asarray(ours) - case.expected[output])
    if difference.max() <= 1 and np.mean(difference > 0) <= 0.002:
        return None
    return f"{output}: {np.mean(difference > 0):.2%} of the values differ, by up to {difference.max()}"


class StubVae(torch.nn.Module):
    """z -> tanh of its first three channels; keeps what it got."""

    def __init__(self):
        super().__init__()
        self.parts = []

    def decode(self, z):
        self.parts.append(z)
        return torch.tanh(z[:, :3])


def stability_decode8(case: Case) -> dict:
    stub = StubVae()
    ours = codec(case, stub)
    pixels = official.decode(ours, case.tensor("mean_std"), case.tensor("noise"))
    rgb = case.tensor("rgb")
    assert torch.equal(official.decode(ours, rgb), rgb)
    chunks = np.array([len(part) for part in stub.parts])
    return {"vae_input": torch.cat(stub.parts), "chunks": chunks, "pixels": pixels.long()}


def to_uint8(case: Case) -> dict:
    rgb = RgbCodec()
    return {
        "stability": to_pixels(case.tensor("x4")).long(),
        "rgb": rgb.decode(case.tensor("x3")).long(),
        "rgb_encoded": rgb.moments(case.tensor("pixels").to(torch.uint8)),
    }


def latent_zip(case: Case) -> dict:
    config, folder = case.config, case.folder
    expected_listing = config["labels_json_of_create_labels"]
    assert labels_from_names(config["png_names_in_sorted_order"]) == expected_listing
    with TemporaryDirectory() as name:
        images, dest = Path(name, "images"), Path(name, "latents.zip")
        images.mkdir()
        for file, pixels in zip(config["png_names_in_sorted_order"], case.array("png_pixels"), strict=True):
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(images / file)
        (images / "dataset.json").write_text(json.dumps(expected_listing), encoding="utf-8")
        vae = filled_vae(config["vae"])
        encode_images(images, dest, VaeCodec(vae, factor=vae.stride), torch.device("cpu"))
        with zipfile.ZipFile(dest) as ours, zipfile.ZipFile(folder / case.spec.get("zip", "latents.zip")) as theirs:
            assert ours.namelist() == theirs.namelist() == config["zip_members"]
            assert sorted({entry.compress_type for entry in ours.infolist()}) == config["compress_types"]
            assert ours.read("dataset.json") == theirs.read("dataset.json")
            assert json.loads(ours.read("dataset.json")) == config["dataset_json"]
        latents = ImageSet(dest)
        return {"images": latents.images(range(len(latents))), "labels": latents.label_rows}


def dataset_options(case: Case) -> dict:
    out = {}
    for run in case.config["runs"]:
        options = {key: value for key, value in run.items() if key != "name"}
        latents = ImageSet(case.folder / case.config["zip"], **options)
        values = {"source_index": latents.indices, "flipped": latents.flipped.astype(np.int64),
                  "images": latents.images(range(len(latents))), "labels": latents.label_rows}  # fmt: skip
        out.update({f"{run['name']}_{key}": value for key, value in values.items()})
    return out


# Orders, pickles, merges.


def infinite_sampler(case: Case) -> dict:
    ranks, draws = case.config["num_replicas"], case.config["draws"]
    order = list(islice(windowed_shuffle(case.config["length"], case.config["seed"]), ranks * draws))
    return {f"rank{rank}": np.array(order[rank::ranks]) for rank in range(ranks)}


def label_order(case: Case) -> dict:
    classes, world = case.config["num_classes"], case.config["world_size"]
    labels = label_plan(classes * case.config["per_class_count"], classes)
    ids = official.numbers_in_class(labels)
    names = [image_name(int(k), int(i)) for k, i in zip(labels, ids, strict=True)]
    assert labels_from_names(names)["labels"] == sorted([n, int(k)] for n, k in zip(names, labels, strict=True))
    out = {}
    for rank in range(world):
        out[f"labels_rank{rank}"], out[f"ids_rank{rank}"] = labels[rank::world], ids[rank::world]
    return out


def build(checkpoint) -> IMMPrecond:
    net = build_network(checkpoint.config)
    load_strict(net, checkpoint)
    return net.eval()


def merged_forward(case: Case) -> dict:
    base, aux = (read_checkpoint(case.folder / case.config[name]) for name in ("base", "aux"))
    out = {}
    for name in case.expected:
        state = neon_merge(base.state, aux.state, float(name.removeprefix("w")), rule=find_rule("official-imm"))
        net = build(dataclasses.replace(base, state=state))
        steps = re.search(r"(\d+) uniform steps, cfg_scale ([\d.]+)", case.spec["what"])  # stated nowhere else
        grid = time_grid(net.schedule, "uniform", int(steps[1]))
        out[name] = pushforward(net, case.tensor("latents"), grid, maybe(case, "labels"), float(steps[2]))
    return out


ADAPTERS = {
    **dict.fromkeys(
        ("dit_forward", "dit_variant", "dit_single_t_no_s", "dit_fourier", "dit_dropout", "dit_class_dropout"), dit
    ),
    "dit_parts": dit_parts,
    "dit_init": dit_init,
    "init_spread": init_spread,
    "songunet": songunet,
    "schedules": schedules,
    "precond": precond,
    "net_stub": net_stub,
    "autocast_dit": autocast_dit,
    "t_grid": t_grid,
    "pushforward": sample_pushforward,
    "restart": sample_restart,
    "kernel_weight": kernel_weight,
    "sample_trs": sample_trs,
    "mmd": mmd,
    "loss": whole_loss,
    "nan_loss": nan_loss,
    "train_steps": train_steps,
    "vae": vae,
    "vae_clamp": vae,
    "stability_encoder": stability_encoder,
    "stability_decode8": stability_decode8,
    "to_uint8": to_uint8,
    "latent_zip": latent_zip,
    "dataset_options": dataset_options,
    "infinite_sampler": infinite_sampler,
    "label_plan": label_order,
    "pickle": lambda case: pickles.read_imm_pickle(case, build),
    "merge": merges.merge_imm,
    "merged_forward": merged_forward,
}
COMPARE = {"stability_encoder": nearly_equal_pixels}


def KEY_LISTS(file: str, spec: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        if "sd_vae" not in file:
            state = IMMPrecond(**spec["config"]).state_dict()
        elif file == "keys_sd_vae_ldm.json":
            kwargs = {ours: spec["config"][theirs] for ours, theirs in LDM_ARGUMENTS.items()}
            state = AutoencoderKL(**kwargs).state_dict()
        else:
            state = to_diffusers_names(AutoencoderKL.from_diffusers_config(spec["config"]).state_dict())
    return {name: tuple(value.shape) for name, value in state.items()}


LDM_ARGUMENTS = {
    "embed_dim": "embed_dim", "ch_mult": "ch_mult", "ch": "ch", "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions", "z_channels": "z_channels", "in_channels": "in_channels",
    "out_channels": "out_ch",
}  # fmt: skip
