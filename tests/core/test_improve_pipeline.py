"""`neon improve PIPELINE`, with the real diffusers, on pipelines of a few thousand weights."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from core.discs import DETECTOR, discs

from neon_core.merge import neon_merge
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_metrics.reference import Reference, write_reference
from neon_metrics.statistics import FeatureStatistics
from neon_run.command import neon
from neon_run.improvement import Result, improve
from neon_run.low_rank import factors_of
from neon_run.pipelines.command import Chosen, add_lora, improve_pipeline
from neon_run.pipelines.kinds import KINDS, Opened, open_pipeline
from neon_run.pipelines.losses import Noising, pipeline_loss
from neon_run.pipelines.results import write_result
from neon_run.pipelines.sampling import Sampling, pipeline_images

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
tiny = pytest.importorskip("core.tiny_pipelines")
CPU = torch.device("cpu")
STEPS = 50  # of every schedule here
DDIM = partial(diffusers.DDIMScheduler, num_train_timesteps=STEPS)


def opened_of(pipeline, folder=Path("gone")):
    """As `open_pipeline` gives it, without files."""
    kind = next(kind for kind in KINDS if type(pipeline).__name__ in kind.pipelines)
    pipeline.set_progress_bar_config(disable=True)
    return Opened(kind, pipeline, folder)


def train(opened, steps=150):
    """A short training: far from done, so that a few images show an effect of Neon."""
    net, generator = opened.network.train(), torch.Generator().manual_seed(0)
    noising, optimizer = Noising.of(opened.pipeline.scheduler), torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(steps):
        value = pipeline_loss(net, discs(64, generator), None, generator, opened=opened, noising=noising)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    net.eval()


def write_statistics(path, detector, images):
    statistics = FeatureStatistics(detector.num_features).update(detector(images)["features"])
    write_reference(path, Reference.from_statistics(statistics))
    return path


def run(monkeypatch, detector, source, real, out, *words):
    monkeypatch.setattr("neon_metrics.evaluate.open_detector", lambda *given: detector)
    numbers = ("--num_synthetic", 128, "--images", 128, "--ranking_images", 64, "--batch_size", 32, "--no_controls")
    given = ("improve", source, "--real", real, "--out", out, *numbers, "--detector", "inception", "--device", "cpu")
    result = CliRunner().invoke(neon, [str(word) for word in (*given, *words)])
    return result.exit_code, " ".join(result.output.split())


# Unconditional, from beginning to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    opened = opened_of(diffusers.DDIMPipeline(tiny.unet(), DDIM()))
    train(opened)
    path = tmp_path_factory.mktemp("pipeline")
    opened.pipeline.save_pretrained(path / "base")
    write_statistics(path / "real.npz", DETECTOR, discs(5000, torch.Generator().manual_seed(99)))
    return path


def test_a_pipeline_is_improved_and_opened_as_any_other(folder, tmp_path, monkeypatch):
    base, out = folder / "base", tmp_path / "out"
    status, said = run(monkeypatch, DETECTOR, base, folder / "real.npz", out, "--steps", 4)
    assert status == 0 and "Neon is better" in said, said
    opened = diffusers.DDIMPipeline.from_pretrained(out / "pipeline")
    expected = read_checkpoint(out / "neon.safetensors").state
    assert all(torch.equal(value, expected[name]) for name, value in opened.unet.state_dict().items())
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["second_block"]["neon"]["fid"] < results["second_block"]["base"]["fid"]
    status, said = run(monkeypatch, DETECTOR, base, folder / "real.npz", out, "--steps", 5)
    assert status == 2 and "holds a run with another sample" in said


# Samplers and losses of every scheduler

UNCONDITIONAL = {
    "DDPM": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
    "DDIM": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
    "DPM": (diffusers.DDPMPipeline, diffusers.DPMSolverMultistepScheduler),
    "Euler": (diffusers.DDPMPipeline, diffusers.EulerDiscreteScheduler),
    "flow": (diffusers.DDPMPipeline, diffusers.FlowMatchEulerDiscreteScheduler),
}


def sampler_of(name, net, steps, **settings):
    pipeline, scheduler = UNCONDITIONAL[name]
    opened = opened_of(pipeline(net, scheduler(num_train_timesteps=1000, **settings)))
    return opened, partial(pipeline_images, opened=opened, sampling=Sampling(opened.pipeline.scheduler, steps))


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_images_are_functions_of_their_seeds_and_equal_the_pipelines_own(name):
    opened, sample = sampler_of(name, tiny.unet(), 4)
    images = sample(tiny.unet(), [3, 4, 5], None)
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images[[2, 0]], sample(tiny.unet(), [5, 3], None))
    if name != "Euler":  # which the pipeline's own call does not know: the next test
        own = opened.pipeline(1, generator=torch.Generator().manual_seed(4), num_inference_steps=4).images[0]
        assert torch.equal(images[1, 0], torch.from_numpy(np.array(own.convert("L"))))


class Gaussian(diffusers.UNet2DModel):
    """Predicts as the best network does for images of independent normal pixels, standard deviation 0.25 around 0."""

    noising: Noising

    def forward(self, x, time):
        n = self.noising
        place = (n.time - time).abs().argmin()
        signal, noise = n.signal[place], n.noise[place]
        image = x * signal * 0.25**2 / (signal**2 * 0.25**2 + noise**2)
        e = (x - signal * image) / noise
        wanted = {"epsilon": e, "sample": image, "v_prediction": signal * e - noise * image, "flow": e - image}
        return type("Output", (), {"sample": wanted[n.prediction]})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_samplers_and_losses_belong_together(name, prediction):
    """With the best prediction the sampler gives the images' distribution: the network means what the loss teaches."""
    if name == "flow" and prediction != "epsilon":
        pytest.skip("flow has one prediction")
    settings = {} if name == "flow" else {"prediction_type": prediction}
    net = Gaussian(**tiny.UNET)
    opened, sample = sampler_of(name, net, 100, **settings)
    net.noising = Noising.of(opened.pipeline.scheduler)
    pixels = sample(net, list(range(32)), None).float() / 127.5 - 1
    assert pixels.mean().abs() < 0.02 and abs(pixels.std() / 0.25 - 1) < 0.15


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_the_loss_is_0_for_a_network_that_knows_the_image(name):
    scheduler = UNCONDITIONAL[name][1](num_train_timesteps=STEPS)
    images, noising = discs(4, torch.Generator().manual_seed(1)), Noising.of(scheduler)
    x, seen = images.float() / 127.5 - 1, {}

    class Oracle(torch.nn.Module):
        def forward(self, noisy, time):
            place = (noising.time[:, None] == time).float().argmax(0)
            signal, noise = (level[place].view(-1, 1, 1, 1) for level in (noising.signal, noising.noise))
            seen["e"], seen["noisy"], seen["time"] = (noisy - signal * x) / noise, noisy, time
            return type("Output", (), {"sample": seen["e"] - x if name == "flow" else seen["e"]})

    opened = opened_of(UNCONDITIONAL[name][0](tiny.unet(), scheduler))
    given = {"opened": opened, "noising": noising}
    assert pipeline_loss(Oracle(), images, None, torch.Generator().manual_seed(2), **given).item() < 1e-6
    if name not in ("DPM", "Euler"):  # which know the noise only of the times that they sample at
        e, time = seen["e"], seen["time"]
        theirs = scheduler.scale_noise(x, time, e) if name == "flow" else scheduler.add_noise(x, e, time)
        torch.testing.assert_close(theirs, seen["noisy"], rtol=1e-4, atol=1e-4)


# Classes


class Colours:
    """The mean colour of each quarter of an image: few features, so that few images have a covariance."""

    name, num_features, num_classes, official, device = "colours", 12, 0, False, CPU

    def __call__(self, images):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}


COLOURS = Colours()


def test_a_dit_is_sampled_by_class_and_trained_on_latents(tmp_path):
    opened = opened_of(tiny.dit_pipeline())
    sample = partial(pipeline_images, opened=opened, sampling=Sampling(opened.pipeline.scheduler, 3, guidance=2.0))
    net = tiny.dit_pipeline().transformer
    images = sample(net, [3, 4, 5], torch.tensor([7, 8, 7]))
    assert images.shape == (3, 3, 8, 8) and torch.equal(images[[2]], sample(net, [5], torch.tensor([7])))
    assert not torch.equal(images[[2]], sample(net, [5], torch.tensor([9])))
    noising, generator = Noising.of(opened.pipeline.scheduler), torch.Generator().manual_seed(0)
    value = pipeline_loss(net, images, torch.tensor([7, 8, 7]), generator, opened=opened, noising=noising)
    value.backward()
    variance = net.proj_out_2.weight.grad.view(2, 2, 4, -1)[:, :, 2:]
    assert value.item() > 0 and not variance.any(), "no loss on what is predicted of the variance"
    assert not any(parameter.grad is not None for parameter in opened.pipeline.vae.parameters())


def test_the_command_runs_a_dit(tmp_path, monkeypatch):
    tiny.dit_pipeline().save_pretrained(tmp_path / "base")
    real = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    statistics = write_statistics(tmp_path / "real.npz", COLOURS, real)
    words = ("--steps", 1, "--guidance", 1, "--num_synthetic", 32, "--images", 32, "--ranking_images", 16)
    status, said = run(monkeypatch, COLOURS, tmp_path / "base", statistics, tmp_path / "out", *words)
    assert status == 0 and ("Neon is better" in said or "the base is kept" in said), said
    names = {path.name.split("_label")[1] for path in (tmp_path / "out/synthetic").rglob("*.png")}
    assert names == {f"{label}.png" for label in range(32)}


# Text

PROMPTS = ("a disc", "b")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text-to-image pipeline as it is on the hub: with a card, and its network once more in a single file."""
    path = tmp_path_factory.mktemp("text")
    tiny.text_pipeline(path / "words").save_pretrained(path / "base")
    (path / "base" / "old.ckpt").write_bytes(b"the network once more")
    card = "---\nlicense: mit\ntags: [a]\n---\n# A base\n"
    (path / "base" / "README.md").write_text(card, encoding="utf-8")
    (path / "prompts.txt").write_text("a disc\n\nb\n", encoding="utf-8")
    return path


def darkness(images):
    return images.float().mean().item()


def test_a_text_to_image_lora_is_trained_reversed_and_opened_at_weight_1(text, tmp_path, monkeypatch):
    out, snapshots = tmp_path / "out", []

    def taken(net, **given):
        """The whole run, and then w = 1 whatever its search found: this network has learnt nothing to be improved."""
        result = improve(net, **given)
        (base,), (snapshot,) = out.glob("base-*.safetensors"), (out / "finetune").glob("snapshot-*.safetensors")
        ends = [read_checkpoint(path).state for path in (base, snapshot)]
        snapshots.append(ends[1])
        write_checkpoint(tmp_path / "neon.safetensors", neon_merge(*ends, 1.0))
        return replace(result, improved=True, w=1.0, checkpoint=tmp_path / "neon.safetensors")

    monkeypatch.setattr("neon_run.pipelines.command.improve", taken)
    chosen = Chosen(steps=2, guidance=3.0, prompts=text / "prompts.txt", rank=4)
    few = {"num_synthetic": 32, "images": 32, "ranking_images": 16, "batch_size": 16, "micro_batch_size": 16}
    options = {"score": darkness, "lr": 0.01, "distance": 0.1, "controls": False, **few}
    improve_pipeline(str(text / "base"), out, "cpu", chosen, **options)

    # The adapter in the pipeline makes the images of the merged network.
    merged = tiny.text_unet()
    add_lora(merged, 4)
    merged.load_state_dict(read_checkpoint(tmp_path / "neon.safetensors").state)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(text / "base")
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    given = {"opened": opened_of(pipeline), "sampling": Sampling(pipeline.scheduler, 2, 3.0, PROMPTS)}
    labels, own = torch.arange(4) % 2, pipeline.unet
    plain = pipeline_images(own, [0, 1, 2, 3], labels, **given)
    expected = pipeline_images(merged, [0, 1, 2, 3], labels, **given)
    pipeline.register_modules(unet=own)
    pipeline.load_lora_weights(out / "adapter")
    images = pipeline_images(own, [0, 1, 2, 3], labels, **given)
    assert (images.int() - expected.int()).abs().max() <= 1 < (images.int() - plain.int()).abs().max()

    # theta_neon = theta_base - w (theta_syn - theta_base) of whole weights.
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fresh = tiny.text_unet()
    add_lora(fresh, 4)
    pairs = {pair.frozen[0].replace("base_layer.", ""): pair.change(snapshots[0]) for pair in factors_of(fresh)}
    assert pairs and all(change.any() for change in pairs.values())
    for name, value in pipeline.unet.state_dict().items():
        wanted = before[name].double() - pairs.get(name, 0)
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)

    card = (out / "adapter/README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "load_lora_weights" in card and not (out / "pipeline").exists()


def test_the_folder_has_the_new_network_and_every_other_file_as_it_was(text, tmp_path, capsys):
    changed = {name: value + 1 for name, value in tiny.text_unet().state_dict().items()}
    write_checkpoint(tmp_path / "neon.safetensors", changed)
    result = Result(1.0, 2.0, 1.0, 0.1, True, tmp_path / "neon.safetensors", tmp_path, {"distance": "FID"})
    path = write_result(open_pipeline(str(text / "base"), CPU), result, str(text / "base"), tmp_path, adapter=False)
    opened = diffusers.StableDiffusionPipeline.from_pretrained(path)
    assert all(torch.equal(value, changed[name]) for name, value in opened.unet.state_dict().items())
    files = {file.relative_to(text / "base") for file in (text / "base").rglob("*") if file.is_file()}
    other = {Path("unet/diffusion_pytorch_model.safetensors"), Path("README.md")}
    for file in files - other - {Path("old.ckpt")}:
        assert (path / file).read_bytes() == (text / "base" / file).read_bytes(), file
    assert {file.relative_to(path) for file in path.rglob("*") if file.is_file()} == files - {Path("old.ckpt")}
    assert "old.ckpt of the base not copied" in capsys.readouterr().err
    assert "license: mit" in (path / "README.md").read_text(encoding="utf-8")


# What is refused


def saved(folder, pipeline):
    pipeline.save_pretrained(folder)
    return str(folder)


def ddpm(scheduler=None, **changes):
    return diffusers.DDPMPipeline(tiny.unet(**changes), scheduler or diffusers.DDPMScheduler())


BAD_PIPELINES = {
    "its network wants classes": lambda: ddpm(num_class_embeds=3),
    "its network also predicts a variance": lambda: ddpm(out_channels=2),
    "sets use_dynamic_shifting, whose loss": lambda: ddpm(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ),
    "sets timestep_type, whose loss": lambda: ddpm(diffusers.EulerDiscreteScheduler(timestep_type="continuous")),
    "predicts flow_prediction; known are epsilon, v_prediction, sample$": lambda: ddpm(
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")
    ),
    "its network has 10 classes; a DiTPipeline is for 1000": lambda: tiny.dit_pipeline(num_embeds_ada_norm=10),
    r"is a DiTPipeline \(scheduler DDPMScheduler.*; known are DDPMPipeline of a UNet2DModel with .*call "
    "neon_run.improve for others": lambda: tiny.dit_pipeline(diffusers.DDPMScheduler()),
    r"is a ScoreSdeVePipeline \(scheduler ScoreSdeVeScheduler, unet UNet2DModel\)": lambda: (
        diffusers.ScoreSdeVePipeline(tiny.unet(), diffusers.ScoreSdeVeScheduler())
    ),
}


@pytest.mark.parametrize("message", BAD_PIPELINES)
def test_other_pipelines_are_refused_in_one_sentence(message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_pipeline(saved(tmp_path, BAD_PIPELINES[message]()), CPU)
    assert "\n" not in error.value.message


def test_a_scheduler_that_a_pipeline_would_replace_by_another_is_refused(tmp_path):
    """A DDIMPipeline makes a DDIMScheduler of any other, also of one whose network predicts a flow."""
    saved(tmp_path, diffusers.DDIMPipeline(tiny.unet(), DDIM()))
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"][1] = "FlowMatchEulerDiscreteScheduler"
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"is a DDIMPipeline .scheduler FlowMatchEulerDiscreteScheduler"):
        open_pipeline(str(tmp_path), CPU)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone: cannot be opened as a diffusers pipeline"):
        open_pipeline(str(tmp_path / "gone"), CPU)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("text", [], "--prompts: .* makes images of texts; name a file with one prompt per line"),
        ("text", ["--prompts", "EMPTY"], "holds no prompt; write one per line"),
        ("text", ["--prompts", "gone.txt"], "--prompts gone.txt: cannot be read"),
        ("text", ["--prompts", "EMPTY", "--full", "--rank", 4], "--rank: is of a LoRA, and --full trains all weights"),
        ("other", ["--guidance", 2], "--guidance: .* is a DDIMPipeline, which has none; leave it out"),
        ("other", ["--prompts", "EMPTY"], "--prompts: .* is a DDIMPipeline, which has none"),
        ("other", ["--full"], "--full: .* is a DDIMPipeline, which has none"),
        ("other", ["--rank", 4], "--rank: .* is a DDIMPipeline, which has none"),
    ],
)
def test_flags_that_do_not_fit_the_pipeline_are_refused(kind, words, message, folder, text, tmp_path, monkeypatch):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    source = (text if kind == "text" else folder) / "base"
    words = [empty if word == "EMPTY" else word for word in words]
    status, said = run(monkeypatch, COLOURS, source, folder / "real.npz", tmp_path / "out", *words)
    assert status == 2 and re.search(message, said), said
    assert not (tmp_path / "out").exists()
