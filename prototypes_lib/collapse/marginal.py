"""Which prototypes do the data use: the marginal latent class distribution, and the void set away from all data."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prototypes_lib.collapse.unique import UniquePrototypes
from prototypes_lib.objectives import entropy
from prototypes_lib.precision import directions, wide, without_autocast


@dataclass(frozen=True)
class Marginal:
    """The marginal latent class distribution (PPC, section 3), over all prototypes and over the unique ones.

    p, entropy: mean assignment of the data to the K prototypes, and its entropy in nats. unique_p, unique_entropy:
    the same when only the representatives compete. by_part: p summed over the copies of each part.
    """

    p: Float[Tensor, " k"]
    entropy: float
    unique_p: Float[Tensor, " m"] | None = None
    unique_entropy: float | None = None
    by_part: Float[Tensor, " m"] | None = None

    @property
    def perplexity(self) -> float:
        """exp(entropy): how many prototypes the data effectively use."""
        return math.exp(self.entropy)


@torch.no_grad()
def marginal(log_scores: Float[Tensor, "n k"], unique: UniquePrototypes | None = None) -> Marginal:
    """p_k = mean_n softmax(log_scores)_nk, and again with only the unique prototypes competing (PPC, Fig. 2).

    Args: log_scores of the data under any score function, before or after centering; unique from `unique_prototypes`.
    Raises ValueError where the two speak of different numbers of prototypes.
    """
    log_scores = wide(log_scores)
    p = torch.softmax(log_scores, -1).mean(0)
    if unique is None:
        return Marginal(p, float(entropy(p)))
    if len(unique.assignment) != log_scores.shape[-1]:
        raise ValueError(f"{log_scores.shape[-1]} scores a sample, but {len(unique.assignment)} prototypes")
    alone = torch.softmax(log_scores[:, unique.representatives.to(p.device)], -1).mean(0)
    by_part = torch.zeros_like(alone).index_add_(0, unique.assignment.to(p.device), p)
    return Marginal(p, float(entropy(p)), alone, float(entropy(alone)), by_part)


@dataclass(frozen=True)
class VoidSet:
    """Prototypes that point away from all data; `cosine` is each prototype's with the mean code (vMF, section 5.2)."""

    count: int
    mask: Bool[Tensor, " k"]
    cosine: Float[Tensor, " k"]


@torch.no_grad()
@without_autocast
def void_set(w: Float[Tensor, "k dim"], codes: Float[Tensor, "n dim"], eps: float = 0.025) -> VoidSet:
    """Prototypes with cosine -1 to the mean code, up to eps: unused ones, as far from the data as the sphere goes.

    vMF, section 5.2: in DINO ViT-B/16 they are 83 % of 65,536. Args: w of any length; codes unit vectors.
    Raises ValueError where the mean code has no direction (then nothing is opposite to it).
    """
    mean = wide(codes).mean(0)
    if not float(mean.norm()) > 1e-6:  # also without any code
        raise ValueError("the codes average to zero: there is no direction away from the data")
    w = directions(w)
    cosine = w @ directions(mean).to(w)
    mask = 1 + cosine < eps
    return VoidSet(int(mask.sum()), mask, cosine)
