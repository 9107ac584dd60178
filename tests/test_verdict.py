"""What `collapse.verdict` says about runs whose state is known because it was built."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prototypes_lib.collapse import unique_prototypes, verdict
from prototypes_lib.objectives import cross_entropy, entropy

K = 1024
LN_K = math.log(K)


def _meters(teacher_scores: torch.Tensor, student_scores: torch.Tensor) -> dict:
    p = torch.softmax(teacher_scores, -1)
    return {
        "loss": cross_entropy(p, student_scores).item(),
        "k": p.shape[-1],
        "teacher_entropy": entropy(p).mean().item(),
        "marginal_entropy": entropy(p.mean(0)).item(),
    }


def _one_hot(labels: torch.Tensor, k: int, height: float = 40.0) -> torch.Tensor:
    return height * torch.nn.functional.one_hot(labels, k).float()


def test_uniform_targets_at_ln_k_are_a_uniform_collapse():
    v = verdict(**_meters(torch.zeros(8, K), torch.zeros(8, K)))
    assert v.kind == "uniform"
    assert "ln K" in v.text and "6.931" in v.text and "KL 0.000" in v.text


def test_a_uniform_teacher_that_is_not_followed_is_named_as_the_cause():
    student = _one_hot(torch.arange(8), K, height=5.0)
    v = verdict(**_meters(torch.zeros(8, K), student))
    assert v.kind == "uniform"
    assert "temperature" in v.text and "stands at" not in v.text


def test_one_class_for_all_images_is_a_one_hot_collapse():
    scores = _one_hot(torch.full((8,), 3), K)
    assert verdict(**_meters(scores, scores)).kind == "one-hot"


def test_one_class_for_all_is_seen_while_the_student_still_disagrees():
    assert verdict(**_meters(_one_hot(torch.full((8,), 3), K), torch.zeros(8, K))).kind == "one-hot"


def test_the_same_blend_for_all_images_is_a_collapse_although_neither_uniform_nor_one_hot():
    blend = 2 * torch.randn(1, K, generator=torch.Generator().manual_seed(0)).expand(8, K)
    meters = _meters(blend, blend)
    assert 0.05 * LN_K < meters["teacher_entropy"] < 0.99 * LN_K
    assert verdict(**meters).kind == "constant"


def test_every_image_its_class_is_healthy_although_its_kl_is_as_small():
    scores = _one_hot(torch.arange(64) % 32, K)
    meters = _meters(scores, scores)
    assert meters["loss"] - meters["teacher_entropy"] == pytest.approx(0, abs=1e-5)
    assert verdict(**meters).kind == "healthy"


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40), st.integers(1, 5))
def test_no_constant_teacher_is_ever_healthy(scores, n):
    row = torch.tensor(scores, dtype=torch.float64).expand(n, -1)
    assert verdict(**_meters(row, row)).kind in {"uniform", "one-hot", "constant"}


def test_without_a_marginal_a_loss_near_zero_is_suspect_and_asks_for_it():
    v = verdict(loss=0.01, k=K, teacher_entropy=0.005)
    assert v.kind == "one-hot"
    assert "see the marginal" in v.text
    assert verdict(loss=0.01, k=K, teacher_entropy=0.005, marginal_entropy=5.0).kind == "healthy"


def test_few_unique_prototypes_are_a_partial_collapse_with_the_copies_counted():
    v = verdict(loss=3.0, k=K, teacher_entropy=2.0, unique=128, marginal_entropy=6.0)
    assert v.kind == "partial"
    assert "8.0 copies" in v.text and "M = 128 of K = 1024" in v.text


def test_the_partition_itself_may_be_given_in_place_of_its_count():
    w = torch.eye(4).repeat(3, 1)  # 12 prototypes, 4 directions
    v = verdict(loss=1.5, k=12, teacher_entropy=1.0, unique=unique_prototypes(w))
    assert v.kind == "partial"
    assert "M = 4 of K = 12" in v.text


def test_a_full_collapse_is_named_before_a_partial_one():
    assert verdict(loss=LN_K, k=K, teacher_entropy=LN_K, unique=1).kind == "uniform"
    assert verdict(loss=0.0, k=K, teacher_entropy=0.0, marginal_entropy=0.0, unique=1).kind == "one-hot"


def test_a_healthy_run_names_every_figure():
    v = verdict(loss=3.25, k=K, teacher_entropy=2.125, unique=1000, marginal_entropy=6.5)
    assert v.kind == "healthy"
    for part in ("loss 3.250", "ln K = 6.931", "teacher entropy 2.125", "KL 1.125", "M = 1000", "6.500"):
        assert part in str(v), part


def test_a_student_that_still_says_one_over_k_is_told_apart_from_a_collapse():
    v = verdict(loss=LN_K, k=K, teacher_entropy=3.0, marginal_entropy=6.5)
    assert v.kind == "healthy"
    assert "student still answers 1/K" in v.text
    assert "still" not in verdict(loss=5.0, k=K, teacher_entropy=3.0, marginal_entropy=6.5).text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "teacher_entropy", "kl", "marginal_entropy"])
def test_a_figure_that_is_not_finite_is_a_divergence(name, bad):
    v = verdict(**{"loss": 3.0, "k": K, "teacher_entropy": 2.0, "marginal_entropy": 6.0, name: bad})
    assert v.kind == "diverged"
    assert "ln K" in v.text


def test_one_prototype_takes_everything_and_none_is_an_error():
    v = verdict(loss=0.0, k=1, teacher_entropy=0.0, unique=1, marginal_entropy=0.0)
    assert v.kind == "one-hot" and "by construction" in v.text
    with pytest.raises(ValueError, match="at least one prototype"):
        verdict(loss=0.0, k=0, teacher_entropy=0.0)


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"teacher_entropy": 0.991 * LN_K, "marginal_entropy": LN_K, "loss": LN_K}, "uniform"),
        ({"teacher_entropy": 0.98 * LN_K, "marginal_entropy": LN_K, "loss": LN_K}, "healthy"),
        ({"unique": K // 2}, "healthy"),
        ({"unique": K // 2 - 1}, "partial"),
        ({"teacher_entropy": 0.0, "marginal_entropy": 0.049 * LN_K}, "one-hot"),
        ({"teacher_entropy": 0.0, "marginal_entropy": 0.051 * LN_K}, "healthy"),
        ({"teacher_entropy": 2.0, "marginal_entropy": 2.0 + 0.009 * LN_K}, "constant"),
        ({"teacher_entropy": 2.0, "marginal_entropy": 2.0 + 0.011 * LN_K}, "healthy"),
        ({"teacher_entropy": 3.0, "marginal_entropy": 2.0}, "healthy"),  # not of the same targets: no conclusion
        ({"marginal_entropy": None, "loss": 0.0099 * LN_K, "teacher_entropy": 0.0}, "one-hot"),
        ({"marginal_entropy": None, "loss": 0.0101 * LN_K, "teacher_entropy": 0.0}, "healthy"),
    ],
)
def test_borderline_cases_fall_on_the_side_the_docstring_draws(change, kind):
    meters = {"loss": 3.0, "k": K, "teacher_entropy": 2.0, "marginal_entropy": 6.0, "unique": None} | change
    assert verdict(**meters).kind == kind


def test_kl_defaults_to_loss_minus_entropy_and_may_be_measured():
    assert "KL 1.000" in verdict(loss=3.0, k=K, teacher_entropy=2.0).text
    assert "KL 0.900" in verdict(loss=3.0, k=K, teacher_entropy=2.0, kl=0.9).text
