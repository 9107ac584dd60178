"""Weighted nearest-neighbor classification, the family's first question to a feature: who are your neighbors?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prototypes_lib.evaluate.features import Features
from prototypes_lib.precision import directions


@dataclass(frozen=True)
class KNN:
    """Accuracy in percent for each k, with a 95 % Wilson interval over the n test images. `best` is the highest."""

    accuracy: dict[int, float]
    interval: dict[int, tuple[float, float]]
    n: int
    temperature: float

    @property
    def best(self) -> tuple[int, float]:
        """(k, accuracy) of the best k: chosen on the test images, as the papers do, so slightly optimistic."""
        k = max(self.accuracy, key=self.accuracy.__getitem__)
        return k, self.accuracy[k]


@torch.no_grad()
def knn(
    train: Features,
    test: Features,
    k: int | tuple[int, ...] = (10, 20, 100, 200),
    *,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    block: int = 2**26,
) -> KNN:
    """Weighted kNN: argmax_c sum over the k nearest of exp(cos / T) [label = c] (DINO, Wu et al. 2018).

    Differences from the official script, none of which moves a number on ImageNet: classes are counted from the
    labels instead of 1000, any number of test images works (the script fails below 100), and a k beyond the training
    set is an error. Weights are exp((cos - largest cos) / T), the same votes without over- or underflow.

    Args: features of any length (normalized here); k list; block: similarities held at a time.

    Raises:
        ValueError: k outside 1 .. number of training images, no test images, or a temperature that is not positive.
    """
    k = (k,) if isinstance(k, int) else tuple(k)
    if not k or min(k) < 1 or max(k) > len(train.x):
        raise ValueError(f"k={k} must lie between 1 and the {len(train.x)} training images")
    if not len(test.x):
        raise ValueError("kNN needs at least one test image")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    bank = directions(train.x.to(device))
    labels = train.labels.to(device)
    n_classes = int(max(labels.max(), test.labels.max())) + 1
    right = dict.fromkeys(k, 0)
    for rows, similarity, places in _blocks(test.x, bank, max(k), block):
        truth = test.labels[rows].to(device)
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)  # against the nearest: no underflow
        voted = labels[places]
        for count in k:
            votes = weight.new_zeros(len(truth), n_classes)
            votes.scatter_add_(1, voted[:, :count], weight[:, :count])
            right[count] += int((votes.argmax(-1) == truth).sum())
    n = len(test.x)
    return KNN(
        {count: 100 * hits / n for count, hits in right.items()},
        {count: wilson(hits, n) for count, hits in right.items()},
        n,
        temperature,
    )


@torch.no_grad()
def neighbors(
    queries: Float[Tensor, "n dim"], bank: Float[Tensor, "m dim"], k: int, block: int = 2**26
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Cosines and places in the bank of each query's k nearest vectors, the nearest first; vectors of any length.

    Raises ValueError where k lies outside 1 .. size of the bank.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} must lie between 1 and the {len(bank)} vectors of the bank")
    found = [(similarity, places) for _, similarity, places in _blocks(queries, directions(bank), k, block)]
    if not found:
        return bank.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=bank.device)
    return torch.cat([x for x, _ in found]), torch.cat([x for _, x in found])


def _blocks(queries: Tensor, bank: Tensor, k: int, block: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Queries, `block` similarities at a time in one piece of memory: their rows, largest cosines, places."""
    n = len(bank)
    size = 2 ** max(0, round(math.log2(n / k) / 2))  # of a group: as many in k groups as there are groups
    width = -(-n // size) * size
    step = max(1, min(block // n, len(queries)))
    made = bank.new_full((step, width), -torch.inf)  # the last group may have fewer
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        here = directions(queries[rows].to(bank.device)).to(bank.dtype)
        products = made[: len(here)]
        with torch.autocast(bank.device.type, enabled=False):
            torch.mm(here, bank.T, out=products[:, :n])
        yield rows, *_largest(products.unflatten(1, (-1, size)), k)


def _largest(groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, cut into groups: they lie in the k groups of the largest maxima, and few are those."""
    size = groups.shape[2]
    if size == 1:
        return groups.flatten(1).topk(k, dim=1)
    chosen = groups.amax(2).topk(min(k, groups.shape[1]), dim=1, sorted=False).indices
    candidates = groups.gather(1, chosen[:, :, None].expand(-1, -1, size)).flatten(1)
    values, places = candidates.topk(k, dim=1)
    return values, chosen.gather(1, places // size) * size + places % size


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, in percent."""
    p, z2 = hits / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)
