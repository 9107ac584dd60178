"""Few-shot classification as in MSN: logistic regression on one, two or five images of each class, or 1 % of all."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.data import Images
from prototypes_lib.evaluate import logistic
from prototypes_lib.evaluate.features import Features, check
from prototypes_lib.evaluate.intervals import check_seed, over_seeds, wilson
from prototypes_lib.files.texts import read_lines

Split = Sequence[int] | np.ndarray | Int[Tensor, " images"]  # places of its images in the training set


@dataclass(frozen=True)
class FewShot:
    """Accuracies in percent, by images a class ("1", "2", "5") or share of the training set ("1%").

    Attributes:
        values: of each split.
        mean, deviation: over the splits; the deviation (that of a sample, n - 1) of a single split is nan.
        interval: 95 %, of the mean over splits (Student's t, within 0 .. 100); of a single split over the n test
            images (Wilson).
        n: test images. seed: of the splits, where they were drawn. lambd: strength of the regularization.
    """

    values: dict[str, tuple[float, ...]]
    mean: dict[str, float]
    deviation: dict[str, float]
    interval: dict[str, tuple[float, float]]
    n: int
    seed: int
    lambd: float


def few_shot(
    train: Features,
    test: Features,
    *,
    images: int | np.integer | Sequence[int | np.integer] = (1, 2, 5),
    splits: int | np.integer | Sequence[Split] = 3,
    share: float | None = None,
    lambd: float = 0.075,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FewShot:
    """Accuracy of L2-regularized logistic regression that has seen a few labeled images of each class (MSN).

    On features z (`prepared`), W minimizes (1/n) sum_i CE(W z_i, y_i) + lambd/(2n) |W|^2 over the n images of a split,
    without an intercept: scikit-learn's objective with C = 1/lambd (from three classes on), and cyanure's, which MSN
    uses.

    The protocol takes class tokens of the last block BEFORE the final norm: extract(..., norm=False). It works on any
    features, but after the norm the accuracies are others.

    Differences from MSN's script: the optimum itself instead of cyanure's at a relative duality gap of 1e-3 (whose
    result is reported to vary with the number of cores); images are resized bicubically (`extract`), there bilinearly;
    lambd is 0.075, the value of the papers, where the script's default is 0.00025; and our splits are drawn from a
    seed unless the published lists are given. Classes of the test images that the training images lack count as
    missed.

    Args:
        images: how many of each class, one answer for each.
        splits: how many to draw of each kind; or the splits themselves, e.g. from `read_split`. Those are grouped by
            what they are, equal numbers of each class ("5") or else a share of the training set ("1%"), and `images`
            and `share` say nothing.
        share: also take this share of each class (0.01: "1%"), at least one image, in one split as MSN does.
        lambd: strength of the regularization; the script divides it by n as well.

    Raises:
        ValueError: features that `check` refuses, a class with fewer images than asked for or none in a split,
            a split that names an image twice or one that is not there, an option out of range.
    """
    check_seed(seed)
    check(train, test)
    if not 0 < lambd < math.inf:
        raise ValueError(f"lambd={lambd} must be positive")
    if isinstance(splits, Integral):
        images = (images,) if isinstance(images, Integral) else images
        named = _drawn(train.labels, tuple(map(int, images)), int(splits), share, seed)
    else:
        named = _given(train.labels, splits)
    todo = [(name, split) for name, group in named.items() for split in group]
    bar = tqdm(todo, "few-shot", unit="split", file=sys.stdout, mininterval=5, disable=not progress)
    classifiers = [
        logistic.fit(
            Features(prepared(train.x[split]), train.labels[split]), c=1 / lambd, intercept=False, device=device
        )
        for _, split in bar
    ]
    hits = torch.zeros(len(todo), dtype=torch.long)
    rows = max(1, 2**24 // test.x.shape[1])
    for start in range(0, len(test.x), rows):
        z, truth = prepared(test.x[start : start + rows]).to(device), test.labels[start : start + rows]
        for place, classifier in enumerate(classifiers):
            hits[place] += int((classifier.predict(z).cpu() == truth).sum())
    n, found = len(test.x), iter(hits.tolist())
    right = {name: [next(found) for _ in group] for name, group in named.items()}
    values = {name: tuple(100 * h / n for h in group) for name, group in right.items()}
    return FewShot(
        values,
        mean={name: sum(v) / len(v) for name, v in values.items()},
        deviation={name: float(np.std(v, ddof=1)) if len(v) > 1 else math.nan for name, v in values.items()},
        interval={name: _interval(values[name], group, n) for name, group in right.items()},
        n=n,
        seed=seed,
        lambd=lambd,
    )


def prepared(x: Shaped[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Each image's features minus their mean, divided by the length of what is left; zero where nothing is left.

    What cyanure.preprocess(x, centering=True, normalize=True, columns=False) does: no image sees another, so training
    and test images are treated alike.
    """
    wide = x.double()
    centered = wide - wide.mean(1, keepdim=True)
    length = centered.norm(dim=1, keepdim=True)
    nothing = length <= 1e-6 * wide.norm(dim=1, keepdim=True)  # a constant's rounding errors aren't a direction
    return torch.where(nothing, 0.0, centered / length).to(torch.promote_types(x.dtype, torch.float32))


def draw_split(
    labels: Int[Tensor, " n"], images: int | np.integer | float, split: int = 0, seed: int = 0
) -> Int[np.ndarray, " images"]:
    """Places of so many images of each class, in ascending order: a function of (seed, split, images) and the labels.

    images: a number, or a share in (0, 1) of each class, rounded, but at least one image.

    Raises ValueError for a class with fewer images, a number below 1, a share outside (0, 1) or a negative seed.
    """
    check_seed(seed)
    if not (0 < images < 1 if isinstance(images, float) else images >= 1):
        raise ValueError(f"images={images} a class: give a number from 1, or a share in (0, 1)")
    labels = labels.numpy()
    draw = np.random.default_rng((seed, split, round(1e6 * images)))
    found = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        take = max(1, round(images * count)) if isinstance(images, float) else images
        if take > count:
            raise ValueError(
                f"class {label} has fewer training images ({count}) than the {take} a class asked for; ask for fewer"
            )
        found.append(draw.permutation(np.flatnonzero(labels == label))[:take])
    return np.sort(np.concatenate(found))


def read_split(path: str | Path, images: Images) -> Int[np.ndarray, " images"]:
    """Places in `images` of what a file lists, one image a line: a file's name, or its place, counted from 0.

    Names are compared without their folders, so the published lists of MSN and SwAV (n01440764_10026.JPEG) fit any
    copy of ImageNet; where two files share a name, the line must hold enough of the path to tell them apart.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or none in UTF-8, a name that is not among the images (or is more than one of them), a
            place beyond the last image, an image listed twice, or a class of which there is no image in the list.
    """
    lines = split_lines(path)
    try:
        places = [int(line) for line in lines] if all(line.isdecimal() for line in lines) else _places(lines, images)
        return _checked(torch.from_numpy(images.labels), places, lambda label: repr(images.classes[label]))
    except ValueError as error:
        raise ValueError(f"few-shot split {path}: {error}") from error


def split_lines(path: str | Path) -> list[str]:
    """The lines of a split that say something: what `read_split` can check without the images. Raises as it does."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"few-shot split {path}: no such file; leave splits=3 to draw them from the seed")
    lines = [line for line in read_lines(path) if line]
    if not lines:
        raise ValueError(f"few-shot split {path} is empty; list one image a line")
    return lines


def _places(lines: list[str], images: Images) -> list[int]:
    if not images.files:
        raise ValueError(f"{images.name} is an array without file names; list places (0, 1, ...) instead")
    named: dict[str, list[int]] = {}
    for place, file in enumerate(images.files):
        named.setdefault(PurePosixPath(file).name, []).append(place)
    places = []
    for line in lines:
        found = named.get(PurePosixPath(line).name, [])
        if len(found) > 1:
            found = [place for place in found if f"/{images.files[place]}".endswith(f"/{line}")]
        if len(found) != 1:
            raise ValueError(f"{line!r} names {len(found) or 'none'} of the {len(images):,} images of {images.name}")
        places += found
    return places


def _checked(labels: Int[Tensor, " n"], places: Split, name: Callable[[int], str] = str) -> Int[np.ndarray, " images"]:
    """The places as an array, if it is a split: some images, each there and once, and of each class at least one."""
    try:
        split = np.atleast_1d(np.asarray(places, dtype=np.int64))
    except OverflowError:  # beyond what any array has
        raise ValueError(f"there is no image {max(places, key=abs)}; the {len(labels):,} images end before") from None
    if not len(split):
        raise ValueError("no images; list at least one of each class")
    if split.min() < 0 or split.max() >= len(labels):
        wrong = split.min() if split.min() < 0 else split.max()
        raise ValueError(f"there is no image {wrong}; the {len(labels):,} images are 0 .. {len(labels) - 1}")
    once, counts = np.unique(split, return_counts=True)
    if len(once) < len(split):
        raise ValueError(f"image {once[counts.argmax()]} is listed {counts.max()} times")
    classes = np.unique(labels[labels >= 0])
    missing = np.setdiff1d(classes, labels[split]).tolist()
    if missing:
        raise ValueError(f"no image of {', '.join(map(name, missing[:5]))} ({len(missing)} of {len(classes)} classes)")
    return split


def _drawn(labels: Tensor, images: tuple[int, ...], splits: int, share: float | None, seed: int) -> dict[str, list]:
    if splits < 1 or not (images or share):
        raise ValueError(f"few-shot needs images or a share, and a split; got images={images}, splits={splits}")
    named = {str(count): [draw_split(labels, count, split, seed) for split in range(splits)] for count in images}
    if share is not None:
        named[f"{100 * share:.3g}%"] = [draw_split(labels, float(share), 0, seed)]
    return named


def _given(labels: Tensor, splits: Sequence[Split]) -> dict[str, list]:
    named: dict[str, list] = {}
    for place, given in enumerate(splits):
        try:
            split = _checked(labels, given)
        except ValueError as error:
            raise ValueError(f"few-shot split {place}: {error}") from error
        counts = np.unique(labels[split], return_counts=True)[1]
        alike = counts.min() == counts.max()
        named.setdefault(str(counts[0]) if alike else f"{100 * len(split) / len(labels):.3g}%", []).append(split)
    if not named:
        raise ValueError("few-shot needs at least one split; splits=3 draws three")
    return named


def _interval(values: tuple[float, ...], hits: list[int], n: int) -> tuple[float, float]:
    if len(values) == 1:
        return wilson(hits[0], n)
    mean, half = over_seeds(values)
    return max(0.0, mean - half), min(100.0, mean + half)
