"""Long-tailed versions of balanced data sets, `NAME-lt-FACTOR`: the training split thinned, the test split as it is."""

import math
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class LongTail:
    """What a name asks for: the data set it starts from, the imbalance factor (largest / smallest class), the draw."""

    base: str
    factor: float
    seed: int = 0


def parse(name: str) -> LongTail | None:
    """`BASE-lt-FACTOR` or `BASE-lt-FACTOR-seedSEED` in its parts; None for a name without "-lt-".

    Raises ValueError, one line, for a factor that is no number from 1 on, or a seed that is no whole one.
    """
    found = re.fullmatch(r"(.+)-lt-(.*?)(?:-seed(.*))?", name, re.DOTALL)
    if found is None:
        return None
    base, factor, seed = found.groups()
    number, draw = r"\d{1,9}(\.\d{1,9})?", "0" if seed is None else seed
    if not (re.fullmatch(number, factor, re.ASCII) and float(factor) >= 1 and re.fullmatch(r"[0-9]{1,18}", draw)):
        raise ValueError(
            f"data: {name!r} is no folder, and a long tail is NAME-lt-FACTOR or NAME-lt-FACTOR-seedSEED with a factor "
            "of at least 1 and a whole seed, for example cifar10-lt-100"
        )
    return LongTail(base, float(factor), int(draw))


def sizes(available: Int[np.ndarray, " classes"], factor: float) -> Int[np.ndarray, " classes"]:
    """Images a class keeps: n_c = int(n_max * factor^(-c / (C - 1))) (Cao et al. 2019, CIFAR-LT; Cui et al. 2019).

    `available` is what each class has and n_max the most any of them has. At least 1, and never more than there are:
    in a set that is not balanced to begin with a class may lie below its place on the curve.
    """
    last = max(len(available) - 1, 1)
    n_max = int(available.max(initial=0))
    wanted = [math.floor(n_max * factor ** (-c / last) + 1e-9) for c in range(len(available))]
    return np.minimum(np.maximum(np.array(wanted, np.int64), 1), available)


def exponential(labels: Int[np.ndarray, " n"], factor: float, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Indices, ascending, of a subset whose classes shrink exponentially in the order of their labels; see `sizes`.

    Each class is permuted by numpy's default generator seeded with (seed, label) and its first n_c images are kept: a
    draw does not depend on the other classes, and a larger factor takes a part of what a smaller one takes. The
    official code draws from one generator that goes on from class to class, so its images differ; its counts do not.

    Raises ValueError for a factor below 1, or images without a label.
    """
    if not factor >= 1:
        raise ValueError(f"data: the imbalance factor must be at least 1, not {factor}")
    if len(labels) and labels.min() < 0:
        raise ValueError(f"data: a long tail needs labels, and {int((labels < 0).sum()):,} images have none")
    kept = [np.zeros(0, np.int64)]
    for label, n in enumerate(sizes(np.bincount(labels), factor)):
        (own,) = np.nonzero(labels == label)
        kept.append(own[np.random.default_rng((seed, label)).permutation(len(own))[:n]])
    return np.sort(np.concatenate(kept))
