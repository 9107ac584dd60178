"""Test sets of a few of the training classes, ImageNet-A and -R: who is right, if only those classes can be said?"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prototypes_lib.evaluate import features
from prototypes_lib.evaluate.features import Features
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.knn import predict
from prototypes_lib.evaluate.logistic import fit
from prototypes_lib.evaluate.robustness import check_classifier
from prototypes_lib.files.texts import read_lines


@dataclass(frozen=True)
class Restricted:
    """Accuracy in percent on n test images of `classes` classes among those a classifier was trained for."""

    accuracy: float
    interval: tuple[float, float]
    classes: int
    n: int
    classifier: str


def restricted(
    train: Features,
    test: Features,
    kept: Sequence[int],
    *,
    classifier: str = "knn",
    k: int = 20,
    c: float = 1.0,
    device: str | torch.device = "cpu",
) -> Restricted:
    """Accuracy on a test set of a few of the training classes, predictions limited to those (ImageNet-A and -R).

    kept: the training class of each test label, as `label_map` reads it; the test labels count the kept classes, as
    those of a folder with these classes do.

    Logistic regression is trained on all classes and its scores on the others ignored, as official code does with a
    network's logits. kNN, which official code does not have, looks for neighbors among training images of kept classes.

    Raises: ValueError, one line, for features that do not fit, a classifier that is none, a k beyond the training
        images of kept classes, test labels beyond them, a class kept twice, or one that no training image has.
    """
    features.check(train, test)
    kept = torch.as_tensor(list(kept), dtype=torch.long)
    if not len(kept) or int(test.labels.max()) >= len(kept):
        raise ValueError(f"{len(kept)} classes are kept, but test labels go up to {int(test.labels.max())}")
    if len(set(kept.tolist())) < len(kept):
        raise ValueError(f"class {int(kept.mode().values)} is kept twice; name each class once")
    missing = sorted(set(kept.tolist()) - set(train.labels.unique().tolist()))
    if missing:
        raise ValueError(f"no training image has class {missing[0]}, one of {len(missing)} kept classes without any")
    truth = kept[test.labels]
    if classifier == "knn":
        own = torch.isin(train.labels, kept)
        train = Features(train.x[own], train.labels[own])
    check_classifier(train, classifier, k)
    if classifier == "knn":
        predicted = predict(train, test.x, k, device=device, progress=False)
    else:
        fitted = fit(train, c=c, device=device)
        columns = torch.searchsorted(fitted.classes.cpu(), kept)
        predicted = kept[fitted.scores(test.x)[:, columns].argmax(1)]
    hits, n = int((predicted == truth).sum()), len(truth)
    return Restricted(100 * hits / n, wilson(hits, n), len(kept), n, classifier)


def label_map(path: str | Path, classes: Sequence[str]) -> tuple[int, ...]:
    """The training classes a file lists, one a line: their indices in `classes`, in the order of the sorted names.

    That is the order of the test folder's labels. A line is a class name (for ImageNet a WordNet id), perhaps followed
    by a tab or space and its index, which must then be right; empty lines and those that start with # do not count.

    Raises: FileNotFoundError or ValueError, one line: no file, none in UTF-8, no class in it, a class unknown, twice,
        or misnumbered.
    """
    place, found = {name: i for i, name in enumerate(classes)}, {}
    for number, line in class_lines(path).items():
        name, index = line, ""
        if name not in place:  # names may have spaces
            name, _, index = line.replace("\t", " ").rpartition(" ")
            name, index = (name.strip(), index) if index.isdigit() else (line, "")
        if name not in place:
            near = difflib.get_close_matches(name, place, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}, line {number}: {name!r} is none of the {len(place)} training classes{hint}")
        if name in found or index not in ("", str(place[name])):
            fault = "is there twice" if name in found else f"is class {place[name]}, not {index}"
            raise ValueError(f"{path}, line {number}: {name!r} {fault}")
        found[name] = place[name]
    return tuple(found[name] for name in sorted(found))


def class_lines(path: str | Path) -> dict[int, str]:
    """The lines of a list of classes that count, by their numbers: what `label_map` can check without the classes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no list of classes {path}; write one with a class name a line")
    lines = {i: line for i, line in enumerate(read_lines(path), start=1) if line and not line.startswith("#")}
    if not lines:
        raise ValueError(f"{path} lists no class; write a class name a line")
    return lines


def check_names(folder: str | Path, names: Sequence[str], path: str | Path, listed: Sequence[str]) -> None:
    """Raise ValueError, one line, unless a test folder's classes are those that the file of `label_map` lists."""
    if differ := sorted(set(names) ^ set(listed)):
        has, lacks = (folder, path) if differ[0] in names else (path, folder)
        counts = f"{folder} has {len(names)} classes and {path} names {len(listed)}"
        raise ValueError(f"{counts}: {differ[0]!r} is in {has} and not in {lacks}")
