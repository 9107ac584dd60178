"""From teacher scores to targets: a chain of links, each mapping log-assignments (B, K) to log-assignments (B, K).

A link corrects the scores of the prototypes so that none of them takes all the data; the softmax of the last link is
the target. Everything is in the log domain and in float32 at least: the exponential of a score at temperature 0.04
overflows float32 from a prototype norm of 3.55 on. Links that remember (the moving averages) keep their memory in a
buffer, so that a checkpoint holds it.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prototypes_lib.precision import wide


class _MovingCenter(nn.Module):
    """c <- m c + (1 - m) c_batch, subtracted from the scores; the average sees a batch after it has been centered.

    So step t uses the center of the steps before it, as the official code does; in eval mode c stays. With momentum 0
    there is no memory to use and the batch is centered by its own estimate.
    """

    center: Tensor

    def __init__(self, k: int, momentum: float = 0.9):
        super().__init__()
        if k < 1 or not 0 <= momentum < 1:
            raise ValueError(f"k={k}, momentum={momentum}: need at least one prototype and a momentum in [0, 1)")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(k, dtype=torch.float64))  # K numbers: precision is free

    def _centered(self, scores: Tensor, batch_center: Tensor, scale: float) -> Tensor:
        if scores.shape[-1] != self.center.shape[-1]:
            raise ValueError(f"scores for {scores.shape[-1]} prototypes meet a center of {self.center.shape[-1]}")
        # the score -inf of a prototype nobody can reach stays so
        center = torch.where(batch_center.isfinite(), batch_center, 0.0) if self.momentum == 0 else self.center
        centered = scores - center.to(scores.dtype) / scale
        if self.training and len(scores):  # a batch without samples (no patch masked) leaves the memory alone
            new = torch.lerp(self.center, batch_center.to(self.center.dtype), 1 - self.momentum)
            self.center.copy_(torch.where(torch.isfinite(new), new, self.center))  # infinities are not remembered
        return centered

    def extra_repr(self) -> str:
        return f"{self.center.numel()}, momentum={self.momentum}"


class Center(_MovingCenter):
    """Logit centering: c <- m c + (1 - m) mean_b z_b, target softmax((z - c) / tau), z = tau * scores (vMF, Eq. 8).

    c is in units of the logits before the temperature, as in the official code, so a temperature schedule rescales it;
    leave tau at 1 only where the scores are such logits.
    """

    @torch.no_grad()
    def forward(self, log_scores: Float[Tensor, "batch k"], tau: float = 1.0) -> Float[Tensor, "batch k"]:
        scores = wide(log_scores)
        return self._centered(scores, scores.mean(0) * tau, scale=tau)


class ProbabilityCenter(_MovingCenter):
    """Probability centering: c <- m c + (1 - m) log mean_b P_b, target softmax(L - c), P = softmax(L) (PPC, Eq. 3).

    L are the full scores, log C_p included. vMF Eq. 9 prints P without log C_p; its text and PPC Eq. 3 mean it
    included, and so do we; literal=True is Eq. 9 as printed. P is not centered before it is averaged, and c is not
    divided by tau. The mean of P is taken in the log domain: in float32 thousands of its entries would underflow to
    log 0.
    """

    def __init__(self, k: int, momentum: float = 0.9, literal: bool = False):
        super().__init__(k, momentum)
        self.literal = literal

    @torch.no_grad()
    def forward(
        self,
        log_scores: Float[Tensor, "batch k"],
        tau: float = 1.0,
        log_normalizer: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "batch k"]:
        """log_normalizer: the log C_p of each prototype that is in the scores, where `literal` is to leave it out."""
        scores = wide(log_scores)
        if self.literal and log_normalizer is None:
            raise ValueError("literal=True leaves log C_p out of P: pass the log_normalizer that is in the scores")
        log_p = torch.log_softmax(scores - log_normalizer if self.literal else scores, dim=-1)
        batch = torch.logsumexp(log_p, dim=0) - math.log(max(len(scores), 1))
        return self._centered(scores, batch, scale=1.0)


class Normalize(nn.Module):
    """log softmax over the prototypes: the start from which one Sinkhorn step is probability centering (PPC, Eq. 2)."""

    @torch.no_grad()
    def forward(self, log_scores: Float[Tensor, "batch k"], tau: float = 1.0) -> Float[Tensor, "batch k"]:
        return torch.log_softmax(wide(log_scores), dim=-1)


class Sinkhorn(nn.Module):
    """Sinkhorn-Knopp: `steps` times give every prototype equal mass, then every sample mass one (SwAV, DINOv2, MSN).

    The last half-step is the samples', so rows of the result sum to one and prototypes only nearly to B / K. Started
    from the scores it is the official exp(L) start; after `Normalize` it starts from the softmax (PPC, Eq. 2).
    """

    def __init__(self, steps: int = 3):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps={steps}: Sinkhorn needs at least one step")
        self.steps = steps

    @torch.no_grad()
    def forward(self, log_scores: Float[Tensor, "batch k"], tau: float = 1.0) -> Float[Tensor, "batch k"]:
        log_q = wide(log_scores)
        if not len(log_q):
            return log_q
        for _ in range(self.steps):
            void = log_q.amax(dim=0, keepdim=True) == -torch.inf  # a prototype nobody can reach stays so
            log_q = torch.where(void, log_q, torch.log_softmax(log_q, dim=0))  # over samples: equal shares
            log_q = torch.log_softmax(log_q, dim=1)  # over prototypes: a sample is one sample
        return log_q

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


Link = Callable[..., nn.Module] | nn.Module


class Chain(nn.Module):
    """A method's links for K prototypes; calling it gives log targets, log softmax(link_n(...link_1(L)))."""

    def __init__(self, targets: tuple[Link, ...], k: int):
        super().__init__()
        self.links = nn.ModuleList(_build(target, k) for target in targets)

    @torch.no_grad()
    def forward(
        self,
        log_scores: Float[Tensor, "batch k"],
        tau: float = 1.0,
        log_normalizer: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "batch k"]:
        log_q = wide(log_scores)
        for link in self.links:
            literal = getattr(link, "literal", False)
            log_q = link(log_q, tau, log_normalizer) if literal else link(log_q, tau)
        return torch.log_softmax(log_q, dim=-1)


def _build(target: Link, k: int) -> nn.Module:
    """A link from a class, a functools.partial of a class, or an instance (copied: its memory is a method's own)."""
    if isinstance(target, nn.Module):
        return copy.deepcopy(target)
    kind = target.func if isinstance(target, partial) else target
    remembers = isinstance(kind, type) and issubclass(kind, _MovingCenter)
    return target(k) if remembers else target()
