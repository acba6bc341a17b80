"""`neon improve PIPELINE`, with the real diffusers, on a UNet of a few thousand weights."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from core.discs import DETECTOR, discs

from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_metrics.reference import Reference, write_reference
from neon_metrics.statistics import FeatureStatistics
from neon_run.command import neon
from neon_run.pipelines import open_pipeline, pipeline_images, pipeline_loss

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
}  # fmt: skip


def unet(**changes):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**{**UNET, **changes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DDIM pipeline after a short training: far from done, so that a few images show an effect."""
    net, scheduler = unet().train(), diffusers.DDIMScheduler(num_train_timesteps=100)
    optimizer, generator = torch.optim.Adam(net.parameters(), 5e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        value = pipeline_loss(net, discs(64, generator), None, generator, scheduler=scheduler)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("pipeline")
    diffusers.DDIMPipeline(net, scheduler).save_pretrained(path)
    real = DETECTOR(discs(5000, torch.Generator().manual_seed(99)))["features"]
    write_reference(path / "real.npz", Reference.from_statistics(FeatureStatistics(64).update(real)))
    return path


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setattr("neon_metrics.evaluate.open_detector", lambda *given: DETECTOR)


def run(folder, out, *words):
    numbers = ("--num_synthetic", 128, "--images", 128, "--ranking_images", 64, "--batch_size", 32)
    given = (
        "improve",
        folder,
        "--real",
        folder / "real.npz",
        "--out",
        out,
        *numbers,
        "--no_controls",
        "--detector",
        "inception",
        *words,
    )
    result = CliRunner().invoke(neon, [str(word) for word in (*given, "--device", "cpu")])
    return result.exit_code, " ".join(result.output.split())


def test_a_pipeline_is_improved_and_opened_as_any_other(folder, tmp_path, pixels):
    out = tmp_path / "out"
    status, said = run(folder, out, "--steps", 4)
    assert status == 0 and "Neon is better" in said, said
    opened = diffusers.DDIMPipeline.from_pretrained(out / "pipeline")
    expected = read_checkpoint(out / "neon.safetensors").state
    assert all(torch.equal(value, expected[name]) for name, value in opened.unet.state_dict().items())
    assert (out / "pipeline/scheduler/scheduler_config.json").read_bytes() == (
        folder / "scheduler/scheduler_config.json"
    ).read_bytes()
    card = (out / "pipeline/README.md").read_text(encoding="utf-8")
    assert "library_name: diffusers" in card and "Neon" in card
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["second_block"]["neon"]["fid"] < results["second_block"]["base"]["fid"]
    status, said = run(folder, out, "--steps", 5)
    assert status == 2 and "holds a run with another sample" in said


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_images_are_functions_of_their_seeds_and_equal_the_pipelines_own(kind):
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=50)
    pipeline = getattr(diffusers, f"{kind}Pipeline")(unet(), scheduler)
    sample = partial(pipeline_images, pipeline=pipeline, scheduler=scheduler, steps=5)
    images = sample(unet(), [3, 4, 5], None)
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images[[2, 0]], sample(unet(), [5, 3], None))
    own = pipeline(1, generator=torch.Generator().manual_seed(4), num_inference_steps=5).images[0]
    assert torch.equal(images[1, 0], torch.from_numpy(np.array(own.convert("L"))))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_0_for_a_network_that_knows_the_image(prediction):
    """Whatever is predicted, the scheduler itself gets the image back from it."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type=prediction, clip_sample=False)
    images = discs(4, torch.Generator().manual_seed(1))
    x = images.float() / 127.5 - 1

    class Oracle(torch.nn.Module):
        def forward(self, noisy, time):
            a = scheduler.alphas_cumprod[time][:, None, None, None]
            noise = (noisy - a.sqrt() * x) / (1 - a).sqrt()
            given = {"epsilon": noise, "sample": x, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x}[prediction]
            for i in range(len(x)):
                step = scheduler.step(given[i], time[i], noisy[i], generator=torch.Generator().manual_seed(0))
                torch.testing.assert_close(step.pred_original_sample, x[i], rtol=1e-3, atol=1e-3)
            return type("Output", (), {"sample": given})

    value = pipeline_loss(Oracle(), images, None, torch.Generator().manual_seed(2), scheduler=scheduler)
    assert value.item() < 1e-6


def test_other_pipelines_are_refused_in_one_sentence(tmp_path):
    other = {
        "its network wants classes": (unet(num_class_embeds=3), diffusers.DDIMScheduler()),
        "its network also predicts a variance": (unet(out_channels=2), diffusers.DDIMScheduler()),
    }
    for number, (message, parts) in enumerate(other.items()):
        diffusers.DDIMPipeline(*parts).save_pretrained(tmp_path / str(number))
        with pytest.raises(UserError, match=message):
            open_pipeline(str(tmp_path / str(number)), CPU)
    with pytest.raises(UserError, match="gone: cannot be opened as a diffusers pipeline"):
        open_pipeline(str(tmp_path / "gone"), CPU)
    diffusers.ScoreSdeVePipeline(unet(), diffusers.ScoreSdeVeScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is a ScoreSdeVePipeline .*known are DDPMPipeline and DDIMPipeline"):
        open_pipeline(str(tmp_path / "other"), CPU)
