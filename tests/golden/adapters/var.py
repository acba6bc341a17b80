"""VAR and its VQVAE: how each kind of golden case maps to a call of neon_var."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from golden.adapters.merges import merge_var
from golden.case import Case, mismatch
from golden.official import var as official_var
from neon_run.check.numbers import fill
from neon_var import loss, official, preprocessing, sampler
from neon_var.quantizer import MultiScaleQuantizer
from neon_var.var import VAR
from neon_var.vqvae import VQVAE, Decoder, Encoder

NOT_SAVED = {"name"}  # labels of the cases, not arguments


def make_vae(case: Case) -> VQVAE:
    return fill(VQVAE(**case.config["VQVAE"]))


def make_var(case: Case, vae: VQVAE) -> VAR:
    """VAR over the codes of `vae`, filled, with the case's overrides."""
    var = fill(VAR(*vae.codes.shape, **var_arguments(case.config["VAR"])))
    override(case, var)
    return var.eval()


def var_arguments(config: dict) -> dict:
    config = dict(config)
    assert not config.pop("drop_rate", 0) and not config.pop("attn_drop_rate", 0), "VAR has no dropout"
    config = {"attn_l2_norm": False} | config  # the official class's default; ours is that of every checkpoint
    return {name: value for name, value in config.items() if not name.startswith(("flash", "fused"))}


@torch.no_grad()
def override(case: Case, var: nn.Module) -> None:
    parameters = dict(var.named_parameters())
    for name in case.arrays:
        if name.startswith("in_override__"):
            parameters[name.removeprefix("in_override__")].copy_(torch.from_numpy(np.array(case.arrays[name])))


def split(tokens: torch.Tensor, patch_nums) -> tuple[torch.Tensor, ...]:
    return torch.split(tokens, [p * p for p in patch_nums], dim=1)


def cat(parts) -> torch.Tensor:
    return torch.cat(list(parts), dim=1)


# Tokenizer


@torch.no_grad()
def vqvae_encode_decode(case: Case) -> dict:
    vae, image = make_vae(case), case.tensor("image")
    f = vae.features(image)
    tokens, f_hats = zip(*vae.quantize.scales(f), strict=True)
    out = {
        "encoder": vae.encoder(image),
        "f": f,
        "var_input": vae.quantize.teacher_input(tokens),
        "reconstruction_from_image": vae.reconstruct(image)[-1],
        "reconstruction_from_tokens": vae.decode_tokens(vae.encode(image))[-1],
        "decoder_unclamped": vae.decoder(vae.post_quant_conv(f_hats[-1])),
    }
    for i, (idx, f_hat) in enumerate(zip(tokens, f_hats, strict=True)):
        out[f"idx_{i}"], out[f"fhat_{i}"] = idx, f_hat
    return out


@torch.no_grad()
def quantizer_variants(case: Case) -> dict:
    out = {}
    for name, arguments in case.config["VectorQuantizer2"].items():
        quantizer = fill(MultiScaleQuantizer(**arguments))
        tokens, f_hats = zip(*quantizer.scales(case.tensor(f"{name}_f")), strict=True)
        stored = case.expected[f"{name}_fhat"].shape[1]  # all scales, or the last alone
        out[f"{name}_idx"] = cat(tokens)
        out[f"{name}_fhat"] = torch.stack(f_hats[-stored:], dim=1)
        out[f"{name}_var_input"] = quantizer.teacher_input(tokens)
        maps = [quantizer.maps(t) for t in tokens]
        *_, out[f"{name}_fhat_growing"] = quantizer.accumulate(maps, all_to_max_scale=False)
    return out


@torch.no_grad()
def quantizer_phi_index(case: Case) -> dict:
    out = {}
    for arguments in case.config["VectorQuantizer2"]:
        name = arguments["name"]
        quantizer = fill(MultiScaleQuantizer(**{k: v for k, v in arguments.items() if k not in NOT_SAVED}))
        S = len(quantizer.patch_nums)
        maps = [quantizer.maps(t) for t in split(case.tensor(f"{name}_tokens"), quantizer.patch_nums)]
        out[f"{name}_index"] = np.array([quantizer.phi_index(i, S) for i in range(S)])
        *_, out[f"{name}_fhat"] = quantizer.accumulate(maps)
    return out


@torch.no_grad()
def vae_encoder_decoder(case: Case) -> dict:
    out = {}
    for name, arguments in case.config["Encoder/Decoder"].items():
        out[f"{name}_z"] = fill(Encoder(**arguments)).eval()(case.tensor(f"{name}_image"))
        arguments = {k: v for k, v in arguments.items() if k != "double_z"}
        out[f"{name}_image"] = fill(Decoder(**arguments)).eval()(case.tensor(f"{name}_z"))
    return out


@torch.no_grad()
def vqvae_image_lists(case: Case) -> dict:
    vae, image, wide = make_vae(case), case.tensor("image"), case.tensor("image_nonsquare")
    scales, sides = case.config["v_patch_nums_override"], case.config["v_patch_nums_nonsquare"]
    tokens = vae.encode(image)
    out = {
        "tokens": cat(tokens),
        "tokens_override": cat(vae.encode(image, scales)),
        "tokens_nonsquare": cat(vae.encode(wide, sides)),
    }
    lists = {
        "rec": vae.reconstruct(image),
        "rec_override": vae.reconstruct(image, scales),
        "rec_nonsquare": vae.reconstruct(wide, sides),
        "same": vae.decode_tokens(tokens, same_shape=True),
        "growing": vae.decode_tokens(tokens, same_shape=False),
    }
    for name, images in lists.items():
        assert len(images) == case.config["list_lengths"][name]
        out |= {f"{name}_{i}": x[..., ::3, ::3] for i, x in enumerate(images)}
    return out


# Transformer


@torch.no_grad()
def var_teacher_forced(case: Case) -> dict:
    vae = make_vae(case)
    var = make_var(case, vae)
    labels, uniform = case.tensor("labels"), case.tensor("label_drop_uniform")
    tokens = split(case.tensor("tokens"), vae.patch_nums)
    inputs = vae.quantize.teacher_input(tokens)
    out = {"logits": var(labels, inputs, uniform), "var_input": inputs}
    for name in case.expected:
        if name.startswith("logits_prog_si_"):
            scales = int(name.rsplit("_", 1)[1]) + 1
            out[name] = var(labels, vae.quantize.teacher_input(tokens[:scales]), uniform)
    return out


def progressive_cut(case: Case) -> dict:
    vae = make_vae(case)
    var = make_var(case, vae)
    out = {}
    for i in range(len(vae.patch_nums)):
        with torch.no_grad():
            scales = list(vae.quantize.scales(case.tensor("f")))[: i + 1]
            inputs = vae.quantize.teacher_input([tokens for tokens, _ in scales])
        logits = var(case.tensor("labels"), inputs, case.tensor("label_drop_uniform"))
        out[f"tokens_{i}"], out[f"fhat_last_{i}"] = cat(t for t, _ in scales), scales[-1][1]
        out[f"var_input_{i}"], out[f"logits_{i}"] = inputs, logits.detach()
        if f"word_embed_weight_grad_{i}" in case.expected:
            gradient = torch.autograd.grad(logits.square().sum(), [var.word_embed.weight, var.word_embed.bias])
            out[f"word_embed_weight_grad_{i}"], out[f"word_embed_bias_grad_{i}"] = gradient
    return out


# Training


class Trainer:
    """The official step out of the project's parts: tokens, loss, clipped AdamW."""

    def __init__(self, case: Case, weight_decay: float = 0.0, lr: float = 0.0):
        self.vae = make_vae(case)
        self.var = make_var(case, self.vae).train()
        optimizer = case.config.get("optimizer", {"betas": (0.9, 0.95), "eps": 1e-8})
        self.groups = loss.parameter_groups(self.var, weight_decay)
        self.optimizer = torch.optim.AdamW(self.groups, lr=lr, betas=tuple(optimizer["betas"]), eps=optimizer["eps"])
        self.stages = official_var.ProgressiveStages()
        self.label_smoothing = case.config["label_smooth"]
        self.clip = case.config.get("grad_clip", 0.0)

    def gradients(self, x, labels, uniform=None, keep=None, prog_si: int = -1, warmup_steps: float = 1.0):
        """(loss, tokens, logits, w_p); the gradients are in the parameters."""
        weight = self.stages.step(prog_si, warmup_steps)
        scales = prog_si + 1 if prog_si >= 0 else len(self.vae.patch_nums)
        with torch.no_grad():
            tokens = self.vae.encode(x, num_scales=scales)
            inputs = self.vae.quantize.teacher_input(tokens)
        logits = self.var(labels, inputs, uniform, keep)
        value = official_var.progressive_loss(
            logits, cat(tokens), self.var.sizes, prog_si, weight, self.label_smoothing
        )
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        return value.detach(), cat(tokens), logits.detach(), weight

    def step(self) -> torch.Tensor:
        limit = self.clip if self.clip > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.var.parameters(), limit)
        self.optimizer.step()
        return norm


def var_train_step(case: Case) -> dict:
    config = case.config
    trainer = Trainer(case, config["optimizer"]["weight_decay"], config["optimizer"]["lr"])
    trainer.stages.last_prog_si = config["last_prog_si_before"]
    parameters = dict(trainer.var.named_parameters())
    assert list(parameters) == config["parameter_order"]
    value, tokens, logits, weight = trainer.gradients(
        case.tensor("image"), case.tensor("labels"), case.tensor("label_drop_uniform"), case.tensor("drop_path_keep"),
        config["prog_si"], config["prog_wp_it"],
    )  # fmt: skip
    assert abs(weight - config["prog_wp"]) < 1e-9
    out = {"loss": value, "tokens": tokens, "logits": logits}
    out["grad_norms"] = torch.stack([p.grad.norm() for p in parameters.values()])
    out["grad_norm_total"] = trainer.step()
    return out | {f"after__{name}": p.detach() for name, p in parameters.items()}


def compare_train_step(case: Case, output: str, ours) -> str | None:
    """Adam's first step moves an element by lr times the sign of its gradient: where the golden move is neither 0 nor
    a whole lr the sign is uncertain, and the tolerance there is 2 lr (`notes` of the cases)."""
    if not output.startswith("after__"):
        return mismatch(case, output, ours)
    golden, ours, lr = case.expected[output], ours.numpy(), case.config["optimizer"]["lr"]
    vae = make_vae(case)
    before = dict(make_var(case, vae).named_parameters())[output.removeprefix("after__")].detach().numpy()
    moved = np.abs(golden - before)
    uncertain = (moved > 0.001 * lr) & (moved < 0.95 * lr)
    if np.any(np.abs(ours - golden)[uncertain] > 2 * lr):
        return f"{output}: an uncertain element is more than 2 lr off"
    return mismatch(case, output, np.where(uncertain, golden, ours))


def var_train_step_multi(case: Case) -> dict:
    config = case.config
    trainer = Trainer(case)
    parameters = dict(trainer.var.named_parameters())
    assert list(parameters) == config["parameter_order"]
    decayed = {id(p) for p in trainer.groups[0]["params"]}
    assert [name for name, p in parameters.items() if id(p) in decayed] == config["decayed_parameters"]
    after, losses, totals, norms = [], [], [], []
    for t, (lr, decay) in enumerate(zip(config["lr"], config["weight_decay"], strict=True)):
        for group, wd in zip(trainer.optimizer.param_groups, (decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = lr, wd
        x = preprocessing.to_unit_range(case.tensor("images_u8")[t])
        value, *_ = trainer.gradients(
            x, case.tensor("labels")[t], case.tensor("label_drop_uniform")[t], case.tensor("drop_path_keep")[t],
            config["prog_si"],
        )  # fmt: skip
        losses.append(value)
        totals.append(trainer.step())
        picked = zip(parameters.values(), case.tensor("pick"), strict=True)
        after.append(torch.stack([p.detach().flatten()[index] for p, index in picked]))
        norms.append(torch.stack([p.detach().norm() for p in parameters.values()]))
    stacked = {"after": after, "loss": losses, "grad_norm_total": totals, "param_norms": norms}
    return {name: torch.stack(values) for name, values in stacked.items()}


def progressive_warmup(case: Case) -> dict:
    trainer = Trainer(case)
    x = preprocessing.to_unit_range(case.tensor("image_u8"))
    out = {"loss": [], "prog_wp": [], "prog_it": [], "first_prog": []}
    for prog_si, steps in zip(case.config["prog_si"], case.config["prog_wp_it"], strict=True):
        value, _, _, weight = trainer.gradients(x, case.tensor("labels"), prog_si=prog_si, warmup_steps=steps)
        out["loss"].append(value)
        out["prog_wp"].append(weight)
        out["prog_it"].append(trainer.stages.prog_it)
        out["first_prog"].append(int(trainer.stages.first_prog))
    return {name: np.array(values) for name, values in out.items()}


def finetune_schedule(case: Case) -> dict:
    out = {}
    for name, run in case.config.items():
        lr = run["tlr"] if run["target_lr"] is None else run["target_lr"]
        loop = official_var.OfficialLoop(run["glb_batch_size"], run["total_images"], run["save_interval"], lr)
        rates, saves, stopped = [], [], []
        for _ in range(run["epochs"]):
            stopped.append(0)
            for _ in range(run["iters_per_epoch"]):
                images = loop.images
                step = loop.step()
                if step is None:
                    stopped[-1] = 1
                    break
                rates.append(step[0])
                saves += [images] * step[1]
            if stopped[-1]:
                break
        out[f"{name}_lr"], out[f"{name}_saved_at"] = np.array(rates), np.array(saves)
        out[f"{name}_stopped"] = np.array(stopped)
    return out


# Sampling


class GivenTokens:
    """Noise that returns given tokens, scale by scale."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def draw(self, probabilities):
        return next(self.tokens)


class GivenExponentials(sampler.BatchNoise):
    """The official generator, whose exponentials are given."""

    def __init__(self, generator, exponentials):
        super().__init__(generator)
        self.exponentials = iter(exponentials)

    def exponential(self, like):
        super().exponential(like)  # the generator moves on
        return next(self.exponentials)


def settings(config: dict) -> dict:
    return {k: config[k] for k in ("cfg", "top_k", "top_p", "more_smooth") if config.get(k) is not None}


@torch.no_grad()
def run_sampler(case: Case, labels, noise, config: dict, models=None) -> dict:
    """The outputs that any sampling case may ask for."""
    vae, var = models or (None, None)
    vae = vae or make_vae(case)
    var = var or make_var(case, vae)
    out, tokens = {}, []
    for i, result in enumerate(sampler.sample_scales(var, vae.quantize, labels, noise, **settings(config))):
        tokens.append(result.tokens)
        out |= {
            f"raw_logits_{i}": result.raw_logits,
            f"guided_logits_{i}": result.guided_logits,
            f"filtered_logits_{i}": result.filtered_logits,
            f"fhat_{i}": result.f_hat,
            f"next_map_{i}": result.following,
        }
    f_hat = result.f_hat
    return out | {"tokens": cat(tokens), "f_hat": f_hat, "image": (vae.decode(f_hat) + 1) / 2}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def var_cached_cfg(case: Case) -> dict:
    tokens = split(case.tensor("tokens"), case.config["VQVAE"]["v_patch_nums"])
    return run_sampler(case, case.tensor("labels"), GivenTokens(tokens), case.config)


def var_greedy(case: Case) -> dict:
    noise = sampler.BatchNoise(generator(case.config["g_seed"]))
    return run_sampler(case, case.tensor("labels"), noise, case.config)


def var_more_smooth(case: Case) -> dict:
    exponentials = [case.tensor(f"exponential_{i}") for i in range(len(case.config["VQVAE"]["v_patch_nums"]))]
    noise = GivenExponentials(generator(case.config["g_seed"]), exponentials)
    return run_sampler(case, case.tensor("labels"), noise, case.config)


def var_seeded_sampling(case: Case) -> dict:
    vae = make_vae(case)
    var = make_var(case, vae)
    out = {}
    for name, run in case.config["runs"].items():
        rng, label = generator(run["g_seed"]), run["label_B"]
        if isinstance(label, str):
            label = case.tensor(label.removeprefix("in_"))
        labels = official_var.labels_for(label, case.config["B"], var.num_classes, rng)
        result = run_sampler(case, labels, sampler.BatchNoise(rng), run, (vae, var))
        for key in ("tokens", "f_hat", "image"):
            out[f"{name}_{key}"] = result[key]
        if f"{name}_image" in case.expected:
            out[f"{name}_image"] = result["image"][: len(case.expected[f"{name}_image"])]
        out[f"{name}_labels"] = labels
    return out


def sample_with_top_k_top_p(case: Case) -> dict:
    out = {}
    for run in case.config["runs"]:
        filtered = sampler.filter_logits(case.tensor("logits"), run["top_k"], run["top_p"])
        out[f"keep_{run['run']}"] = torch.isfinite(filtered)
        probabilities = filtered.softmax(dim=-1)
        out[f"idx_{run['run']}"] = sampler.multinomial(probabilities, generator(run["seed"]), run["num_samples"])
    return out


def sample_filter_edges(case: Case) -> dict:
    out = {}
    for run in case.config["runs"]:
        kept = torch.isfinite(sampler.filter_logits(case.tensor("logits"), run["top_k"], run["top_p"])).flatten(0, 1)
        out[f"keep_{run['run']}"], out[f"count_{run['run']}"] = kept.long(), kept.sum(dim=-1)
    return out


def compare_filter_edges(case: Case, output: str, ours) -> str | None:
    """Masks count only in the `mask_rows` of their run; elsewhere a tie was split, which depends on the sort."""
    if output.startswith("keep_"):
        run = next(r for r in case.config["runs"] if f"keep_{r['run']}" == output)
        golden, rows = case.expected[output], run["mask_rows"]
        ours = np.where(np.isin(np.arange(len(golden)), rows)[:, None], np.asarray(ours), golden)
    return mismatch(case, output, ours)


# Data and labels


def picture(array: np.ndarray, mode: str, palette: np.ndarray | None) -> Image.Image:
    image = Image.fromarray(array.astype(np.uint8))
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(palette.astype(np.uint8).tobytes())
    return image


def both_transforms(path: Path, resolution: int, factor: float, flip: bool, offset) -> tuple:
    """(resized size, training tensor, validation tensor) of one file."""
    with Image.open(path) as image:
        image.load()
        large = preprocessing.enlarge(image, resolution, factor, flip)
        upright = preprocessing.enlarge(image, resolution, factor)
    center = official_var.center_crop_offset(*upright.shape[-2:], resolution)
    train = preprocessing.to_unit_range(official_var.crop(large, offset, resolution))
    return large.shape[-2:], train, preprocessing.to_unit_range(official_var.crop(upright, center, resolution))


def data_preprocessing(case: Case) -> dict:
    config, out = case.config, {}
    count = len(config["crop_top_left"])
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            path = Path(folder) / config["folders"][i] / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            picture(case.array(f"image_{i}"), "RGB", None).save(path)
        items = official_var.list_class_folders(Path(folder))
        for path, _ in items:
            i = int(path.stem)
            _, out[f"train_{i}"], out[f"val_{i}"] = both_transforms(
                path, config["final_reso"], config["mid_reso"], False, config["crop_top_left"][i]
            )
        out["labels"] = np.array([label for _, label in items])
    return out


def data_preprocessing_odd(case: Case) -> dict:
    images, out = case.config["images"], {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = {}
        for i, spec in enumerate(images):
            path = Path(folder) / spec["folder"] / spec["file"]
            path.parent.mkdir(exist_ok=True)
            palette = case.array(f"palette_{i}") if case.has(f"palette_{i}") else None
            picture(case.array(f"image_{i}"), spec["mode"], palette).save(path)
            path.with_suffix(".txt").write_text("not a picture", encoding="utf-8")
            numbers[path] = i
        items = official_var.list_class_folders(Path(folder))
        for run in case.config["runs"]:
            r, sizes, labels = run["run"], [None] * len(images), [None] * len(images)
            for path, label in items:
                i = numbers[path]
                flip = run["hflip"] and run["flipped"][i]
                sizes[i], train, val = both_transforms(
                    path, run["final_reso"], run["mid_reso"], flip, run["crop_top_left"][i]
                )
                labels[i] = label
                out[f"train_float_{r}_{i}"] = train
                out[f"train_{r}_{i}"] = ((train + 1) * 127.5).round().long()
                out[f"val_{r}_{i}"] = ((val + 1) * 127.5).round().long()
            out[f"resized_hw_{r}"], out[f"labels_{r}"] = np.array(sizes), np.array(labels)
            out[f"order_{r}"] = np.array([numbers[path] for path, _ in items])
    return out


def batch_sampler(case: Case) -> dict:
    out = {}
    for name, run in case.config.items():
        for rank in range(run["world_size"]):
            epochs = [
                official_var.rank_batches(
                    run["dataset_len"], run["glb_batch_size"], epoch, rank, run["world_size"],
                    run["same_seed_for_all_ranks"],
                )
                for epoch in range(run["epochs"])
            ]  # fmt: skip
            assert len(epochs[0]) == run["iters_per_epoch"]
            out[f"{name}_rank{rank}"] = np.concatenate(epochs)
    return out


def labels_and_png(case: Case) -> dict:
    out = {}
    for run in case.config["labels"]:
        out[f"labels_{run['run']}"] = official.balanced_labels(
            run["num_images"], run["num_classes"], run["seed"], run["global_seed"]
        )
    for name in case.expected:
        if name.startswith("png_"):
            out[name] = sampler.to_uint8(case.tensor("image_" + name.removeprefix("png_"))).permute(1, 2, 0)
    return out


ADAPTERS = {
    "vqvae_encode_decode": vqvae_encode_decode,
    "quantizer_variants": quantizer_variants,
    "quantizer_phi_index": quantizer_phi_index,
    "vae_encoder_decoder": vae_encoder_decoder,
    "vqvae_image_lists": vqvae_image_lists,
    "progressive_cut": progressive_cut,
    "progressive_warmup": progressive_warmup,
    "var_train_step_multi": var_train_step_multi,
    "var_more_smooth": var_more_smooth,
    "var_seeded_sampling": var_seeded_sampling,
    "sample_with_top_k_top_p": sample_with_top_k_top_p,
    "sample_filter_edges": sample_filter_edges,
    "data_preprocessing": data_preprocessing,
    "data_preprocessing_odd": data_preprocessing_odd,
    "batch_sampler": batch_sampler,
    "batch_sampler_small": batch_sampler,
    "labels_and_png": labels_and_png,
    "finetune_schedule": finetune_schedule,
    "neon_merge": merge_var,
}
ADAPTERS |= {f"var_teacher_forced_{v}": var_teacher_forced for v in ("plain", "saln", "nol2")}
ADAPTERS |= {f"var_cached_cfg_{v}": var_cached_cfg for v in ("plain", "saln", "nol2")}
ADAPTERS |= {f"var_greedy_{v}": var_greedy for v in ("plain", "saln", "nol2")}
ADAPTERS |= {f"var_train_step_{v}": var_train_step for v in ("plain", "saln", "nol2", "progressive")}

COMPARE = {f"var_train_step_{v}": compare_train_step for v in ("plain", "saln", "nol2", "progressive")}
COMPARE |= {"sample_filter_edges": compare_filter_edges}


def KEY_LISTS(file_name: str, spec: dict) -> dict:
    """Names and shapes of the published networks, built without memory."""
    with torch.device("meta"):
        config = spec["config"]
        net = VQVAE(**config) if "z_channels" in config else VAR(**var_arguments(config))
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
