"""A set of prototypes seen without data: how many there really are, how long they are, how they lie on the sphere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prototypes_lib.collapse import UniquePrototypes, neighbors, uniform_nearest_quantile, unique_prototypes
from prototypes_lib.official import Found
from prototypes_lib.precision import directions, without_autocast

PPC, VMF = 0.025, 0.1  # cosine distances: PPC, Definition 4.1; vMF, Table 4, a cosine above 0.9
CURVE = (1e-4, 3e-4, 1e-3, 2.5e-3, 5e-3, 0.01, PPC, 0.05, VMF, 0.15, 0.2, 0.3, 0.4, 0.5)
RATE_EPS = 0.05**0.5  # of the coding rate, as in the SimDINO recipes (Sim, Eq. 8)
_ROWS = 2**14  # at a time
_POINTS = 10_000  # quantiles that stand for a distribution
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Comparison:
    """The same prototypes in the other network: its M at the same eps, and each prototype's cosine with its match."""

    network: str
    count: int
    k: int
    cosine: Float[Tensor, " k"]


@dataclass(frozen=True)
class Examination:
    """What one set of K prototypes is.

    found: where it comes from. unique: its partition at eps. curve: (eps, M, largest group) in order of eps, both
    papers' thresholds among them. order_range: M over `orders` random orders drawn with `seed`; components: groups when
    copies of copies count as copies. lengths: |w|; tau: the temperature they are divided by to be vMF's kappa, None
    where the file does not say it. nearest: 1 - cos of each prototype to the nearest other one; uniform: quantiles of
    the same for as many points drawn evenly on the sphere; both None of a single prototype. eigenvalues: of the second
    moment of the directions w / |w|, falling, summing to 1. other: against the other network.
    """

    found: Found
    eps: float
    unique: UniquePrototypes
    curve: tuple[tuple[float, int, int], ...]
    order_range: tuple[int, int]
    orders: int
    seed: int
    components: int
    lengths: Float[Tensor, " k"]
    tau: float | None
    nearest: Float[Tensor, " k"] | None
    uniform: Float[Tensor, " points"] | None
    eigenvalues: Float[Tensor, " dim"]
    other: Comparison | None = None

    @property
    def k(self) -> int:
        """K, the number of prototypes."""
        return len(self.lengths)

    @property
    def largest(self) -> int:
        """Size of the largest group of copies, at eps."""
        return int(self.unique.redundancy.max())

    @property
    def largest_of(self) -> int:
        """Index of the prototype that this group are copies of."""
        return int(self.unique.representatives[int(self.unique.redundancy.argmax())])

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues: from 1, all in one line, to min(K, dim) (Roy & Vetterli 2007)."""
        return float(torch.special.entr(self.eigenvalues).sum().exp())

    @property
    def coding_rate(self) -> float:
        """1/2 sum ln(1 + dim / RATE_EPS^2 eigenvalue) of the directions, in nats (Sim, Eq. 8)."""
        return float(torch.log1p(len(self.eigenvalues) / RATE_EPS**2 * self.eigenvalues).sum() / 2)

    def at(self, eps: float) -> tuple[int, int]:
        """M and the largest group at a threshold of the curve."""
        return next((count, largest) for at, count, largest in self.curve if at == eps)

    def copies(self) -> list[tuple[int, int]]:
        """(r, number of unique prototypes with redundancy r), r rising: PPC's r_m as a histogram."""
        factor, count = self.unique.redundancy.unique(return_counts=True)
        return list(zip(factor.tolist(), count.tolist(), strict=True))


def examine(
    found: Found,
    *,
    eps: float = PPC,
    other: Found | None = None,
    tau: float | None = None,
    orders: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Examination:
    """Everything about a set of prototypes that needs no data; K = 131,072 of 384 dimensions fit in 2 GB.

    Args:
        found: of `checkpoints.all_prototypes`. other: the same prototypes in the other network.
        eps: cosine distance below which two prototypes are copies. tau: the score's temperature, where it is known.
        orders: random orders whose M are compared, drawn with `seed`. progress: a line for each part of the work.

    Raises ValueError, one line, for an eps outside (0, 2], or prototypes that are zero or not finite.
    """
    if not 0 < eps <= 2:
        raise ValueError(f"eps={eps}: a cosine distance lies in (0, 2]")
    lengths = check_rows(found)
    pairs = neighbors(found.w, sorted({*CURVE, eps}), progress=progress)
    curve = tuple((u.eps, u.count, int(u.redundancy.max())) for u in pairs.curve())
    unique, order_range, components = pairs.unique(eps), pairs.range(eps, orders, seed), pairs.components(eps)
    nearest = even = None
    if min(found.w.shape) > 1:
        levels = (np.arange(_POINTS) + 0.5) / _POINTS
        nearest = 1 - pairs.nearest.cpu()
        even = 1 - torch.from_numpy(uniform_nearest_quantile(levels, *found.w.shape)).float()
    del pairs  # it holds all directions
    return Examination(
        found, eps, unique, curve, order_range, orders, seed, components, lengths, tau, nearest,
        even, _spectrum(found.w),
        compare(found, other, eps) if other is not None and other.w.shape == found.w.shape else None,
    )  # fmt: skip


def compare(found: Found, other: Found, eps: float = PPC, count: int | None = None) -> Comparison:
    """One set of prototypes against the same in the other network; count: that one's M, where it is known.

    Raises ValueError as `examine`.
    """
    check_rows(other)
    blocks = zip(found.w.split(_ROWS), other.w.split(_ROWS), strict=True)
    cosine = torch.cat([(directions(a) * directions(b)).sum(1) for a, b in blocks])
    count = unique_prototypes(other.w, eps).count if count is None else count
    return Comparison(other.network, count, len(cosine), cosine)


def compared(seen: Sequence[Examination], sets: Sequence[Found]) -> list[Examination]:
    """Each examination of a teacher, and the first one, set against the same prototypes in the other network."""
    counts = {(one.found.network, one.found.of): one.unique.count for one in seen}
    found = []
    for i, one in enumerate(seen):
        mine, shape = one.found, one.found.w.shape
        fits = (s for s in sets if s.of == mine.of and s.network != mine.network and s.w.shape == shape)
        other = next(fits, None) if i == 0 or mine.network == "teacher" else None
        if other is not None:
            one = replace(one, other=compare(mine, other, one.eps, counts.get((other.network, other.of))))
        found.append(one)
    return found


def check_rows(found: Found) -> Float[Tensor, " k"]:
    """Lengths of the prototypes. Raises ValueError naming the set and the first row that has no direction."""
    lengths = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in found.w.split(_ROWS)])
    bad = ~(lengths.isfinite() & (lengths > 0))
    if not len(lengths) or bool(bad.any()):
        what = f"{int(bad.sum())} of {len(lengths)} {found.network} prototypes ({found.tensor})"
        first = f", the first is number {int(bad.int().argmax())}" if len(lengths) else ""
        raise ValueError(f"{what} are zero or not finite{first}: the file is damaged or its training diverged")
    return lengths.float()


@torch.no_grad()
@without_autocast
def _spectrum(w: Float[Tensor, "k dim"]) -> Float[Tensor, " dim"]:
    """Eigenvalues of X^T X / K, X the directions, falling; summed block by block in float64."""
    gram = w.new_zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    for part in w.split(_ROWS):
        x = directions(part).double()
        gram += x.T @ x
    return torch.linalg.eigvalsh(gram / len(w)).flip(0).clamp_min(0)


def quantiles(x: Tensor, at: Sequence[float] = QUANTILES) -> dict[str, float]:
    """{"0.05": ...}; of any length (torch's own takes 16 million at most)."""
    ordered = x.double().sort().values
    return {f"{q:g}": float(ordered[round(q * (len(ordered) - 1))]) for q in at}


def histogram(x: Tensor, bins: int = 40, low: float | None = None, high: float | None = None) -> dict[str, list]:
    """{"edges": bins + 1, "counts": bins}; of equal values one narrow histogram around them."""
    low, high = float(x.min()) if low is None else low, float(x.max()) if high is None else high
    if not high > low:
        low, high = low - 0.5 * max(abs(low), 1e-6), low + 0.5 * max(abs(low), 1e-6)
    counts = torch.histc(x.double().clamp(low, high), bins, low, high)
    return {
        "edges": torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist(),
        "counts": counts.long().tolist(),
    }
