"""Weighted nearest-neighbor classification, the family's first question to a feature: who are your neighbors?

A protocol is how features are prepared (`normalize`), what is near (`metric`), how many vote (`k`) and with what weight
(`weights`, `temperature`). The defaults are DINO's; knn_protocols.py puts the others beside them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from prototypes_lib.evaluate.features import Features, check
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.nearest import METRICS, NORMALIZE, Found, neighbors, search

__all__ = ["KNN", "Vote", "knn", "neighbors", "predict"]

WEIGHTS = ("exp", "softmax", "uniform", "inverse")


@dataclass(frozen=True)
class Vote:
    """How many neighbors vote, and with what weight for a score s.

    weights: "exp", exp(s / T); "softmax", the same divided by its sum over the k (DINOv2: over the largest k asked for;
    one winner in either); "uniform", 1; "inverse", 1 / (1e-5 + distance).
    """

    k: int
    temperature: float = 0.07
    weights: str = "exp"


@dataclass(frozen=True)
class KNN:
    """Accuracy in percent for each k, with a 95 % Wilson interval over the n test images. `best` is the highest."""

    accuracy: dict[int, float]
    interval: dict[int, tuple[float, float]]
    n: int
    temperature: float
    weights: str = "exp"
    normalize: bool | str = True
    metric: str = "dot"

    @property
    def best(self) -> tuple[int, float]:
        """(k, accuracy) of the best k: chosen on the test images, as the papers do, so slightly optimistic."""
        k = max(self.accuracy, key=self.accuracy.__getitem__)
        return k, self.accuracy[k]


def knn(
    train: Features,
    test: Features,
    k: int | np.integer | Sequence[int | np.integer] = (10, 20, 100, 200),
    *,
    temperature: float = 0.07,
    weights: str = "exp",
    normalize: bool | str = True,
    metric: str = "dot",
    device: str | torch.device = "cpu",
    block: int = 2**26,
    held: int | None = None,
    progress: bool = True,
) -> KNN:
    """Weighted kNN: argmax_c sum over the k nearest of exp(cos / T) [label = c] (DINO, Wu et al. 2018).

    Differences from the official script, none of which moves a number on ImageNet: classes are counted from the
    labels instead of 1000, any number of test images works (the script fails below 100), and a k beyond the training
    set is an error. Weights are exp((cos - largest cos) / T), the same votes without over- or underflow. Of classes
    with equal votes the first wins.

    Args:
        k: numbers of neighbors; one search for all.
        temperature: T, of "exp" and "softmax".
        weights: "exp", "softmax" (DINOv2), "uniform" or "inverse", as `Vote` says; "inverse" of euclidean only.
        normalize: True, to unit length; False, as they are; "centered", to unit length once the mean of the training
            features is taken off.
        metric: "dot", the score s is the inner product, a cosine where normalized; "euclidean", minus the distance.
        block: similarities held at a time.
        held: bytes of prepared training features held at a time, 1 GiB or half of what a GPU has free: a larger bank,
            memory-mapped say, is read in parts, each once.
        progress: a text bar, for what takes longer than 5 s.

    Raises:
        ValueError: features that `features.check` refuses, k outside 1 .. number of training images, a temperature that
            is not positive, or a choice that is none of these.
    """
    votes = [Vote(int(count), temperature, weights) for count in ((k,) if isinstance(k, Integral) else k)]
    check(train, test)
    hits = correct(train, test, votes, normalize, metric, device=device, block=block, held=held, progress=progress)
    found, n = dict(zip((vote.k for vote in votes), hits, strict=True)), len(test.x)
    return KNN(
        {count: 100 * right / n for count, right in found.items()},
        {count: wilson(right, n) for count, right in found.items()},
        n, temperature, weights, normalize, metric,
    )  # fmt: skip


def predict(
    train: Features,
    test_x: Shaped[Tensor, "n dim"],
    k: int = 20,
    temperature: float = 0.07,
    *,
    weights: str = "exp",
    normalize: bool | str = True,
    metric: str = "dot",
    device: str | torch.device = "cpu",
    block: int = 2**26,
    held: int | None = None,
    progress: bool = True,
) -> Int[Tensor, " n"]:
    """The class that `knn` gives each row of test_x, on the CPU; arguments and refusals are `knn`'s."""
    check(train, Features(test_x, torch.zeros(len(test_x), dtype=torch.long)))
    votes = [Vote(k, temperature, weights)]
    machine = {"device": device, "block": block, "held": held, "progress": progress}
    return torch.cat([labels[0].cpu() for _, labels in _elected(train, test_x, votes, normalize, metric, **machine)])


def correct(
    train: Features, test: Features, votes: Sequence[Vote], normalize: bool | str, metric: str, **machine
) -> list[int]:
    """How many test images each vote gets right, all from one search; machine: the last arguments of `knn`."""
    right = [0] * len(votes)
    for rows, labels in _elected(train, test.x, votes, normalize, metric, **machine):
        truth = test.labels[rows].to(labels[0].device)
        for i, elected in enumerate(labels):
            right[i] += int((elected == truth).sum())
    return right


def _elected(
    train: Features, test_x: Tensor, votes: Sequence[Vote], normalize: bool | str, metric: str, **machine
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of test_x with the labels that each vote elects."""
    if not votes:
        raise ValueError("k: give at least one number of neighbors")
    for vote in votes:
        check_vote(vote, len(train.x), normalize, metric)
    device, largest = machine["device"], max(vote.k for vote in votes)
    classes, ballots = train.labels.to(device).unique(return_inverse=True)
    for found in search(test_x, train.x, largest, normalize=normalize, metric=metric, **machine):
        for rows, score, places in _split(found, max(1, machine["block"] // len(classes))):
            weight = {(v.temperature, v.weights): _weights(score, v.temperature, v.weights) for v in votes}
            voted, labels = ballots[places], []
            for vote in votes:
                counted = score.new_zeros(len(score), len(classes))
                counted.scatter_add_(1, voted[:, : vote.k], weight[vote.temperature, vote.weights][:, : vote.k])
                labels.append(classes[counted.argmax(-1)])
            yield rows, labels


def _weights(score: Tensor, temperature: float, weights: str) -> Tensor:
    if weights == "exp":
        return torch.exp((score - score[:, :1]) / temperature)  # against the nearest: no underflow
    if weights == "softmax":
        return torch.softmax(score / temperature, dim=1)
    return torch.ones_like(score) if weights == "uniform" else 1 / (1e-5 - score)


def _split(found: Found, most: int) -> Iterator[Found]:
    """A block of queries in blocks of at most so many: votes of thousands of classes are wider than neighbors."""
    rows, score, places = found
    for start in range(0, len(score), most):
        part = slice(start, min(start + most, len(score)))
        yield slice(rows.start + part.start, rows.start + part.stop), score[part], places[part]


def check_vote(vote: Vote, n: int, normalize: bool | str, metric: str) -> None:
    """Raise ValueError, one line, for a vote that n training images cannot hold or that is none of ours."""
    if not 1 <= vote.k <= n:
        raise ValueError(f"k={vote.k} must lie between 1 and the {n} training images")
    if not vote.temperature > 0:
        raise ValueError(f"temperature={vote.temperature} must be positive")
    for name, value, known in (
        ("weights", vote.weights, WEIGHTS), ("normalize", normalize, NORMALIZE), ("metric", metric, METRICS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")
    if vote.weights == "inverse" and metric != "euclidean":
        raise ValueError("weights='inverse' are of distances: take metric='euclidean'")
