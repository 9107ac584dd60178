"""How sure a number is: over the test images it was measured on, and over the seeds it was measured with."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Num
from scipy import stats
from torch import Tensor


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, in percent; exactly from 0 without a hit, to 100 without a miss."""
    p, z2 = hits / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    low, high = max(0.0, center - half), min(1.0, center + half)
    return 100 * low if hits else 0.0, 100 * high if hits < n else 100.0  # there the sums round to almost these


def check_seed(seed: int) -> None:
    """Raise ValueError, one line, for a seed that not every generator takes."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must lie between 0 and 2^63 - 1")


def bootstrap(
    values: Num[Tensor, "n ..."],
    statistic: Callable[[Tensor], float] = lambda x: float(x.double().mean()),
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `statistic` over test images drawn again, with replacement, `draws` times.

    values: one row a test image (its hit, or its truth and prediction); statistic: of such rows, in its own unit.

    Raises ValueError without an image, for fewer than 2 draws, a level outside (0, 1), or a negative seed.
    """
    check_seed(seed)
    if not len(values) or draws < 2 or not 0 < level < 1:
        told = f"{len(values)} images, {draws} draws, level {level}"
        raise ValueError(f"a bootstrap needs images, 2 draws or more and a level in (0, 1), not {told}")
    draw = torch.Generator().manual_seed(seed)
    found = [statistic(values[torch.randint(len(values), (len(values),), generator=draw)]) for _ in range(draws)]
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(found, dtype=torch.float64).quantile(tail).tolist()
    return low, high


def over_seeds(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean over seeds (or splits) and half the width of its t-interval; nan for the width of a single one."""
    x = torch.tensor(list(values), dtype=torch.float64)
    if not len(x):
        return math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * float(x.std()) / len(x) ** 0.5 if len(x) > 1 else math.nan
    return float(x.mean()), float(half)
