"""Nothing that was sampled is lost: what can be checked is checked before, work is kept until its result is safe."""

import numpy as np
import PIL.Image
import pytest
import torch
from core.pico import PicoBackbone, PixelMoments

from neon_files.errors import UserError
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference


class Counting(PicoBackbone):
    sampled = 0
    on_batch = staticmethod(lambda: None)

    def sample(self, seeds, labels, **settings):
        self.sampled += len(seeds)
        self.on_batch()
        return super().sample(seeds, labels, **settings)


def make_evaluator(metrics=("fid", "is"), **options):
    reference = Reference(np.zeros(12), np.eye(12))
    return Evaluator(reference, device=torch.device("cpu"), metrics=metrics, detector=PixelMoments(), **options)


def run(evaluator, backbone, work, num=20, **options):
    options = {"settings": {}, "batch_size": 4, "save_seconds": 0.0, "progress": False, **options}
    return evaluator(backbone, range(num), work_dir=work, **options)


def real(folder, count, size=(8, 8)):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


def resize(path):
    PIL.Image.new("RGB", (8, 9)).save(path)


def to_arrays(path):
    for file in path.parent.iterdir():
        file.unlink()
        np.save(file.with_suffix(".npy"), np.zeros((3, 8, 8), np.float32))


@pytest.mark.parametrize(
    "count, metrics, spoil, message",
    [
        (999, ("kid",), None, r"KID with subsets of 1000 needs at least 1000 images, and 999 are in .*real"),
        (4, ("prdc",), None, r"precision and recall with k = 5 needs at least 6 images, and 4 are in .*real"),
        (9, ("prdc",), cut, r"0008\.png cannot be read"),
        (9, ("prdc",), resize, r"0008\.png has shape \(3, 9, 8\)"),
        (9, ("prdc",), to_arrays, r"real: holds arrays of float32"),
    ],
)
def test_real_images_that_cannot_serve_are_named_before_anything_is_sampled(tmp_path, count, metrics, spoil, message):
    folder = real(tmp_path / "real", count)
    if spoil:
        spoil(max(folder.iterdir()))
    with pytest.raises(UserError, match=message):
        make_evaluator(("fid", *metrics), real_images=folder)


def test_a_grey_image_among_the_real_ones_is_no_error(tmp_path):
    folder = real(tmp_path / "real", 9)
    PIL.Image.new("L", (8, 8), 7).save(folder / "0008.png")
    assert make_evaluator(("prdc",), real_images=folder).real_features(4).shape == (9, 12)


def test_work_is_kept_until_the_caller_has_its_result(tmp_path, monkeypatch):
    backbone, evaluator = Counting.fresh(), make_evaluator()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "compute", lambda *_: 1 / 0)  # whatever may go wrong after the sampling
        with pytest.raises(ZeroDivisionError):
            run(evaluator, backbone, tmp_path / "work", save_seconds=1e9)
    result = run(evaluator, backbone, tmp_path / "work")
    assert backbone.sampled == 20
    evaluator.clear()
    assert not (tmp_path / "work").exists()
    assert run(make_evaluator(), Counting.fresh(), None)["fid"] == pytest.approx(result["fid"], rel=1e-9)


def test_evaluations_that_share_a_folder_leave_each_other_alone(tmp_path):
    first, second = make_evaluator(), make_evaluator()
    run(first, Counting.fresh(), tmp_path, identity={"sha256": "a"})
    run(second, Counting.fresh(seed=1), tmp_path, identity={"sha256": "b"})
    assert len(list(tmp_path.glob("partial-*/rank-000.pt"))) == 2
    first.clear()
    again = Counting.fresh(seed=1)
    run(second, again, tmp_path, identity={"sha256": "b"})
    assert again.sampled == 0
    second.clear()
    second.clear()  # another's absence is no error
    assert not tmp_path.exists()


def test_other_metrics_of_the_same_images_are_another_evaluation(tmp_path):
    run(make_evaluator(("fid",)), Counting.fresh(), tmp_path)
    run(make_evaluator(("fid", "is")), Counting.fresh(), tmp_path)
    assert len(list(tmp_path.glob("partial-*/rank-000.pt"))) == 2


def test_the_same_evaluation_started_twice_ends_twice(tmp_path):
    """The second ends in the middle of the first, and clears the folder under it."""
    slow, fast = make_evaluator(), make_evaluator()
    backbone = Counting.fresh()

    def other():
        if backbone.sampled == 8:
            run(fast, Counting.fresh(), tmp_path / "work")
            fast.clear()

    backbone.on_batch = other
    result = run(slow, backbone, tmp_path / "work")
    slow.clear()
    assert backbone.sampled == 20 and result["fid"] == run(make_evaluator(), Counting.fresh(), None)["fid"]


def test_damaged_sums_are_set_aside_and_made_again(tmp_path, capsys):
    evaluator = make_evaluator()
    wanted = run(evaluator, Counting.fresh(), tmp_path)["fid"]
    (path,) = tmp_path.glob("partial-*/rank-000.pt")
    saved = torch.load(path, weights_only=True)["statistics"]["feature_statistics"]["mean"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.find(saved) + 3] ^= 16  # one bit of one number
    path.write_bytes(data)
    backbone = Counting.fresh()
    assert run(evaluator, backbone, tmp_path)["fid"] == wanted and backbone.sampled == 20
    assert "rank-000.pt" in capsys.readouterr().err and path.with_name("rank-000.pt.damaged").exists()


def test_batches_that_two_files_count_are_counted_once(tmp_path):
    """As two runs at once on several ranks leave them."""
    evaluator = make_evaluator()
    wanted = run(evaluator, Counting.fresh(), tmp_path, num=12)["fid"]
    (path,) = tmp_path.glob("partial-*/rank-000.pt")
    partial = make_evaluator().new_accumulator(12)
    backbone = Counting.fresh()
    partial.update(backbone.sample(range(4, 8), backbone.assign_labels(range(4, 8))), range(4, 8))
    torch.save({"batches": [1], "statistics": partial.state_dict()}, path.with_name("rank-001.pt"))
    backbone = Counting.fresh()
    assert run(evaluator, backbone, tmp_path, num=12)["fid"] == pytest.approx(wanted, rel=1e-9)
    assert backbone.sampled == 0
