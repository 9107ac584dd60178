"""What the student is asked: predict the teacher's assignment (with prototypes), or point the same way (without)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from prototypes_lib.precision import wide

Objective = Callable[..., Tensor]


def cross_entropy(
    targets: Float[Tensor, "*batch k"],
    log_scores: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """-sum_k targets_k log softmax(log_scores)_k, averaged over samples: KL + entropy of the targets (Sim, Eqs. 18-20).

    One direction, teacher to student, as the official code; the form printed as Sim Eq. 5 is symmetrized (notebook 14).

    Args:
        targets: probabilities, rows summing to one. log_scores: the student's scores, normalized here.
        weight: per sample; the result is then sum_b weight_b CE_b instead of the mean.
    """
    log_p = torch.log_softmax(wide(log_scores), dim=-1)
    loss = -(targets * torch.where(targets > 0, log_p, 0.0)).sum(-1)  # 0 log 0 is 0
    return loss.mean() if weight is None else (weight * loss).sum()


def alignment(
    a: Float[Tensor, "*batch dim"], b: Float[Tensor, "*batch dim"], weight: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """1 - <a, b> of unit codes, averaged over samples: half their squared distance (Sim, Eq. 7).

    The paper equates it with -<a, b>; the constant is ours to keep. `weight` as in `cross_entropy`.
    """
    loss = 1 - (wide(a) * wide(b)).sum(-1)
    return loss.mean() if weight is None else (weight * loss).sum()


def over_views(
    objective: Objective,
    teacher: Float[Tensor, "views batch d"],
    student: list[Float[Tensor, "batch d"]],
    first: int = 0,
) -> Float[Tensor, ""]:
    """Mean of objective(teacher view q, student view v) over all pairs q != v: 2(2+L) - 2 pairs for L local views.

    Views are ordered [global1, global2, local1, ...] in both arguments; the student's begin with view `first` (MSN's
    with 1: its one target is none of its anchors). Both objectives are linear in the teacher, so
    one call a student view with the mean of its targets replaces a call a pair. Raises ValueError without any pair.
    """
    teacher = wide(teacher)
    total, loss, pairs = teacher.sum(0), 0.0, 0
    for v, prediction in enumerate(student, start=first):
        n = len(teacher) - (v < len(teacher))
        if n:
            others = (total - teacher[v]) if v < len(teacher) else total
            loss = loss + n * objective(others / n, prediction)
            pairs += n
    if not pairs:
        raise ValueError("one view has nothing to agree with; use two global views or a local one")
    return loss / pairs


def entropy(p: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """H(p) = -sum_k p_k log p_k in nats, 0 log 0 = 0; ln K for the uniform distribution."""
    p = wide(p)  # clamped before the logarithm: 0 log 0 is 0, and so has a gradient
    return -(p * torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))).sum(-1)
