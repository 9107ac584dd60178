"""What can be measured on a step of training: targets, prototypes, codes, weights, and how the teacher moves.

Each function returns entries of a row: plain floats under the names of metrics.jsonl. All compute in float32 at least,
outside autocast and without a gradient, on whatever device the tensors are.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prototypes_lib import ranks
from prototypes_lib.collapse.marginal import void_set
from prototypes_lib.collapse.sphere import effective_rank
from prototypes_lib.collapse.unique import unique_prototypes
from prototypes_lib.objectives import entropy
from prototypes_lib.precision import wide, without_autocast
from prototypes_lib.regularizers import coding_rate

Prototypes = Tensor | nn.Module

_BLOCK = 2**22  # entries of the targets handled at once: a batch of 512 with K = 65,536 needs little beside itself
_SAMPLE = 2**16  # entries of each parameter that movement is measured on


@torch.no_grad()
@without_autocast
def measures_of_targets(
    targets: Float[Tensor, "*batch k"], *, log_scores: bool = False
) -> tuple[dict[str, float], Float[Tensor, " k"]]:
    """teacher_entropy, marginal_entropy and k of targets, in nats, and their mean; with log_scores also score_max.

    Args: targets: probabilities whose rows sum to one or, with log_scores, scores whose softmax they are.
    Raises ValueError without a target, and where probabilities are negative or do not sum to one (within 1 %).
    """
    rows = targets.reshape(-1, targets.shape[-1])
    if not rows.numel():
        raise ValueError(f"targets of shape {tuple(targets.shape)}: nothing to measure")
    n, k = rows.shape
    entropies, mass, peaks = [], 0.0, []
    for block in rows.split(max(1, _BLOCK // k)):
        p = wide(block)
        if log_scores:
            # -inf is the score of a prototype that nobody can reach; anything else that is not finite is a divergence
            peaks.append(torch.where(p == -torch.inf, 0.0, p.abs()).amax())
            p = torch.softmax(p, -1)
        else:
            _check_distributions(p)
        entropies.append(entropy(p))
        mass = mass + p.sum(0)
    mean = mass / n
    row = {"k": float(k), "teacher_entropy": float(torch.cat(entropies).mean())}
    row["marginal_entropy"] = float(entropy(mean))
    if log_scores:
        row["score_max"] = float(torch.stack(peaks).amax())
    return row, mean


def _check_distributions(p: Tensor) -> None:
    sums, low = p.sum(-1), float(p.amin())
    worst = float(sums[(sums - 1).abs().argmax()])  # not a number, if there is one: that is for the diagnosis
    if low < 0:
        raise ValueError(f"targets hold {low:.3g}: probabilities are not negative; pass scores as log_scores=...")
    if math.isfinite(worst) and abs(worst - 1) > 0.01:  # half precision stays within it
        raise ValueError(
            f"a row of the targets sums to {worst:.4g}, not 1: the last dimension must be the prototypes; "
            "pass scores as log_scores=..."
        )


@torch.no_grad()
@without_autocast
def measures_of_prototypes(w: Float[Tensor, "k dim"], eps: float = 0.025, count: bool = True) -> dict[str, float]:
    """k, M (where `count`: it takes seconds for 65,536), quantiles of |w| as kappa_05, kappa_50, kappa_95.

    vMF, section 3.3: DINO's prototypes are vMF components of precision |w| / tau; with weight normalization and norms
    that are not trained all are 1. M is of `unique_prototypes` among those that are finite and have a direction, and
    left out where there are none. kappa_* are nan where a prototype is.
    """
    w = wide(w)
    lengths = torch.linalg.vector_norm(w, dim=-1)
    levels = torch.quantile(lengths.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=w.device))
    row = {"k": float(len(w))} | dict(zip(("kappa_05", "kappa_50", "kappa_95"), levels.tolist(), strict=True))
    if count:
        sound = torch.isfinite(lengths) & (lengths > 0)
        row |= {"M": float(unique_prototypes(w[sound], eps).count)} if bool(sound.any()) else {}
    return row


@torch.no_grad()
def measures_of_codes(codes: Float[Tensor, "*batch dim"], eps: float = 0.05**0.5) -> dict[str, float]:
    """code_dim, effective_rank and coding_rate of one process's codes.

    effective_rank is that of their second moment, see `sphere.effective_rank`: 1 where all codes are one, up to p where
    they fill the sphere. coding_rate is Sim, Eq. 8, in nats; eps defaults to what SimDINO's released code uses. Both
    are nan where a code is not finite.

    Raises ValueError without a code.
    """
    z = wide(codes.reshape(-1, codes.shape[-1]))
    if not len(z):
        raise ValueError("no codes: nothing to measure")
    row = {"code_dim": float(z.shape[1]), "effective_rank": math.nan, "coding_rate": math.nan}
    if bool(torch.isfinite(z).all()):
        with ranks.alone():  # a meter may run on one process of many
            row["coding_rate"] = float(coding_rate(z, eps))
        row["effective_rank"] = effective_rank(z, squared=True)
    return row


@torch.no_grad()
def void_share(w: Float[Tensor, "k dim"], codes: Float[Tensor, "*batch dim"], eps: float = 0.025) -> float | None:
    """Share of prototypes in the void set of these codes (vMF, section 5.2); None where their mean has no direction."""
    try:
        return void_set(w, codes.reshape(-1, codes.shape[-1]), eps).count / len(w)
    except ValueError:
        return None


@torch.no_grad()
def measures_of_student(student: nn.Module) -> dict[str, float]:
    """weight_max, the largest |weight|, and grad_norm, the global norm of the gradients where there are any."""
    weights = [p.detach() for p in student.parameters() if p.numel()]
    gradients = [p.grad.detach() for p in student.parameters() if p.grad is not None]
    row = {}
    if weights:
        row["weight_max"] = float(torch.stack([w.abs().amax().float() for w in weights]).amax())
    if gradients:
        norm = math.hypot(*torch.stack([torch.linalg.vector_norm(wide(g)) for g in gradients]).tolist())
        if math.isinf(norm):  # the squares overflow before the norm does
            norm = math.hypot(*(float(torch.linalg.vector_norm(g.cpu().double())) for g in gradients))
        row["grad_norm"] = norm
    return row


class Movement:
    """How far the teacher moved since the last look, how far it lags behind the student, whether they are one.

    Parameters only, on at most 65,536 evenly spaced entries of each, so that a teacher need not be kept twice. Passing
    no `student` leaves out the lag.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(
        self, teacher: nn.Module, student: nn.Module | None = None, shared_by_design: Iterable[Tensor] = ()
    ) -> dict[str, float]:
        """teacher_moved |t - t_before| / |t|, teacher_lag |t - s| / |s|, shared_memory 1.0 or 0.0.

        shared_by_design: parameters that both may hold (SwAV's and MSN's prototypes). Parameters that the student does
        not train may be shared, too, unless all are.
        """
        row, now = {}, [_sample(p).clone() for p in teacher.parameters()]
        if self._before is not None and len(self._before) == len(now):
            row["teacher_moved"] = _relative(now, self._before, now)
        self._before = now
        if student is not None:
            ours = [_sample(p) for p in student.parameters()]
            if [x.shape for x in ours] == [x.shape for x in now]:
                row["teacher_lag"] = _relative(now, ours, ours)
            row["shared_memory"] = float(_share_memory(teacher, student, shared_by_design))
        return row


def _sample(p: Tensor) -> Tensor:
    flat = p.detach().reshape(-1)
    return wide(flat[:: -(-flat.numel() // _SAMPLE) | 1])  # an odd step: not always the same column of a matrix


def _relative(a: list[Tensor], b: list[Tensor], scale: list[Tensor]) -> float:
    def size(tensors: list[Tensor]) -> float:
        return math.hypot(*(float(n) for n in torch._foreach_norm(tensors))) if tensors else 0.0

    length = size(scale)
    return size([x - y.to(x.device) for x, y in zip(a, b, strict=True)]) / length if length else 0.0


def _share_memory(teacher: nn.Module, student: nn.Module, by_design: Iterable[Tensor]) -> bool:
    allowed = {p.data_ptr() for p in by_design}
    for module in student.modules():  # a layer's bias comes with its weight
        own = {p.data_ptr() for p in module.parameters(recurse=False)}
        allowed |= own if allowed & own else set()
    theirs = {p.data_ptr() for p in teacher.parameters()} - {0}
    ours = [p for p in student.parameters() if p.data_ptr() not in allowed and p.data_ptr()]
    shared = [p for p in ours if p.data_ptr() in theirs]
    return bool(shared) and (len(shared) == len(ours) or any(p.requires_grad for p in shared))


def weights_of(prototypes: Prototypes) -> Float[Tensor, "k dim"]:
    """The prototypes as the scores use them, one a row, detached: of a tensor or of any kind of last layer.

    Modules: `.w` (ours), `.weight` (nn.Linear, also with `parametrizations.weight_norm`), and the older `weight_norm`,
    whose `.weight` is that of the last forward pass: w = g v / |v| is computed from weight_g and weight_v.
    """
    while isinstance(getattr(prototypes, "module", None), nn.Module):  # DataParallel's and DDP's
        prototypes = prototypes.module
    with torch.no_grad():
        if isinstance(prototypes, Tensor):
            w = prototypes
        elif isinstance(w := getattr(prototypes, "w", None), Tensor):
            pass
        elif hasattr(prototypes, "weight_g") and hasattr(prototypes, "weight_v"):
            v, g = wide(prototypes.weight_v), wide(prototypes.weight_g)
            dims = [d for d in range(v.ndim) if not g.ndim or g.shape[d] == 1]
            w = v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=True))
        else:
            w = getattr(prototypes, "weight", None)
        if not isinstance(w, Tensor) or w.ndim != 2 or not w.numel():
            found = f"a tensor of shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(prototypes).__name__
            raise ValueError(f"{found} holds no prototypes: pass a (k, p) tensor or a last layer that has .weight")
        return w.detach()
