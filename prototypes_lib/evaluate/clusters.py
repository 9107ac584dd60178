"""Prototypes as clusters: how far their partition of the images is the partition into classes, and what names do.

An image belongs to the prototype of its largest score. Nothing here is trained; labels are looked at afterwards.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from prototypes_lib import scores
from prototypes_lib.evaluate.features import Features
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.learner import Network

Score = Callable[[Tensor, Tensor], Tensor]  # unit codes (n, dim) and prototypes (K, dim) to log-scores (n, K)


@dataclass(frozen=True)
class Clusters:
    """How clusters and classes agree, over n images in `used` of k clusters and in `classes` classes.

    nmi: mutual information over the mean of both entropies, in [0, 1]. ari, fmi: the adjusted Rand index, 0 by chance
    and 1 at best, and the Fowlkes-Mallows index, of pairs of images. accuracy: images in percent whose cluster is
    matched to their class, one cluster a class, by the best such matching (Hungarian method). purity: the same with as
    many clusters a class as like to, each to its majority. Intervals of 95 %, as `clusters` says; seed: theirs.
    """

    nmi: float
    nmi_interval: tuple[float, float]
    ari: float
    ari_interval: tuple[float, float]
    fmi: float
    fmi_interval: tuple[float, float]
    accuracy: float
    interval: tuple[float, float]
    purity: float
    purity_interval: tuple[float, float]
    k: int
    used: int
    classes: int
    n: int
    seed: int


def clusters(
    assigned: Int[Tensor, " n"],
    labels: Int[Tensor, " images"],
    *,
    k: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Clusters:
    """Agreement of a clustering with classes; k: how many clusters there could be (default: those that have images).

    NMI, of arithmetic mean, ARI, FMI and accuracy are those of iBOT's table of unsupervised classification. With more
    clusters than classes a matching leaves some without a class and its images count as wrong: accuracy is at most what
    the largest cluster of each class holds. Purity has no such limit; like NMI it rises with the number of clusters
    whatever they hold (n clusters of one image have purity 100 %), so compare at equal k and n. ARI does not.

    Intervals: accuracy and purity are Wilson's with the matching as it is; the others are of a bootstrap over images.
    Drawing images again repeats some, which raises the agreement of small clusters, so the draws' distances from their
    own mean are laid around the value; with many small clusters they are wider than they need be.

    Raises ValueError, one line, for lengths that differ, no images, unknown labels, or clusters outside 0 .. k - 1.
    """
    assigned, labels = assigned.cpu(), labels.cpu()
    if len(assigned) != len(labels) or not len(labels):
        raise ValueError(f"{len(assigned)} assignments of {len(labels)} images: give one each, and at least one")
    if int(labels.min()) < 0:
        raise ValueError(f"{int((labels < 0).sum())} images have no label (-1); take labeled ones")
    if int(assigned.min()) < 0 or (k is not None and int(assigned.max()) >= k):
        raise ValueError(f"clusters {int(assigned.min())} to {int(assigned.max())} must lie between 0 and k - 1, k={k}")
    if draws < 2:
        raise ValueError(f"draws={draws}: a bootstrap needs at least 2")
    rows, columns, cells = _table(assigned, labels)
    n, n_rows, n_columns = len(labels), int(rows.max()) + 1, int(columns.max()) + 1

    def agreement(cells: Tensor) -> Tensor:
        return _agreement(rows, columns, cells, n_rows, n_columns)

    found = agreement(cells)
    drawn = torch.cat([agreement(some) for some in _drawn(cells, draws, seed)])
    tails = found + (drawn - drawn.mean(0)).quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=0)
    tails = torch.maximum(tails, torch.tensor([0, -0.5, 0], dtype=tails.dtype)).clamp_max(1)
    pairs = [(float(value), (float(low), float(high))) for value, low, high in zip(found, *tails, strict=True)]

    table = torch.zeros(n_rows, n_columns, dtype=torch.int32)
    table[rows, columns] = cells.int()
    best = linear_sum_assignment(table.numpy(), maximize=True)
    matched, majority = int(table.numpy()[best].sum()), int(table.amax(1).sum())
    return Clusters(
        *(part for pair in pairs for part in pair),
        100 * matched / n, wilson(matched, n), 100 * majority / n, wilson(majority, n),
        n_rows if k is None else k, n_rows, n_columns, n, seed,
    )  # fmt: skip


def _table(assigned: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The contingency table's cells that are not empty: row (cluster) and column (class), renumbered, and count."""
    rows, columns = assigned.unique(return_inverse=True)[1], labels.unique(return_inverse=True)[1]
    width = int(columns.max()) + 1
    cells, counts = (rows * width + columns).unique(return_counts=True)
    return cells // width, cells % width, counts


def _drawn(cells: Tensor, draws: int, seed: int) -> Iterator[Int[Tensor, "some cells"]]:
    """The counts of n images drawn again, some draws at a time: only how many of each cell there are matters."""
    n, generator = int(cells.sum()), torch.Generator().manual_seed(seed)
    of = torch.repeat_interleave(torch.arange(len(cells)), cells)
    most = max(1, 2**22 // n)
    for start in range(0, draws, most):
        some = min(most, draws - start)
        rows = of[torch.randint(n, (some, n), generator=generator)] + len(cells) * torch.arange(some)[:, None]
        yield torch.bincount(rows.flatten(), minlength=some * len(cells)).view(some, len(cells))


def _agreement(
    rows: Tensor, columns: Tensor, cells: Int[Tensor, "*draws cells"], n_rows: int, n_columns: int
) -> Float[Tensor, "*draws 3"]:
    """NMI, ARI and FMI of contingency tables, in float64."""
    x = cells.double()
    a = x.new_zeros(*x.shape[:-1], n_rows).index_add_(-1, rows, x)
    b = x.new_zeros(*x.shape[:-1], n_columns).index_add_(-1, columns, x)
    n = x.sum(-1)

    def entropy(counts: Tensor) -> Tensor:
        return n.log() - torch.xlogy(counts, counts).sum(-1) / n

    def pairs(counts: Tensor) -> Tensor:
        return (counts * (counts - 1)).sum(-1) / 2

    either, mean = entropy(a) + entropy(b), (entropy(a) + entropy(b)) / 2
    nmi = torch.where(mean > 1e-12, (either - entropy(x)).clamp_min(0) / mean, 1.0)  # one cluster and one class: equal
    together, in_a, in_b = pairs(x), pairs(a), pairs(b)
    expected, most = in_a * in_b / pairs(n[..., None]).clamp_min(1), (in_a + in_b) / 2
    ari = torch.where(most > expected, (together - expected) / (most - expected), 1.0)  # no pairs, or all of them
    fmi = torch.where(together > 0, together / (in_a * in_b).sqrt(), 0.0)
    return torch.stack([nmi, ari, fmi], -1)


# --------------------------------------------------------------------------------- prototypes of a run


def score_of(path: str | Path, network: str = "teacher") -> Score:
    """The score of a run's method with its last temperature, without centering, to be asked for (codes, prototypes).

    The temperature matters for vMF only: elsewhere it moves no argmax. Raises FileNotFoundError where the folder holds
    no run, ValueError for a score that is none of `scores`.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no run folder: it has no config.json")
    method = json.loads((path / "config.json").read_text())["method"]
    told, tau = method["score"], method["student_temp" if network == "student" else "teacher_temp"]
    options = {} if isinstance(told, str) else {key: v for key, v in told.items() if key not in ("name", "args")}
    name = (told if isinstance(told, str) else told["name"]).removeprefix("scores.")
    if name not in ("dot", "cosine", "vmf"):
        raise ValueError(f"{path}: the method's score {name!r} is none of scores (dot, cosine, vmf); pass your own")
    return functools.partial(getattr(scores, name), tau=tau["end"] if isinstance(tau, dict) else tau, **options)


@torch.no_grad()
def prototype_assignments(
    network: Network,
    features: Features,
    score: Score,
    *,
    only: Int[Tensor, " m"] | None = None,
    device: str | torch.device = "cpu",
    block: int = 2**26,
) -> Int[Tensor, " n"]:
    """argmax_k score(y, w_k) of each image, y the projector's code of its class token (vMF, section 5.2).

    Args:
        network: of `checkpoints.load_network`. features: of its backbone, as `features.extract` makes them by default.
        score: `score_of` the run, or any function of codes and prototypes, one of `scores` with its temperature bound.
        only: indices of prototypes that compete (PPC, Fig. 2: the unique ones); the result then counts among them.
        block: scores held at a time.

    Raises ValueError for a network without prototypes, or features of another length than its backbone's.
    """
    if network.prototypes is None:
        raise ValueError("this network has no prototypes to assign images to (SimDINO, for example)")
    if features.x.shape[1] != network.backbone.dim:
        raise ValueError(
            f"features have {features.x.shape[1]} dimensions, the network's backbone {network.backbone.dim}: "
            "extract them with it (blocks=1, pool=False)"
        )
    home, was_training = network.prototypes.weight_v.device, network.training
    network.eval().to(device)
    w = network.prototypes.w if only is None else network.prototypes.w[only.to(device)]
    parts = features.x.split(max(1, block // len(w)))
    found = [score(network.projector(part.to(device)), w).argmax(-1).cpu() for part in parts]
    network.train(was_training).to(home)
    return torch.cat(found)


@dataclass(frozen=True)
class PrototypesAsClasses:
    """Accuracy in percent of "the class of my prototype" (Wilson's 95 % interval over the n test images).

    named: prototypes that have training images, and with them a class; classes: how many classes these are. nameless:
    test images on prototypes without a training image, which count as wrong.
    """

    accuracy: float
    interval: tuple[float, float]
    n: int
    named: int
    classes: int
    nameless: int


def prototypes_as_classes(
    train_assigned: Int[Tensor, " m"],
    train_labels: Int[Tensor, " train"],
    test_assigned: Int[Tensor, " n"],
    test_labels: Int[Tensor, " test"],
) -> PrototypesAsClasses:
    """Name each prototype by the majority of its training images, then classify test images by their prototype's name.

    Of classes with equally many images the one of the lowest index gives the name. Unlike purity, names are not taken
    from the images they are tried on.

    Raises ValueError, one line, for lengths that differ, no images, or unknown labels.
    """
    for part, assigned, labels in (("training", train_assigned, train_labels), ("test", test_assigned, test_labels)):
        if len(assigned) != len(labels) or not len(labels):
            raise ValueError(f"{len(assigned)} assignments of {len(labels)} {part} images: give one each, at least one")
        if int(labels.min()) < 0 or int(assigned.min()) < 0:
            raise ValueError(f"{part} images have no label or no prototype (-1)")
    k = int(max(train_assigned.max(), test_assigned.max())) + 1
    name = torch.full((k,), -1)
    pairs, counts = torch.stack([train_assigned, train_labels], 1).cpu().unique(dim=0, return_counts=True)
    order = torch.argsort(counts, stable=True, descending=True).flip(0)  # rare first; of equal ones the lowest last
    for prototype, label in pairs[order].tolist():
        name[prototype] = label
    told, n = name[test_assigned.cpu()], len(test_labels)
    right, named = int((told == test_labels.cpu()).sum()), name[name >= 0]
    nameless = int((told < 0).sum())
    return PrototypesAsClasses(100 * right / n, wilson(right, n), n, len(named), len(named.unique()), nameless)
