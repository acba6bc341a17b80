"""Golden cases of xAR: each kind mapped to calls of neon_xar."""

import numpy as np
import torch
from torch import Tensor, nn

from golden.adapters import merges
from golden.case import mismatch
from golden.official.xar import OfficialSchedule, euler, official_lr
from neon_core.backbone import TrainSettings
from neon_core.kl_vae import AutoencoderKL, posterior
from neon_core.schedules import Ema
from neon_core.selftrain import FineTune, snapshot_plan
from neon_run.check.numbers import fill
from neon_xar.backbone import XARBackbone
from neon_xar.flow import cell_guidance, euler_maruyama, guide, sde_times, time_index
from neon_xar.loss import Randomness, drop_labels, logit_normal, noised, velocity_loss
from neon_xar.official import official_labels
from neon_xar.sampler import sample_latents
from neon_xar.vae import SCALE, center_crop, from_uint8, scaled_latent, to_uint8
from neon_xar.xar import CELLS, NULL_CLASS, SIZES, XAR, GatedMLP, Rope, build, from_cells, to_cells

CELL_TOKENS = 64  # of the published grid


def _net(config: dict, **more) -> XAR:
    return fill(XAR(**config, **more))


def rope(case):
    module, x = Rope(2 * case.config["dim"]), case.tensor("x")
    out = {"freqs": module.freqs, "freqs_cos": module.freqs_cos, "freqs_sin": module.freqs_sin, "full": module(x, 0)}
    for cell in range(CELLS):
        for n in (64, 128)[: 1 + (cell > 0)]:
            out[f"s{cell}_n{n}"] = module(x[:, :, :n], CELL_TOKENS * (cell + 1) - n)
    return out


def swiglu(case):
    hidden = [GatedMLP.hidden_width(int(width), case.config["mlp_ratio"]) for width in case.array("dims")]
    net = _net(case.config["model"]).eval()
    with torch.no_grad():
        return {"hidden": np.array(hidden), "mlp": net.encoder_blocks[0].mlp(case.tensor("x"))}


@torch.no_grad()
def pieces(case):
    net, x, t, image = _net(case.config["model"]), case.tensor("x"), case.tensor("t"), case.tensor("img")
    tokens = to_cells(image)
    mask = net.mask[0, 0]
    return {
        "rms_noweight": net.encoder_blocks[0].norm1(x),
        "rms_weight": net.encoder_norm(x),
        "z_proj_ln": net.z_proj_ln(x),
        "time_embed": net.time_embed(t),
        "time_sinusoid": net.time_embed.sinusoid(t),
        "mask_rowsum_visible": (mask == 0).sum(1),
        "mask_counts": torch.stack([(mask == 0).sum(), torch.isneginf(mask).sum()]),
        "clusters": tokens.unflatten(1, (CELLS, -1)).transpose(0, 1),
        "unclusterified": from_cells(tokens),
    }


def _condition(rows: Tensor) -> Tensor:
    """Cluster-major condition rows [4B, D] -> [B, 4, D]."""
    return rows.unflatten(0, (CELLS, -1)).transpose(0, 1)


@torch.no_grad()
def block(case):
    net, x = _net(case.config["model"]), case.tensor("x")
    first = net.encoder_blocks[0].train()
    return {
        "block": first(x, _condition(case.tensor("condition")), mask=net.mask),
        "attn": first.attn(x, mask=net.mask),
    }


def _randomness(case) -> Randomness:
    return Randomness(case.tensor("drop_uniform"), case.tensor("t").view(CELLS, -1), case.tensor("noise"))


def train_loss(case):
    config = case.config
    net, latents, labels, random = (
        _net(config["model"]),
        case.tensor("latents"),
        case.tensor("labels"),
        _randomness(case),
    )
    net.train()
    seen = []
    net.pred.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss = velocity_loss(net, latents, labels, random, net.label_drop_prob)
    loss.backward()
    parameters = dict(net.named_parameters())
    assert list(parameters) == config["parameter_order"]
    out = {
        "loss": loss,
        "model_output": seen[0],
        "grad_norms": torch.stack([parameters[name].grad.norm() for name in config["parameter_order"]]),
        "class_emb_row_grad_norms": net.class_emb.weight.grad[config["class_rows"]].norm(dim=1),
    }
    return out | {"grad_" + name.replace(".", "_"): parameters[name].grad for name in config["full_grads"]}


def train_seeded(case):
    """The original draws from two global generators; ours takes the draws, so they are made here in that order."""
    latents, labels = case.tensor("latents"), case.tensor("labels")
    B, channels = latents.shape[:2]
    net = _net(case.config["model"]).train()
    np.random.seed(case.config["numpy_seed"])
    torch.manual_seed(case.config["torch_seed"])
    drop = torch.rand(B)
    normals = np.random.standard_normal(CELLS * B)
    noise = torch.stack([torch.randn(B, CELL_TOKENS, channels) for _ in range(CELLS)])
    t = logit_normal(torch.from_numpy(normals))
    random = Randomness(drop, t.view(CELLS, B), noise)
    used, k = drop_labels(labels, drop, net.label_drop_prob), time_index(t)
    with torch.no_grad():
        v = net(noised(latents, random.t, noise)[0], used, k.view(CELLS, B).t())
        loss = velocity_loss(net, latents, labels, random, net.label_drop_prob)
    return {
        "loss": loss,
        "drop_uniform": drop,
        "labels_used": used,
        "time_normals": normals,
        "t": t,
        "k": k[:, None, None],
        "noise": noise,
        "model_output_first_token": v[:, ::CELL_TOKENS],
    }


@torch.no_grad()
def dropout(case):
    config, x = case.config, case.tensor("x")
    attn, proj = config["attn_dropout"], config["proj_dropout"]

    def seeded(function):
        torch.manual_seed(config["seed"])
        return function()

    def net(**dropouts):
        return _net(config["model"], **dropouts).train()

    a, p, both = net(attn_dropout=attn), net(proj_dropout=proj), net(attn_dropout=attn, proj_dropout=proj)
    condition = _condition(case.tensor("condition"))
    return {
        "attn_with_attn_dropout": seeded(lambda: a.encoder_blocks[0].attn(x, mask=a.mask)),
        "attn_with_proj_dropout": seeded(lambda: p.encoder_blocks[0].attn(x, mask=p.mask)),
        "mlp_with_proj_dropout": seeded(lambda: p.encoder_blocks[0].mlp(x)),
        "block_with_both": seeded(lambda: both.encoder_blocks[0](x, condition, mask=both.mask)),
        "loss_with_both": seeded(
            lambda: velocity_loss(
                both, case.tensor("latents"), case.tensor("labels"), _randomness(case), both.label_drop_prob
            )
        ),
        "mlp_eval": p.eval().encoder_blocks[0].mlp(x),
    }


def init(case):
    torch.manual_seed(0)
    values = {name: p.detach().double() for name, p in XAR(**case.config["model"]).named_parameters()}
    order = case.config["parameter_order"]
    constant = {name: bool((value == value.flatten()[0]).all()) for name, value in values.items()}
    return {
        "std": torch.stack([values[name].std(correction=0) for name in order]),
        "mean": torch.stack([values[name].mean() if constant[name] else torch.zeros([]).double() for name in order]),
        "abs_max": torch.stack([values[name].abs().max() for name in case.config["bounded"]]),
    }


@torch.no_grad()
def cached_network(case):
    net = _net(case.config["model"]).eval()
    labels, x, x2, context = case.tensor("labels"), case.tensor("x"), case.tensor("x2"), case.tensor("context")
    cache = net.new_cache(len(labels))
    out = {}
    for cell in range(CELLS):
        k = time_index(case.tensor("t")[cell : cell + 1])
        tokens = x[cell]
        if cell:
            tokens, k = torch.cat([context[cell - 1], tokens], dim=1), torch.cat([torch.zeros_like(k), k])
        condition = net.class_emb(labels)[:, None] + net.time_embed(k)
        out[f"first_{cell}"] = net.velocity(tokens, condition, cell, cache)[:, -CELL_TOKENS:]
        out[f"cache_len_{cell}"] = np.array(cache.length)
        out[f"cache_k_{cell}"] = cache.keys[-1][:, :, : cache.length].sum(2)
        k = time_index(case.tensor("t2")[cell : cell + 1])
        out[f"later_{cell}"] = net.velocity(x2[cell], net.class_emb(labels)[:, None] + net.time_embed(k), cell, cache)
    return out


def sample(case):
    net, labels, config = _net(case.config["model"]).eval(), case.tensor("labels"), case.config
    dtypes = []

    def noise():
        for initial, steps in zip(case.tensor("initial_noise"), case.tensor("step_noise"), strict=True):
            yield initial
            yield from steps

    remaining = noise()

    def draw(*shape, dtype):
        dtypes.append(dtype)
        return next(remaining).to(dtype)

    tokens = sample_latents(net, labels, config["num_steps"], config["cfg"], draw)
    state = euler_maruyama(
        lambda x, t, first: x, torch.zeros(1), config["num_steps"], lambda: torch.zeros(1, dtype=dtypes[1])
    )
    return {
        "tokens": tokens,
        "cluster_cfg": np.array([cell_guidance(config["cfg"], cell) for cell in range(CELLS)]),
        "state_is_float64": np.array(int(state.dtype == torch.float64)),
    }


def sample_seeded(case):
    net, labels, config = _net(case.config["model"]).eval(), case.tensor("labels"), case.config
    torch.manual_seed(config["seed"])

    def draw(*shape, dtype):
        return torch.randn(len(labels), *shape, dtype=dtype)

    return {"tokens": sample_latents(net, labels, config["num_steps"], config["cfg"], draw)}


def sampler_toy(case):
    c, latents, labels, context = case.config, case.tensor("latents"), case.tensor("labels"), case.tensor("context")
    y = torch.cat([labels, torch.full_like(labels, NULL_CLASS)]).double()[:, None, None] / 1000
    out = {}
    for number, (cell, g) in enumerate(zip(c["scale_index"], c["cfg_scale"], strict=True)):

        def velocity(x, t, first, cell=cell, g=g):
            x = torch.cat([x, x])
            seen = torch.cat([torch.cat([context, context]), x], dim=1) if first and cell > 0 else x
            v = c["a"] * seen[:, -CELL_TOKENS:].double() + c["b"] * y + c["c"] * np.sin(3 * t)
            if seen.shape[1] > CELL_TOKENS:
                v = v + 0.1 * seen[:, :CELL_TOKENS].double()
            return guide(v, g) if g > 1 else v[: len(labels)]

        noise = iter(case.tensor("step_noise").double())
        out[f"em_{number}"] = euler_maruyama(velocity, latents, c["num_steps"], lambda noise=noise: next(noise))
        out[f"ode_{number}"] = euler(velocity, latents, c["num_steps"])
    return out


def flow_times(case):
    out = {}
    for n in case.array("num_steps").tolist():
        t = sde_times(n)[:-1]
        k = time_index(t)
        out[f"t_{n}"], out[f"int_{n}"] = t.float().double(), k
        out[f"first_call_{n}"] = torch.stack([torch.zeros_like(k[0]), k[0]]).repeat_interleave(2)
    return out


@torch.no_grad()
def kl_vae(case):
    net = fill(AutoencoderKL(**case.config["vae"]))
    moments = net.encode(case.tensor("image"))
    found, clamped = posterior(moments), posterior(case.tensor("moments"))
    decoded = net.decode(case.tensor("tokens") / SCALE)
    return {
        "mean": found.mean,
        "std": found.std,
        "logvar": found.logvar,
        "scaled_latent": scaled_latent(moments, case.tensor("posterior_noise")),
        "decoded": decoded,
        "uint8": to_uint8(decoded).permute(0, 2, 3, 1),
        "clamped_std": clamped.std,
        "clamped_logvar": clamped.logvar,
    }


def uint8(case):
    x = case.tensor("decoded")
    return {"neon": to_uint8(x), "xar_original": to_uint8(x, "round")}


def crop(case):
    size, out = case.config["image_size"], {}
    for name in (key.removeprefix("in_") for key in case.arrays if key.startswith("in_")):
        cropped = center_crop(case.array(name).astype(np.uint8), size)
        out[name] = cropped
        out[f"{name}_norm"] = from_uint8(torch.from_numpy(cropped.transpose(2, 0, 1).copy()))
    return out


def labels(case):
    out = {}
    for row, (num_images, class_num, batch, world) in enumerate(case.array("num_class_batch_world").tolist()):
        found = official_labels(num_images, class_num, batch, world)
        out[f"labels_{row}"], out[f"total_batches_{row}"] = found, np.array(len(found) // (batch * world))
    return out


def lr_schedule(case):
    return {"lr": np.array([official_lr(*row) for row in case.array("lr_minlr_warmup_epoch").tolist()])}


def _closed_form(seed: int, shape: tuple[int, ...]) -> Tensor:
    k = np.arange(np.prod(shape), dtype=np.float64)
    values = np.sin(k * (0.7310 + 0.0137 * seed) + seed).astype(np.float32) * np.float32(1.4142135)
    return torch.from_numpy(values.reshape(shape))


class _GivenDraws(XARBackbone):
    """The backbone with the randomness of its loss handed in, one batch after the other."""

    draws: list[Randomness]

    def self_training_loss(self, x, labels, generator):
        return velocity_loss(self.net, x, labels, self.draws.pop(0), self.net.label_drop_prob)


def finetune(case):
    config, args = case.config, case.config["args"]
    epochs, steps, batch = config["epochs"], config["batches_per_epoch"], args["batch_size"]
    seeds, channels = config["closed_form_seeds"], 16
    each = (epochs, steps, batch)
    moments = _closed_form(seeds["moments"], (*each, 2 * channels, 16, 16)).flatten(0, 1)
    eps = _closed_form(seeds["posterior_noise"], (*each, channels, 16, 16)).flatten(0, 1)
    noise = _closed_form(seeds["noise"], (epochs, steps, CELLS, batch, CELL_TOKENS, channels)).flatten(0, 1)
    drop, t = case.tensor("drop_uniform").flatten(0, 1), case.tensor("t").flatten(0, 1).unflatten(1, (CELLS, batch))
    net = _net(config["model"])
    with torch.device("meta"):
        backbone = _GivenDraws(net, AutoencoderKL())
    backbone.draws = [Randomness(*rows) for rows in zip(drop, t, noise, strict=True)]
    settings = TrainSettings(
        images=epochs * steps * batch,
        batch_size=batch,
        micro_batch_size=batch,
        lr=args["lr"],
        schedule=OfficialSchedule(args["warmup_epochs"], steps * batch, args["min_lr"] / args["lr"]),
        optimizer="adamw",
        betas=tuple(config["betas"]),
        weight_decay=args["weight_decay"],
        clip_norm=args["grad_clip"],
        ema=Ema(decay=args["ema_rate"]),
        snapshot_images=args["save_img_interval"],
    )
    run = FineTune(backbone, settings, torch.device("cpu"))
    parameters = dict(net.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    before, after, losses, lrs, files = {}, [], [], [], {}
    for name, p in parameters.items():
        p.register_post_accumulate_grad_hook(lambda p, name=name: before.__setitem__(name, p.grad.norm()))
    norms = []

    def at_step(*_):
        norms.append(torch.stack(list(before.values())).norm())
        after.append(torch.stack([p.grad.norm() for p in parameters.values()]).norm())

    run.optimizer.register_step_pre_hook(at_step)
    for x, e, own in zip(moments, eps, case.tensor("labels").flatten(0, 1), strict=True):
        lrs.append(run.lr)
        losses.append(run.step([(scaled_latent(x, e), own, torch.Generator().manual_seed(0))]))
        if run.images_seen in snapshot_plan(settings):
            files[run.images_seen] = {name: value.clone() for name, value in run.theta_syn().items()}
    expected = [int(name.split("-")[-1].removesuffix(".pth")) for name in config["expected_files"]]
    assert set(expected) <= set(files) and list(files[expected[0]]) == config["model_ema_keys"]
    ema, order = files[max(expected)], config["parameter_order"]
    groups = {id(p): number for number, group in enumerate(run.optimizer.param_groups) for p in group["params"]}
    change = parameters["class_emb.weight"].detach() - start["class_emb.weight"]
    out = {
        "losses": torch.stack(losses),
        "lrs": np.array(lrs),
        "param_delta_norms": torch.stack([(parameters[name].detach() - start[name]).norm() for name in order]),
        "ema_delta_norms": torch.stack([(ema[name] - start[name]).norm() for name in order]),
        "group_of_parameter": np.array([groups[id(parameters[name])] for name in order]),
        "grad_norm_before_clip": torch.stack(norms),
        "grad_norm_after_clip": torch.stack(after),
        "class_emb_row_delta_norms": change[config["class_rows"]].norm(dim=1),
        "images_seen": np.array(run.images_seen),
        "epoch_in_last_file": np.array((max(expected) - batch) // (steps * batch)),
    }
    return out | {"ema_" + name.replace(".", "_"): ema[name] for name in config["full"]}


def compare_pixels(case, output: str, ours) -> str | None:
    """uint8 of decoded images: at most 1 apart, in at most 0.1 % of the pixels."""
    if output != "uint8":
        return mismatch(case, output, ours)
    gap = np.abs(np.asarray(ours).astype(int) - case.expected[output])
    limit = 0.001 * gap.size
    return None if gap.max() <= 1 and np.count_nonzero(gap) <= limit else f"{output}: off by up to {gap.max()}"


ADAPTERS = {
    "rope": rope,
    "swiglu": swiglu,
    "pieces": pieces,
    "block": block,
    "train_loss": train_loss,
    "train_seeded": train_seeded,
    "dropout": dropout,
    "init": init,
    "cached_network": cached_network,
    "sample": sample,
    "sample_seeded": sample_seeded,
    "sampler_toy": sampler_toy,
    "flow_times": flow_times,
    "kl_vae": kl_vae,
    "to_uint8": uint8,
    "center_crop": crop,
    "labels": labels,
    "lr_schedule": lr_schedule,
    "finetune": finetune,
    "merge": merges.merge_xar,
}
COMPARE = {"kl_vae": compare_pixels}


def KEY_LISTS(name: str, spec: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net: nn.Module = build(spec["model"]) if spec["model"] in SIZES else AutoencoderKL()
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}
