"""KoLeo, coding rate and the entropies against float64 by other means, and on the inputs that break such things."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo import together
from hypothesis import given
from hypothesis import strategies as st

from prototypes_lib import ranks
from prototypes_lib.regularizers import (
    coding_rate,
    expansion,
    koleo,
    mean_entropy,
    nearest,
    power_law,
    power_law_matching,
    prior_matching,
)

EPS = math.sqrt(0.05)  # the released SimDINO's eps=0.05 is our eps^2


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def gradient(loss, x):
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def naive_koleo(x, eps=1e-8):
    """Every distance by subtraction, the smallest by a loop, in float64."""
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    logs = []
    for k in range(len(x)):
        others = [i for i in range(len(x)) if i != k]
        logs.append(torch.log((x[others] - x[k]).norm(dim=-1).min() + eps))
    return -torch.stack(logs).mean()


def naive_rate(z, eps, n=None):
    n, d = n or len(z), z.shape[1]
    sigma = torch.linalg.svdvals(z.double())
    return float(0.5 * torch.log1p(d / (n * eps**2) * sigma**2).sum())


class TestKoleo:
    @pytest.mark.parametrize(("n", "dim"), [(2, 2), (17, 3), (60, 32)])
    def test_equals_the_double_loop_with_its_gradient(self, n, dim):
        x = randn(n, dim)
        expected, slope = gradient(naive_koleo, x.double())
        value, g = gradient(koleo, x)
        assert abs(float(value) - float(expected)) < 1e-6 * max(1, abs(float(expected)))
        assert torch.allclose(g.double(), slope, rtol=1e-4, atol=1e-6 * float(slope.abs().max()))
        assert float(koleo(x.double())) == pytest.approx(float(expected), abs=1e-12)

    def test_is_a_loss_that_falls_as_vectors_spread(self):
        angles = torch.arange(8) * 2 * math.pi / 8
        values = [float(koleo(torch.stack([(s * angles).cos(), (s * angles).sin()], 1))) for s in (0.01, 0.1, 0.5, 1.0)]
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(-math.log(2 * math.sin(math.pi / 8)), abs=1e-6)

    def test_a_step_against_the_gradient_moves_near_copies_apart(self):
        x = F.normalize(randn(1, 16).repeat(2, 1) + 1e-3 * randn(2, 16, seed=1), dim=-1)
        _, g = gradient(koleo, x)
        moved = F.normalize(x - 1e-6 * g, dim=-1)
        assert (moved[0] - moved[1]).norm() > (x[0] - x[1]).norm()
        assert float(((x[0] - x[1]) * g[0]).sum()) < 0 < float(((x[0] - x[1]) * g[1]).sum())

    @pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e8])
    def test_only_directions_count(self, scale):
        x = randn(30, 8)
        lengths = 10 ** randn(30, 1, seed=1).clamp(-2, 2)
        assert float(koleo(scale * lengths * x)) == pytest.approx(float(koleo(x)), abs=1e-5)
        _, g = gradient(koleo, scale * lengths * x)
        assert float((g * x).sum(-1).abs().max()) < 1e-5 * float(g.abs().max()), "no pull along the vector itself"

    def test_order_does_not_matter(self):
        x = randn(40, 8)
        assert float(koleo(x)) == pytest.approx(float(koleo(x[torch.randperm(40, generator=rng(3))])), abs=1e-6)

    def test_exact_copies_have_the_value_of_eps_and_no_gradient(self):
        x = randn(5, 16).repeat(3, 1)
        value, g = gradient(koleo, x)
        assert float(value) == pytest.approx(-math.log(1e-8), abs=1e-5)
        assert not g.any()

    def test_only_the_copies_lose_their_gradient(self):
        x = randn(6, 16)
        x[1] = x[0]
        _, g = gradient(koleo, x)
        assert g[2:].norm(dim=-1).min() > 0

    @pytest.mark.parametrize("d", [1e-5, 1e-3, 1e-1])
    def test_the_force_on_a_pair_is_one_over_its_distance(self, d):
        x = torch.tensor([[1.0, 0, 0], [math.cos(d), math.sin(d), 0]], dtype=torch.float64)
        _, g = gradient(koleo, x)
        chord = 2 * math.sin(d / 2)
        assert g.norm(dim=-1).tolist() == pytest.approx([math.cos(d / 2) / (chord + 1e-8)] * 2, rel=1e-6)

    def test_distances_between_near_copies_keep_their_digits(self):
        d = 1e-5  # 1 - cos = 5e-11 is no number in float32 beside 1
        x = torch.tensor([[1.0, 0.0], [1.0, d]])
        assert float(koleo(x)) == pytest.approx(-math.log(d), rel=1e-3)

    @pytest.mark.parametrize("n", [1, 2])
    def test_one_and_two_vectors(self, n):
        value, g = gradient(koleo, randn(n, 4))
        assert torch.isfinite(value) and torch.isfinite(g).all()
        if n == 1:
            assert float(value) == 0 and not g.any()

    def test_a_zero_vector_gets_no_gradient_and_leaves_the_others_theirs(self):
        x = randn(5, 8)
        x[0] = 0
        value, g = gradient(koleo, x)
        assert torch.isfinite(value) and torch.isfinite(g).all()
        assert not g[0].any() and g[1:].abs().max() > 0
        assert g.abs().max() < 1e3, "the direction of a zero vector must not be searched for at a slope of 1e12"

    @given(
        n=st.integers(1, 12),
        dim=st.integers(2, 20),
        near=st.sampled_from([0.0, 1e-12, 1e-8, 1e-7, 1e-4, 1.0]),
        zeros=st.integers(0, 2),
        scale=st.sampled_from([1e-8, 1.0, 1e8]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        parts=st.integers(1, 3),
        seed=st.integers(0, 99),
    )
    def test_value_and_gradient_are_finite_whatever_comes(self, n, dim, near, zeros, scale, dtype, parts, seed):
        scale = 1.0 if dtype == torch.float16 else scale  # 1e8 is no half-precision number
        x = scale * (randn(1, dim, seed=seed) + near * randn(n, dim, seed=seed + 100))
        x[:zeros] = 0
        value, g = gradient(lambda x: koleo(x, parts=min(parts, n), generator=rng(seed)), x.to(dtype))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(value) and value <= -math.log(1e-8) + 1e-4
        assert g.dtype == dtype
        if dtype != torch.float16:  # a slope of 1e8 is no half-precision number either
            assert torch.isfinite(g).all()

    def test_autocast_changes_nothing(self):
        x = randn(300, 3)  # so close together that bfloat16 products would pick other neighbors
        expected, slope = gradient(koleo, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, g = gradient(koleo, x)
        assert torch.equal(value, expected) and torch.equal(g, slope)

    def test_gradcheck(self):
        assert torch.autograd.gradcheck(koleo, randn(7, 3, dtype=torch.float64).requires_grad_())


class TestPartition:
    def test_one_part_is_the_whole(self):
        x = randn(50, 8)
        assert torch.equal(koleo(x, parts=1, generator=rng(0)), koleo(x))

    def test_parts_of_one_vector_see_nothing(self):
        value, g = gradient(lambda x: koleo(x, parts=9), randn(9, 4))
        assert float(value) == 0 and not g.any()

    def test_equals_the_naive_loss_of_each_part(self):
        x = randn(24, 6)
        order = torch.randperm(24, generator=rng(5))
        expected = torch.stack([naive_koleo(x[rows]) for rows in order.split(6)]).mean()
        assert float(koleo(x, parts=4, generator=rng(5))) == pytest.approx(float(expected), abs=1e-5)

    def test_the_generator_decides_the_partition(self):
        x = randn(40, 6)
        value = [float(koleo(x, parts=5, generator=rng(seed))) for seed in (1, 1, 2)]
        assert value[0] == value[1] != value[2]

    def test_a_part_of_one_vector_counts_as_zero_in_the_mean(self):
        x = randn(3, 6)  # in parts of two and one
        pair = torch.randperm(3, generator=rng(5))[:2]
        expected = -math.log(float((F.normalize(x[pair], dim=-1).diff(dim=0)).norm())) * 2 / 3
        assert float(koleo(x, parts=2, generator=rng(5))) == pytest.approx(expected, abs=1e-6)

    @given(n=st.integers(4, 40), parts=st.integers(1, 8), seed=st.integers(0, 50))
    def test_neighbors_in_a_part_are_never_nearer(self, n, parts, seed):
        parts = min(parts, n // 2)  # every part has a pair
        x = randn(n, 5, seed=seed)
        assert koleo(x, parts=parts, generator=rng(seed)) <= koleo(x) + 1e-6

    def test_copies_in_different_parts_go_unseen(self):
        k, m, parts = 1024, 109, 8  # iBOT's 8192 and 875, an eighth of both
        x = randn(m, 16)[torch.randint(m, (k,), generator=rng(0))]
        blind = float(koleo(x, parts=1, eps=1e-8))
        seen = float(koleo(x, parts=parts, generator=rng(1)))
        share = 1 - (1 - 1 / m) ** (k // parts - 1)
        assert blind == pytest.approx(-math.log(1e-8), rel=1e-3)
        assert 0.9 * share * blind < seen < 1.05 * share * blind

    @pytest.mark.parametrize("parts", [0, -1, 11])
    def test_impossible_parts_are_refused(self, parts):
        with pytest.raises(ValueError, match="parts"):
            koleo(randn(10, 4), parts=parts)


class TestNearest:
    @pytest.mark.parametrize("block", [1, 40, 333, 2**26])
    def test_blocks_give_the_same_indices_as_all_distances(self, block):
        x = F.normalize(randn(70, 9, dtype=torch.float64), dim=-1)
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        assert torch.equal(nearest(x, block=block), distance.argmin(-1))

    def test_is_never_the_vector_itself(self):
        x = F.normalize(randn(3, 9).repeat(5, 1), dim=-1)
        assert (nearest(x, block=7) != torch.arange(15)).all()


class TestCodingRate:
    @pytest.mark.parametrize(("n", "dim"), [(5, 12), (12, 5), (8, 8), (1, 6), (6, 1)])
    def test_equals_the_log_determinant(self, n, dim):
        z, eps = randn(n, dim, dtype=torch.float64), 0.4
        expected = 0.5 * torch.linalg.slogdet(torch.eye(dim) + dim / (n * eps**2) * z.T @ z).logabsdet
        assert float(coding_rate(z, eps)) == pytest.approx(float(expected), rel=1e-12)
        eigenvalues = np.linalg.eigvalsh((z.T @ z).numpy())
        by_eigenvalues = 0.5 * np.log1p(dim / (n * eps**2) * eigenvalues.clip(0)).sum()
        assert float(coding_rate(z, eps)) == pytest.approx(by_eigenvalues, rel=1e-12)

    @pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_gradcheck(self, shape, groups):
        shape = (shape[0] * groups, shape[1])
        z = randn(*shape, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: coding_rate(z, 0.5, groups), z)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_gradcheck_where_one_term_drowns_the_other(self, scale):
        z = (scale * randn(6, 4, dtype=torch.float64)).requires_grad_()
        slope = torch.autograd.grad(coding_rate(z, 0.5), z)[0]
        a = 4 / (6 * 0.25)
        expected = a * z @ torch.linalg.inv(torch.eye(4) + a * z.T @ z)
        assert torch.allclose(slope, expected.detach(), rtol=1e-6, atol=0)

    def test_groups_are_processes_that_do_not_reduce(self):
        z = randn(24, 10)
        pieces = [naive_rate(piece, EPS, n=24) for piece in z.split(6)]
        assert float(coding_rate(z, EPS, groups=4)) == pytest.approx(np.mean(pieces), rel=1e-6)
        assert float(coding_rate(z, EPS, groups=1)) == pytest.approx(naive_rate(z, EPS), rel=1e-6)
        assert coding_rate(z, EPS, groups=4) < coding_rate(z, EPS, groups=2) < coding_rate(z, EPS)

    # one process's batch m, processes N: the released runs' gamma R at p = 256, eps^2 = 0.05
    @pytest.mark.parametrize(
        ("m", "processes", "kind", "expected"),
        [
            (64, 8, "orthonormal", 0.4496),
            (64, 8, "random", 0.429),
            (64, 8, "collapsed", 0.0189),
            (256, 2, "orthonormal", 1.80),
            (512, 1, "orthonormal", 2.28),
            (64, 16, "orthonormal", 0.280),
            (24, 1, "orthonormal", 2.935),
            (78, 32, "collapsed", 0.0109),
        ],
    )
    def test_the_released_runs_values(self, m, processes, kind, expected):
        p, n = 256, m * processes
        if kind == "orthonormal":  # as orthonormal as m vectors in p dimensions can be: a tight frame
            z = torch.eye(p).repeat(2, 1)[:m].repeat(processes, 1)
        elif kind == "random":
            z = F.normalize(randn(n, p), dim=-1)
        else:
            z = F.normalize(randn(1, p), dim=-1).expand(n, p)
        gamma = (p + n) / (p * n)
        tolerance = 0.002 if kind == "random" else 0.5 * 10 ** -len(f"{expected}".split(".")[1]) + 1e-6
        value = gamma * float(coding_rate(z, EPS, groups=processes))
        assert float(expansion(z, EPS, groups=processes)) == pytest.approx(value, rel=1e-6)
        assert value == pytest.approx(expected, abs=max(tolerance, 5e-5))

    def test_reducing_the_gram_matrix_is_one_process_of_the_whole_batch(self):
        """The released code's reduce_cov=1 on 8 processes of 64: 2.28, not the 0.4496 without it."""
        z = torch.eye(256).repeat(2, 1)
        assert float(expansion(z, EPS, groups=1)) == pytest.approx(2.28, abs=0.005)

    @given(
        n=st.integers(1, 24),
        dim=st.integers(1, 24),
        kind=st.sampled_from(["zero", "constant", "rank one", "duplicated", "full"]),
        scale=st.sampled_from([1e-30, 1e-8, 1e-4, 1.0, 1e4, 1e8]),
        eps=st.sampled_from([1e-3, EPS, 2.0]),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        seed=st.integers(0, 99),
    )
    def test_is_exact_and_its_gradient_finite_whatever_comes(self, n, dim, kind, scale, eps, dtype, seed):
        z = randn(n, dim, seed=seed)
        if kind == "zero":
            z = 0 * z
        elif kind == "constant":
            z = torch.ones(n, dim)
        elif kind == "rank one":
            z = z[:, :1] * z[:1]
        elif kind == "duplicated":
            z = z[torch.arange(n) // 2]
        z = (scale * z).to(dtype)
        value, g = gradient(lambda z: coding_rate(z, eps), z)
        assert torch.isfinite(g).all() and g.dtype == dtype
        assert float(value) == pytest.approx(naive_rate(z, eps), rel=1e-5, abs=1e-36)

    def test_collapse_is_the_smallest_rate_and_a_tight_frame_the_largest(self):
        n, d = 48, 16
        frame, point = torch.eye(d).repeat(3, 1), torch.eye(d)[:1].repeat(n, 1)
        middle = [float(coding_rate(F.normalize(randn(n, d, seed=s), dim=-1), EPS)) for s in range(5)]
        low, high = float(coding_rate(point, EPS)), float(coding_rate(frame, EPS))
        assert low < min(middle) and max(middle) < high
        assert low == pytest.approx(0.5 * math.log1p(d / EPS**2), rel=1e-6)
        assert high == pytest.approx(0.5 * d * math.log1p(1 / EPS**2), rel=1e-6)

    def test_is_invariant_to_rotation_order_and_sign(self):
        z = randn(20, 8)
        q = torch.linalg.qr(randn(8, 8, seed=1)).Q
        for other in (z @ q, z.flip(0), -z):
            assert float(coding_rate(other, EPS)) == pytest.approx(float(coding_rate(z, EPS)), rel=1e-6)

    def test_autocast_changes_nothing(self):
        z = randn(50, 32)
        expected, slope = gradient(lambda z: coding_rate(z, EPS), z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, g = gradient(lambda z: coding_rate(z, EPS), z)
        assert torch.equal(value, expected) and torch.equal(g, slope)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_codes_that_are_not_finite_give_nan_and_no_crash(self, bad):
        z = randn(6, 4)
        z[2, 1] = bad
        assert torch.isnan(coding_rate(z, EPS))

    @pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
    def test_a_distortion_that_is_not_positive_is_refused(self, eps):
        with pytest.raises(ValueError, match="eps"):
            coding_rate(randn(4, 4), eps)

    @pytest.mark.parametrize("groups", [0, 3, 8, -2])
    def test_groups_must_divide_the_batch(self, groups):
        with pytest.raises(ValueError, match="groups"):
            coding_rate(randn(4, 4), EPS, groups)


def probabilities(batch, k, seed=0, sharpness=2.0):
    return torch.softmax(sharpness * randn(batch, k, seed=seed), dim=-1)


class TestMarginal:
    def test_mean_entropy_is_that_of_the_mean(self):
        p = probabilities(30, 12)
        marginal = p.double().mean(0).numpy()
        assert float(mean_entropy(p)) == pytest.approx(-(marginal * np.log(marginal)).sum(), abs=1e-6)

    def test_mean_entropy_runs_from_zero_to_ln_k(self):
        one, each = F.one_hot(torch.zeros(16, dtype=torch.long), 16).float(), torch.eye(16)
        assert float(mean_entropy(one)) == pytest.approx(0, abs=1e-30)
        assert float(mean_entropy(each)) == pytest.approx(math.log(16), abs=1e-6)
        assert 0 < float(mean_entropy(probabilities(30, 16))) < math.log(16)

    def test_prior_matching_is_kl_from_the_marginal_to_the_prior(self):
        p, prior = probabilities(30, 12), power_law(12, 1.0)
        a, b = p.double().mean(0).numpy(), prior.double().numpy()
        forward, backward = (a * np.log(a / b)).sum(), (b * np.log(b / a)).sum()
        assert float(prior_matching(p, prior)) == pytest.approx(forward, abs=1e-6)
        assert abs(forward - backward) > 0.01, "the example must tell the two directions apart"

    @given(k=st.integers(1, 40), batch=st.integers(1, 10), seed=st.integers(0, 99))
    def test_the_uniform_prior_leaves_ln_k_minus_the_entropy(self, k, batch, seed):
        p = probabilities(batch, k, seed)
        expected = math.log(k) - float(mean_entropy(p))
        assert float(prior_matching(p, torch.full((k,), 1 / k))) == pytest.approx(expected, abs=2e-6)
        assert float(prior_matching(p, power_law(k, 0.25))) > -1e-6, "a divergence is not negative"

    def test_prior_matching_is_zero_at_the_prior(self):
        prior = power_law(20, 0.5)
        assert float(prior_matching(prior.expand(4, 20), prior)) == pytest.approx(0, abs=1e-6)

    def test_pmsn_with_exponent_zero_is_msn(self):
        logits = randn(30, 64)
        msn = gradient(lambda x: -mean_entropy(torch.softmax(x, -1)), logits)
        pmsn = gradient(lambda x: prior_matching(torch.softmax(x, -1), power_law(64, 0)), logits)
        assert float(pmsn[0]) == pytest.approx(float(msn[0]) + math.log(64), abs=1e-6)
        assert torch.allclose(msn[1], pmsn[1], atol=1e-7)

    @pytest.mark.parametrize("loss", [mean_entropy, lambda p: prior_matching(p, power_law(8, 0.25))])
    def test_gradients_are_finite_at_probability_zero(self, loss):
        for p in (torch.eye(8)[:3], F.one_hot(torch.zeros(4, dtype=torch.long), 8).float()):
            value, g = gradient(loss, p)
            assert torch.isfinite(value) and torch.isfinite(g).all()
        value, g = gradient(lambda x: loss(torch.softmax(x, -1)), 1e4 * randn(5, 8))
        assert torch.isfinite(value) and torch.isfinite(g).all()

    @pytest.mark.parametrize("loss", [mean_entropy, lambda p: prior_matching(p, power_law(6, 0.25).double())])
    def test_gradcheck(self, loss):
        assert torch.autograd.gradcheck(loss, probabilities(5, 6).double().requires_grad_())

    def test_half_precision_is_widened(self):
        p = probabilities(64, 512)
        for low in (p.half(), p.bfloat16()):
            assert mean_entropy(low).dtype == torch.float32
            assert float(mean_entropy(low)) == pytest.approx(float(mean_entropy(p)), abs=0.01)
            assert prior_matching(low, power_law(512, 0.25)).dtype == torch.float32

    @pytest.mark.parametrize(
        "prior", [torch.full((5,), 0.2), torch.full((8,), 0.2), torch.eye(8)[0], torch.tensor([-0.4] + 7 * [0.2])]
    )
    def test_a_prior_that_is_none_is_refused(self, prior):
        unchecked = inspect.unwrap(prior_matching)  # without the type check, which only tests have
        with pytest.raises(ValueError, match="prior"):
            unchecked(probabilities(3, 8), prior)


class TestPowerLawMatching:
    @pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0, 3.0])
    def test_is_the_divergence_of_the_marginal_from_the_power_law(self, exponent):
        p = probabilities(30, 12).double()
        marginal, prior = p.mean(0).numpy(), np.arange(1, 13) ** -exponent
        expected = (marginal * np.log(marginal / (prior / prior.sum()))).sum()
        assert float(power_law_matching(p, exponent)) == pytest.approx(expected, abs=1e-14)

    def test_its_prior_has_float64_digits_for_float64_probabilities(self):
        k = 200
        prior = np.arange(1, k + 1) ** -0.25
        p = torch.from_numpy(prior / prior.sum()).expand(3, k)
        assert abs(float(power_law_matching(p, 0.25))) < 1e-14

    def test_the_order_of_prototypes_matters_unless_the_law_is_uniform(self):
        p = probabilities(30, 12, sharpness=4.0)
        for exponent, same in ((0.25, False), (0.0, True)):
            change = float(power_law_matching(p, exponent)) - float(power_law_matching(p.flip(-1), exponent))
            assert (abs(change) < 1e-6) == same

    def test_it_pulls_the_marginal_to_the_law(self):
        logits = torch.zeros(4, 10, dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            (slope,) = torch.autograd.grad(power_law_matching(torch.softmax(logits, -1), 1.0), logits)
            logits = (logits - 20 * slope).detach().requires_grad_()
        assert torch.allclose(torch.softmax(logits, -1).mean(0).float(), power_law(10, 1.0), atol=1e-3)

    def test_gradcheck(self):
        p = probabilities(5, 6).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda p: power_law_matching(p, 0.25), p)

    def test_is_finite_in_half_precision_and_at_zero(self):
        for p in (probabilities(64, 512).bfloat16(), torch.eye(8)[:3]):
            value, g = gradient(lambda p: power_law_matching(p, 0.25), p)
            assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(g).all()


class TestPowerLaw:
    def test_values(self):
        prior = power_law(1024, 0.25)
        assert float(prior[0] / prior[-1]) == pytest.approx(5.7, abs=0.05)
        weights = np.arange(1, 1025) ** -0.25
        assert np.allclose(prior.numpy(), weights / weights.sum(), rtol=1e-6)
        assert float(power_law(8142, 0.25)[0] / power_law(8142, 0.25)[-1]) == pytest.approx(9.5, abs=0.05)

    @given(k=st.integers(1, 500), exponent=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
    def test_is_a_falling_distribution(self, k, exponent):
        prior = power_law(k, exponent)
        assert float(prior.double().sum()) == pytest.approx(1, abs=1e-5)
        assert (prior > 0).all() and (prior.diff() <= 0).all()

    def test_exponent_zero_is_uniform(self):
        assert torch.allclose(power_law(7, 0), torch.full((7,), 1 / 7))

    def test_no_prototype_no_prior(self):
        with pytest.raises(ValueError, match="prototype"):
            power_law(0, 0.25)


def test_the_nearest_of_near_copies_is_exact_where_cosines_cannot_rank_them():
    g = torch.Generator().manual_seed(0)
    for spread in (1e-2, 1e-3, 1e-4, 1e-6):
        centers = torch.randn(50, 64, generator=g)
        x = centers.repeat_interleave(10, 0) + spread * torch.randn(500, 64, generator=g)
        exact = torch.nn.functional.normalize(x, dim=-1).double()
        gaps = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist") + 9 * torch.eye(500)
        expected = -torch.log(gaps.amin(-1) + 1e-8).mean()
        assert abs(float(koleo(x)) - float(expected)) < 2e-3 * float(expected), spread


def test_only_directions_count_at_any_scale():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1e-25, 1e-13, 1e13, 1e20):
        assert abs(float(koleo(scale * x)) - float(koleo(x))) < 1e-4


def test_no_codes_have_no_coding_rate():
    for function in (coding_rate, expansion):
        with pytest.raises(ValueError, match="no codes"):
            function(torch.empty(0, 3), 0.3)


LOSSES_OF_A_BATCH = {
    "mean_entropy": lambda x: mean_entropy(torch.softmax(x, -1)),
    "prior_matching": lambda x: prior_matching(torch.softmax(x, -1), power_law(x.shape[-1], 0.5)),
    "power_law_matching": lambda x: power_law_matching(torch.softmax(x, -1), 0.25),
    "coding_rate": lambda z: coding_rate(z, EPS),
    "coding_rate of tiny codes": lambda z: coding_rate(1e-7 * z, EPS),
    "coding_rate, 2 groups": lambda z: coding_rate(z, EPS, 2),
    "coding_rate, 6 groups": lambda z: coding_rate(z, EPS, 6),
    "expansion": lambda z: expansion(z, EPS),
    "expansion, 4 groups": lambda z: expansion(z, EPS, 4),
    "koleo": koleo,
    "koleo, near-copies": lambda x: koleo(1 + 1e-4 * x),
    "koleo, parts": lambda x: koleo(x, parts=5, generator=rng(7)),
}


def batch_losses(x, counts):
    """Value and gradient by this rank's rows of every loss of the batch; a random partition; each rank's own KoLeo."""
    start = sum(counts[: ranks.rank()])
    own = x[start : start + counts[ranks.rank()]]
    found = {name: gradient(loss, own) for name, loss in LOSSES_OF_A_BATCH.items()}
    return found, koleo(own, parts=3), gradient(lambda x: koleo(x, gathered=False), own) if len(own) else None


def batch_losses_of_ranks(rank, x, counts):
    torch.manual_seed(rank)  # ranks may differ in what they draw
    found = batch_losses(x, counts)
    with ranks.alone():
        return *found, gradient(koleo, x)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[12, 12], [1, 11, 0, 12]], ids=str)
def test_ranks_that_share_a_batch_have_the_loss_and_gradient_of_one_process(counts):
    x = randn(24, 9, dtype=torch.float64)
    torch.manual_seed(0)
    expected, drawn, _ = batch_losses(x, [24])
    seen = together(len(counts), batch_losses_of_ranks, x, counts)
    for name, (value, slope) in expected.items():
        for found, *_ in seen:
            assert abs(float(found[name][0] - value)) <= 1e-12 * max(1, abs(float(value))), name
        mean = torch.cat([found[name][1] for found, *_ in seen]) / len(counts)  # as DDP averages parameters' gradients
        assert float((mean - slope).abs().max()) <= 1e-12 * max(1, float(slope.abs().max())), name
    assert all(torch.equal(rank[1], drawn) for rank in seen), "a partition is one for all ranks"
    for (_, _, local, whole), own in zip(seen, x.split(counts), strict=True):
        assert local is None or torch.equal(local[0], koleo(own)), "the official KoLeo is of each rank's own rows"
        assert torch.equal(whole[0], expected["koleo"][0]) and torch.equal(whole[1], expected["koleo"][1])


def test_a_batch_without_rows_has_no_entropy_and_matches_any_prior():
    for loss in (mean_entropy, lambda p: power_law_matching(p, 0.25)):
        value, g = gradient(loss, torch.empty(0, 5))
        assert float(value) == 0 and g.shape == (0, 5)
