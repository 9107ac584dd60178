"""Weighted nearest-neighbor classification, the family's first question to a feature: who are your neighbors?"""

from dataclasses import dataclass

import torch

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
    rows = max(1, block // len(bank))
    right = dict.fromkeys(k, 0)
    for start in range(0, len(test.x), rows):
        queries = directions(test.x[start : start + rows].to(device))
        truth = test.labels[start : start + rows].to(device)
        with torch.autocast(bank.device.type, enabled=False):
            similarity, neighbors = (queries.to(bank.dtype) @ bank.T).topk(max(k), dim=-1)
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)  # against the nearest: no underflow
        voted = labels[neighbors]
        for count in k:
            votes = weight.new_zeros(len(queries), n_classes)
            votes.scatter_add_(1, voted[:, :count], weight[:, :count])
            right[count] += int((votes.argmax(-1) == truth).sum())
    n = len(test.x)
    return KNN(
        {count: 100 * hits / n for count, hits in right.items()},
        {count: wilson(hits, n) for count, hits in right.items()},
        n,
        temperature,
    )


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, in percent."""
    p, z2 = hits / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)
