"""Scores against loops, mpmath's log C_p and each other; in float32 at least, for any length and temperature."""

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from prototypes_lib import scores

ALL = (scores.dot, scores.cosine, scores.vmf)


def problem(n=20, k=7, p=16, length=1.0, spread=0.5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    y = normalize(torch.randn(n, p, generator=g, dtype=torch.float64), dim=-1)
    w = normalize(torch.randn(k, p, generator=g, dtype=torch.float64), dim=-1)
    w = w * length * torch.exp(spread * torch.randn(k, 1, generator=g, dtype=torch.float64))
    return y.to(dtype), w.to(dtype)


def log_c(kappa, p):
    """log C_p(kappa) from its definition, in 40 digits."""
    with mpmath.workdps(40):
        nu, kappa = mpmath.mpf(p) / 2 - 1, mpmath.mpf(kappa)
        bessel = mpmath.log(mpmath.besseli(nu, kappa))
        return float(nu * mpmath.log(kappa) - (nu + 1) * mpmath.log(2 * mpmath.pi) - bessel)


def naive(kind, y, w, tau):
    """The three formulas entry by entry."""
    out = torch.empty(len(y), len(w), dtype=torch.float64)
    for b in range(len(y)):
        for k in range(len(w)):
            product = sum(float(i) * float(j) for i, j in zip(y[b], w[k], strict=True))
            length = sum(float(j) ** 2 for j in w[k]) ** 0.5
            out[b, k] = product / tau / (length if kind is scores.cosine else 1)
            if kind is scores.vmf:
                out[b, k] += log_c(length / tau, w.shape[-1])
    return out


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("tau", [0.04, 0.1, 1.0])
def test_a_score_is_its_formula_written_as_loops(kind, tau):
    y, w = problem(length=2.0)
    torch.testing.assert_close(kind(y, w, tau), naive(kind, y, w, tau), rtol=1e-11, atol=1e-10)


def test_vmf_scores_of_unit_prototypes_are_cosine_scores_after_the_softmax():
    y, w = problem(spread=0.0)
    a, b = scores.vmf(y, w, 0.07), scores.cosine(y, w, 0.07)
    assert not torch.allclose(a, b)  # log C_p is there, as one constant
    torch.testing.assert_close(a.softmax(-1), b.softmax(-1), rtol=0, atol=1e-12)


def test_vmf_scores_of_prototypes_of_different_length_are_not_dot_scores_after_the_softmax():
    y, w = problem()
    gap = (scores.vmf(y, w, 0.07).softmax(-1) - scores.dot(y, w, 0.07).softmax(-1)).abs().max()
    assert gap > 0.05


def test_cosine_ignores_the_length_of_a_prototype():
    y, w = problem(spread=0.0)
    stretched = w * torch.linspace(0.01, 50, len(w), dtype=torch.float64)[:, None]
    torch.testing.assert_close(scores.cosine(y, stretched, 0.1), scores.dot(y, w, 0.1), rtol=0, atol=1e-12)


def test_prototypes_are_scored_on_their_own():
    y, w = problem()
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(3))
    for kind in ALL:
        torch.testing.assert_close(kind(y, w[order], 0.07), kind(y, w, 0.07)[:, order], rtol=1e-13, atol=1e-12)


def test_leading_dimensions_are_a_batch():
    y, w = problem(n=24)
    for kind in ALL:
        grid = kind(y.view(2, 3, 4, -1), w, 0.07)
        torch.testing.assert_close(grid.view(24, -1), kind(y, w, 0.07), rtol=0, atol=1e-12)
        assert kind(y[:0], w, 0.07).shape == (0, len(w))


def test_the_papers_approximation_of_log_c_moves_targets_little_at_p_256():
    y, w = problem(n=50, k=20, p=256, length=3.0)
    exact, paper = (scores.vmf(y, w, 0.07, terms=terms) for terms in (None, 1))
    gap = (exact.softmax(-1) - paper.softmax(-1)).abs().max()
    assert 0 < gap < 1e-3


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_in_is_float32_out_as_if_the_inputs_were_widened_first(kind, dtype):
    y, w = problem(length=3.0, dtype=dtype)
    out = kind(y, w, 0.04)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), kind(y.double(), w.double(), 0.04), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_autocast_does_not_lower_the_precision(kind):
    y, w = problem(length=3.0, dtype=torch.float32)
    plain = kind(y, w, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kind(y, w, 0.04)
        mixed = kind(y.bfloat16(), w, 0.04)
    assert inside.dtype == mixed.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert torch.equal(mixed, kind(y.bfloat16(), w, 0.04))


@pytest.mark.parametrize("kind", ALL)
def test_gradients_of_codes_and_prototypes_are_those_of_finite_differences(kind):
    y, w = (x.requires_grad_() for x in problem(n=3, k=4, p=5))
    assert torch.autograd.gradcheck(lambda a, b: kind(a, b, 0.2), (y, w))


def test_the_gradient_of_a_prototypes_length_is_zero_where_its_mean_cosine_is_met():
    """d/d|w| (<w, y> / tau + log C_p) = (<mu, y> - A_p(kappa)) / tau: longer only for codes closer than expected."""
    y, w = problem(n=1, k=1, length=2.0)
    tau, kappa = 0.1, w.norm() / 0.1
    with mpmath.workdps(40):
        p, x = w.shape[-1], mpmath.mpf(kappa.item())
        expected = float(mpmath.besseli(mpmath.mpf(p) / 2, x) / mpmath.besseli(mpmath.mpf(p) / 2 - 1, x))
    length = w.norm().requires_grad_()
    mu = w / w.norm()
    scores.vmf(y, mu * length, tau).sum().backward()
    torch.testing.assert_close(length.grad, ((mu @ y.T).squeeze() - expected) / tau, rtol=1e-9, atol=1e-9)


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([2, 3, 16, 256]),
    st.floats(-3, 0),
    st.floats(-6, 4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_scores_and_their_gradients_are_finite_for_any_length_and_temperature(n, k, p, log_tau, log_length, dtype):
    y, w = problem(n, k, p, length=10**log_length, dtype=dtype)
    y.requires_grad_()
    w.requires_grad_()
    for kind in ALL:
        out = kind(y, w, 10**log_tau)
        grads = torch.autograd.grad(out.logsumexp(-1).sum(), (y, w))
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", ALL)
def test_a_prototype_that_vanished_is_still_scored(kind):
    y, w = problem()
    w[2] = 0
    w.requires_grad_()
    out = kind(y, w, 0.07)
    out.sum().backward()
    assert out.isfinite().all() and w.grad.isfinite().all()
    if kind is not scores.vmf:
        assert (out[:, 2] == 0).all()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("tau", [0.0, -0.1, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error_that_names_it(kind, tau):
    y, w = problem()
    with pytest.raises(ValueError, match=rf"tau={tau}: the temperature must be positive"):
        kind(y, w, tau)
