"""Accuracy where training images are many and where they are few: what a single top-1 hides on long-tailed data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prototypes_lib.evaluate import logistic
from prototypes_lib.evaluate.features import Features, check
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.knn import predict

NAMES = ("head", "medium", "tail")


@dataclass(frozen=True)
class Group:
    """Mean recall of a group of classes, in percent with a 95 % interval; nan for a group without classes.

    classes: how many with test images. n: their test images. counts: the fewest and the most training images of one.
    """

    accuracy: float
    interval: tuple[float, float]
    classes: int
    n: int
    counts: tuple[int, int]


@dataclass(frozen=True)
class LongTail:
    """In percent, with 95 % intervals over the n test images; means are over the `classes` that have test images.

    accuracy: share of images that are right (Wilson's interval). balanced: mean over classes of recall. macro_f1: mean
    over classes of F1. groups: head, medium and tail. recall: of each class index, nan without test images; counts: its
    training images. seed: of the bootstrap.
    """

    accuracy: float
    interval: tuple[float, float]
    balanced: float
    balanced_interval: tuple[float, float]
    macro_f1: float
    macro_f1_interval: tuple[float, float]
    groups: dict[str, Group]
    recall: tuple[float, ...]
    counts: tuple[int, ...]
    classes: int
    n: int
    seed: int

    def __str__(self) -> str:
        parts = [f"top-1 {self.accuracy:.2f} %", f"balanced {self.balanced:.2f} %", f"macro-F1 {self.macro_f1:.2f} %"]
        parts += [f"{name} {g.accuracy:.2f} % ({g.classes} classes)" for name, g in self.groups.items() if g.classes]
        return ", ".join(parts)


def long_tail(
    train: Features,
    test: Features,
    *,
    classifier: str = "knn",
    k: int = 20,
    temperature: float = 0.07,
    c: float = 1.0,
    groups: tuple[int, int] | str = (100, 20),
    draws: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> LongTail:
    """Classify the test images by what was learned from long-tailed training images, and score head and tail apart.

    classifier: "knn", with k and temperature, or "logistic", logistic regression with weight c on the errors; neither
    knows of the imbalance. There is no official protocol in the papers for this: groups are those of OLTR and of the
    long-tail literature after it (`scores`), and logistic regression stands for the linear classifier.

    Raises ValueError for features that `features.check` refuses, k beyond the training images, or an option unknown.
    """
    check(train, test)
    _bounds(groups)
    if classifier == "knn":
        predicted = predict(train, test.x, k, temperature, device=device, progress=progress)
    elif classifier == "logistic":
        predicted = logistic.fit(train, c=c, device=device).predict(test.x)
    else:
        raise ValueError(f"classifier={classifier!r}: choose 'knn' or 'logistic'")
    counts = torch.bincount(train.labels, minlength=int(test.labels.max()) + 1)
    return scores(predicted, test.labels, counts, groups=groups, draws=draws, seed=seed)


def scores(
    predicted: Int[Tensor, " n"],
    labels: Int[Tensor, " images"],
    counts: Int[Tensor, " classes"],
    *,
    groups: tuple[int, int] | str = (100, 20),
    draws: int = 1000,
    seed: int = 0,
) -> LongTail:
    """`LongTail` of any classifier's predictions; counts: training images of each class index, 0 where it has none.

    groups: (100, 20) puts classes of more than 100 training images in the head, of less than 20 in the tail, others
    between (Liu et al. 2019, OLTR, who also take the mean over classes); "thirds" cuts the classes, ordered by count
    (equal ones by index), in three parts of as equal size as can be, the larger ones first.

    Intervals are of a bootstrap stratified by class: each class's test images are drawn again among themselves, n_c - 1
    of them with replacement, which makes the variance of a class's recall unbiased also for few images (Rao and Wu
    1988); a class with a single test image adds none. What is drawn is the test set: the classifier stays.

    Raises ValueError, one line, for lengths that differ, unknown labels, a class without a count, bad groups, or fewer
    than 2 draws.
    """
    predicted, labels, counts = predicted.cpu(), labels.cpu(), counts.cpu()
    if len(predicted) != len(labels) or not len(labels):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} test images: give one each, and at least one")
    if int(labels.min()) < 0:
        raise ValueError(f"{int((labels < 0).sum())} test images have no label (-1); evaluate on labeled ones")
    if int(labels.max()) >= len(counts):
        raise ValueError(f"test images have classes up to {int(labels.max())}, counts are of {len(counts)}; pass zeros")
    if draws < 2:
        raise ValueError(f"draws={draws}: a bootstrap needs at least 2")
    parts = _parts(counts, labels, groups)
    n = len(labels)
    here = torch.bincount(labels, minlength=len(counts))  # test images a class
    present = here > 0
    recall, f1 = (values[0] for values in _by_class(torch.arange(n)[None], here, predicted, labels))
    drawn = [_by_class(*sample, predicted, labels) for sample in _stratified(labels, here, draws, seed)]
    recalls, f1s = (torch.cat(values) for values in zip(*drawn, strict=True))

    def mean(values: Tensor, draws: Tensor, of: Tensor) -> tuple[float, tuple[float, float]]:
        return float(values[of].mean()), _middle(draws[:, of].mean(1))

    found = {
        name: Group(*mean(recall, recalls, part), len(part), int(here[part].sum()), _ends(counts[part]))
        for name, part in zip(NAMES, parts, strict=True)
    }
    right = int((predicted == labels).sum())
    return LongTail(
        100 * right / n, wilson(right, n), *mean(recall, recalls, present), *mean(f1, f1s, present), found,
        tuple(recall.tolist()), tuple(counts.tolist()), int(present.sum()), n, seed,
    )  # fmt: skip


def _by_class(
    rows: Int[Tensor, "draws m"], sizes: Int[Tensor, " classes"], predicted: Tensor, labels: Tensor
) -> tuple[Float[Tensor, "draws classes"], Float[Tensor, "draws classes"]]:
    """Recall, hits / images, and F1, 2 hits / (images + predictions), of each class in percent; nan without images."""
    told, truth, classes = predicted[rows], labels[rows], len(sizes)
    told = torch.where((told >= 0) & (told < classes), told, classes)  # another class than any with a count

    def count(of: Tensor) -> Tensor:
        place = of + (classes + 1) * torch.arange(len(of))[:, None]
        return torch.bincount(place.flatten(), minlength=len(of) * (classes + 1)).view(len(of), -1)[:, :classes]

    hits, named = count(torch.where(told == truth, truth, classes)).double(), count(told)
    return 100 * hits / sizes, torch.where(sizes > 0, 200 * hits / (sizes + named), math.nan)


def _stratified(labels: Tensor, here: Tensor, draws: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of test sets with n_c - 1 images of each class (at least one), some draws at a time, and these numbers."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.argsort(labels, stable=True)
    sizes = (here - 1).clamp_min(1) * (here > 0)
    of = torch.repeat_interleave(torch.arange(len(here)), sizes)  # the class of each drawn row
    starts, available = (torch.cumsum(here, 0) - here)[of], here[of]
    most = max(1, 2**22 // max(len(of), len(here)))
    for start in range(0, draws, most):
        some = (min(most, draws - start), len(of))
        place = (torch.rand(some, generator=generator, dtype=torch.float64) * available).long()
        yield order[starts + place], sizes


def _middle(values: Float[Tensor, " draws"]) -> tuple[float, float]:
    """Where the middle 95 % of the values lie; nan where they are nan."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _bounds(groups: tuple[int, int] | str) -> None:
    pair = isinstance(groups, tuple) and len(groups) == 2 and groups[0] >= groups[1] >= 0
    if groups != "thirds" and not pair:
        raise ValueError(f"groups={groups!r}: choose 'thirds' or (most, least), head above most and tail below least")


def _parts(counts: Tensor, labels: Tensor, groups: tuple[int, int] | str) -> list[Tensor]:
    """Indices of the classes in head, medium and tail, of those that have test images."""
    _bounds(groups)
    classes = labels.unique()
    if groups == "thirds":
        order = classes[torch.argsort(counts[classes], descending=True, stable=True)]
        return [torch.sort(part).values for part in torch.tensor_split(order, 3)]
    many, few = counts[classes] > groups[0], counts[classes] < groups[1]
    return [classes[many], classes[~many & ~few], classes[few]]


def _ends(counts: Tensor) -> tuple[int, int]:
    return (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
