"""Two figures of prototypes: kNN accuracy by their precision (vMF, Fig. 2), data by their redundancy (PPC, Fig. 2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prototypes_lib import checkpoints, collapse
from prototypes_lib.evaluate.clusters import Score, prototype_assignments, score_of
from prototypes_lib.evaluate.features import Features
from prototypes_lib.evaluate.intervals import bootstrap, wilson
from prototypes_lib.evaluate.knn import predict


@dataclass(frozen=True)
class Precision:
    """kNN accuracy of the images between percentiles of the precision of their prototypes (vMF, Fig. 2).

    percentiles: edges of the ranges, from 0 to 100 (bins + 1). For each range: accuracy in percent with Wilson's 95 %
    interval, nan where it has no image; n, its images; kappa, their least and largest precision, nan without any.
    overall: accuracy of all images. trend: Spearman's rank correlation of an image's kappa with being right, with a
    95 % bootstrap interval; nan where all are of one precision, or all right or wrong. seed: of the bootstrap.
    """

    percentiles: tuple[float, ...]
    accuracy: tuple[float, ...]
    interval: tuple[tuple[float, float], ...]
    n: tuple[int, ...]
    kappa: tuple[tuple[float, float], ...]
    overall: float
    trend: float
    trend_interval: tuple[float, float]
    seed: int


def precision(
    train: Features,
    test: Features,
    kappa: Float[Tensor, " n"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    bins: int | Sequence[float] = 10,
    draws: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Precision:
    """`by_precision` of weighted kNN; kappa: the precision |w| / tau of each test image's prototype.

    Raises ValueError as `evaluate.knn` for features and k, and as `by_precision`.
    """
    if len(kappa) != len(test.x):
        raise ValueError(f"{len(kappa)} precisions of {len(test.x)} test images: give one each")
    hit = predict(train, test.x, k, temperature, device=device, progress=progress) == test.labels
    return by_precision(hit, kappa, bins=bins, draws=draws, seed=seed)


def by_precision(
    hit: Bool[Tensor, " n"],
    kappa: Float[Tensor, " images"],
    *,
    bins: int | Sequence[float] = 10,
    draws: int = 1000,
    seed: int = 0,
) -> Precision:
    """Accuracy of any classifier between percentiles of kappa; bins: how many ranges of equal width, or their edges.

    The paper says neither how many ranges there are nor what becomes of images of one prototype, whose kappa is one. We
    never part them: an image's percentile is the middle one of all images with its kappa, so with few prototypes ranges
    differ in size and may be empty.

    Raises ValueError for lengths that differ, no images, a kappa that is not finite, or edges that do not rise from 0
    to 100.
    """
    if len(hit) != len(kappa) or not len(hit):
        raise ValueError(f"{len(kappa)} precisions of {len(hit)} images: give one each, and at least one")
    if not bool(kappa.isfinite().all()):
        raise ValueError(f"{int((~kappa.isfinite()).sum())} precisions are not finite")
    if isinstance(bins, int) and bins < 1:
        raise ValueError(f"bins={bins}: take at least one range of percentiles")
    bins = [100 * i / bins for i in range(bins + 1)] if isinstance(bins, int) else list(bins)
    edges = torch.tensor(bins, dtype=torch.float64)
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 100 or not bool((edges.diff() > 0).all()):
        raise ValueError(f"bins={bins}: edges rise from 0 to 100")
    hit, kappa, n = hit.cpu(), kappa.cpu(), len(hit)
    if kappa.max() - kappa.min() <= 1e-5 * kappa.abs().max():  # unit prototypes differ by rounding only
        kappa = kappa[:1].expand(n)
    percentile = 100 * (_ranks(kappa) + 0.5) / n
    place = torch.bucketize(percentile + 1e-9, edges[1:-1], right=True)  # what is on an edge belongs above it
    parts = [place == i for i in range(len(edges) - 1)]
    right = [int(hit[part].sum()) for part in parts]
    sizes = [int(part.sum()) for part in parts]
    none = (math.nan, math.nan)
    pairs = torch.stack([percentile, hit.double()], 1)
    trend = _correlation(pairs)
    return Precision(
        tuple(edges.tolist()),
        tuple(100 * h / m if m else math.nan for h, m in zip(right, sizes, strict=True)),
        tuple(wilson(h, m) if m else none for h, m in zip(right, sizes, strict=True)),
        tuple(sizes),
        tuple((float(kappa[p].min()), float(kappa[p].max())) if bool(p.any()) else none for p in parts),
        100 * sum(right) / n, trend, bootstrap(pairs, _correlation, draws=draws, seed=seed), seed,
    )  # fmt: skip


def _ranks(x: Tensor) -> Tensor:
    """Rank of each value from 0 on, equal ones at the middle of theirs."""
    _, of, counts = x.unique(return_inverse=True, return_counts=True)
    return (torch.cumsum(counts, 0) - counts + (counts - 1) / 2).double()[of]


def _correlation(pairs: Tensor) -> float:
    """Pearson's, nan where one of the two does not vary; of ranks and a yes or no it is Spearman's."""
    x, y = (pairs - pairs.mean(0)).T
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float(x @ y) / scale if scale > 1e-9 else math.nan


@dataclass(frozen=True)
class RedundancyShare:
    """How the data lie on unique prototypes of each redundancy factor (PPC, Fig. 2); one entry a factor, rising.

    factor: r, copies of a prototype, itself included. prototypes: how many unique ones have so many. share: percent of
    the images on all of them. average: percent of the images on one of them, share / prototypes, and its 95 % interval
    over images. trend: Spearman's rank correlation over the unique prototypes of r with the images they have, nan
    where one of the two does not vary. m, k: unique and all prototypes. n: images.
    """

    factor: tuple[int, ...]
    prototypes: tuple[int, ...]
    share: tuple[float, ...]
    average: tuple[float, ...]
    interval: tuple[tuple[float, float], ...]
    trend: float
    m: int
    k: int
    n: int


def redundancy_share(assigned: Int[Tensor, " n"], unique: collapse.UniquePrototypes) -> RedundancyShare:
    """The share of data on unique prototypes by their redundancy; assigned: each image's unique prototype, 0 .. M - 1.

    As in PPC, Fig. 2, images are to be assigned anew with only the unique prototypes competing: `prototype_assignments`
    with only=unique.representatives. The figure's grouping of factors is not told; here every factor stands by itself.

    Raises ValueError, one line, without images or for numbers outside 0 .. M - 1.
    """
    if not len(assigned) or int(assigned.min()) < 0 or int(assigned.max()) >= unique.count:
        raise ValueError(
            f"{len(assigned)} images must be assigned to the {unique.count} unique prototypes, numbered from 0; assign "
            "them anew with only=unique.representatives"
        )
    n, r = len(assigned), unique.redundancy.cpu()
    held = torch.bincount(assigned.cpu(), minlength=unique.count)
    factor, of, prototypes = r.unique(return_inverse=True, return_counts=True)
    images = torch.zeros_like(factor).index_add_(0, of, held)
    found = [(int(h), int(m), wilson(int(h), n)) for h, m in zip(images, prototypes, strict=True)]
    return RedundancyShare(
        tuple(factor.tolist()),
        tuple(prototypes.tolist()),
        tuple(100 * h / n for h, _, _ in found),
        tuple(100 * h / n / m for h, m, _ in found),
        tuple((low / m, high / m) for _, m, (low, high) in found),
        _correlation(torch.stack([_ranks(r), _ranks(held)], 1)),
        unique.count, len(unique.assignment), n,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- from a run folder


def precision_of_run(
    path: str | Path,
    train: Features,
    test: Features,
    *,
    network: str = "teacher",
    score: Score | None = None,
    **options,
) -> Precision:
    """`precision` of a run: each test image's prototype is the one of its largest score, kappa that one's length.

    features: of the run's backbone (`checkpoints.load_backbone`) as `features.extract` makes them by default. network:
    "teacher" or "student". score: by default `clusters.score_of` the run. options: of `precision`. kappa is |w| here,
    as in the figure's caption, not |w| / tau: percentiles are the same.

    Raises what `checkpoints.load_network`, `clusters.prototype_assignments` and `precision` do.
    """
    whole = checkpoints.load_network(path, network)
    assigned = prototype_assignments(whole, test, score or score_of(path, network), device=options.get("device", "cpu"))
    return precision(train, test, whole.prototypes.w.detach().norm(dim=1)[assigned], **options)


def redundancy_of_run(
    path: str | Path,
    features: Features,
    *,
    network: str = "teacher",
    eps: float = 0.025,
    score: Score | None = None,
    device: str | torch.device = "cpu",
) -> RedundancyShare:
    """`redundancy_share` of a run on images whose features are its backbone's (training images in PPC, Fig. 2).

    Which network the paper looks at is not told; eps: the cosine distance below which prototypes are copies.

    Raises what `checkpoints.load_network`, `clusters.prototype_assignments` and `collapse.unique_prototypes` do.
    """
    whole = checkpoints.load_network(path, network)
    if whole.prototypes is None:
        raise ValueError(f"{path}: this method has no prototypes (SimDINO, for example)")
    unique = collapse.unique_prototypes(whole.prototypes.w.detach(), eps)
    only = unique.representatives
    assigned = prototype_assignments(whole, features, score or score_of(path, network), only=only, device=device)
    return redundancy_share(assigned, unique)
