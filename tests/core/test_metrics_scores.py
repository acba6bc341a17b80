"""FID, IS, KID and PRDC against their definitions written out, and where rounding, ties and low ranks break them."""

import math

import numpy as np
import pytest
import torch

from golden.official.metrics import fid_infinity, fid_infinity_fit, kernel_by_name
from neon_files.errors import UserError
from neon_metrics import (
    BiasedFidWarning,
    FeatureStatistics,
    Reference,
    fid,
    fid_from_features,
    frechet_distance,
    inception_score,
    kid,
    prdc,
)
from neon_metrics.covariance import psd_factor
from neon_metrics.scores import mmd2, polynomial_kernel, rbf_kernel, trace_sqrt_product


def features(count, width, seed, scale=1.0, power=1.0):
    """float64 [count, width] with a power-law spectrum along random directions."""
    rng = np.random.default_rng(seed)
    spread = scale * np.arange(1, width + 1) ** -(power / 2)
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return torch.from_numpy((rng.standard_normal((count, width)) * spread) @ rotation)


def reference_of(x):
    return Reference.from_statistics(FeatureStatistics(x.shape[1]).update(x))


def singular_value_fid(x, y):
    """The same distance straight from centred features: the square root's trace is a nuclear norm."""
    a, b = (z - z.mean(0) for z in (x, y))
    n, m = len(x) - 1, len(y) - 1
    cross = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(n * m)
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return float(gap + a.square().sum() / n + b.square().sum() / m - 2 * cross)


# ------------------------------------------------------------------------------------------------------------------ FID


@pytest.mark.parametrize(("count", "width"), [(200, 16), (12, 40), (600, 540)])
@pytest.mark.filterwarnings("ignore::neon_metrics.BiasedFidWarning")
def test_fid_of_a_set_with_itself_is_zero(count, width):
    x = features(count, width, 0, scale=5.0)
    assert abs(fid_from_features(x, reference_of(x))) < 1e-9
    assert abs(fid(FeatureStatistics(width).update(x), reference_of(x))) < 1e-9


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 90), (90, 20), (90, 80)])
@pytest.mark.filterwarnings("ignore::neon_metrics.BiasedFidWarning")
def test_fid_is_right_and_symmetric_for_singular_covariances(n, m):
    x, y = features(n, 50, 1), features(m, 50, 2) + 0.1
    expected = singular_value_fid(x, y)
    assert fid_from_features(x, reference_of(y)) == pytest.approx(expected, abs=1e-10)
    assert fid_from_features(y, reference_of(x)) == pytest.approx(expected, abs=1e-10)
    assert fid(FeatureStatistics(50).update(x), reference_of(y)) == pytest.approx(expected, abs=1e-10)
    statistics = [FeatureStatistics(50).update(z) for z in (x, y)]
    given = [a for s in statistics for a in (s.mean, s.covariance())]
    assert frechet_distance(*given) == pytest.approx(expected, abs=1e-7)  # the ranks have to be found


def test_a_large_matrix_through_its_gram_matrix_gives_the_singular_values():
    a, b = (psd_factor(torch.cov(features(900, 520, seed).T).numpy()) for seed in (3, 4))
    expected = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert trace_sqrt_product(a, b) == pytest.approx(expected, rel=1e-12)


def test_squaring_is_avoided_where_it_would_cost_digits():
    """Singular values from 1 to 1e-12: through the Gram matrix the small ones would read about 1e-8."""
    values = np.logspace(0, -12, 600)
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((600, 600)))[0]
    factor = np.diag(np.sqrt(values))
    assert trace_sqrt_product(factor @ rotation, factor) == pytest.approx(values.sum(), rel=1e-12)


def test_fid_of_commuting_gaussians_has_the_closed_form():
    a, b = np.array([4.0, 1.0, 0.25, 0.0]), np.array([1.0, 9.0, 0.25, 2.0])
    expected = 2.0 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(np.zeros(4), np.diag(a), [1, 0, 0, -1], np.diag(b)) == pytest.approx(expected, rel=1e-14)


def test_a_reference_stored_in_float32_costs_no_digits_that_matter():
    """Rounding makes small eigenvalues negative; the factor then comes from the eigenvalues."""
    x, y = features(3000, 120, 6, power=5.0), features(3000, 120, 7, power=5.0)
    exact, rounded = reference_of(y), reference_of(y)
    sigma = rounded.sigma.astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(sigma)[0] < 0
    rounded = Reference(rounded.mu.astype(np.float32).astype(np.float64), sigma)
    assert fid_from_features(x, rounded) == pytest.approx(fid_from_features(x, exact), abs=1e-5)


def test_an_indefinite_matrix_is_no_covariance():
    with pytest.raises(UserError, match=r"broken\.npz: sigma is not a covariance: its eigenvalues run from -1 to 3"):
        _ = Reference(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), "broken.npz").factor


def test_fewer_images_than_features_warn_and_fewer_than_two_are_refused():
    reference = reference_of(features(50, 8, 8))
    with pytest.warns(BiasedFidWarning, match="from 8 images with 8 features"):
        fid_from_features(features(8, 8, 9), reference)
    with pytest.raises(UserError, match="at least 2 images"):
        fid_from_features(features(1, 8, 9), reference)
    with pytest.raises(UserError, match="at least 2 images"):
        fid(FeatureStatistics(8).update(features(1, 8, 9)), reference)
    with pytest.raises(UserError, match="made from 8 features, the detector gives 5"):
        fid_from_features(features(50, 5, 9), reference)


def test_statistics_that_are_not_finite_give_no_number():
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance([0.0, np.nan], np.eye(2), [0.0, 0.0], np.eye(2))


def test_fid_infinity_removes_the_bias_of_few_images():
    reference = Reference(np.zeros(20), np.eye(20))
    x = torch.randn(4000, 20, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    biased = fid_from_features(x[:400], reference)
    extrapolated = fid_infinity(x, reference, points=12, min_images=200)
    assert biased > 0.2 and abs(extrapolated) < 0.03  # the true value is 0
    intercept, slope = fid_infinity_fit([10, 20, 40], [3 + 5 / 10, 3 + 5 / 20, 3 + 5 / 40])
    assert (intercept, slope) == pytest.approx((3, 5))
    with pytest.raises(ValueError, match="two or more different"):
        fid_infinity_fit([10, 10], [1.0, 2.0])
    with pytest.raises(UserError, match="subsets of 5000 images and more, and there are 4000"):
        fid_infinity(x, reference)


# ------------------------------------------------------------------------------------------------------ Inception Score


def written_out_inception_score(logits, splits, shuffle, seed):
    """Row by row, term by term; a term with p = 0 is left out."""
    logits = np.asarray(logits, dtype=np.float64)
    n = len(logits)
    logits = logits[np.random.RandomState(seed).permutation(n)] if shuffle else logits
    scores = []
    for i in range(splits):
        part = logits[i * n // splits : (i + 1) * n // splits]
        log_p = part - part.max(1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        q = p.mean(0)
        divergences = [sum(a * (b - math.log(c)) for a, b, c in zip(*rows, q, strict=True) if a > 0)
                       for rows in zip(p, log_p, strict=True)]  # fmt: skip
        scores.append(math.exp(np.mean(divergences)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize(
    ("n", "splits", "shuffle", "seed"), [(97, 10, True, 2020), (40, 7, False, 0), (10, 10, True, 3)]
)
def test_inception_score_is_its_definition(n, splits, shuffle, seed):
    logits = 4 * torch.randn(n, 13, generator=torch.Generator().manual_seed(n))
    ours = inception_score(logits, splits=splits, shuffle=shuffle, seed=seed)
    assert ours == pytest.approx(written_out_inception_score(logits, splits, shuffle, seed), rel=1e-12)


def test_classes_that_underflow_count_zero():
    logits = 3 * torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    without = inception_score(logits[:, :4], splits=3)
    logits[:, 4], logits[:, 5] = -900.0, -math.inf
    assert inception_score(logits, splits=3) == pytest.approx(without, rel=1e-13)


def test_fewer_images_than_splits_are_refused():
    with pytest.raises(UserError, match="takes 10 parts of the images, and there are 9"):
        inception_score(torch.zeros(9, 4))


# ------------------------------------------------------------------------------------------------------------------ KID


def written_out_mmd2(x, y, kernel):
    within = [sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
              for z in (x, y)]  # fmt: skip
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


@pytest.mark.parametrize(
    ("kernel", "written_out"),
    [
        (polynomial_kernel, lambda a, b: (a @ b / len(a) + 1) ** 3),
        (kernel_by_name("poly", degree=2, gamma=0.3, coef0=0.5), lambda a, b: (0.3 * (a @ b) + 0.5) ** 2),
        (kernel_by_name("rbf", sigma=2.0), lambda a, b: math.exp(-((a - b) @ (a - b)) / 8)),
    ],
)
def test_mmd_is_its_definition(kernel, written_out):
    x, y = features(17, 5, 11), features(12, 5, 12) + 0.2
    assert mmd2(x, y, kernel) == pytest.approx(written_out_mmd2(x.numpy(), y.numpy(), written_out), rel=1e-11)


def test_mmd_in_chunks_leaves_out_the_same_diagonal(monkeypatch):
    from neon_metrics import scores

    x, y = features(23, 5, 13), features(31, 5, 14)
    whole = mmd2(x, y)
    small = lambda *args, **kw: original(*args, **{**kw, "chunk": 7})  # noqa: E731
    original = scores._kernel_sum
    monkeypatch.setattr(scores, "_kernel_sum", small)
    assert mmd2(x, y) == pytest.approx(whole, rel=1e-12)


def test_rbf_kernel_survives_a_common_offset():
    x, y = features(20, 6, 15), features(20, 6, 16)
    assert mmd2(x + 1e5, y + 1e5, rbf_kernel) == pytest.approx(mmd2(x, y, rbf_kernel), rel=1e-6)


def test_kid_is_unbiased_and_draws_its_subsets_in_turn():
    x, y = features(300, 6, 17), features(200, 6, 18)
    mean, std = kid(generated=x, real=y, subsets=40, subset_size=60)
    rng = np.random.RandomState(2020)
    by_hand = [mmd2(x[rng.choice(300, 60, replace=False)], y[rng.choice(200, 60, replace=False)]) for _ in range(40)]
    assert (mean, std) == pytest.approx((np.mean(by_hand), np.std(by_hand)), rel=1e-12)
    none, spread = kid(generated=x[:150], real=x[150:], subsets=40, subset_size=60)
    assert abs(none) < spread < mean  # of one distribution: about 0 on either side, whatever the number of images
    with pytest.raises(UserError, match="subsets of 1000 images, and the generated set has 300"):
        kid(generated=x, real=y)
    with pytest.raises(UserError, match="kernel 'cosine' is unknown; choose from poly, rbf"):
        kernel_by_name("cosine")


# ----------------------------------------------------------------------------------------------------------------- PRDC


def written_out_prdc(real, generated, k):
    def distances(a, b):
        return np.array([[math.sqrt(math.fsum((p - q) ** 2)) for q in b] for p in a])

    def balls(z):
        return np.sort(distances(z, z), axis=1)[:, k]

    real, generated = real.double().numpy(), generated.double().numpy()
    cross, r_real, r_gen = distances(generated, real), balls(real), balls(generated)
    return {
        "precision": (cross <= r_real).any(1).mean(),
        "recall": (cross <= r_gen[:, None]).any(0).mean(),
        "precision_strict": (cross < r_real).any(1).mean(),
        "recall_strict": (cross < r_gen[:, None]).any(0).mean(),
        "density": (cross < r_real).sum() / (k * len(generated)),
        "coverage": (cross < r_real).any(0).mean(),
    }


def grid(count, seed):
    return torch.randint(0, 3, (count, 3), generator=torch.Generator().manual_seed(seed)).float()


def copies(count, seed):
    """Random points, most of them several times."""
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    return points[torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(seed + 1))]


SETS = {
    "plain": (features(40, 7, 19), features(33, 7, 20)),
    "float32 with an offset": (features(40, 7, 21).float() + 1000.3, features(33, 7, 22).float() + 1000.3),
    "ties on a grid": (grid(45, 0), grid(38, 1)),
    "copies within and across": (copies(40, 2), copies(30, 2)),
    "all points equal": (torch.ones(12, 3), torch.ones(10, 3)),
    "more features than points": (features(12, 300, 23), features(14, 300, 24)),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("elements", [1 << 24, 150])
def test_prdc_counts_exactly(name, k, elements, monkeypatch):
    monkeypatch.setattr("neon_metrics.neighbours.CHUNK_ELEMENTS", elements)
    real, generated = SETS[name]
    scores = prdc(real=real, generated=generated, k=k)
    for key, value in written_out_prdc(real, generated, k).items():
        assert getattr(scores, key) == pytest.approx(value, abs=1e-12), key


def test_exchanging_the_sets_exchanges_precision_and_recall():
    real, generated = SETS["plain"]
    there, back = prdc(real=real, generated=generated, k=3), prdc(real=generated, generated=real, k=3)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision != there.recall


def test_prdc_needs_more_points_than_neighbours():
    with pytest.raises(UserError, match="k = 5 need more than 5 images; generated has 5"):
        prdc(real=torch.zeros(9, 2), generated=torch.zeros(5, 2))
