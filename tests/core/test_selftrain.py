"""The loop: micro batches, averaging, gradient rules, snapshots, and the errors it must raise before training."""

import dataclasses
import json
import math
import zipfile

import pytest
import torch
from core.pico import TRAIN, PicoBackbone
from launch import own_group
from needs import SHARDS

from neon_core.backbone import TrainSettings
from neon_core.prepared import TrainingData
from neon_core.schedules import Constant, Ema, LinearRamp, RampThenCosine
from neon_core.selftrain import FineTune, find_snapshots, self_train, snapshot_plan
from neon_files.errors import UserError

CPU = torch.device("cpu")


def settings(**changes) -> TrainSettings:
    return dataclasses.replace(TRAIN, **changes)


def data(num=12) -> TrainingData:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 3, 8, 8), generator=g, dtype=torch.uint8)
    return TrainingData(lambda items: images[torch.from_numpy(items)], torch.arange(num) % 4, num)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def stream(seed=1):
    return torch.Generator().manual_seed(seed)


def batch(num=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, 8, 8, generator=g), torch.zeros(num, dtype=torch.int64), stream(seed)


def test_without_dropout_cutting_the_batch_changes_no_gradient():
    class Still(PicoBackbone):
        def self_training_loss(self, x, labels, generator):
            return (self.net(torch.ones(len(x), 8), labels) - x).square().mean()

    x, labels, _ = batch(8)
    ends = []
    for micro in (8, 4, 2):
        run = FineTune(Still.fresh(dropout=0.0), settings(micro_batch_size=micro, schedule=Constant()), CPU)
        run.step([(x[i : i + micro], labels[i : i + micro], stream()) for i in range(0, 8, micro)])
        ends.append(run.backbone.net.out.weight.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-4, atol=1e-7)


@pytest.fixture
def group():
    with own_group():
        yield


@pytest.mark.parametrize("declared", [True, False])
def test_parameters_that_a_step_leaves_out_must_be_declared(group, declared):
    backbone = PicoBackbone.fresh()
    backbone.net.spare = torch.nn.Parameter(torch.zeros(3))
    backbone.unused_parameters = declared
    run = FineTune(backbone, settings(), CPU)
    run.step([batch()])
    if declared:
        run.step([batch()])
    else:
        with pytest.raises(RuntimeError, match="find_unused_parameters"):
            run.step([batch()])


@SHARDS
def test_weights_that_are_not_contiguous_can_be_sharded(group):
    rule = settings(schedule=Constant(), ema=Ema(decay=0.5))
    plain = FineTune(Convolved.laid_out(torch.channels_last), rule, CPU)
    sharded = FineTune(Convolved.laid_out(torch.channels_last), rule, CPU, mode="fsdp")
    for run in (plain, sharded):
        run.step([batch(8, 1)])
    sharded.load_state_dict(plain.state_dict())
    for run in (plain, sharded):
        run.step([batch(8, 2)])
    ours, theirs = sharded.theta_syn(), plain.theta_syn()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_dropout_follows_the_micro_batch_and_leaves_the_default_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    values = []
    for seed in (1, 1, 2):
        run = FineTune(PicoBackbone.fresh(dropout=0.5), settings(), CPU)
        x, labels, _ = batch(2)
        values.append(float(run.step([(x, labels, stream(seed))])))
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_average_follows_its_definition_and_is_what_is_published():
    run = FineTune(PicoBackbone.fresh(), settings(ema=Ema(decay=0.75), schedule=Constant()), CPU)
    expected = run.backbone.net.hidden.weight.detach().clone()
    for seed in range(3):
        run.step([batch(2, seed)])
        expected = 0.75 * expected + 0.25 * run.backbone.net.hidden.weight.detach()
    torch.testing.assert_close(run.theta_syn()["hidden.weight"], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(run.theta_syn()["mask"], run.backbone.net.mask)


class Convolved(PicoBackbone):
    """With a weight of four dimensions, which may lie in memory in two ways."""

    @classmethod
    def laid_out(cls, memory_format):
        backbone = cls.fresh()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            backbone.net.conv = torch.nn.Conv2d(3, 3, 3, padding=1).to(memory_format=memory_format)
        return backbone

    def self_training_loss(self, x, labels, generator):
        z = torch.randn(len(x), 8, generator=generator)
        return (self.net.conv(self.net(z, labels)) - x).square().mean()


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("restored", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_a_restored_state_lies_in_memory_as_its_parameters_do(saved, restored):
    """EDM's weights are channels_last on GPUs only; the fused Adam reads moments in the order of the weights."""
    rule = settings(optimizer="adam", ema=Ema(decay=0.5), schedule=Constant())
    first, second = (FineTune(Convolved.laid_out(layout), rule, CPU) for layout in (saved, restored))
    for seed in range(3):
        first.step([batch(8, seed)])
    second.load_state_dict(first.state_dict())
    for run in (first, second):
        run.step([batch(8, 3)])
    weight = second.backbone.net.conv.weight
    assert second.optimizer.state[weight]["exp_avg"].stride() == weight.stride() == second.ema[-2].stride()
    ours, theirs = second.theta_syn(), first.theta_syn()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight, first.backbone.net.conv.weight, rtol=1e-5, atol=1e-7)


def test_halflife_warmup_and_rampup_of_the_average():
    assert Ema(halflife_images=100).beta(0, 50) == pytest.approx(0.5**0.5)
    assert Ema(halflife_images=100, rampup_ratio=0.05).beta(200, 50) == pytest.approx(0.5**5)
    assert [Ema(decay=0.9, warmup_steps=10).beta(8 * i, 8) for i in (0, 1, 1000)] == [0.1, 2 / 11, 0.9]
    with pytest.raises(ValueError):
        Ema()
    with pytest.raises(ValueError):
        Ema(decay=0.9, halflife_images=1)


def test_schedules():
    ramp = LinearRamp(100)
    assert [ramp(n) for n in (0, 25, 100, 500)] == [0.0, 0.25, 1.0, 1.0]
    cosine = RampThenCosine(ramp_images=20, images=100, batch_size=10)
    assert cosine(0) == pytest.approx(0.5) and cosine(100) == pytest.approx(0.0)
    assert cosine(50) == pytest.approx(0.5)


def spoil(run):
    run.backbone.net.out.bias.register_hook(lambda grad: torch.full_like(grad, math.nan))


def test_gradients_that_are_not_finite_end_the_run_or_become_zero(tmp_path):
    backbone = PicoBackbone.fresh()
    backbone.net.out.bias.register_hook(lambda grad: torch.full_like(grad, math.nan))
    with pytest.raises(UserError, match="the gradient is not finite in the step up to 8 images"):
        self_train(backbone, data(), settings(), tmp_path, device=CPU)
    assert not find_snapshots(tmp_path) and not (tmp_path / "state.pt").exists()
    run = FineTune(PicoBackbone.fresh(), settings(nonfinite_gradients="zero", schedule=Constant()), CPU)
    before = run.backbone.net.out.bias.detach().clone()
    spoil(run)
    run.step([batch()])
    assert torch.equal(run.backbone.net.out.bias, before)


def test_clipping_bounds_the_norm():
    run = FineTune(PicoBackbone.fresh(), settings(clip_norm=1e-3), CPU)
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in run.backbone.net.parameters()]).norm())
    )
    run.step([batch()])
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision, tmp_path):
    run = FineTune(PicoBackbone.fresh(), settings(precision=precision, schedule=Constant()), CPU)
    values = [float(run.step([batch(8, 3)])) for _ in range(20)]
    assert math.isfinite(values[-1]) and values[-1] < values[0]
    assert run.backbone.net.out.weight.dtype == torch.float32


def test_gradient_scale_is_capped():
    run = FineTune(PicoBackbone.fresh(), settings(precision="fp16", scaler_init=2.0**14, scaler_max=2.0**12), CPU)
    run.step([batch()])
    assert run.scaler.get_scale() == 2.0**12


@pytest.mark.parametrize(
    "images, batch_size, wanted, plan",
    [
        (100, 8, 40, [40, 80, 104]),
        (100, 8, 30, [32, 64, 96, 104]),
        (96, 8, (1, 50), [8, 56, 96]),
        (16, 8, 1000, [16]),
    ],
)
def test_snapshots_fall_on_step_ends(images, batch_size, wanted, plan):
    assert snapshot_plan(settings(images=images, batch_size=batch_size, snapshot_images=wanted)) == plan


def test_a_finished_run_is_found_and_not_repeated(tmp_path):
    first = self_train(PicoBackbone.fresh(), data(), settings(), tmp_path, device=CPU)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert self_train(PicoBackbone.fresh(), data(), settings(), tmp_path, device=CPU) == first
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert list(first) == [80, 160] == list(find_snapshots(tmp_path))


def test_a_run_with_other_settings_is_refused_and_kept(tmp_path):
    self_train(PicoBackbone.fresh(), data(), settings(), tmp_path, device=CPU)
    with pytest.raises(UserError, match=r"lr = 0\.01, not 0\.5"):
        self_train(PicoBackbone.fresh(), data(), settings(lr=0.5), tmp_path, device=CPU)
    assert len(find_snapshots(tmp_path)) == 2


def test_an_interrupted_run_continues_with_the_same_losses(tmp_path):
    class Breaks(PicoBackbone):
        steps = 0

        def self_training_loss(self, *args):
            Breaks.steps += 1
            if Breaks.steps == 50:  # step 13 of 20, micro batch 2 of 4; the last state was saved at step 10
                raise KeyboardInterrupt
            return super().self_training_loss(*args)

    with pytest.raises(KeyboardInterrupt):
        self_train(Breaks.fresh(seed=1), data(), settings(), tmp_path / "broken", device=CPU)
    assert list(find_snapshots(tmp_path / "broken")) == [80]
    self_train(PicoBackbone.fresh(seed=1), data(), settings(), tmp_path / "broken", device=CPU)
    self_train(PicoBackbone.fresh(seed=1), data(), settings(), tmp_path / "whole", device=CPU)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    names = [p.name for p in sorted((tmp_path / "whole").iterdir())]
    assert names == [p.name for p in sorted((tmp_path / "broken").iterdir())]
    for name in names:
        if name.endswith("safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


@pytest.mark.parametrize("micro, remedy", [(3, "use 2 or 4"), (5, "use 4 or 8"), (9, "use 8"), (16, "use 8")])
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tmp_path, micro, remedy):
    with pytest.raises(UserError, match=f"--micro_batch_size {micro} does not divide the batch size 8; {remedy}"):
        self_train(PicoBackbone.fresh(), data(), settings(micro_batch_size=micro), tmp_path, device=CPU)
    assert not any(tmp_path.iterdir())


def test_sharding_without_ranks_is_refused(tmp_path):
    with pytest.raises(UserError, match="torchrun"):
        self_train(PicoBackbone.fresh(), data(), settings(), tmp_path, device=CPU, mode="fsdp")


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "other", "too far"])
def test_a_damaged_state_is_set_aside_and_the_run_begins_again(tmp_path, capsys, damage):
    class Breaks(PicoBackbone):
        def self_training_loss(self, *args):
            if (tmp_path / "broken/state.pt").exists():
                raise KeyboardInterrupt
            return super().self_training_loss(*args)

    with pytest.raises(KeyboardInterrupt):
        self_train(Breaks.fresh(seed=1), data(), settings(), tmp_path / "broken", device=CPU)
    path = tmp_path / "broken/state.pt"
    content = path.read_bytes()
    if damage == "other":
        torch.save({"images_seen": 8}, path)
    elif damage == "too far":  # past a snapshot that is not there
        (tmp_path / "broken/snapshot-000000080.safetensors").unlink()
    else:
        with zipfile.ZipFile(path) as archive:  # the middle of the file may lie between two members
            largest = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
        middle = content.index(largest) + len(largest) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "empty": b"", "flip": flipped}[damage])
    self_train(PicoBackbone.fresh(seed=1), data(), settings(), tmp_path / "broken", device=CPU)
    self_train(PicoBackbone.fresh(seed=1), data(), settings(), tmp_path / "whole", device=CPU)
    assert f"{path}: damaged" in capsys.readouterr().err
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "broken").iterdir()} == names | {"state.pt.damaged"}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_learning_moves_toward_the_data(tmp_path):
    """The loop really trains: the loss on one flat grey image falls by far."""
    grey = torch.full((8, 3, 8, 8), 50, dtype=torch.uint8)
    flat = TrainingData(lambda items: grey[torch.from_numpy(items)], torch.zeros(8, dtype=torch.int64), 8)
    long = settings(images=1600, lr=3e-2, ema=None, snapshot_images=10_000)
    self_train(PicoBackbone.fresh(), flat, long, tmp_path, device=CPU)
    values = losses(tmp_path)
    assert values[-1] < 0.2 * values[0]
