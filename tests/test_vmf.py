"""The von Mises-Fisher library against mpmath, quadrature, numerical distribution functions and closed forms."""

import math
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck, gradgradcheck

from prototypes_lib import scores, vmf

DIMS = (2, 3, 4, 5, 8, 15, 33, 63, 64, 65, 256, 511, 1024, 4096)
GRID = (0.0, *np.logspace(-8, 8, 17), 0.37, 3.3, 14.2857, 33.0, 377.0)  # float32 rounds them below


def tensor(*values: float, dtype=torch.float64, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def float32(kappa: float) -> float:
    return float(np.float32(kappa))


@cache
def exact(kappa: float, dim: int) -> mpmath.mpf:
    """log C_p(kappa) with 40 digits, from mpmath's Bessel function."""
    with mpmath.workdps(40):
        half = mpmath.mpf(dim) / 2
        if kappa == 0:  # one over the area of the sphere
            return mpmath.loggamma(half) - mpmath.log(2) - half * mpmath.log(mpmath.pi)
        k = mpmath.mpf(kappa)
        bessel = mpmath.besseli(half - 1, k, maxterms=10**7)
        return (half - 1) * mpmath.log(k) - half * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)


def exact_mean_cosine(kappa: float, dim: int) -> mpmath.mpf:
    with mpmath.workdps(40):
        nu, k = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(kappa)
        return mpmath.besseli(nu + 1, k, maxterms=10**7) / mpmath.besseli(nu, k, maxterms=10**7)


def relative_errors(kappas, dim: int, dtype) -> list[float]:
    values = vmf.log_normalizer(tensor(*kappas, dtype=dtype), dim).tolist()
    return [float(abs(mpmath.mpf(v) - exact(k, dim)) / abs(exact(k, dim))) for v, k in zip(values, kappas, strict=True)]


# the normalizer


@pytest.mark.parametrize("dim", DIMS)
def test_log_normalizer_has_six_digits_in_float32_and_ten_in_float64(dim):
    kappas = [float32(k) for k in GRID]
    assert max(relative_errors(kappas, dim, torch.float32)) <= 1e-6
    assert max(relative_errors(kappas, dim, torch.float64)) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dims", [range(2, 32), range(32, 80), (127, 128, 255, 257, 384, 768, 2047, 2048, 4095)])
def test_log_normalizer_keeps_its_digits_on_a_dense_grid(dims):
    kappas = [float32(k) for k in np.logspace(-8, 8, 81)]
    for dim in dims:
        assert max(relative_errors(kappas, dim, torch.float32)) <= 1e-6, f"p={dim}"
        assert max(relative_errors(kappas, dim, torch.float64)) <= 1e-10, f"p={dim}"


@pytest.mark.parametrize("dim", [19, 32, 64, 257, pytest.param(4096, marks=pytest.mark.slow)])
def test_log_normalizer_keeps_its_digits_where_it_changes_sign(dim):
    # log C_p falls through zero once for p >= 19. There a relative error says little: the value that is left may be as
    # small as what kappa's own last digit is worth, kappa A_p(kappa). Farther than 0.1 from zero it still holds.
    low, high = 1e-8, 1e8
    for _ in range(80):
        middle = math.sqrt(low * high)
        positive = float(vmf.log_normalizer(tensor(middle), dim)) > 0
        low, high = (middle, high) if positive else (low, middle)
    offsets = np.r_[-np.logspace(-7, -0.5, 14), 0, np.logspace(-7, 0, 14)]
    kappas = [float32(low * (1 + d)) for d in offsets]
    signs = {float(exact(k, dim)) > 0 for k in kappas}
    assert signs == {True, False}, "the grid should reach both sides of the zero"
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        values = vmf.log_normalizer(tensor(*kappas, dtype=dtype), dim).tolist()
        worth = vmf.mean_cosine(tensor(*kappas), dim) * tensor(*kappas)
        for kappa, value, scale in zip(kappas, values, worth.tolist(), strict=True):
            true = exact(kappa, dim)
            error = float(abs(mpmath.mpf(value) - true))
            assert error <= tolerance * (abs(float(true)) if abs(true) > 0.1 else scale), f"p={dim}, kappa={kappa}"


@given(
    st.one_of(st.just(0.0), st.floats(0, 1e8), st.floats(-8, 8).map(lambda x: 10.0**x)),
    st.one_of(st.integers(2, 70), st.integers(2, 4096)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_log_normalizer_and_its_derivatives_are_finite_and_the_first_lies_in_minus_one_to_zero(kappa, dim, dtype):
    kappa = min(kappa, 6e4) if dtype == torch.float16 else kappa
    k = tensor(kappa, dtype=dtype, grad=True)
    value = vmf.log_normalizer(k, dim)
    (slope,) = torch.autograd.grad(value.sum(), k, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), k)
    assert torch.isfinite(torch.cat([value, slope, curvature])).all()
    assert -1 <= slope.item() <= 0
    if dtype == torch.float64:
        assert slope.item() > -1, "only lower precision may round it to -1"


@pytest.mark.parametrize("dim", [2, 3, 17, 61, 62, 256, 4096])
def test_log_normalizer_falls_monotonically(dim):
    kappas = torch.logspace(-3, 8, 400, dtype=torch.float64)
    assert (vmf.log_normalizer(kappas, dim).diff() < 0).all()
    assert (vmf.mean_cosine(kappas, dim).diff() > 0).all()


@pytest.mark.parametrize("dim", [2, 3, 17, 61, 256])
def test_first_and_second_derivatives_pass_gradcheck_at_zero_too(dim):
    k = tensor(0.0, 0.3, 2.0, 20.0, 150.0, grad=True)
    assert gradcheck(lambda x: vmf.log_normalizer(x, dim), k)
    assert gradgradcheck(lambda x: vmf.log_normalizer(x, dim), k)
    assert gradcheck(lambda x: vmf.mean_cosine(x, dim), k)
    if dim > 2:
        assert gradcheck(lambda x: vmf.log_normalizer(x, dim, terms=3), k)


def test_derivatives_of_every_order_are_right():
    def third(x):
        (slope,) = torch.autograd.grad(vmf.log_normalizer(x, 8).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]

    k = tensor(0.0, 0.3, 2.0, 20.0, 150.0, grad=True)
    assert gradgradcheck(lambda x: vmf.mean_cosine(x, 8), k)
    assert gradcheck(third, k)


@pytest.mark.parametrize("dim", [2, 3, 8, 63, 256, 1024])
def test_derivative_is_minus_the_mean_cosine_of_mpmath(dim):
    kappas = [1e-8, 1e-3, 0.5, 7.0, 90.0, 1e4, 1e8]
    k = tensor(*kappas, grad=True)
    (slope,) = torch.autograd.grad(vmf.log_normalizer(k, dim).sum(), k)
    truth = tensor(*(float(exact_mean_cosine(x, dim)) for x in kappas))
    torch.testing.assert_close(-slope, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(vmf.mean_cosine(k, dim).detach(), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dim", [4, 64, 256])
def test_one_term_is_the_formula_of_the_paper(dim):
    nu = dim / 2 - 1
    for kappa in (0.5, 14.3, 250.0):
        r = kappa / nu  # vMF, Eq. 5 as printed, with U_0 = 1
        eta = math.sqrt(1 + r**2) + math.log(r / (1 + math.sqrt(1 + r**2)))
        log_bessel = nu * eta - 0.5 * math.log(2 * math.pi * nu) - 0.25 * math.log(1 + r**2)
        printed = nu * math.log(kappa) - 0.5 * dim * math.log(2 * math.pi) - log_bessel
        assert vmf.log_normalizer(tensor(kappa), dim, terms=1).item() == pytest.approx(printed, rel=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 6])
@pytest.mark.parametrize("dim", [3, 4, 256])
def test_few_terms_are_finite_for_every_kappa(dim, terms):
    k = tensor(0.0, *np.logspace(-8, 8, 60), grad=True)
    value = vmf.log_normalizer(k, dim, terms=terms)
    (slope,) = torch.autograd.grad(value.sum(), k)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()


@pytest.mark.parametrize("dim, limit", [(256, 1e-3), (128, 2.1e-3), (64, 4.2e-3), (32, 8.6e-3), (16, 1.8e-2)])
def test_error_of_one_term_is_small_up_to_a_constant_and_more_terms_remove_it(dim, limit):
    kappas = torch.linspace(0.5, 500, 400, dtype=torch.float64)
    truth = vmf.log_normalizer(kappas, dim)
    spread = [float(np.ptp((vmf.log_normalizer(kappas, dim, terms=n) - truth).numpy())) for n in (1, 2, 3, 6)]
    assert 0.8 * limit < spread[0] <= limit
    assert spread[1] < spread[0] / 10 and spread[2] < spread[1] / 5 and spread[3] < spread[2] / 5


def test_known_values_at_the_dimension_of_dino():
    kappas = tensor(1.0, 5.0, 14.2857, 25.0, 50.0, 100.0, 250.0, 500.0)
    one_term = tensor(0.1932, 0.1463, -0.2028, -1.0198, -4.5993, -18.0904, -92.812, -270.046)
    full = tensor(0.1932, 0.1463, -0.2028, -1.0198, -4.5996, -18.0910, -92.813, -270.047)
    tolerance = tensor(*[5.1e-5] * 6, 5.1e-4, 5.1e-4)  # the printed digits
    for terms, known in ((1, one_term), (None, full)):
        start = vmf.log_normalizer(tensor(10.0), 256, terms=terms)
        gap = (vmf.log_normalizer(kappas, 256, terms=terms) - start - known).abs()
        assert (gap <= tolerance).all(), f"terms={terms}: {gap}"


def test_known_values_at_64_dimensions():
    for terms, known in ((1, tensor(-3.8026, -48.0332)), (None, tensor(-3.8045, -48.0362))):
        start = vmf.log_normalizer(tensor(10.0), 64, terms=terms)
        gap = vmf.log_normalizer(tensor(25.0, 100.0), 64, terms=terms) - start - known
        assert float(gap.abs().max()) < 5.1e-5, f"terms={terms}: {gap}"


@pytest.mark.parametrize("tau, to_2, to_10", [(0.04, 0.143, 0.408), (0.07, 0.083, 0.272), (0.1, 0.058, 0.201)])
def test_break_even_cosine_of_a_longer_prototype(tau, to_2, to_10):
    for length, known in ((2.0, to_2), (10.0, to_10)):
        log_c = vmf.log_normalizer(tensor(1 / tau, length / tau), 256)
        assert float((log_c[0] - log_c[1]) * tau / (length - 1)) == pytest.approx(known, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_gives_float32_out(dtype):
    k = tensor(0.0, 0.1, 25.0, 3000.0, dtype=dtype)
    for function in (vmf.log_normalizer, vmf.mean_cosine):
        out = function(k, 256)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, function(k.float(), 256), rtol=0, atol=0)


def test_autocast_changes_no_digit():
    y, w = F.normalize(torch.randn(5, 16), dim=-1), 3 * torch.randn(7, 16)
    plain = scores.vmf(y, w, 0.1), vmf.log_normalizer(w.norm(dim=-1), 16), vmf.fit_mixture(y, 2).log_joint(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scores.vmf(y, w, 0.1), vmf.log_normalizer(w.norm(dim=-1), 16), vmf.fit_mixture(y, 2).log_joint(y)
    for a, b in zip(plain, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_shapes_pass_through_even_without_entries():
    for shape in ((), (0,), (2, 3)):
        k = torch.ones(shape)
        assert vmf.log_normalizer(k, 16).shape == shape == vmf.log_normalizer(k, 16, terms=1).shape


@pytest.mark.parametrize(
    "dim, terms, message", [(1, None, "dim=1"), (2, 1, "dim >= 3"), (256, 0, "terms=0"), (256, 7, "1 to 6 terms")]
)
def test_normalizer_names_what_is_wrong(dim, terms, message):
    with pytest.raises(ValueError, match=message):
        vmf.log_normalizer(torch.ones(1), dim, terms=terms)


# density and sampler


def angles(dim: int, kappa: float) -> tuple[np.ndarray, np.ndarray]:
    """A fine grid of the angle to mu, and the distribution function of the angle on it."""
    width = min(math.pi, 12 * math.sqrt(dim / max(kappa, 1e-9)))
    theta = np.linspace(1e-9, width, 100_001)
    log_f = (dim - 2) * np.log(np.sin(theta).clip(1e-300)) + kappa * (np.cos(theta) - 1)
    f = np.exp(log_f - log_f.max())
    cdf = np.r_[0, np.cumsum(f[1:] + f[:-1])]
    return theta, cdf / cdf[-1]


def p_value(y: torch.Tensor, mu: torch.Tensor, kappa: float) -> float:
    """Kolmogorov-Smirnov p-value of the samples' angles to mu."""
    theta, cdf = angles(len(mu), kappa)
    chord = (y - mu).norm(dim=-1).numpy()
    return stats.kstest(2 * np.arcsin(np.minimum(chord / 2, 1)), lambda x: np.interp(x, theta, cdf)).pvalue


CASES = [(2, 0.0), (2, 5.0), (3, 20.0), (5, 1e4), (16, 50.0), (256, 0.0), (256, 30.0), (256, 1000.0), (8, 1e8)]


@pytest.mark.parametrize("dim, kappa", CASES)
def test_angles_of_the_samples_have_the_right_distribution(dim, kappa):
    generator = torch.Generator().manual_seed(dim)
    mu = F.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    y = vmf.sample(3 * mu, kappa, 5_000, generator)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(5_000, dtype=torch.float64))
    assert p_value(y, mu, kappa) > 1e-3
    wrong = 1.2 * kappa if kappa > 0 else max(0.3, dim / 16)
    assert p_value(y, mu, wrong) < 1e-6, "the test would not see a wrong kappa"


@pytest.mark.parametrize("dim, kappa", [(2, 3.0), (3, 0.5), (16, 40.0), (64, 300.0)])
def test_samples_have_the_right_mean_and_no_direction_beside_it(dim, kappa):
    n, generator = 20_000, torch.Generator().manual_seed(1)
    mu = F.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    y = vmf.sample(mu, kappa, n, generator)
    k = tensor(kappa, grad=True)
    mean = vmf.mean_cosine(k, dim)
    (variance,) = torch.autograd.grad(mean.sum(), k)  # A' is the variance of the cosine
    mean = mean.detach()
    assert abs(float((y @ mu).mean() - mean)) < 4.5 * math.sqrt(variance.item() / n)
    assert float((y @ mu).var()) == pytest.approx(variance.item(), rel=0.05)
    side = y - (y @ mu)[:, None] * mu
    per_axis = (1 - mean.item() ** 2 - variance.item()) / (dim - 1)
    assert float(n * side.mean(0).square().sum() / per_axis) < stats.chi2.isf(1e-5, dim - 1)
    spectrum = torch.linalg.eigvalsh(side.T @ side / n)[1:] / per_axis  # the first belongs to mu
    assert 1 - 4 * math.sqrt(dim / n) < float(spectrum.min()) <= float(spectrum.max()) < 1 + 4 * math.sqrt(dim / n)


def test_zero_concentration_samples_the_whole_sphere_evenly():
    y = vmf.sample(torch.eye(6, dtype=torch.float64)[0], 0.0, 30_000, torch.Generator().manual_seed(2))
    assert float(len(y) * 6 * y.mean(0).square().sum()) < stats.chi2.isf(1e-5, 6)
    torch.testing.assert_close(6 * y.T @ y / len(y), torch.eye(6, dtype=torch.float64), rtol=0, atol=0.05)


def test_a_generator_reproduces_the_samples():
    mu = torch.randn(12)
    one, two, other = (vmf.sample(mu, 9.0, 50, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert one.dtype == torch.float32 and torch.equal(one, two) and not torch.equal(one, other)
    assert vmf.sample(mu, 9.0, 0).shape == (0, 12)


@pytest.mark.parametrize(
    "mu, kappa", [([1.0], 1.0), ([0.0, 0.0], 1.0), ([math.nan, 1.0], 1.0), ([1.0, 0.0], -1.0), ([1.0, 0.0], math.inf)]
)
def test_sampler_names_what_is_wrong(mu, kappa):
    with pytest.raises(ValueError, match="mu must be" if kappa == 1 else "kappa="):
        vmf.sample(tensor(*mu), kappa, 3)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 80.0])
@pytest.mark.parametrize("dim", [2, 3, 16, 256])
def test_density_integrates_to_one(dim, kappa):
    mu = F.one_hot(torch.tensor(0), dim).double()
    nodes, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(400))
    theta, weight = (nodes + 1) * (torch.pi / 2), weight * (torch.pi / 2)
    y = torch.zeros(len(theta), dim, dtype=torch.float64)
    y[:, 0], y[:, 1] = theta.cos(), theta.sin()
    rest = (dim - 1) / 2  # samples at angle theta fill a sphere of dim - 2 dimensions and radius sin theta
    log_area = math.log(2) + rest * math.log(math.pi) - math.lgamma(rest) + (dim - 2) * theta.sin().log()
    assert ((vmf.log_density(y, mu, kappa) + log_area).exp() * weight).sum().item() == pytest.approx(1, abs=1e-10)


def test_density_integrates_to_one_over_points_of_the_sphere():
    z, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(60))
    phi = torch.arange(120, dtype=torch.float64) * (2 * torch.pi / 120)
    radius = (1 - z**2).sqrt()[:, None]
    y = torch.stack([radius * phi.cos(), radius * phi.sin(), z[:, None].expand(-1, 120)], dim=-1)
    mu = F.normalize(tensor(1.0, -2.0, 0.5), dim=0)
    total = (vmf.log_density(y, mu, 7.0).exp() * weight[:, None]).sum() * (2 * torch.pi / 120)
    assert total.item() == pytest.approx(1, abs=1e-10)


def test_density_is_the_score_and_keeps_float32():
    y, w = F.normalize(torch.randn(5, 8), dim=-1), torch.randn(7, 8)
    kappa = w.norm(dim=-1) / 0.1
    pairs = vmf.log_density(y[:, None], F.normalize(w, dim=-1), kappa)
    torch.testing.assert_close(pairs, scores.vmf(y, w, 0.1), rtol=1e-4, atol=1e-4)
    assert vmf.log_density(y.bfloat16(), y.bfloat16(), 0.1).dtype == torch.float32


# mixtures


@pytest.mark.parametrize("dim", [2, 3, 16, 256])
def test_fit_concentration_inverts_the_mean_cosine(dim):
    kappa = torch.logspace(-3, 5, 33, dtype=torch.float64)
    torch.testing.assert_close(vmf.fit_concentration(vmf.mean_cosine(kappa, dim), dim), kappa, rtol=1e-7, atol=0)
    ends = vmf.fit_concentration(tensor(0.0, 1.0), dim, largest=1e4)
    assert ends.tolist() == [0.0, 1e4]


MU = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
KAPPA, WEIGHTS = tensor(15.0, 30.0, 60.0), tensor(0.5, 0.3, 0.2)


def known_mixture(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = (2000 * WEIGHTS).int().tolist()
    return torch.cat([vmf.sample(m, k.item(), n, generator) for m, k, n in zip(MU, KAPPA, sizes, strict=True)])


def in_order(fit: vmf.Mixture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, order = linear_sum_assignment(-(MU @ fit.mu.T).numpy())
    return fit.mu[order], fit.kappa[order], fit.weights[order]


@pytest.mark.parametrize("seed", [0, 1])
def test_em_and_prototypes_both_recover_a_known_mixture(seed):
    y = known_mixture(seed)
    fits = [vmf.fit_mixture(y, 3, seed=seed), vmf.fit_mixture(y, 3, method="prototypes", steps=300, seed=seed)]
    for mu, kappa, weights in map(in_order, fits):
        assert ((mu * MU).sum(-1) > 0.99).all()
        torch.testing.assert_close(kappa, KAPPA, rtol=0.15, atol=0)
        torch.testing.assert_close(weights, WEIGHTS, rtol=0, atol=0.03)
    em, prototypes = (torch.logsumexp(fit.log_joint(y), -1).mean().item() for fit in fits)
    assert em - 0.01 < prototypes < em + 1e-9, "EM is at the maximum, the stochastic view close below it"
    torch.testing.assert_close(in_order(fits[1])[1], in_order(fits[0])[1], rtol=0.1, atol=0)


@pytest.mark.slow
@settings(max_examples=12)
@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(1, 7), st.booleans())
def test_em_never_loses_likelihood(seed, dim, k, uniform):
    y = F.normalize(torch.randn(40, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)
    fit = vmf.fit_mixture(y, k, steps=15, uniform_weights=uniform, seed=seed)
    assert min(np.diff(fit.log_likelihood), default=0) >= -1e-9
    torch.testing.assert_close(fit.responsibilities(y).sum(-1), torch.ones(40, dtype=torch.float64))
    assert torch.isfinite(fit.log_joint(y)).all() and fit.weights.sum().item() == pytest.approx(1)
    if uniform:
        assert torch.equal(fit.weights, torch.full((k,), 1 / k, dtype=torch.float64))


def test_one_component_is_the_closed_form():
    y = known_mixture(0)
    fit, mean = vmf.fit_mixture(y, 1), y.mean(0)
    torch.testing.assert_close(fit.mu[0], mean / mean.norm())
    torch.testing.assert_close(fit.kappa, vmf.fit_concentration(mean.norm()[None], 8))


@pytest.mark.parametrize("method", ["em", "prototypes"])
def test_as_many_components_as_samples_stay_finite(method):
    y = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), dim=-1)  # float32 is welcome
    fit = vmf.fit_mixture(y, 6, method=method, steps=40)
    for values in (fit.mu, fit.kappa, fit.weights, fit.responsibilities(y), torch.tensor(fit.log_likelihood)):
        assert torch.isfinite(values).all()
    assert sorted(fit.responsibilities(y).argmax(-1).tolist()) == list(range(6))


@pytest.mark.parametrize("method", ["em", "prototypes"])
def test_data_without_a_mean_direction_is_no_trap(method):
    y = torch.cat([torch.eye(4), -torch.eye(4)])
    fit = vmf.fit_mixture(y, 1, method=method, steps=20)
    assert torch.isfinite(fit.mu).all() and fit.kappa.item() < 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k=0"),
        ({"k": 11}, "k=11"),
        ({"method": "kmeans"}, "'em' or 'prototypes'"),
        ({"y": 2.0}, "unit vectors"),
    ],
)
def test_fit_mixture_names_what_is_wrong(change, message):
    y = change.pop("y", 1.0) * torch.eye(10)
    with pytest.raises(ValueError, match=message):
        vmf.fit_mixture(y, **{"k": 2, **change})
