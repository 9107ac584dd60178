"""Nearest neighbors against points drawn evenly on the sphere, and effective rank, against mpmath, scipy and draws."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prototypes_lib.collapse import (
    effective_rank,
    nearest_cosine,
    neighbors,
    sphere,
    uniform_nearest_cdf,
    uniform_nearest_quantile,
)


def _random(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exact_cdf(t: float, k: int, dim: int) -> mpmath.mpf:
    """(1 - tail)^(k - 1) with the tail as the integral over the cap, to 50 digits."""
    with mpmath.workdps(50):
        density = lambda s: (1 - s * s) ** (mpmath.mpf(dim - 3) / 2)
        tail = mpmath.quad(density, mpmath.linspace(t, 1, 9)) / mpmath.beta(0.5, mpmath.mpf(dim - 1) / 2)
        return (1 - tail) ** (k - 1)


# --- nearest cosine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "dim"), [(2, 3), (50, 2), (300, 16)])
def test_the_nearest_cosine_is_the_largest_of_all_and_that_of_neighbors(k, dim):
    w = _random(k, dim)
    cosine = torch.corrcoef(torch.cat([w, -w], dim=1))  # rows of mean zero, whose correlation is the cosine
    expected = (cosine - 3 * torch.eye(k)).amax(1)
    np.testing.assert_allclose(nearest_cosine(w), expected, atol=1e-12)
    assert torch.equal(nearest_cosine(w.float()).sort().values, neighbors(w.float()).nearest.sort().values)


def test_a_copy_has_cosine_one_and_an_opposite_minus_one_whatever_the_lengths():
    w = _random(1, 5)
    assert nearest_cosine(torch.cat([w, 1e3 * w, 1e-3 * w])).tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert nearest_cosine(torch.cat([w, -2 * w])).tolist() == pytest.approx([-1] * 2, abs=1e-12)
    assert nearest_cosine(torch.ones(9, 7)).max() <= 1  # in float32 a cosine may round beyond


def test_one_prototype_has_no_nearest_and_none_or_zero_is_refused():
    assert nearest_cosine(_random(1, 3)).isnan().all()
    for w in (torch.empty(0, 3), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="non-zero"):
            nearest_cosine(w)


# --- points drawn evenly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "dim"), [(131072, 384), (65536, 256), (4096, 64), (2, 3), (100, 4)])
@pytest.mark.parametrize("q", [1e-6, 0.05, 0.5, 0.95, 1 - 1e-6])
def test_the_law_is_that_of_the_integral_to_ten_digits(k, dim, q):
    t = float(uniform_nearest_quantile(q, k, dim))
    exact = _exact_cdf(t, k, dim)
    assert float(exact) == pytest.approx(q, rel=1e-9)
    assert float(1 - exact) == pytest.approx(1 - q, rel=1e-9)
    assert float(uniform_nearest_cdf(t, k, dim)) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("t", "k", "dim"), [(-0.3, 2, 5), (-0.9, 4, 3), (-0.05, 20, 384), (0.6, 131072, 384)])
def test_the_law_holds_below_zero_and_far_out(t, k, dim):
    assert float(uniform_nearest_cdf(t, k, dim)) == pytest.approx(float(_exact_cdf(t, k, dim)), rel=1e-9)


def test_on_the_circle_the_law_is_that_of_the_angle_between():
    """In 2 dimensions P(cos <= t) = 1 - arccos(t) / pi; in 3 the cosine itself is uniform (Archimedes)."""
    t = np.linspace(-1, 1, 41)
    np.testing.assert_allclose(uniform_nearest_cdf(t, 7, 2), (1 - np.arccos(t) / math.pi) ** 6, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(uniform_nearest_cdf(t, 7, 3), ((1 + t) / 2) ** 6, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("k", "dim"), [(200, 3), (1000, 64), (30, 384)])
def test_draws_have_the_law(k, dim):
    draws = 60_000 // k if k > 100 else 300
    # few of each set, as two that are each other's nearest are no two draws
    cosine = np.concatenate([nearest_cosine(_random(k, dim, seed).float())[:2] for seed in range(draws)])
    assert stats.kstest(cosine, lambda t: uniform_nearest_cdf(t, k, dim)).pvalue > 0.01


@given(q=st.floats(1e-9, 1 - 1e-9), k=st.integers(2, 200_000), dim=st.integers(2, 2000))
def test_the_quantile_is_the_inverse(q, k, dim):
    t = uniform_nearest_quantile(q, k, dim)
    assert -1 <= t <= 1
    slack = 1e-7 * min(q, 1 - q) + (0 if abs(t) < 0.999 else 2e-3)  # next to 1 the law is steeper than t is fine
    assert uniform_nearest_cdf(t, k, dim) == pytest.approx(q, abs=slack)


def test_more_points_are_nearer_and_more_dimensions_farther():
    medians = [float(uniform_nearest_quantile(0.5, k, 384)) for k in (2, 1024, 65536, 131072)]
    assert medians == sorted(medians) and medians[0] == pytest.approx(0, abs=1e-12)
    far = [float(uniform_nearest_quantile(0.5, 65536, dim)) for dim in (64, 256, 384, 768)]
    assert far == sorted(far, reverse=True)
    assert uniform_nearest_quantile([0.1, 0.5, 0.9], 65536, 256).shape == (3,)


def test_impossible_questions_about_even_points_are_refused():
    for k, dim in ((1, 8), (8, 1)):
        with pytest.raises(ValueError, match="two points and two dimensions"):
            uniform_nearest_cdf(0.5, k, dim)
        with pytest.raises(ValueError, match="two points and two dimensions"):
            uniform_nearest_quantile(0.5, k, dim)
    for q in (0.0, 1.0, [0.5, math.nan]):
        with pytest.raises(ValueError, match="inside"):
            uniform_nearest_quantile(q, 8, 8)


# --- effective rank -----------------------------------------------------------------------------------------------


def _by_svd(x: torch.Tensor, squared: bool) -> float:
    s = torch.linalg.svdvals(x.double()).numpy() ** (2 if squared else 1)
    return float(np.exp(stats.entropy(s)))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (1, 9), (9, 1), (40, 7), (7, 40), (33, 33), (9000, 12)])
def test_effective_rank_is_the_entropy_of_the_singular_values(n, dim, squared):
    x = _random(n, dim) * torch.linspace(0.1, 3, dim)
    assert effective_rank(x, squared=squared) == pytest.approx(_by_svd(x, squared), rel=1e-9)
    assert effective_rank(x.float(), squared=squared) == pytest.approx(_by_svd(x, squared), rel=1e-6)
    if n > 1:
        centered = _by_svd(x - x.mean(0) + 5 - 5, squared)
        assert effective_rank(x + 5, center=True, squared=squared) == pytest.approx(centered, rel=1e-8)


def test_effective_rank_counts_equal_directions_and_ignores_scale_and_rotation():
    q = torch.linalg.qr(_random(20, 20)).Q
    for r in (1, 3, 20):
        x = _random(200, 20, seed=r)
        x = torch.linalg.qr(x[:, :r]).Q @ q[:r]
        for scale in (1e-20, 1.0, 1e20):
            assert effective_rank(scale * x) == pytest.approx(r, rel=1e-5)
            assert effective_rank(scale * x, squared=True) == pytest.approx(r, rel=1e-9)
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1, rel=1e-9)


@given(seed=st.integers(0, 1000), n=st.integers(1, 30), dim=st.integers(1, 30), power=st.floats(0, 5))
def test_effective_rank_lies_between_one_and_the_rank_and_squaring_lowers_it(seed, n, dim, power):
    x = _random(n, dim, seed) * torch.arange(1, dim + 1) ** -power
    plain, squared = effective_rank(x), effective_rank(x, squared=True)
    assert 1 - 1e-9 <= squared <= plain * (1 + 1e-9) and plain <= min(n, dim) * (1 + 1e-9)


def test_effective_rank_of_nothing_of_equal_rows_and_of_broken_numbers():
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert effective_rank(0.1 * torch.ones(7, 3), center=True) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan]])))
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf]])))
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="no effective rank"):
            effective_rank(torch.empty(shape))


def test_effective_rank_does_not_notice_autocast_or_half_precision_overflow():
    x = 3e4 * torch.nn.functional.normalize(_random(64, 16), dim=1).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert effective_rank(x) == pytest.approx(_by_svd(x, False), rel=1e-9)
    assert sphere.effective_rank is effective_rank
