"""The running statistics: any order, any cut, any offset, stopped and resumed - one and the same numbers."""

import io

import numpy as np
import pytest
import torch

from golden.official.metrics import edm_sweep_covariance
from neon_files.errors import UserError
from neon_metrics import FeatureStatistics, InceptionScoreStatistics, inception_score


def random_features(count=101, width=7, offset=0.0, seed=0):
    return (
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) @ torch.eye(width).cumsum(0) + offset
    )


def exact(features):
    x = features.double()
    return x.mean(0), torch.from_numpy(np.cov(x.numpy().astype(np.longdouble).T).astype(np.float64))


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("batches", [[101], [1] * 101, [64, 1, 0, 36]])
def test_mean_and_covariance_do_not_depend_on_the_batches(offset, batches):
    features = random_features(offset=offset)
    statistics = FeatureStatistics(7)
    for batch in features.split(batches):
        statistics.update(batch)
    mean, covariance = exact(features)
    assert statistics.count == 101
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(statistics.covariance(), covariance, rtol=1e-11, atol=1e-11)
    assert torch.equal(statistics.covariance(), statistics.covariance().T)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_merging_parts_in_any_order_gives_the_whole(order):
    """Means 1e6 spreads away, parts of very different size, one empty: where plain sums of squares fail."""
    features = random_features(offset=1e6)
    parts = [FeatureStatistics(7).update(chunk) for chunk in features.split([80, 0, 1, 20])]
    total = FeatureStatistics(7)
    for i in order:
        total.merge(parts[i])
    mean, covariance = exact(features)
    torch.testing.assert_close(total.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(total.covariance(), covariance, rtol=1e-9, atol=1e-9)


def test_edm_sweep_covariance_exceeds_the_unbiased_one_by_the_outer_mean():
    x = random_features(offset=3.0).double()
    statistics = FeatureStatistics(7).update(x)
    as_the_scripts_do = x.T @ x / 100 - torch.outer(x.mean(0), x.mean(0))
    torch.testing.assert_close(edm_sweep_covariance(statistics), as_the_scripts_do, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(edm_sweep_covariance(statistics), statistics.covariance(), rtol=1e-3)


def test_wrong_widths_and_too_few_images_are_refused():
    statistics = FeatureStatistics(7).update(random_features(1))
    with pytest.raises(ValueError, match=r"must be \[B, 7\]; got \(5, 6\)"):
        statistics.update(torch.zeros(5, 6))
    with pytest.raises(ValueError, match="6 and 7 features"):
        statistics.merge(FeatureStatistics(6))
    with pytest.raises(UserError, match="at least 2 images, and there are 1"):
        statistics.covariance()
    with pytest.raises(ValueError, match="mean: saved"):
        statistics.load_state_dict(FeatureStatistics(6).state_dict())


def saved_and_read(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_statistics_stopped_and_resumed_are_those_of_an_unbroken_run():
    features, logits, order = random_features(), random_features(seed=1), torch.randperm(101)
    unbroken = FeatureStatistics(7).update(features[:60]).update(features[60:])
    first = FeatureStatistics(7).update(features[:60])
    state = saved_and_read(first.state_dict())
    first.update(features[60:])  # must not reach into what was saved
    resumed = FeatureStatistics(7)
    resumed.load_state_dict(state)
    resumed.update(features[60:])
    assert resumed.count == unbroken.count
    assert torch.equal(resumed.mean, unbroken.mean) and torch.equal(resumed.scatter, unbroken.scatter)

    unbroken = InceptionScoreStatistics(101, 7).update(logits[order[:60]], order[:60])
    resumed = InceptionScoreStatistics(101, 7)
    resumed.load_state_dict(saved_and_read(unbroken.state_dict()))
    for statistics in (unbroken, resumed):
        statistics.update(logits[order[60:]], order[60:])
    assert unbroken.score() == resumed.score()


def test_inception_score_does_not_depend_on_the_order_of_arrival_or_on_the_parts():
    logits = 3 * random_features()
    order = torch.randperm(101, generator=torch.Generator().manual_seed(4))
    parts = [InceptionScoreStatistics(101, 7, splits=9) for _ in range(3)]
    for i, batch in enumerate(order.split(10)):
        parts[i % 3].update(logits[batch], batch)
    parts[0].merge(parts[1]).merge(parts[2])
    assert parts[0].score() == pytest.approx(inception_score(logits, splits=9), rel=1e-13)
    with pytest.raises(ValueError, match="differently split"):
        parts[0].merge(InceptionScoreStatistics(101, 7, splits=8))


def test_inception_score_follows_the_official_file_order():
    """IMM's files sort by class and number as text; row j of the official run is image file_order[j]."""
    logits = 3 * random_features()
    file_order = np.random.default_rng(0).permutation(101)
    statistics = InceptionScoreStatistics(101, 7, file_order=file_order).update(logits, torch.arange(101))
    assert statistics.score() == pytest.approx(inception_score(logits[file_order]), rel=1e-13)
    assert statistics.score()[0] != pytest.approx(inception_score(logits)[0], rel=1e-6)


def test_inception_score_with_images_missing_is_refused():
    statistics = InceptionScoreStatistics(20, 7).update(random_features(19), torch.arange(19))
    with pytest.raises(ValueError, match="of 20 images after 19 rows"):
        statistics.score()
