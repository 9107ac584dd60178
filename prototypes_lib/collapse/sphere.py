"""How prototypes lie on the sphere: nearest neighbors against those of points drawn evenly, and effective rank.

For x uniform on the unit sphere of p dimensions and any unit vector u, the share of the sphere beyond a cosine t is

    tail(t) = P(<x, u> > t) = I_{1 - t^2}((p - 1)/2, 1/2) / 2  for t >= 0,  and 1 - tail(-t) for t < 0,

I the regularized incomplete beta function. To each of K independent uniform points the K - 1 others are as many tries:
P(largest cosine <= t) = (1 - tail(t))^(K - 1). At K = 131,072 the median is where the tail is 5e-6, so the powers are
taken by log1p and expm1. The K largest cosines of one set depend on each other a little; their law is the same.
"""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.special import betainc, betaincinv
from torch import Tensor

from prototypes_lib.collapse.pairs import _compare
from prototypes_lib.collapse.unique import _directions
from prototypes_lib.precision import wide, without_autocast


@torch.no_grad()
@without_autocast
def nearest_cosine(w: Float[Tensor, "k dim"], *, progress: bool = False) -> Float[Tensor, " k"]:
    """Each prototype's largest cosine to another one, nan for one alone; `neighbors(w).nearest` without the rest.

    Computed block by block, never as a K x K matrix. Raises ValueError for a prototype without direction.
    """
    x = _directions(w, 1.0)
    cosine, _ = _compare(x, x.new_full((len(x),), -3.0), progress)  # a reach of -3: no pair is kept
    return cosine.clamp(-1, 1) if len(x) > 1 else torch.full_like(cosine, torch.nan)


def uniform_nearest_cdf(t: ArrayLike, k: int, dim: int) -> np.ndarray:
    """P(largest cosine <= t) = (1 - tail(t))^(k - 1) of one of k points uniform on the sphere to the others, float64.

    Raises ValueError for less than 2 points or 2 dimensions.
    """
    _check(k, dim)
    t = np.clip(np.asarray(t, np.float64), -1, 1)
    # 1 - t^2 as a product: next to 1 it keeps its digits
    half = betainc((dim - 1) / 2, 0.5, (1 - t) * (1 + t)) / 2
    with np.errstate(divide="ignore"):  # log 0 at t = -1
        log_below = np.where(t >= 0, np.log1p(-half), np.log(half))
    return np.asarray(np.exp((k - 1) * log_below))


def uniform_nearest_quantile(q: ArrayLike, k: int, dim: int) -> np.ndarray:
    """The t with P(largest cosine <= t) = q, the inverse of `uniform_nearest_cdf`; q = 0.5 is the median.

    Raises ValueError for q outside (0, 1), and less than 2 points or 2 dimensions.
    """
    _check(k, dim)
    q = np.asarray(q, np.float64)
    if not ((q > 0) & (q < 1)).all():
        raise ValueError(f"q={q}: a quantile's probability lies inside (0, 1)")
    log_below, a = np.log(q) / (k - 1), (dim - 1) / 2
    tail, below = -np.expm1(log_below), np.exp(log_below)
    half = np.minimum(tail, below)  # of the smaller side, where |t| is the same
    far = np.sqrt(1 - betaincinv(a, 0.5, 2 * half))
    near = np.sqrt(betaincinv(0.5, a, np.abs(below - tail)))  # around t = 0, where 1 - t^2 rounds to 1
    return np.asarray(np.copysign(np.where(half < 0.25, far, near), below - tail))


def _check(k: int, dim: int) -> None:
    if k < 2 or dim < 2:
        raise ValueError(f"k={k}, dim={dim}: a nearest neighbor on a sphere needs two points and two dimensions")


@torch.no_grad()
@without_autocast
def effective_rank(x: Float[Tensor, "n dim"], *, center: bool = False, squared: bool = False) -> float:
    """exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j, s the singular values of x (Roy & Vetterli 2007).

    From 1, all rows in one line, to min(n, dim), all directions alike. A matrix of zeros has 0, one that is not finite
    nan. The singular values come from the Gram matrix of the shorter side, summed in float64 block by block, so that
    n = 131,072 will do; those below about 1e-7 of the largest are rounding and count as 0.

    Args:
        center: subtract the mean row first.
        squared: p_i = s_i^2 / sum_j s_j^2, the eigenvalues of x^T x / n: the effective rank of the second moment
            (covariance, with `center`) instead of that of the matrix, and never larger. The row `effective_rank` of a
            training is `effective_rank(codes, squared=True)`.

    Raises:
        ValueError: no row or no column.
    """
    if not x.numel():
        raise ValueError(f"a matrix of shape {tuple(x.shape)} has no effective rank")
    x = wide(x)
    n, dim = x.shape
    scale = x.abs().amax().double()
    if not torch.isfinite(scale):
        return float("nan")
    if scale == 0:
        return 0.0
    blocks = [slice(i, i + 8192) for i in range(0, n, 8192)]
    mean = sum((x[b].double() / scale).sum(0) for b in blocks) / n if center else 0
    if n < dim:
        rows = x.double() / scale - mean
        gram = rows @ rows.T
    else:
        gram = torch.zeros(dim, dim, dtype=torch.float64, device=x.device)
        for b in blocks:
            rows = x[b].double() / scale - mean
            gram.addmm_(rows.T, rows)
    power = torch.linalg.eigvalsh(gram)
    power = torch.where(power > 1e-15 * len(power) * power[-1], power, 0.0)
    if center and power.sum() <= 1e-30 * n * dim:  # what rounding leaves of equal rows
        return 0.0
    size = power if squared else power.sqrt()
    return float(torch.special.entr(size / size.sum()).sum().exp())
