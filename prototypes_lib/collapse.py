"""Is it collapsing, and how? Unique prototypes, the marginal latent class distribution, the void set, a verdict."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components as _components
from torch import Tensor

from prototypes_lib.objectives import entropy
from prototypes_lib.precision import directions, wide, without_autocast

_BLOCK = 1024


@dataclass(frozen=True)
class UniquePrototypes:
    """A partition of K prototypes into M near-copies of a representative each (PPC, Definition 4.1).

    count: M. representatives: their indices (M,). assignment: for each prototype the number, 0 .. M-1, of its
    representative (K,). redundancy: r_m, the sizes of the parts (M,), summing to K. eps: the cosine distance used.
    """

    count: int
    representatives: Int[Tensor, " m"]
    assignment: Int[Tensor, " k"]
    redundancy: Int[Tensor, " m"]
    eps: float = field(default=0.025, kw_only=True)

    @property
    def share(self) -> float:
        """M / K."""
        return self.count / len(self.assignment)


@torch.no_grad()
@without_autocast
def unique_prototypes(w: Float[Tensor, "k dim"], eps: float = 0.025) -> UniquePrototypes:
    """Greedy first-fit in index order: a prototype joins the first representative with 1 - cos < eps, or becomes one.

    PPC's Definition 4.1 asks for a partition whose members lie within eps of their representative, and leaves open
    which: M depends on order and rule (`unique_range`, `connected_components`). The inequality is strict; eps = 0.025
    is a cosine of 0.975, an angle of 12.8 degrees. The vMF paper's Table 4 counts with a cosine above 0.9: eps = 0.1.

    Args:
        w: prototypes of any length but zero, one a row; only directions count. Computed block by block in float32
            at least: 65,536 of 256 dimensions fit in well under 2 GB.

    Raises:
        ValueError: eps outside (0, 2], no prototype, or a prototype without direction.
    """
    x = _directions(w, eps)
    k = len(x)
    representatives: list[int] = []
    assignment = np.full(k, -1, dtype=np.int64)
    kept = x.new_empty(0, x.shape[1])
    for start in range(0, k, _BLOCK):
        block = x[start : start + _BLOCK]
        first = _first_match(block, kept, eps)
        assignment[start : start + _BLOCK] = first
        rest = np.flatnonzero(first < 0)
        if not len(rest):
            continue
        near = (1 - block[rest] @ block[rest].T < eps).cpu().numpy()
        taken, new = np.zeros(len(rest), dtype=bool), []
        for i in range(len(rest)):
            if not taken[i]:
                mine = near[i] & ~taken
                mine[: i + 1] = False
                mine[i] = True
                taken |= mine
                assignment[start + rest[mine]] = len(representatives)
                representatives.append(start + int(rest[i]))
                new.append(int(rest[i]))
        kept = torch.cat([kept, block[new]])
    assigned = torch.from_numpy(assignment)
    redundancy = torch.bincount(assigned, minlength=len(representatives))
    return UniquePrototypes(len(representatives), torch.tensor(representatives), assigned, redundancy, eps=eps)


def _directions(w: Tensor, eps: float) -> Tensor:
    if not 0 < eps <= 2:
        raise ValueError(f"eps={eps}: a cosine distance lies in (0, 2]")
    largest = w.abs().amax(dim=-1) if len(w) else w.new_zeros(1)
    if not (torch.isfinite(largest) & (largest > 0)).all():
        raise ValueError("prototypes must be finite and of non-zero length; drop the empty rows first")
    return directions(w)


def _first_match(block: Tensor, kept: Tensor, eps: float) -> np.ndarray:
    """For each row of the block the first kept row with 1 - cos < eps, or -1."""
    found = torch.full((len(block),), -1, dtype=torch.int64, device=block.device)
    for start in range(0, len(kept), 16 * _BLOCK):
        open_rows = torch.nonzero(found < 0)[:, 0]
        if not len(open_rows):
            break
        similarity = block[open_rows] @ kept[start : start + 16 * _BLOCK].T
        hit = 1 - similarity.amax(dim=-1) < eps  # few rows, late in the search: only these are looked through
        place = (1 - similarity[hit] < eps).int().argmax(dim=-1)  # the first True
        found[open_rows[hit]] = place + start
    return found.cpu().numpy()


def unique_range(w: Float[Tensor, "k dim"], eps: float = 0.025, orders: int = 10, seed: int = 0) -> tuple[int, int]:
    """Smallest and largest M of `unique_prototypes` over random orders of the prototypes: what the order decides.

    Raises ValueError as `unique_prototypes`, and without any order.
    """
    if orders < 1:
        raise ValueError(f"orders={orders}: a range needs at least one order")
    generator = torch.Generator().manual_seed(seed)
    shuffles = [torch.randperm(len(w), generator=generator).to(w.device) for _ in range(orders)]
    counts = [unique_prototypes(w[order], eps).count for order in shuffles]
    return min(counts), max(counts)


@torch.no_grad()
@without_autocast
def connected_components(w: Float[Tensor, "k dim"], eps: float = 0.025) -> int:
    """Number of groups when near-copies of near-copies count as copies: the coarsest reading, at most M.

    Prototypes i and j are linked where 1 - cos < eps; the greedy parts are each connected, so links are gathered
    between parts, never as a K x K matrix.
    """
    x, unique = _directions(w, eps), unique_prototypes(w, eps)
    order = torch.argsort(unique.assignment, stable=True)
    x, part = x[order.to(x.device)], unique.assignment[order].numpy()
    rows, columns = [], []
    for start in range(0, len(x), _BLOCK):
        rest = part[start:]  # links are symmetric: each block looks only onwards
        firsts = np.flatnonzero(np.r_[True, rest[1:] != rest[:-1]])
        near = (1 - x[start : start + _BLOCK] @ x[start:].T < eps).cpu().numpy()
        i, j = np.nonzero(np.logical_or.reduceat(near, firsts, axis=1))
        rows.append(rest[i])
        columns.append(rest[firsts[j]])
    i, j = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(i), dtype=bool), (i, j)), shape=(unique.count, unique.count))
    return int(_components(graph, directed=False)[0])


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


@dataclass(frozen=True)
class Verdict:
    """`kind` is uniform, one-hot, constant, partial, healthy or diverged; `text` says it in words with the figures."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def verdict(
    *,
    loss: float,
    k: int,
    teacher_entropy: float,
    kl: float | None = None,
    unique: int | UniquePrototypes | None = None,
    marginal_entropy: float | None = None,
) -> Verdict:
    """What the meters of a run mean (Sim, Eqs. 18-21; PPC, section 4).

    loss = KL + teacher entropy, so a loss that sits at ln K with an entropy of ln K has learned nothing (every target
    is uniform), and a loss near zero with a marginal of entropy zero has one class for everything. Whatever its shape,
    a target that is the same for all images has a marginal entropy equal to the teacher's: they differ by the mutual
    information of image and prototype. A low KL proves neither success nor collapse. M below half of K is partial
    prototype collapse.

    Args: loss and teacher_entropy in nats, means over samples; kl defaults to their difference; unique is M;
    marginal_entropy the entropy of the mean of the same targets. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: a verdict needs at least one prototype")
    ceiling = math.log(k)
    kl = loss - teacher_entropy if kl is None else kl
    count = unique.count if isinstance(unique, UniquePrototypes) else unique
    figures = f"loss {loss:.3f} against ln K = {ceiling:.3f}, teacher entropy {teacher_entropy:.3f}, KL {kl:z.3f}"
    if marginal_entropy is not None:
        figures += f", marginal entropy {marginal_entropy:.3f}"
    if count is not None:
        figures += f", M = {count} of K = {k}"
    if not all(map(math.isfinite, (loss, teacher_entropy, kl, marginal_entropy or 0.0))):
        return Verdict("diverged", f"The loss is not finite: the run has diverged ({figures}).")
    if k == 1:
        return Verdict("one-hot", f"A single prototype takes all images by construction ({figures}).")
    if teacher_entropy > 0.99 * ceiling:
        if abs(loss - ceiling) < 0.01 * ceiling:
            text = "Collapsed to uniform: every target is 1/K, the loss stands at ln K and its KL part teaches nothing"
        else:
            text = "The teacher says 1/K for every image: lower its temperature or look at the centering"
        return Verdict("uniform", f"{text} ({figures}).")
    if marginal_entropy is not None and marginal_entropy < 0.05 * ceiling:
        return Verdict("one-hot", f"Collapsed to one class: one prototype takes all images ({figures}).")
    if marginal_entropy is not None and abs(marginal_entropy - teacher_entropy) < 0.01 * ceiling:
        return Verdict("constant", f"Collapsed to one answer: every image gets the same target ({figures}).")
    if marginal_entropy is None and loss < 0.01 * ceiling:
        text = "The loss is near zero: one prototype takes all images, or the views are no challenge; see the marginal"
        return Verdict("one-hot", f"{text} ({figures}).")
    if count is not None and count < 0.5 * k:
        copies = k / max(count, 1)
        text = f"Partial prototype collapse: {copies:.1f} copies of each unique prototype on average"
        return Verdict("partial", f"{text}; KoLeo-proto spreads them ({figures}).")
    waiting = ", but the student still answers 1/K" if abs(loss - ceiling) < 0.01 * ceiling else ""
    return Verdict("healthy", f"No collapse to be seen{waiting} ({figures}).")
