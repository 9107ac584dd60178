"""Objectives against float64 numpy and naive loops: what is averaged over what, and what the gradient says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prototypes_lib.objectives import alignment, cross_entropy, entropy, over_views


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _targets(*shape: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    return torch.softmax(sharpness * _normal(*shape, seed=seed), -1)


def _codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(_normal(*shape, seed=seed), dim=-1)


def _numpy_cross_entropy(p: torch.Tensor, scores: torch.Tensor) -> np.ndarray:
    """One value a sample, in float64, by the definition (Sim, Eq. 6)."""
    p, scores = p.double().numpy(), scores.double().numpy()
    shifted = scores - scores.max(-1, keepdims=True)
    log_q = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -(p * log_q).sum(-1)


@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (3, 4, 11)])
def test_cross_entropy_is_its_definition_averaged_over_samples(shape):
    p, scores = _targets(*shape), 5 * _normal(*shape, seed=1)
    assert cross_entropy(p, scores).item() == pytest.approx(_numpy_cross_entropy(p, scores).mean(), rel=1e-6)


def test_weighted_cross_entropy_is_a_weighted_sum_not_a_mean():
    p, scores, weight = _targets(6, 5), 3 * _normal(6, 5, seed=1), torch.tensor([0.0, 0.5, 0.5, 0.0, 2.0, 1.0])
    expected = (weight.numpy() * _numpy_cross_entropy(p, scores)).sum()
    assert cross_entropy(p, scores, weight).item() == pytest.approx(expected, rel=1e-6)


def test_weights_of_one_over_the_number_of_samples_are_the_mean():
    p, scores, a, b = _targets(6, 5), _normal(6, 5, seed=1), _codes(6, 5), _codes(6, 5, seed=1)
    even = torch.full((6,), 1 / 6)
    assert cross_entropy(p, scores, even).item() == pytest.approx(cross_entropy(p, scores).item(), rel=1e-6)
    assert alignment(a, b, even).item() == pytest.approx(alignment(a, b).item(), rel=1e-6)


def test_a_sample_of_weight_zero_counts_for_nothing():
    p, scores = _targets(4, 5), _normal(4, 5, seed=1).requires_grad_()
    cross_entropy(p, scores, torch.tensor([1.0, 0.0, 1.0, 1.0])).backward()
    assert scores.grad[1].abs().max() == 0
    assert scores.grad[0].abs().max() > 0


def test_adding_a_constant_to_the_scores_of_a_sample_changes_nothing():
    p, scores = _targets(4, 5).double(), _normal(4, 5, seed=1).double()
    moved = scores + torch.tensor([[0.0], [3.0], [-7.0], [100.0]], dtype=torch.float64)
    assert cross_entropy(p, moved).item() == pytest.approx(cross_entropy(p, scores).item(), rel=1e-12)


def test_cross_entropy_is_kl_plus_the_entropy_of_the_targets():
    p, scores = _targets(9, 13).double(), _normal(9, 13, seed=1).double()
    kl = torch.nn.functional.kl_div(torch.log_softmax(scores, -1), p, reduction="batchmean")
    assert cross_entropy(p, scores).item() == pytest.approx((kl + entropy(p).mean()).item(), rel=1e-12)


@pytest.mark.parametrize("k, reported", [(1024, 6.931), (4096, 8.318), (8192, 9.011), (65536, 11.090)])
def test_uniform_against_uniform_costs_ln_k(k, reported):
    loss = cross_entropy(torch.full((2, k), 1 / k), torch.zeros(2, k)).item()
    assert loss == pytest.approx(math.log(k), rel=1e-6)
    assert loss == pytest.approx(reported, abs=1e-3)


def test_a_uniform_student_pays_ln_k_whatever_the_teacher_says():
    assert cross_entropy(_targets(5, 64, sharpness=30), torch.full((5, 64), 4.2)).item() == pytest.approx(math.log(64))


def test_the_gradient_is_student_minus_target():
    p, scores = torch.softmax(_normal(6, 5).double(), -1), 3 * _normal(6, 5, seed=1).double()
    scores.requires_grad_()
    cross_entropy(p, scores).backward()
    expected = (torch.softmax(scores.detach(), -1) - p) / 6
    assert (scores.grad - expected).abs().max() < 1e-15


@given(
    scores=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12),
    favourite=st.integers(0, 11),
    sharp=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_extreme_scores_give_a_finite_value_and_gradient(scores, favourite, sharp):
    k = len(scores)
    p = torch.full((1, k), (1 - sharp) / k)
    p[0, favourite % k] += sharp
    x = torch.tensor([scores]).requires_grad_()
    loss = cross_entropy(p, x)
    loss.backward()
    assert loss.item() == pytest.approx(_numpy_cross_entropy(p, x.detach())[0], rel=1e-5, abs=1e-2)
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() <= 1 + 1e-6, "student minus target lies in [-1, 1]"


def test_alignment_is_half_the_squared_distance_of_unit_codes():
    a, b = _codes(8, 16).double(), _codes(8, 16, seed=1).double()
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    assert alignment(a, b).item() == pytest.approx(((a - b).square().sum(-1) / 2).mean().item(), rel=1e-12)
    weight = torch.arange(8.0, dtype=torch.float64)
    expected = (weight * (a - b).square().sum(-1) / 2).sum().item()
    assert alignment(a, b, weight).item() == pytest.approx(expected, rel=1e-12)


def test_alignment_is_zero_for_the_same_code_and_two_for_its_opposite():
    a = _codes(3, 8)
    assert alignment(a, a).item() == pytest.approx(0, abs=1e-6)
    assert alignment(a, -a).item() == pytest.approx(2, abs=1e-6)


def _naive(objective, teacher, student):
    terms = [objective(teacher[q], student[v]) for q in range(len(teacher)) for v in range(len(student)) if q != v]
    return sum(terms) / len(terms), len(terms)


def _views(kind: str, n_global: int, n_local: int, dtype=torch.float64):
    """Teacher views, student views that want a gradient, and the objective they belong to."""
    shape, n = (4, 6), n_global + n_local
    if kind == "cross-entropy":
        teacher = torch.stack([_targets(*shape, seed=s) for s in range(n_global)])
        student = [3 * _normal(*shape, seed=10 + s) for s in range(n)]
    else:
        teacher = torch.stack([_codes(*shape, seed=s) for s in range(n_global)])
        student = [_codes(*shape, seed=10 + s) for s in range(n)]
    objective = cross_entropy if kind == "cross-entropy" else alignment
    return objective, teacher.to(dtype), [s.to(dtype).requires_grad_() for s in student]


@pytest.mark.parametrize("kind", ["cross-entropy", "alignment"])
@pytest.mark.parametrize(
    "n_global, n_local, pairs", [(2, 8, 18), (2, 10, 22), (2, 0, 2), (1, 3, 3), (3, 2, 12), (1, 1, 1)]
)
def test_over_views_is_the_mean_over_all_pairs_of_different_views(kind, n_global, n_local, pairs):
    objective, teacher, student = _views(kind, n_global, n_local)
    expected, counted = _naive(objective, teacher, student)
    assert counted == pairs
    wanted = torch.autograd.grad(expected, student, allow_unused=True)
    loss = over_views(objective, teacher, student)
    found = torch.autograd.grad(loss, student, allow_unused=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for v, (f, w) in enumerate(zip(found, wanted, strict=True)):
        if w is None:
            assert f is None, f"view {v} is in no pair"
        else:
            assert (f - w).abs().max() < 1e-14, f"gradient of view {v}"


def test_over_views_without_any_pair_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="nothing to agree with"):
        over_views(cross_entropy, _targets(1, 4, 6), [_normal(4, 6)])
    with pytest.raises(ValueError, match="nothing to agree with"):
        over_views(alignment, _codes(2, 4, 6), [])


def test_a_view_is_never_compared_with_itself():
    """With a teacher that is right about its own view only, every remaining pair is wrong."""
    teacher = torch.eye(2)[:, None, :]  # view 0 says class 0, view 1 class 1
    student = [torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 30.0]])]
    assert over_views(cross_entropy, teacher, student).item() == pytest.approx(30.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["cross-entropy", "alignment"])
def test_half_precision_in_float32_out(kind):
    objective, teacher, student = _views(kind, 2, 2, torch.bfloat16)
    single = objective(teacher[0], student[0])
    loss = over_views(objective, teacher, student)
    assert single.dtype == loss.dtype == torch.float32
    expected, _ = _naive(objective, teacher.double(), [s.double() for s in student])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5), "only the input may be rounded to bfloat16"


def test_entropy_counts_zero_times_log_zero_as_zero():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert entropy(p).tolist() == pytest.approx([0.0, math.log(2), math.log(3)], abs=1e-6)


def test_entropy_is_computed_in_float32_at_least():
    uniform = torch.full((2, 256), 1 / 256, dtype=torch.bfloat16)  # exact in bfloat16
    assert entropy(uniform).dtype == torch.float32
    assert entropy(uniform).tolist() == pytest.approx([math.log(256)] * 2, rel=1e-6)
    assert entropy(uniform.double()).dtype == torch.float64


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).filter(lambda x: sum(x) > 1e-3))
def test_entropy_lies_between_zero_and_ln_k(mass):
    p = torch.tensor(mass, dtype=torch.float64) / sum(mass)
    reference = -sum(x * math.log(x) for x in p.tolist() if x > 0)
    assert entropy(p).item() == pytest.approx(reference, abs=1e-9)
    assert -1e-9 <= entropy(p).item() <= math.log(len(mass)) + 1e-9


def test_zero_times_log_zero_is_zero():
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert cross_entropy(torch.tensor([[1.0, 0.0, 0.0]]), scores).item() == 0.0


@pytest.mark.parametrize("kind", ["cross-entropy", "alignment"])
@pytest.mark.parametrize("n_targets, n_global, n_local, pairs", [(1, 2, 10, 11), (1, 1, 3, 3), (2, 3, 1, 5)])
def test_views_may_begin_after_the_only_target(kind, n_targets, n_global, n_local, pairs):
    """MSN: the student's views are numbered from 1, so all 11 of them have the one target to predict."""
    objective, teacher, student = _views(kind, n_global, n_local)
    terms = [
        objective(teacher[q], student[v]) for q in range(n_targets) for v in range(1, n_global + n_local) if q != v
    ]
    assert len(terms) == pairs
    expected = sum(terms) / pairs
    loss = over_views(objective, teacher[:n_targets], student[1:], first=1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for f, w in zip(*(torch.autograd.grad(x, student[1:]) for x in (loss, expected)), strict=True):
        assert (f - w).abs().max() < 1e-14
