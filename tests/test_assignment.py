"""Links against independent NumPy versions in the exponential domain; who is invariant to what; what is remembered."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Chain, Normalize, ProbabilityCenter, Sinkhorn

TAU = 0.07


def problem(b=30, k=8, p=16, seed=0, length=1.0, spread=0.0, kind=scores.dot, pull=0.5, tau=TAU):
    g = torch.Generator().manual_seed(seed)
    y = normalize(torch.randn(b, p, generator=g, dtype=torch.float64) + pull, dim=-1)
    w = normalize(torch.randn(k, p, generator=g, dtype=torch.float64), dim=-1)
    w = w * length * torch.exp(spread * torch.randn(k, 1, generator=g, dtype=torch.float64))
    return kind(y, w, tau)


def rules(k):
    """Every link as a target, with the batch's own estimate in the centers."""
    links = {
        "center": (partial(Center, momentum=0.0),),
        "probability": (partial(ProbabilityCenter, momentum=0.0),),
        "sinkhorn": (partial(Sinkhorn, steps=3),),
        "msn": (Normalize, Sinkhorn),
    }
    return {name: Chain(targets, k) for name, targets in links.items()}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def official_sinkhorn(scores, steps):
    """Exponentials, prototypes in rows, every division by B, K and sums written out."""
    q = np.exp(scores).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(steps):
        for row in range(k):
            q[row] = q[row] / q[row].sum() / k
        for column in range(b):
            q[:, column] = q[:, column] / q[:, column].sum() / b
    return (q * b).T


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(30, 8), (5, 40), (1, 4), (6, 1)])
def test_sinkhorn_is_the_official_algorithm_of_the_exponential_domain(steps, shape):
    logits = problem(*shape)
    expected = torch.from_numpy(official_sinkhorn(logits.numpy(), steps))
    torch.testing.assert_close(Sinkhorn(steps)(logits, TAU).exp(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1.0, 5.0])
def test_probability_centering_of_one_batch_is_one_sinkhorn_step_from_the_softmax(seed, length):
    logits = problem(seed=seed, length=length, spread=0.3, kind=scores.vmf)
    link = ProbabilityCenter(8, momentum=0.0)
    one_step = Sinkhorn(1)(Normalize()(logits, TAU), TAU)
    torch.testing.assert_close(link(logits, TAU).log_softmax(-1), one_step, rtol=0, atol=1e-12)
    p = softmax(logits.numpy())
    eq2 = softmax(logits.numpy() - np.log(p.mean(0)))  # PPC, Eq. 2
    torch.testing.assert_close(one_step.exp(), torch.from_numpy(eq2), rtol=0, atol=1e-12)
    assert (one_step.exp() - Sinkhorn(1)(logits, TAU).exp()).abs().max() > 0.01  # the official start differs


@pytest.mark.slow
def test_the_two_starts_of_sinkhorn_have_one_limit():
    logits = problem(length=2.0)
    a, b = Sinkhorn(2000)(logits, TAU).exp(), Sinkhorn(2000)(Normalize()(logits, TAU), TAU).exp()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.mean(0), torch.full((8,), 1 / 8, dtype=a.dtype), rtol=0, atol=1e-9)


def test_every_step_brings_the_prototypes_closer_to_equal_shares_and_rows_always_sum_to_one():
    logits = problem(b=200)
    q = [Sinkhorn(n)(logits, TAU).exp() for n in (1, 2, 3, 5, 10)]
    kl = [-(1 / 8 * torch.log(8 * x.mean(0))).sum().item() for x in q]  # from the uniform marginal: falls in each step
    assert kl == sorted(kl, reverse=True) and kl[-1] < 1e-3 * kl[0]
    for x in q:
        torch.testing.assert_close(x.sum(1), torch.ones(200, dtype=x.dtype), rtol=0, atol=1e-13)


def test_logit_centering_cancels_log_c_of_vmf_scores_at_steady_state():
    vmf, dot = (problem(spread=0.5, kind=kind) for kind in (scores.vmf, scores.dot))
    assert (vmf.softmax(-1) - dot.softmax(-1)).abs().max() > 0.1
    a, b = Center(8), Center(8)
    for _ in range(400):  # 0.9^400 is 5e-19
        a(vmf, TAU), b(dot, TAU)
    torch.testing.assert_close(a(vmf, TAU).softmax(-1), b(dot, TAU).softmax(-1), rtol=0, atol=1e-10)


def test_probability_centering_keeps_log_c_and_so_does_a_finite_sinkhorn_from_the_softmax():
    vmf, dot = (problem(spread=0.5, kind=kind) for kind in (scores.vmf, scores.dot))
    gap = {name: (link(vmf, TAU).exp() - link(dot, TAU).exp()).abs().max().item() for name, link in rules(8).items()}
    assert max(gap["center"], gap["sinkhorn"]) < 1e-12 < 0.02 < min(gap["probability"], gap["msn"]), gap


def test_msns_sharpening_is_a_lower_temperature():
    sharpen = 0.25
    p = Normalize()(problem(tau=0.1), 0.1).exp()
    power = p ** (1 / sharpen)
    lower = Normalize()(problem(tau=0.1 * sharpen), 0.1 * sharpen).exp()
    torch.testing.assert_close(power / power.sum(-1, keepdim=True), lower, rtol=0, atol=1e-12)


def test_normalize_is_the_log_of_the_softmax():
    logits = problem()
    expected = torch.from_numpy(softmax(logits.numpy()))
    torch.testing.assert_close(Normalize()(logits, TAU).exp(), expected, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_who_is_invariant_to_which_shift():
    """Sinkhorn from the scores absorbs a number a prototype at once, the centers and Normalize a number a sample."""
    logits, g = problem(), torch.Generator().manual_seed(5)
    per_prototype = torch.randn(1, 8, generator=g, dtype=torch.float64)
    per_sample = torch.randn(30, 1, generator=g, dtype=torch.float64)
    invariant = {}
    for name, link in rules(8).items():
        moved = [
            (link(logits + s, TAU) - link(logits, TAU)).exp().sub(1).abs().max() for s in (per_prototype, per_sample)
        ]
        invariant[name] = tuple(bool(m < 1e-11) for m in moved)
        assert all(m < 1e-11 or m > 0.01 for m in moved), moved  # exactly invariant, or visibly not
    assert invariant == {
        "center": (True, True),
        "probability": (False, True),
        "sinkhorn": (True, False),
        "msn": (False, True),
    }
    limit = Sinkhorn(2000)
    for shift in (per_prototype, per_sample):
        torch.testing.assert_close(limit(logits + shift, TAU), limit(logits, TAU), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["center", "probability", "sinkhorn", "msn"])
def test_the_order_of_samples_and_of_prototypes_does_not_matter(name):
    logits, g = problem(), torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(30, generator=g), torch.randperm(8, generator=g)
    link = rules(8)[name]
    permuted = link(logits[rows][:, columns], TAU)
    torch.testing.assert_close(permuted, link(logits, TAU)[rows][:, columns], rtol=0, atol=1e-12)


@given(
    st.sampled_from([(1, 1), (1, 6), (6, 1), (3, 50), (7, 5)]),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.floats(-3, 0),
    st.sampled_from(["random", "identical rows", "one-hot", "constant"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10**6),
)
def test_targets_are_finite_probabilities_for_scores_of_any_size(shape, size, log_tau, form, dtype, seed):
    x = (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1) * size
    if form == "identical rows":
        x = x[:1].expand(shape)
    elif form == "one-hot":  # every sample on one prototype: the others' means underflow in plain arithmetic
        x = torch.full(shape, -size, dtype=dtype)
        x[:, 0] = size
    elif form == "constant":
        x = torch.full(shape, size, dtype=dtype)
    tau = 10**log_tau
    moving = {"moving center": Chain((Center,), shape[1]), "moving probability": Chain((ProbabilityCenter,), shape[1])}
    for name, link in (rules(shape[1]) | moving).items():
        for _ in range(3):
            log_q = link(x / tau, tau)
            assert log_q.isfinite().all() and log_q.dtype == dtype, name
            torch.testing.assert_close(log_q.exp().sum(1), torch.ones(shape[0], dtype=dtype), rtol=0, atol=1e-5)
        assert all(buffer.isfinite().all() for buffer in link.buffers()), name
    raw = ProbabilityCenter(shape[1], momentum=0.0)(x / tau, tau)
    assert raw.isfinite().all()


@given(st.integers(2, 40), st.integers(2, 60), st.floats(0.1, 8.0), st.integers(0, 10**6))
def test_the_log_domain_is_the_exponential_domain_where_that_is_finite(b, k, size, seed):
    x = torch.randn(b, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    torch.testing.assert_close(Sinkhorn(3)(x, 1.0).exp(), torch.from_numpy(official_sinkhorn(x.numpy(), 3)))


def test_identical_samples_get_the_uniform_target_from_the_balancing_rules():
    """All prototypes compete for the same sample, so equal shares are the only balanced answer."""
    x = problem()[:1].expand(30, 8)
    for link in rules(8).values():
        torch.testing.assert_close(link(x, TAU).exp(), torch.full((30, 8), 1 / 8, dtype=x.dtype), rtol=0, atol=1e-12)


def test_a_realistic_head_whose_softmax_underflows_keeps_a_finite_center():
    """K = 4096, |w| = 6, tau = 0.04, codes near one prototype: the plain log of the mean is -inf nearly everywhere."""
    g = torch.Generator().manual_seed(0)
    w = normalize(torch.randn(4096, 64, generator=g), dim=-1)
    y = normalize(w[:1] + 0.05 * torch.randn(16, 64, generator=g), dim=-1)
    x = scores.vmf(y, 6 * w, 0.04)
    assert x.softmax(-1).mean(0).log().isinf().sum() > 1000
    link = ProbabilityCenter(4096, momentum=0.0)
    link(x, 0.04)
    exact = torch.log_softmax(x.double(), -1).logsumexp(0) - math.log(16)
    torch.testing.assert_close(link.center, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [Center, ProbabilityCenter])
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_a_step_uses_the_center_of_the_steps_before_and_then_averages_the_batch_in(kind, momentum):
    """Against NumPy, while tau changes: vMF Eq. 8 keeps c in logits before tau, PPC Eq. 3 in log-shares."""
    link, c = kind(8, momentum), np.zeros(8)
    for t in range(12):
        tau = 0.04 + 0.005 * t
        x = problem(seed=t, tau=tau, length=2.0)
        before = x.numpy() - (c / tau if kind is Center else c)
        torch.testing.assert_close(link(x, tau), torch.from_numpy(before), rtol=0, atol=1e-11)
        batch = (x.numpy() * tau).mean(0) if kind is Center else np.log(softmax(x.numpy()).mean(0))
        c = momentum * c + (1 - momentum) * batch
        torch.testing.assert_close(link.center, torch.from_numpy(c), rtol=0, atol=1e-12)


def test_the_probability_center_averages_logs_of_means_not_means():
    link, batches = ProbabilityCenter(8, 0.5), [problem(seed=s, length=3.0) for s in range(2)]
    means = [softmax(x.numpy()).mean(0) for x in batches]
    for x in batches:
        link(x, TAU)
    logs = 0.25 * np.log(means[0]) + 0.5 * np.log(means[1])
    torch.testing.assert_close(link.center, torch.from_numpy(logs), rtol=0, atol=1e-12)
    assert np.abs(logs - np.log(0.25 * means[0] + 0.5 * means[1])).max() > 0.1


@pytest.mark.parametrize("kind", [Center, ProbabilityCenter])
def test_momentum_zero_centers_a_batch_by_itself_whatever_came_before(kind):
    link, x = kind(8, momentum=0.0), problem(seed=1)
    alone = kind(8, momentum=0.0)(x, TAU)
    link(problem(seed=2), TAU)
    assert torch.equal(link(x, TAU), alone)
    link.eval()
    assert torch.equal(link(x, TAU), alone)


@pytest.mark.parametrize("kind", [Center, ProbabilityCenter])
def test_in_eval_mode_the_center_is_used_and_stays(kind):
    link = kind(8)
    link(problem(), TAU)
    center = link.center.clone()
    link.eval()
    x = problem(seed=1)
    expected = x - center / (TAU if kind is Center else 1)
    for _ in range(2):
        torch.testing.assert_close(link(x, TAU), expected, rtol=0, atol=1e-13)
    assert torch.equal(link.center, center)


@pytest.mark.parametrize("kind", [Center, ProbabilityCenter])
def test_a_batch_without_samples_gives_no_targets_and_leaves_the_memory_alone(kind):
    link = kind(8)
    link(problem(), TAU)
    center = link.center.clone()
    assert link(torch.empty(0, 8), TAU).shape == (0, 8)
    assert torch.equal(link.center, center)
    for rule in rules(8).values():
        assert rule(torch.empty(0, 8), TAU).shape == (0, 8)


def test_a_state_dict_carries_the_memory_of_a_chain():
    targets = (ProbabilityCenter, partial(Center, momentum=0.5), Sinkhorn)
    a, b = Chain(targets, 8), Chain(targets, 8)
    for seed in range(5):
        a(problem(seed=seed), TAU)
    assert set(a.state_dict()) == {"links.0.center", "links.1.center"}
    b.load_state_dict(a.state_dict())
    for seed in range(5, 8):
        x = problem(seed=seed)
        assert torch.equal(a(x, TAU), b(x, TAU))


@pytest.mark.slow
def test_a_moving_average_keeps_float64_digits_for_float32_scores():
    link = Center(1, momentum=0.999)
    for _ in range(3_000):
        link(torch.full((1, 1), 1e4, dtype=torch.float32), 1.0)
    expected = 1e4 * (1 - 0.999**3_000)
    assert link.center.dtype == torch.float64 and abs(link.center.item() / expected - 1) < 1e-10


def test_a_chain_takes_classes_partials_and_instances_and_is_their_composition():
    instance = Sinkhorn(2)
    chain = Chain(
        (ProbabilityCenter, partial(Center, momentum=0.0), Normalize, instance, partial(Sinkhorn, steps=1)), 8
    )
    x = problem()
    center, sinkhorn = Center(8, momentum=0.0), Sinkhorn(3)
    expected = sinkhorn(Normalize()(center(x, TAU), TAU), TAU)  # the first moving center is still zero
    torch.testing.assert_close(chain(x, TAU), expected, rtol=0, atol=1e-12)


def test_an_instance_is_copied_so_that_two_chains_share_no_memory():
    instance = ProbabilityCenter(8)
    a, b = Chain((instance,), 8), Chain((instance,), 8)
    a(problem(), TAU)
    assert a.links[0].center.abs().max() > 0
    assert not b.links[0].center.any() and not instance.center.any()


def test_no_link_is_the_softmax():
    x = problem()
    torch.testing.assert_close(Chain((), 8)(x, TAU), x.log_softmax(-1), rtol=0, atol=1e-14)
    assert Chain((), 8)(x.bfloat16(), TAU).dtype == torch.float32


def test_sinkhorn_takes_three_steps_by_default_as_the_official_codes_do():
    x = problem()
    assert torch.equal(Sinkhorn()(x, TAU), Sinkhorn(3)(x, TAU))


@pytest.mark.parametrize("name", ["center", "probability", "sinkhorn", "msn"])
def test_no_gradient_flows_through_targets(name):
    x = problem().requires_grad_()
    link = rules(8)[name]
    assert not link(x, TAU).requires_grad
    assert all(not part(x, TAU).requires_grad for part in link.links)
    assert not list(link.parameters())


@pytest.mark.parametrize("name", ["center", "probability", "sinkhorn", "msn"])
def test_bfloat16_in_autocast_comes_out_in_float32_with_float32_accuracy(name):
    x = problem(length=3.0, spread=0.3, kind=scores.vmf).bfloat16()
    exact = rules(8)[name](x.double(), TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_q = rules(8)[name](x, TAU)
    assert log_q.dtype == torch.float32
    torch.testing.assert_close(log_q.exp().double(), exact.exp(), rtol=0, atol=1e-4)


def test_scores_are_not_written_to():
    x = problem()
    copy = x.clone()
    for link in rules(8).values():
        link(x, TAU)
    assert torch.equal(x, copy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinkhorn(0), "steps=0: Sinkhorn needs at least one step"),
        (lambda: Center(0), "k=0, momentum=0.9: need at least one prototype"),
        (lambda: ProbabilityCenter(8, 1.0), r"momentum=1.0: need .* a momentum in \[0, 1\)"),
        (lambda: Center(8, -0.1), r"momentum=-0.1: need .* a momentum in \[0, 1\)"),
        (lambda: Center(8, float("nan")), r"momentum=nan: need .* a momentum in \[0, 1\)"),
        (lambda: Center(5)(problem(), TAU), "scores for 8 prototypes meet a center of 5"),
        (lambda: Chain((ProbabilityCenter,), 5)(problem(), TAU), "scores for 8 prototypes meet a center of 5"),
    ],
)
def test_an_impossible_link_is_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prototype_out_of_reach_of_all_samples_does_no_harm():
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:, 2] = -torch.inf
    rest = [0, 1, 3, 4]
    for link in (Sinkhorn(3), Normalize()):
        assert torch.allclose(link(scores)[:, rest], link(scores[:, rest]), atol=1e-12)
    center = ProbabilityCenter(5, momentum=0.5)
    for _ in range(3):
        centered = center(scores)
    assert torch.isfinite(center.center).all() and torch.isfinite(centered[:, rest]).all()


def test_the_literal_center_leaves_log_c_out_of_the_average_and_keeps_it_in_the_targets():
    """vMF, Eq. 9 as printed: c averages log mean softmax(<w, y> / tau); log C stays in the targets."""
    scored, k = problem(kind=scores.vmf, length=3.0, spread=1.0), 8
    log_c = torch.linspace(-4, 2, k, dtype=scored.dtype)
    plain = scored - log_c
    link, meant = ProbabilityCenter(k, literal=True), ProbabilityCenter(k)
    first = link(scored, TAU, log_c)
    assert torch.equal(first, meant(scored, TAU)), "the first center is zero"
    expected = 0.1 * torch.log(torch.softmax(plain, -1).mean(0))
    assert torch.allclose(link.center, expected, atol=1e-12)
    assert float((link.center - meant.center).abs().max()) > 0.05
    assert torch.allclose(link(scored[:3], TAU, log_c), scored[:3] - expected, atol=1e-12)


def test_a_chain_tells_the_literal_link_alone_what_the_normalizer_is():
    scored, log_c = problem(), torch.linspace(-4, 2, 8, dtype=problem().dtype)
    literal, meant = (Chain((partial(ProbabilityCenter, literal=flag),), 8) for flag in (True, False))
    for chain in (literal, meant):
        chain(scored, TAU, log_c)
    assert not torch.equal(literal.links[0].center, meant.links[0].center)
    alone = ProbabilityCenter(8)
    alone(scored, TAU)
    assert torch.equal(meant.links[0].center, alone.center)
    same = Chain((partial(ProbabilityCenter, literal=True),), 8)
    same(scored, TAU, torch.zeros_like(log_c))
    assert torch.allclose(same.links[0].center, alone.center, atol=1e-12), "without log C both are one"


def test_the_literal_center_without_a_normalizer_is_refused():
    with pytest.raises(ValueError, match="log_normalizer"):
        ProbabilityCenter(8, literal=True)(problem(), TAU)
