"""What is computed a block at a time equals what the whole matrix gives, value and gradient."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Chain, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.blockwise import LogScores, cross_entropy, cross_entropy_of_views, entropies, largest
from prototypes_lib.objectives import cross_entropy as dense_cross_entropy
from prototypes_lib.objectives import entropy, over_views

SCORES = {"dot": scores.dot, "cosine": scores.cosine, "vmf": scores.vmf, "one term": partial(scores.vmf, terms=1)}
LINKS = {
    "none": (),
    "center": (Center,),
    "probability": (ProbabilityCenter,),
    "sinkhorn": (Sinkhorn,),
    "msn": (Normalize, Sinkhorn),
    "instant": (partial(ProbabilityCenter, momentum=0.0),),
    "literal": (partial(ProbabilityCenter, literal=True),),
    "center after normalize": (Normalize, Center),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codes(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def dense_loss(student, w, targets, score, first):
    return over_views(dense_cross_entropy, targets, [score(view, w, 0.1) for view in student], first)


@pytest.mark.parametrize("block", [1, 40, None])
@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", SCORES)
def test_the_loss_of_all_pairs_and_its_gradients_are_those_of_the_matrix(name, kind, block):
    score, (n_targets, n_student, first) = SCORES[name], {"dot": (1, 3, 1), "cosine": (2, 2, 0)}.get(name, (2, 5, 0))
    student, w = codes(n_student, 4, 6).requires_grad_(), normal(9, 6, seed=1).requires_grad_()
    t_codes, w_teacher = codes(n_targets * 4, 6, seed=2), normal(9, 6, seed=3)
    made, dense = Chain(LINKS[kind], 9), Chain(LINKS[kind], 9)
    for _ in range(2):  # the second time with a center
        teacher = scores.affine(score, w_teacher, 0.05)
        lazy = LogScores(teacher.scale * t_codes, teacher.slopes, teacher.offsets, block=block)
        log_c = torch.zeros(9, dtype=torch.float64) if teacher.offsets is None else teacher.offsets
        targets = made.shift(lazy, 0.05, log_c)
        matrix = dense(score(t_codes, w_teacher, 0.05), 0.05, log_c).exp()
    assert torch.allclose(torch.softmax(targets.matrix(), -1), matrix, atol=1e-12)
    a = scores.affine(score, w, 0.1)
    loss = cross_entropy_of_views(a.scale * student, a.slopes, a.offsets, [targets], first, block)
    expected = dense_loss(student, w, matrix.unflatten(0, (n_targets, 4)), score, first)
    assert torch.allclose(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(*(torch.autograd.grad(x, (student, w)) for x in (loss, expected)), strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_gradients_are_right_by_finite_differences():
    student, slopes, offsets = (
        codes(3, 2, 4).requires_grad_(),
        normal(5, 4).requires_grad_(),
        normal(5).requires_grad_(),
    )
    targets = [LogScores(codes(4, 4, seed=5), 3 * normal(5, 4, seed=6))]
    assert torch.autograd.gradcheck(
        lambda h, a, b: 2.5 * cross_entropy_of_views(h, a, b, targets, block=7), (student, slopes, offsets)
    )


def test_weighted_pairs_are_the_weighted_dense_cross_entropy():
    given_codes, slopes, weight = codes(5, 4).requires_grad_(), normal(7, 4, seed=1), torch.rand(5, dtype=torch.float64)
    targets = LogScores(3 * normal(5, 7, seed=2))
    loss = cross_entropy(given_codes, weight, weight[:, None] * given_codes, weight, slopes, None, [targets], block=8)
    expected = dense_cross_entropy(torch.softmax(targets.matrix(), -1), given_codes @ slopes.T, weight)
    assert torch.allclose(loss, expected, rtol=1e-12)
    grads = (torch.autograd.grad(x, given_codes)[0] for x in (loss, expected))
    assert torch.allclose(*grads, atol=1e-13)


def test_without_rows_the_loss_is_zero_and_has_a_gradient():
    none, slopes = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    weight, targets = torch.zeros(0), [LogScores(torch.zeros(0, 7))]
    loss = cross_entropy(none, weight, none, weight, slopes, None, targets)
    loss.backward()
    assert loss.item() == 0 and none.grad.shape == (0, 4) and not slopes.grad.any()


def test_targets_in_several_pieces_are_the_targets_in_one():
    student, slopes = codes(4, 3, 5), normal(8, 5, seed=1)
    whole = LogScores(4 * codes(6, 5, seed=2), normal(8, 5, seed=3))
    parts = [whole.only(slice(3)), whole.only(slice(3, 6))]
    one, several = (cross_entropy_of_views(student, slopes, None, t) for t in ([whole], parts))
    assert torch.equal(one, several) or torch.allclose(one, several, rtol=1e-14)
    for a, b in zip(entropies([whole]), entropies(parts), strict=True):
        assert torch.allclose(a, b, rtol=1e-14)


def test_entropies_are_those_of_the_distributions_and_of_their_mean():
    targets = LogScores(5 * normal(6, 9), block=20)
    q = torch.softmax(targets.matrix(), -1)
    mean, marginal, p = entropies([targets])
    assert torch.allclose(mean, entropy(q).mean()) and torch.allclose(marginal, entropy(q.mean(0)))
    assert torch.allclose(p, q.mean(0), rtol=1e-12)


def test_the_largest_score_is_found_in_whatever_block_it_stands():
    scores = LogScores(codes(6, 3), 9 * normal(8, 3, seed=1), block=16)
    assert len(scores.spans()) == 3 and torch.allclose(largest(scores), scores.matrix().abs().max())
    assert largest(scores.only(slice(0))) == 0


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_the_size_of_a_block_changes_nothing(block, n, k, seed):
    x, a, b = codes(n, 3, seed=seed), normal(k, 3, seed=seed + 1), normal(k, seed=seed + 2)
    blocked, whole = LogScores(x, a, b, block=block), LogScores(x @ a.T + b)
    for normalize in (False, True):
        (one, sums), (other, more) = blocked.sweep(normalize), whole.sweep(normalize)
        assert torch.allclose(one.matrix(), other.matrix(), atol=1e-12) and torch.allclose(sums, more, atol=1e-12)
    assert torch.allclose(blocked.means(), whole.means(), atol=1e-12)
    assert torch.allclose(blocked.normalized().matrix().logsumexp(1), torch.zeros(n, dtype=torch.float64), atol=1e-12)


def test_no_block_is_larger_than_allowed_and_a_matrix_is_never_written_to():
    matrix = normal(10, 7)
    kept, seen = matrix.clone(), []
    for span, block in LogScores(matrix, block=21).blocks():
        seen.append(block.numel())
        block.fill_(span.start)
    assert max(seen) <= 21 and sum(seen) == 70 and torch.equal(matrix, kept)


def test_digits_survive_large_log_normalizers():
    """log C_p is in the hundreds at p = 256 and cancels in the loss: float32 keeps six digits of what is left."""
    student, w = codes(4, 8, 256), 3 * normal(64, 256, seed=1)
    targets = [LogScores(20 * codes(16, 256, seed=2), normal(64, 256, seed=3))]
    single = [LogScores(targets[0].codes.float(), targets[0].slopes.float())]
    for score in (scores.vmf, scores.dot):
        double, rounded = scores.affine(score, w, 0.1), scores.affine(score, w.float(), 0.1)
        exact = cross_entropy_of_views(double.scale * student, double.slopes, double.offsets, targets)
        loss = cross_entropy_of_views(rounded.scale * student.float(), rounded.slopes, rounded.offsets, single)
        assert abs(float(loss) - float(exact)) < 2e-5 * float(exact)


def test_one_view_has_nothing_to_agree_with():
    with pytest.raises(ValueError, match="nothing to agree"):
        cross_entropy_of_views(codes(1, 4, 3), normal(5, 3), None, [LogScores(normal(4, 5))])
    with pytest.raises(ValueError, match="whole number of views"):
        cross_entropy_of_views(codes(2, 4, 3), normal(5, 3), None, [LogScores(normal(3, 5))])


class TestAffine:
    @pytest.mark.parametrize("name", SCORES)
    def test_slopes_and_offsets_give_the_score_and_its_gradient(self, name):
        y, w, upstream = codes(5, 16), normal(7, 16, seed=1).requires_grad_(), normal(5, 7, seed=2)
        a = scores.affine(SCORES[name], w, 0.07)
        made = a.scale * y @ a.slopes.T + (0 if a.offsets is None else a.offsets)
        told = SCORES[name](y, w, 0.07)
        assert torch.allclose(made, told, rtol=1e-12)
        one, other = (torch.autograd.grad((upstream * x).sum(), w)[0] for x in (made, told))
        assert torch.allclose(one, other, rtol=1e-10)

    def test_a_score_of_ones_own_is_asked_for_its_slopes(self):
        own = lambda y, w, tau: 2 * y @ w.T / tau + w.square().sum(-1)
        y, w = codes(5, 4), normal(6, 4, seed=1)
        a = scores.affine(own, w, 0.1)
        assert torch.allclose(a.scale * y @ a.slopes.T + a.offsets, own(y, w, 0.1))

    def test_a_score_that_bends_is_refused(self):
        with pytest.raises(ValueError, match="not affine"):
            scores.affine(lambda y, w, tau: (y @ w.T / tau).tanh(), normal(6, 4), 0.1)
        with pytest.raises(ValueError, match="positive"):
            scores.affine(scores.dot, normal(6, 4), 0.0)


@pytest.mark.parametrize("kind", LINKS)
def test_autocast_changes_nothing_here(kind):
    """Assignments are float32 whatever the network computes in, over several blocks too."""
    w, y, student = normal(40, 8).float(), codes(6, 8).float(), codes(3, 3, 8, seed=1).float()
    found = []
    for low in (False, True):
        chain = Chain(LINKS[kind], 40)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            a = scores.affine(scores.vmf, w, 0.1)
            targets = chain.shift(LogScores(a.scale * y, a.slopes, a.offsets, block=90), 0.1, a.offsets)
            loss = cross_entropy_of_views(a.scale * student, a.slopes, a.offsets, [targets])
            found.append([loss, targets.matrix(), *entropies([targets]), *(b for b in chain.buffers())])
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*found, strict=True))


def test_blocks_on_a_gpu_are_float32_under_its_autocast():
    with FakeTensorMode():
        y, w = torch.empty(64, 16, device="cuda"), torch.empty(100, 16, device="cuda")
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            assert (y @ w.T).dtype != torch.float32, "autocast is on"
            assert all(block.dtype == torch.float32 for _, block in LogScores(y, w, block=1000).blocks())
            assert LogScores(y, w).means().dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("k", [12, 8192])
def test_prototypes_that_nobody_can_reach_take_no_part(k):
    """Offsets of -inf, of a whole tile or of some prototypes, for targets and predictions alike."""
    student, slopes, offsets = codes(3, 2, 6).requires_grad_(), normal(k, 6), normal(k)
    offsets[: k // 4] = -torch.inf
    targets = LogScores(4 * codes(4, 6, seed=3), normal(k, 6, seed=4), offsets)
    loss = cross_entropy_of_views(student, slopes, offsets, [targets])
    reached = offsets.isfinite()
    q = torch.softmax(targets.matrix()[:, reached], -1).unflatten(0, (2, 2))
    dense = over_views(dense_cross_entropy, q, [(y @ slopes.T + offsets)[:, reached] for y in student])
    assert torch.allclose(loss, dense, rtol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(x, student)[0] for x in (loss, dense)), atol=1e-12)
