"""Transfer: logistic regression on frozen features, its strength chosen without the test images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Int
from torch import Tensor

from prototypes_lib.data.datasets import DATASETS
from prototypes_lib.evaluate import logistic
from prototypes_lib.evaluate.features import Features, check
from prototypes_lib.evaluate.intervals import bootstrap, check_seed, wilson

LAMBDAS = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))  # the official grid
METRICS = ("top1", "mean_per_class")
PER_CLASS = ("aircraft", "caltech101", "flowers102", "pets")  # of the official code
METRIC: Mapping[str, str] = MappingProxyType({name: METRICS[name in PER_CLASS] for name in DATASETS})


@dataclass(frozen=True)
class Transfer:
    """Accuracy on the n test images in percent, of the classifier refitted with the chosen lambda (c = 1 / lambda).

    interval: 95 %, Wilson's for top-1, else by a bootstrap over test images. validation: accuracies that chose, one for
    each of `lambdas`. at_edge: the chosen one is the smallest or largest, so a wider grid might do better. converged:
    whether the final classifier reached its optimum; unconverged: how many of those that chose lambda did not.
    """

    accuracy: float
    interval: tuple[float, float]
    metric: str
    lam: float
    c: float
    lambdas: tuple[float, ...]
    validation: tuple[float, ...]
    at_edge: bool
    converged: bool
    unconverged: int
    n: int
    seed: int


def transfer(
    train: Features,
    test: Features,
    *,
    val: Features | None = None,
    folds: int | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    metric: str = "top1",
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Transfer:
    """Logistic regression min sum_i CE_i + lambda |W|^2 / 2 with the best of 45 lambdas (Ericsson et al. 2021).

    lambda is chosen by `metric` on `val`, or on a random fifth of the training images, or with `folds` by
    cross-validation (vMF: folds=5); the first of equals is taken. Then the classifier is fitted again to all images
    of train and val with the same lambda. Features are taken as they are, neither normalized nor standardized.

    Official validation images (Aircraft, DTD, Flowers) are `data.load(name, "val")`, with
    `data.load(name, "train-without-val")` for `train`; "train" there contains both. `prototypes evaluate transfer`
    takes them by default.

    Differences from the official code: it resizes the shorter side to 224 px and takes the central square of that, all
    of the shorter side, where `extract`, hence the command, takes 224 of 256 px as kNN does; the optimum of each lambda
    (`logistic`) where that stops after 100 iterations, reached or not; the fifth is drawn by torch, so it is another;
    and two classes have a weight vector each. vMF does not say how its folds are made: ours hold each class as evenly
    as can be, and the accuracy is of all images together, each predicted by the classifier that has not seen its fold.
    Classes that a classifier has not seen, such as a class of one image while it validates, count as missed; where it
    would have seen one class, that is the answer.

    Args:
        metric: "top1", or "mean_per_class" over the classes that have test images; METRIC has the official one.
        seed: of the fifth, the folds and the bootstrap.

    Raises:
        ValueError: features that `check` refuses, fewer than two classes, both val and folds, more folds than images,
            a lambda or metric that is none.
    """
    lambdas = tuple(float(lam) for lam in lambdas)
    check_options(val=val, folds=folds, lambdas=lambdas, metric=metric)
    check_seed(seed)
    check(train, test)
    if val is not None:
        check(train, val)
    n = len(train.x)
    if n < (folds or 2):
        raise ValueError(f"{n} training images cannot be cut into {folds or 2} parts; give more or fewer folds")
    cs = [1 / lam for lam in lambdas]
    options = {"device": device, "progress": progress}
    if val is not None:
        rounds = [(train, val)]
    else:
        part = _folds(train.labels, folds, seed) if folds else _fifth(n, seed)
        rounds = ((_of(train, part != i), _of(train, part == i)) for i in range(folds or 1))
    truth, predicted, unconverged = [], [], 0
    for seen, held_out in rounds:
        truth.append(held_out.labels)
        if bool((seen.labels == seen.labels[0]).all()):  # nothing to tell apart
            predicted.append(seen.labels[0].expand(len(cs), len(held_out.labels)))
            continue
        found = logistic.path(seen, cs, **options)
        unconverged += sum(not classifier.converged for classifier in found)
        predicted.append(torch.stack([classifier.predict(held_out.x) for classifier in found]))
    right, guesses = torch.cat(truth), torch.cat(predicted, dim=1)
    validation = tuple(accuracy(guess, right, metric) for guess in guesses)
    best = max(range(len(cs)), key=validation.__getitem__)

    everything = train
    if val is not None:
        everything = Features(torch.cat([train.x, val.x]), torch.cat([train.labels, val.labels]))
    classifier = logistic.fit(everything, c=cs[best], device=device)
    answers = torch.stack([classifier.predict(test.x), test.labels], dim=1)
    if metric == "top1":
        interval = wilson(int((answers[:, 0] == answers[:, 1]).sum()), len(answers))
    else:
        interval = bootstrap(answers, lambda rows: accuracy(rows[:, 0], rows[:, 1], metric), seed=seed)
    return Transfer(
        accuracy=accuracy(answers[:, 0], answers[:, 1], metric),
        interval=interval,
        metric=metric,
        lam=lambdas[best],
        c=cs[best],
        lambdas=lambdas,
        validation=validation,
        at_edge=lambdas[best] in (min(lambdas), max(lambdas)),
        converged=classifier.converged,
        unconverged=unconverged,
        n=len(answers),
        seed=seed,
    )


def check_options(
    *, val: Features | None = None, folds: int | None = None, lambdas: Sequence[float] = LAMBDAS, metric: str = "top1"
) -> None:
    """Raise ValueError, one line, for options that `transfer` would refuse: to be told before features are made."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: choose {' or '.join(map(repr, METRICS))}")
    if val is not None and folds is not None:
        raise ValueError("give validation images or folds, not both")
    if folds is not None and folds < 2:
        raise ValueError(f"folds={folds} must be at least 2")
    if not lambdas or not all(0 < lam < float("inf") for lam in lambdas):
        raise ValueError(f"lambdas={tuple(lambdas)} must be positive and at least one")


def accuracy(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], metric: str = "top1") -> float:
    """Percent that are right, of all images or as the mean over the classes among `labels`."""
    hits = (predicted == labels).double()
    if metric == "top1":
        return 100 * float(hits.mean())
    counts = labels.bincount()
    here = counts > 0
    return 100 * float((labels.bincount(hits)[here] / counts[here]).mean())


def _fifth(n: int, seed: int) -> Int[Tensor, " n"]:
    """0 for a random fifth of n, else 1."""
    part = torch.ones(n, dtype=torch.long)
    part[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, round(n / 5))]] = 0
    return part


def _folds(labels: Int[Tensor, " n"], folds: int, seed: int) -> Int[Tensor, " n"]:
    """The fold of each image: images in random order, class after class, are dealt out in turn."""
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    in_turn = mixed[labels[mixed].argsort(stable=True)]
    return torch.empty_like(mixed).scatter_(0, in_turn, torch.arange(len(labels)) % folds)


def _of(features: Features, chosen: Tensor) -> Features:
    return Features(features.x[chosen], features.labels[chosen])
