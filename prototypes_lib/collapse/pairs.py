"""All pairs of prototypes in one pass, and from it every count of near-copies, exactly (PPC).

A greedy count compares K prototypes with the M it keeps; a curve of eps, random orders and components repeat that some
fifty times, an hour and more at K = 131,072. Here all pairs are compared once, block by block, and the near ones kept
as a sparse graph, from which a count takes about a second. But in a group of 60,000 copies all pairs are near, and
they are billions. So a prototype with more than about `_CROWD` others within eps counts as *crowded* at eps, and pairs
of two crowded ones are not kept: a count compares them again, with those few of them that it makes representatives.
Who is crowded a sample tells beforehand. It decides what is kept, so time and memory, and never a result.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.collapse.unique import UniquePrototypes, _directions, _first_match, unique_prototypes
from prototypes_lib.precision import without_autocast

CURVE = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_CROWD, _SAMPLE = 128, 4096  # others within eps, and prototypes by which their number is estimated
_ROWS, _COLUMNS, _CELL = 1024, 4096, 64  # cosines made at a time: 16 MB; columns, at least as many, are whole cells
_DELAY = 2  # seconds without a bar: most sets are done by then


@dataclass(frozen=True, eq=False)
class Neighbors:
    """What a pass over all pairs of K prototypes leaves: `unique`, `curve`, `range` and `components`, at any eps.

    nearest: each prototype's largest cosine to another one (K,), nan for one alone. eps: the distances the pass was
    made for, rising; at others the results are as exact, and may take longer.

    Inside, prototypes stand in the order of `_reach`, the largest distance in `eps` at which each is not crowded: those
    crowded at eps come first. `_graph` holds 1 - cos, in both directions, of each pair nearer than either's reach.
    """

    nearest: Float[Tensor, " k"] = field(repr=False)
    eps: tuple[float, ...]
    _x: Float[Tensor, "k dim"] = field(repr=False)
    _place: Int[np.ndarray, " k"] = field(repr=False)  # of each prototype in the inner order
    _reach: Float[np.ndarray, " k"] = field(repr=False)
    _graph: csr_array = field(repr=False)
    _progress: bool = field(repr=False, default=False)

    def unique(self, eps: float = 0.025) -> UniquePrototypes:
        """What `unique_prototypes(w, eps)` gives. Raises ValueError for eps outside (0, 2]."""
        near, crowded = self._near(eps)
        leader = _leaders(self._x[:crowded], near, self._place, eps)[self._place]
        representatives, assignment, redundancy = np.unique(leader, return_inverse=True, return_counts=True)
        parts = (torch.from_numpy(x.astype(np.int64)) for x in (representatives, assignment, redundancy))
        return UniquePrototypes(len(representatives), *parts, eps=eps)

    def curve(self, eps: Sequence[float] | None = None) -> tuple[UniquePrototypes, ...]:
        """`unique` at each distance, by default at those the pass was made for."""
        distances = self.eps if eps is None else tuple(eps)
        return tuple(self.unique(e) for e in _bar(distances, "curve of M", "eps", self._progress))

    def range(self, eps: float = 0.025, orders: int = 10, seed: int = 0) -> tuple[int, int]:
        """What `unique_range(w, eps, orders, seed)` gives: smallest and largest M over the same random orders."""
        if orders < 1:
            raise ValueError(f"orders={orders}: a range needs at least one order")
        (near, crowded), generator, counts = self._near(eps), torch.Generator().manual_seed(seed), []
        for _ in _bar(range(orders), f"orders at {eps:g}", "orders", self._progress):
            order = torch.randperm(len(self._place), generator=generator).numpy()
            counts.append(len(np.unique(_leaders(self._x[:crowded], near, self._place[order], eps))))
        return min(counts), max(counts)

    def components(self, eps: float = 0.025) -> int:
        """What `connected_components(w, eps)` gives: groups when near-copies of near-copies count as copies."""
        near, crowded = self._near(eps)
        count, group = connected_components(near, directed=False)
        return _joined(self._x[:crowded], group, eps) if crowded else int(count)

    def _near(self, eps: float) -> tuple[csr_array, int]:
        """Pairs with 1 - cos < eps, all of them but some of two crowded prototypes, and the number of these."""
        if not 0 < eps <= 2:
            raise ValueError(f"eps={eps}: a cosine distance lies in (0, 2]")
        kept = self._graph.data < eps
        starts = np.r_[0, np.cumsum(kept)][self._graph.indptr].astype(self._graph.indices.dtype)
        near = csr_array((np.ones(starts[-1], np.int8), self._graph.indices[kept], starts), shape=self._graph.shape)
        return near, int((self._reach < eps).sum())


@torch.no_grad()
@without_autocast
def neighbors(w: Float[Tensor, "k dim"], eps: Sequence[float] = CURVE, *, progress: bool = False) -> Neighbors:
    """Compare all pairs of K prototypes once, K^2 / 2 cosines in float32 at least, and keep what counting them needs.

    The results are those of `unique_prototypes`, `unique_range` and `connected_components` in exact arithmetic. In
    float32 a cosine within rounding (about 1e-7) of 1 - eps may fall on either side, there as here.

    Args:
        w: prototypes of any length but zero, one a row. 131,072 of 384 dimensions fit in 2 GB.
        eps: cosine distances to be asked for. The largest sets how many pairs are kept, about `_CROWD` a prototype.
        progress: a line of text for the pass, and for each curve and range.

    Raises:
        ValueError: no eps or one outside (0, 2], no prototype, or a prototype without direction.
    """
    distances = tuple(sorted({_distance(e) for e in eps}))
    if not distances:
        raise ValueError("eps is empty: name at least one cosine distance")
    x = _directions(w, distances[0])
    reach = _reaches(x, distances)
    order = torch.argsort(reach, stable=True)
    x, reach, place = x[order], reach[order], torch.argsort(order)
    largest, graph = _compare(x, reach, progress)
    nearest = largest[place].clamp(-1, 1) if len(x) > 1 else torch.full_like(largest, torch.nan)
    return Neighbors(nearest, distances, x, place.cpu().numpy(), reach.cpu().numpy(), graph, progress)


def _distance(eps: float) -> float:
    if not 0 < eps <= 2:
        raise ValueError(f"eps={eps}: a cosine distance lies in (0, 2]")
    return float(eps)


def _bar(steps, what: str, unit: str, progress: bool) -> tqdm:
    return tqdm(steps, what, unit=unit, file=sys.stdout, delay=_DELAY, mininterval=2, ascii=True, disable=not progress)


def _reaches(x: Tensor, distances: tuple[float, ...]) -> Float[Tensor, " k"]:
    """The largest of the distances at which each row has at most about `_CROWD` others nearby, by a sample; or -3."""
    k = len(x)
    if k <= _CROWD:  # nobody can have too many
        return x.new_full((k,), distances[-1])
    size = min(k, max(_SAMPLE, k // 32))
    sample = x[torch.randperm(k, generator=torch.Generator().manual_seed(0))[:size].to(x.device)]
    allowed = max(1, _CROWD * size // k)
    levels = x.new_tensor((-3.0, *distances))  # 1 - cos of copies may round to less than 0
    reach = torch.empty_like(x[:, 0])
    for start in range(0, k, _ROWS):
        beyond = (x[start : start + _ROWS] @ sample.T).topk(allowed + 1).values[:, -1]  # the first one too many
        reach[start : start + _ROWS] = levels[torch.searchsorted(levels, 1 - beyond, right=True) - 1]
    return reach


def _compare(x: Tensor, reach: Tensor, progress: bool) -> tuple[Tensor, csr_array]:
    """Each row's largest cosine to another, and 1 - cos of all pairs with 1 - cos < max(reach_i, reach_j).

    Few cosines are near enough: they are looked for where the largest of `_CELL` in a row is.
    """
    k, largest, found = len(x), x.new_full((len(x),), -torch.inf), []
    made = x.new_empty(_ROWS, _COLUMNS)
    with _bar(None, "pairs compared", "pairs", progress) as bar:
        bar.total, bar.unit_scale = k * (k + 1) // 2, True
        for start in range(0, k, _ROWS):
            rows = slice(start, min(start + _ROWS, k))
            n, own = rows.stop - start, reach[rows, None]
            for left in range(start, k, _COLUMNS):
                columns = slice(left, min(left + _COLUMNS, k))
                cosine = made[:n]
                torch.mm(x[rows], x[columns].T, out=cosine[:, : columns.stop - left])
                cosine[:, columns.stop - left :] = -torch.inf
                if left == start:  # on the diagonal: each pair once, none with itself
                    cosine[:, :n].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=x.device).tril(), -torch.inf)
                cells = cosine.view(n, -1, _CELL)
                across, down = cells.amax(2), cosine[:, : columns.stop - left].amax(0)
                torch.maximum(largest[rows], across.amax(1), out=largest[rows])
                torch.maximum(largest[columns], down, out=largest[columns])
                theirs = F.pad(reach[columns], (0, _COLUMNS - len(down)), value=-3).view(-1, _CELL)
                i, cell = torch.nonzero(1 - across < torch.maximum(own, theirs.amax(1)), as_tuple=True)
                distance = 1 - cells[i, cell]
                near, j = torch.nonzero(distance < torch.maximum(own[i], theirs[cell]), as_tuple=True)
                if len(near):
                    pairs = i[near] + start, cell[near] * _CELL + j + left, distance[near, j]
                    found.append([value.cpu().numpy() for value in (pairs[0].int(), pairs[1].int(), pairs[2])])
                bar.update(n * len(down))
    if not found:
        return largest, csr_array((k, k), dtype=reach.cpu().numpy().dtype)
    i, j, distance = (np.concatenate(values) for values in zip(*found, strict=True))
    found.clear()
    both = np.r_[i, j], np.r_[j, i]
    return largest, coo_array((np.r_[distance, distance], both), shape=(k, k)).tocsr()


@torch.no_grad()
@without_autocast
def _leaders(x: Tensor, near: csr_array, order: np.ndarray, eps: float) -> Int[np.ndarray, " k"]:
    """First fit in an order: for each prototype the rank of the representative that it joins, by its inner place.

    A representative takes its neighbors in the graph that are still free. What the graph lacks are pairs of two
    crowded prototypes, whose directions are x, the first rows: those are compared with the crowded representatives.
    """
    k, crowded, step = len(order), len(x), 1024
    free = k  # a rank larger than any
    rank, leader = np.empty(k, np.int64), np.full(k, free)
    rank[order] = np.arange(k)
    starts, others = near.indptr, near.indices
    alone = np.diff(starts) == 0
    alone[:crowded] = False
    leader[alone] = rank[alone]
    todo = order[~alone[order]]
    kept, kept_ranks = x[:0], np.empty(0, np.int64)
    for start in range(0, len(todo), step):
        block = todo[start : start + step]
        inside = block[block < crowded]
        if len(inside):
            here = x[torch.from_numpy(inside).to(x.device)]
            first = _first(here, kept, eps)
            leader[inside] = np.minimum(leader[inside], np.append(kept_ranks, free)[first])
            still = leader[inside] == free
            inside, here = inside[still], here[torch.from_numpy(still).to(x.device)]
            close = (1 - here @ here.T < eps).cpu().numpy()
        row, new = {node: i for i, node in enumerate(inside.tolist())}, []
        for node in block[leader[block] == free].tolist():
            if leader[node] < free:
                continue
            leader[node] = rank[node]
            reached = others[starts[node] : starts[node + 1]]
            if node < crowded:
                new.append(row[node])
                reached = np.concatenate([reached, inside[close[row[node]]]])
            leader[reached[leader[reached] == free]] = rank[node]
        if new:
            kept, kept_ranks = torch.cat([kept, here[new]]), np.append(kept_ranks, rank[inside[new]])
    return leader


def _first(x: Tensor, kept: Tensor, eps: float) -> Int[np.ndarray, " n"]:
    """For each row the first kept one within eps, or -1; most find theirs among the first few."""
    first, stop = np.full(len(x), -1), 0
    while stop < len(kept) and len(rest := np.flatnonzero(first < 0)):
        start, stop = stop, min(8 * stop + 64, len(kept))
        hit = _first_match(x[torch.from_numpy(rest).to(x.device)], kept[start:stop], eps)
        first[rest] = np.where(hit < 0, -1, hit + start)
    return first


@torch.no_grad()
@without_autocast
def _joined(x: Tensor, group: np.ndarray, eps: float) -> int:
    """Number of groups when the crowded prototypes x, the first of `group`, join those they are near to.

    Each is near to a representative, and two of them only where the angle between their representatives is at most
    what the farthest members of both and eps leave: the rest, most of it, is not compared.
    """
    unique = unique_prototypes(x, eps)
    part, size = unique.assignment.numpy(), unique.redundancy.numpy()
    first = unique.representatives.numpy()
    linked = coo_array((np.ones(len(x)), (group[: len(x)], group[first][part])), shape=(int(group.max()) + 1,) * 2)
    count, joined = connected_components(linked, directed=False)
    label = joined[group[first]]  # of each part; parts of one group have the same
    if (label == label[0]).all():
        return int(count)
    before, center = len(np.unique(label)), x[unique.representatives.to(x.device)]
    members = np.split(np.argsort(part, kind="stable"), np.cumsum(size)[:-1])
    radius = np.zeros(len(first))
    for start in range(0, len(x), 2**14):
        rows = slice(start, start + 2**14)
        cosine = (x[rows] * center[part[rows]]).sum(1).clamp(-1, 1)
        np.maximum.at(radius, part[rows], torch.arccos(cosine).cpu().numpy())
    radius += (np.arccos(1 - eps) + 2e-3) / 2  # 2e-3 for the rounding of angles near 0
    for start in range(0, len(center), 256):
        angle = torch.arccos((center[start : start + 256] @ center.T).clamp(-1, 1)).cpu().numpy()
        for m, row in enumerate(angle, start):
            near = np.flatnonzero(row < radius[m] + radius)
            near = near[(near > m) & (label[near] != label[m])]
            for some in np.split(near, np.flatnonzero(np.diff(np.cumsum(size[near]) // 2**14)) + 1):
                some = some[label[some] != label[m]]  # what an earlier piece has joined is done
                if len(some):
                    nodes = np.concatenate([members[n] for n in some])
                    reached = nodes[_within(x, nodes, members[m], eps)]
                    label[np.isin(label, label[part[reached]])] = label[m]
    return int(count) - before + len(np.unique(label))


def _within(x: Tensor, nodes: np.ndarray, others: np.ndarray, eps: float) -> Bool[np.ndarray, " n"]:
    """Which of the nodes are near to one of the others."""
    here, closest = x[nodes], x.new_full((len(nodes),), -torch.inf)
    step = max(1, 2**24 // len(nodes))
    for start in range(0, len(others), step):
        closest = torch.maximum(closest, (x[others[start : start + step]] @ here.T).amax(0))
    return (1 - closest < eps).cpu().numpy()
