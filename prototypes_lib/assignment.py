"""From teacher scores to targets: a chain of links, each mapping log-assignments (B, K) to log-assignments (B, K).

A link corrects the scores of the prototypes so that none of them takes all the data; the softmax of the last link is
the target. Every link adds a number to each prototype's column and each sample's row, no more, so it maps `LogScores`,
whose matrix is never whole in memory, to `LogScores`; a matrix goes in and comes out as one. Means and sums over
samples are over the whole batch, wherever its ranks hold it. Everything is in the log domain and in float32 at least:
the exponential of a score at temperature 0.04 overflows float32 from a prototype norm of 3.55 on. Links that remember
(the moving averages) keep their memory in a buffer, so that a checkpoint holds it.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prototypes_lib.blockwise import LogScores
from prototypes_lib.precision import wide


class _Link(nn.Module):
    """A link does its work in `shift`, on scores that may not be in memory."""

    def shift(self, scores: LogScores, tau: float, log_normalizer: Tensor | None = None) -> LogScores:
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self,
        log_scores: Float[Tensor, "batch k"],
        tau: float = 1.0,
        log_normalizer: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "batch k"]:
        """log_normalizer: the log C_p that is in the scores, for the link that is to leave it out of P."""
        return self.shift(LogScores(wide(log_scores)), tau, log_normalizer).matrix()


class _MovingCenter(_Link):
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

    def _centered(self, scores: LogScores, batch_center: Tensor, scale: float) -> LogScores:
        if scores.k != self.center.shape[-1]:
            raise ValueError(f"scores for {scores.k} prototypes meet a center of {self.center.shape[-1]}")
        # the score -inf of a prototype nobody can reach stays so
        center = torch.where(batch_center.isfinite(), batch_center, 0.0) if self.momentum == 0 else self.center
        centered = scores.plus(-center.to(scores.codes.dtype) / scale)
        if self.training:  # a batch without samples (no patch masked) leaves the memory alone
            new = torch.lerp(self.center, batch_center.to(self.center.dtype), 1 - self.momentum)
            remembered = torch.isfinite(new) & (scores.size() > 0)  # infinities are not
            self.center.copy_(torch.where(remembered, new, self.center))
        return centered

    def extra_repr(self) -> str:
        return f"{self.center.numel()}, momentum={self.momentum}"


class Center(_MovingCenter):
    """Logit centering: c <- m c + (1 - m) mean_b z_b, target softmax((z - c) / tau), z = tau * scores (vMF, Eq. 8).

    c is in units of the logits before the temperature, as in the official code, so a temperature schedule rescales it;
    leave tau at 1 only where the scores are such logits.
    """

    def shift(self, scores: LogScores, tau: float, log_normalizer: Tensor | None = None) -> LogScores:
        return self._centered(scores, scores.means() * tau, scale=tau)


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

    def shift(self, scores: LogScores, tau: float, log_normalizer: Tensor | None = None) -> LogScores:
        """log_normalizer: the log C_p of each prototype that is in the scores, where `literal` is to leave it out."""
        if self.literal and log_normalizer is None:
            raise ValueError("literal=True leaves log C_p out of P: pass the log_normalizer that is in the scores")
        _, log_sums = (scores.plus(-log_normalizer) if self.literal else scores).sweep(normalize=True)
        return self._centered(scores, log_sums - scores.size().clamp_min(1).log(), scale=1.0)


class Normalize(_Link):
    """log softmax over the prototypes: the start from which one Sinkhorn step is probability centering (PPC, Eq. 2)."""

    def shift(self, scores: LogScores, tau: float, log_normalizer: Tensor | None = None) -> LogScores:
        return scores.normalized()


class Sinkhorn(_Link):
    """Sinkhorn-Knopp: `steps` times give every prototype equal mass, then every sample mass one (SwAV, DINOv2, MSN).

    The last half-step is the samples', so rows of the result sum to one and prototypes only nearly to B / K. Started
    from the scores it is the official exp(L) start; after `Normalize` it starts from the softmax (PPC, Eq. 2).
    """

    def __init__(self, steps: int = 3):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps={steps}: Sinkhorn needs at least one step")
        self.steps = steps

    def shift(self, scores: LogScores, tau: float, log_normalizer: Tensor | None = None) -> LogScores:
        for step in range(self.steps):
            scores, mass = scores.sweep(normalize=step > 0)  # over samples: equal shares
            void = mass == -torch.inf  # a prototype nobody can reach stays so
            scores = scores.plus(torch.where(void, 0.0, -mass))
        return scores.normalized()  # over prototypes: a sample is one sample

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
        scores = self.shift(LogScores(wide(log_scores)), tau, log_normalizer)
        return torch.log_softmax(scores.matrix(), dim=-1)

    @torch.no_grad()
    def shift(self, scores: LogScores, tau: float, log_normalizer: Tensor | None = None) -> LogScores:
        """Scores whose softmax is the target, for scores that are not in memory; a foreign link gets a matrix."""
        for link in self.links:
            if isinstance(link, _Link):
                scores = link.shift(scores, tau, log_normalizer)
            else:
                scores = LogScores(wide(link(scores.matrix(), tau)), block=scores.block)
        return scores


def _build(target: Link, k: int) -> nn.Module:
    """A link from a class, a functools.partial of a class, or an instance (copied: its memory is a method's own)."""
    if isinstance(target, nn.Module):
        return copy.deepcopy(target)
    kind = target.func if isinstance(target, partial) else target
    remembers = isinstance(kind, type) and issubclass(kind, _MovingCenter)
    return target(k) if remembers else target()
