"""How many prototypes are there really: near-copies counted as one, under every reading of the definition (PPC)."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components as _components
from torch import Tensor

from prototypes_lib.precision import directions, without_autocast

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
