"""The nearest vectors of a bank, exact, in pieces that fit in memory: of the queries always, of the bank if need be."""

import math
import sys
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.precision import directions, wide

NORMALIZE = (True, False, "centered")
METRICS = ("dot", "euclidean")

Found = tuple[slice, Tensor, Tensor]  # rows of the queries; their k scores, the largest first; places in the bank


@torch.no_grad()
def neighbors(
    queries: Float[Tensor, "n dim"], bank: Float[Tensor, "m dim"], k: int, block: int = 2**26
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Cosines and places in the bank of each query's k nearest vectors, the nearest first; vectors of any length.

    Raises ValueError where k lies outside 1 .. size of the bank.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} must lie between 1 and the {len(bank)} vectors of the bank")
    found = [(score, places) for _, score, places in search(queries, bank, k, device=bank.device, block=block)]
    if not found:
        return bank.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=bank.device)
    return torch.cat([x for x, _ in found]), torch.cat([x for _, x in found])


@torch.no_grad()
def search(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    normalize: bool | str = True,
    metric: str = "dot",
    device: str | torch.device = "cpu",
    block: int = 2**26,
    held: int | None = None,
    progress: bool = False,
) -> Iterator[Found]:
    """Blocks of queries with the scores and places of their k nearest, on the device.

    normalize, metric, block, held: as `knn` says. A score is the inner product, or minus the distance.
    """
    n, euclidean = len(bank), metric == "euclidean"
    prepare = _preparation(bank, normalize, euclidean, device)
    if held is None:
        cuda = torch.device(device).type == "cuda"
        held = torch.cuda.mem_get_info(device)[0] // 2 if cuda else 2**30
    part = max(1, held // (bank.shape[1] * torch.promote_types(bank.dtype, torch.float32).itemsize))
    starts = range(0, n, part)
    with tqdm(
        total=len(starts) * len(queries), desc="kNN", unit=" images", file=sys.stdout, delay=5, mininterval=5,
        ascii=True, disable=not progress,
    ) as bar:  # fmt: skip
        if len(starts) == 1:
            for rows, score, places in _blocks(queries, prepare(bank), k, block, prepare, euclidean):
                bar.update(len(places))
                yield rows, score, places
            return
        best, at = None, torch.zeros(len(queries), k, dtype=torch.long)
        for start in starts:
            here = prepare(bank[start : start + part])
            best = here.new_full((len(queries), k), -torch.inf, device="cpu") if best is None else best
            for rows, score, places in _blocks(queries, here, min(k, len(here)), block, prepare, euclidean):
                score = torch.cat([best[rows].to(device), score], dim=1)  # of equal ones the earlier first, as it may
                places = torch.cat([at[rows].to(device), places + start], dim=1)
                score, order = score.topk(k, dim=1)
                best[rows], at[rows] = score.cpu(), places.gather(1, order).cpu()
                bar.update(len(places))
    for start in range(0, len(queries), 4096):
        rows = slice(start, min(start + 4096, len(queries)))
        yield rows, best[rows].to(device), at[rows].to(device)


def _preparation(
    bank: Tensor, normalize: bool | str, euclidean: bool, device: str | torch.device
) -> Callable[[Tensor], Tensor]:
    """What is done to features before they are compared, on the device."""
    if normalize and normalize != "centered":
        return lambda x: directions(x.to(device))
    if not normalize and not euclidean:
        return lambda x: wide(x.to(device))
    total, step = 0, max(1, 2**24 // bank.shape[1])
    for start in range(0, len(bank), step):
        total = total + bank[start : start + step].double().sum(0)
    mean = (total / len(bank)).to(device, torch.promote_types(bank.dtype, torch.float32))
    if not normalize:  # distances are the same from anywhere, and lose the fewest digits from the middle
        return lambda x: wide(x.to(device)) - mean
    return lambda x: directions(wide(x.to(device)) - mean)


def _blocks(
    queries: Tensor, bank: Tensor, k: int, block: int, prepare: Callable[[Tensor], Tensor], euclidean: bool
) -> Iterator[Found]:
    """Queries, `block` similarities at a time in one piece of memory, against a prepared bank."""
    n, dim = bank.shape
    size = 2 ** max(0, round(math.log2(n / k) / 2))  # of a group: as many in k groups as there are groups
    width = -(-n // size) * size
    step = max(1, min(block // (max(n, k * dim) if euclidean else n), len(queries)))
    made = bank.new_full((step, width), -torch.inf)  # the last group may have fewer
    shift = bank.square().sum(1) / -2 if euclidean else None  # -|q - x|^2 = 2 (<q, x> - |x|^2 / 2) - |q|^2
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        here = prepare(queries[rows]).to(bank.dtype)
        products = made[: len(here)]
        with torch.autocast(bank.device.type, enabled=False):
            if shift is None:
                torch.mm(here, bank.T, out=products[:, :n])
            else:
                torch.addmm(shift, here, bank.T, out=products[:, :n])
        score, places = _largest(products.unflatten(1, (-1, size)), k)
        if euclidean:
            score, order = torch.linalg.vector_norm(bank[places] - here[:, None], dim=-1).neg().sort(descending=True)
            places = places.gather(1, order)
        yield rows, score, places


def _largest(groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, cut into groups: they lie in the k groups of the largest maxima, and few are those."""
    size = groups.shape[2]
    if size == 1:
        return groups.flatten(1).topk(k, dim=1)
    chosen = groups.amax(2).topk(min(k, groups.shape[1]), dim=1, sorted=False).indices
    candidates = groups.gather(1, chosen[:, :, None].expand(-1, -1, size)).flatten(1)
    values, places = candidates.topk(k, dim=1)
    return values, chosen.gather(1, places // size) * size + places % size
