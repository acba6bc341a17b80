"""One evaluation: shares that are merged, state that is resumed, settings that must agree, images counted once."""

import io

import pytest
import torch
from core import metrics_ranks

from neon_files.errors import UserError
from neon_metrics import FunctionDetector, MetricAccumulator, MetricSettings, Reference, extract_features
from neon_metrics.statistics import FeatureStatistics

N = metrics_ranks.NUM_IMAGES


@pytest.fixture(scope="module")
def real():
    data = torch.randint(0, 200, (70, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return extract_features(metrics_ranks.detector(), data.split(30))


@pytest.fixture(scope="module")
def reference(real):
    return Reference.from_statistics(FeatureStatistics(9).update(real))


def fresh(metrics=metrics_ranks.METRICS, num_images=N, **options):
    return MetricAccumulator(metrics_ranks.detector(), num_images, metrics, metrics_ranks.SETTINGS, **options)


def test_shares_in_any_cut_merge_to_one_pass(real, reference):
    whole = metrics_ranks.accumulate(list(range(N)), batch=N).compute(reference, real)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(6)).tolist()
    total = metrics_ranks.accumulate(shuffled[:30], batch=7)
    total.merge(metrics_ranks.accumulate(shuffled[30:], batch=1))
    assert total.compute(reference, real) == pytest.approx(whole, rel=1e-11)
    assert total.reduced().compute(reference, real) == pytest.approx(whole, rel=1e-11)  # one process: the same


def test_a_stopped_evaluation_goes_on_where_it_was(real, reference):
    part = metrics_ranks.accumulate(list(range(20)))
    buffer = io.BytesIO()
    torch.save(part.state_dict(), buffer)
    buffer.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.num_seen == 20 and resumed.seen[:20].all()
    for accumulator in (part, resumed):
        accumulator.update(metrics_ranks.images()[20:], range(20, N))
    assert resumed.compute(reference, real) == part.compute(reference, real)


def test_a_saved_state_of_another_evaluation_is_refused():
    state = fresh().state_dict()
    with pytest.raises(UserError, match="another one \\(num_images: 53 instead of 54\\); name another output folder"):
        fresh(num_images=54).load_state_dict(state)
    with pytest.raises(UserError, match="metrics"):
        fresh(metrics=("fid",)).load_state_dict(state)
    with pytest.raises(UserError, match="settings"):
        MetricAccumulator(metrics_ranks.detector(), N, metrics_ranks.METRICS, MetricSettings(is_splits=5,
                          kid_subset_size=20)).load_state_dict(state)  # fmt: skip
    with pytest.raises(UserError, match="file_order"):
        fresh(file_order=torch.arange(N).flip(0).numpy()).load_state_dict(state)
    other = MetricAccumulator(FunctionDetector("other", 9, lambda x: x, 6), N, metrics_ranks.METRICS,
                              metrics_ranks.SETTINGS)  # fmt: skip
    with pytest.raises(UserError, match="detector: 'random layer' instead of 'other'"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="cannot merge evaluations that differ"):
        other.merge(fresh())


def test_every_image_counts_once_and_none_is_forgotten(reference):
    data = metrics_ranks.images()
    accumulator = fresh(("fid",))
    accumulator.update(data[:3], [0, 1, 2])
    for indices, message in [
        ([2, 3, 4], "only once"),
        ([5, 5, 6], "only once"),
        ([-1, 3, 4], "must be 0 .. 52"),
        ([3, 4, N], "must be 0 .. 52"),
        ([3, 4], "3 images with indices"),
    ]:
        with pytest.raises(ValueError, match=message):
            accumulator.update(data[:3], indices)
    assert accumulator.num_seen == 3 and accumulator.feature_statistics.count == 3
    with pytest.raises(ValueError, match="50 of 53 images are missing"):
        accumulator.compute(reference)
    with pytest.raises(ValueError, match="some images were seen by both"):
        accumulator.merge(_with(data, [2, 9]))


def _with(data, indices):
    accumulator = fresh(("fid",))
    accumulator.update(data[indices], indices)
    return accumulator


def test_features_are_kept_only_where_they_are_needed():
    assert fresh(("fid", "is")).features is None
    assert fresh(("kid",)).features.shape == fresh((), keep_features=True).features.shape == (N, 9)
    assert fresh(("kid", "prdc")).feature_statistics is None


def test_what_cannot_work_is_said_before_the_first_image():
    plain = FunctionDetector("plain", 4, lambda images: images.flatten(1)[:, :4].float())
    for metrics, num_images, message in [
        (("fid", "ssim"), 100, "unknown metrics ssim; choose from fid, is, kid, prdc"),
        (("is",), 100, "needs class logits, which the detector plain does not give"),
        (("fid",), 1, "FID needs at least 2 images, and 1 were asked for"),
        (("kid",), 999, "KID with subsets of 1000 needs at least 1000 images, and 999"),
        (("prdc",), 5, "k = 5 needs at least 6 images, and 5"),
        (("prdc",), 1_281_167, "at most 100,000 on this device, and 1,281,167 were asked for; use fewer"),
    ]:
        with pytest.raises(UserError, match=message):
            MetricAccumulator(plain, num_images, metrics)
    with pytest.raises(UserError, match="in 4 parts needs at least 4 images, and 3"):
        fresh(("is",), num_images=3)


def test_compute_names_the_input_that_it_lacks(real, reference):
    total = metrics_ranks.accumulate(list(range(N)))
    with pytest.raises(ValueError, match="without a reference"):
        total.compute(None, real)
    with pytest.raises(ValueError, match="without real_features"):
        total.compute(reference)


def test_features_that_are_not_finite_are_refused():
    broken = FunctionDetector("broken", 2, lambda images: torch.full((len(images), 2), torch.nan))
    accumulator = MetricAccumulator(broken, 4, ("fid",))
    with pytest.raises(ValueError, match="broken gave features"):
        accumulator.update(metrics_ranks.images()[:4], range(4))
    assert accumulator.num_seen == 0


def test_a_run_can_be_extended_without_its_first_images(real, reference):
    """The search evaluates 20 images, then more of the same run; IS alone depends on the final number."""
    metrics, data = ("fid", "kid", "prdc"), metrics_ranks.images()
    accumulator = fresh(metrics, num_images=25)
    accumulator.update(data[:25], range(25))
    first = accumulator.compute(reference, real)
    accumulator.grow(N)
    accumulator.update(data[25:], range(25, N))
    at_once = fresh(metrics)
    at_once.update(data, range(N))
    assert accumulator.compute(reference, real) == pytest.approx(at_once.compute(reference, real), rel=1e-11)
    assert accumulator.signature == at_once.signature and first != accumulator.compute(reference, real)
    with pytest.raises(UserError, match="its split depends on their number"):
        fresh(("is",)).grow(60)
