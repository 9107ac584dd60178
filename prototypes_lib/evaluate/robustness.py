"""How much accuracy is left when images are corrupted, as ImageNet-C asks."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.backbones import Backbone
from prototypes_lib.data import Images
from prototypes_lib.evaluate import features
from prototypes_lib.evaluate.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from prototypes_lib.evaluate.features import Features
from prototypes_lib.evaluate.intervals import bootstrap, check_seed, wilson
from prototypes_lib.evaluate.knn import predict
from prototypes_lib.evaluate.logistic import fit

# Error of torchvision's AlexNet in percent, clean and mean over severities: what ImageNet-C is normalized by
ALEXNET = {
    "clean": 43.48, "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640,
    "defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816,
    "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056,
    "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip


@dataclass(frozen=True)
class Robustness:
    """Errors in percent, of n test images: `error[corruption]` one a severity, mCE with its 95 % bootstrap interval.

    accuracy: on clean images, with a Wilson interval. ce: corruption error of each corruption, normalized if there is a
    baseline. relative_mce: nan where the baseline loses nothing to some corruption. seed: of the corruptions.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    error: dict[str, tuple[float, ...]]
    severities: tuple[int, ...]
    ce: dict[str, float]
    mce: float
    interval: tuple[float, float]
    relative_mce: float
    relative_interval: tuple[float, float]
    n: int
    seed: int
    classifier: str

    @property
    def mean_error(self) -> dict[str, float]:
        """Error of each corruption, mean over severities, and of clean images: what a baseline is (as `ALEXNET`)."""
        return {"clean": 100 - self.accuracy} | {name: sum(e) / len(e) for name, e in self.error.items()}


def robustness(
    backbone: Backbone,
    train: Features,
    test: Images,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    classifier: str = "knn",
    k: int = 20,
    c: float = 1.0,
    baseline: "Mapping[str, float] | Robustness | None" = None,
    size: int | None = None,
    seed: int = 0,
    draws: int = 1000,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **extraction,
) -> Robustness:
    """Error under common corruptions of a classifier trained on clean features (Hendrycks & Dietterich 2019).

    CE_c = sum_s E_{s,c} / sum_s B_{s,c},  mCE = mean over c;  relative: sum_s (E_{s,c} − E) / sum_s (B_{s,c} − B)
    with E the error at severity s, B the baseline's, E and B alone those on clean images; CE and mCE are in percent.
    Without a baseline CE_c is the mean over severities of E_{s,c}, relative that of E_{s,c} − E: points of error.

    Differences from the official protocol: there the classifier is the network's own, here kNN (k neighbors) or
    logistic regression (strength c) on frozen features; corruptions are made on the fly, of the evaluation view rounded
    to 8 bits, and not stored as JPEG (`corruptions.corrupt` has its own list). The bootstrap draws test images again,
    each with all its corruptions; the baseline's numbers are taken as exact.

    Args:
        train: clean features of the same backbone, with the same size and options.
        baseline: errors in percent as `ALEXNET` has them, the means over `severities`; or another result with the same
            corruptions, severities and classifier on as many test images (its `mean_error` is taken unasked).
        size: side of the view, by default the images' own side cut to whole patches.
        extraction: options of `features.extract` that `train` was made with (blocks, pool, mean, batch_size, ...).

    Raises: ValueError, one line, before any work, for features that do not fit, unknown corruptions or severities, a
        classifier that is none, a k beyond the training images, a negative seed, or a baseline that lacks a
        corruption, has no error or was measured otherwise.
    """
    names, severities = tuple(corruptions), tuple(severities)
    side = min(test.pixels.shape[1:3])
    size = size or side - side % backbone.patch_size
    kinds = [Corruption(name, severity, seed, size) for name in names for severity in severities]
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"give corruptions and severities, each once; got {names} and {severities}")
    base = _baseline(baseline, names, severities, classifier, len(test))
    check_seed(seed)
    check_classifier(train, classifier, k)
    labels = torch.from_numpy(np.array(test.labels))

    def extracted(transform: Corruption | None, images: Images) -> Features:
        return features.extract(backbone, images, size=size, device=device, transform=transform, **extraction)

    few = extracted(None, test.subset(slice(1)))  # before the work: does train have the same options?
    features.check(train, Features(few.x.expand(len(labels), -1), labels))
    guess = predictor(train, classifier, k, c, device)
    bar = tqdm([None, *kinds], desc="corruptions", unit="set", file=sys.stdout, mininterval=5, disable=not progress)
    wrong = torch.stack([guess(extracted(kind, test).x) != labels for kind in bar], 1)
    clean, corrupted = wrong[:, 0].double(), wrong[:, 1:].double().unflatten(1, (len(names), len(severities)))
    return _summary(clean, corrupted, names, severities, base, seed, draws, classifier)


def _summary(
    clean: Float[Tensor, " n"],
    corrupted: Float[Tensor, "n names severities"],
    names: tuple[str, ...],
    severities: tuple[int, ...],
    base: Mapping[str, float] | None,
    seed: int,
    draws: int,
    classifier: str,
) -> Robustness:
    """Both mCE are means over test images of a sum that each image has for itself: that is what the bootstrap draws."""
    n, wrong = len(clean), corrupted.mean(2)
    divisor, gap = torch.ones(2, len(names), dtype=torch.float64)
    if base is not None:
        divisor = torch.tensor([base[name] for name in names], dtype=torch.float64) / 100
        gap = divisor - base["clean"] / 100
    share, relative = 100 * wrong / divisor, 100 * (wrong - clean[:, None]) / torch.where(gap > 0, gap, math.nan)
    ce = share.mean(0).tolist()
    right = n - int(clean.sum())
    error = (100 * corrupted.mean(0)).tolist()
    intervals = [bootstrap(x.mean(1), draws=draws, seed=seed) for x in (share, relative)]
    return Robustness(
        100 * right / n, wilson(right, n), {name: tuple(e) for name, e in zip(names, error, strict=True)}, severities,
        dict(zip(names, ce, strict=True)), sum(ce) / len(ce), intervals[0], float(relative.mean()), intervals[1],
        n, seed, classifier,
    )  # fmt: skip


def _baseline(
    baseline: Mapping[str, float] | Robustness | None,
    names: Sequence[str],
    severities: Sequence[int],
    classifier: str,
    n: int,
) -> Mapping[str, float] | None:
    if baseline is None:
        return None
    found = baseline.mean_error if isinstance(baseline, Robustness) else baseline
    lacking = [name for name in ("clean", *names) if name not in found]
    if lacking:
        raise ValueError(f"the baseline has no error of {', '.join(lacking)}")
    for name in names:
        if not found[name] > 0:
            raise ValueError(f"the baseline's error of {name} is {found[name]} %: nothing can be divided by it")
    measured = {"severities": SEVERITIES} if baseline == ALEXNET else {}
    if isinstance(baseline, Robustness):
        measured = {"severities": baseline.severities, "classifier": baseline.classifier, "test images": baseline.n}
    check_alike(measured, {"severities": severities, "classifier": classifier, "test images": n})
    return found


def check_alike(baseline: Mapping[str, Any], asked: Mapping[str, Any], name: str = "the baseline") -> None:
    """Raise ValueError, one line, where a baseline is known to be measured otherwise; severities in any order."""
    for what in (what for what in asked if what in baseline):
        theirs, ours = (sorted(x) if what == "severities" else x for x in (baseline[what], asked[what]))
        if theirs != ours:
            raise ValueError(f"{name} was measured with {what} {theirs}, not {ours}: measure both alike")


def check_classifier(train: Features, classifier: str, k: int) -> None:
    """Raise ValueError, one line, for another classifier than "knn" and "logistic", or a k beyond the bank."""
    if classifier not in ("knn", "logistic"):
        raise ValueError(f"classifier={classifier!r}: choose 'knn' or 'logistic'")
    if classifier == "knn" and not 1 <= k <= len(train.x):
        raise ValueError(f"k={k} must lie between 1 and the {len(train.x)} training images")


def predictor(
    train: Features, classifier: str, k: int, c: float, device: str | torch.device
) -> Callable[[Float[Tensor, "n dim"]], Int[Tensor, " n"]]:
    """From features to predicted labels, on the CPU."""
    if classifier == "knn":
        return lambda x: predict(train, x, k, device=device, progress=False)
    fitted = fit(train, c=c, device=device)
    return lambda x: fitted.predict(x).cpu()
