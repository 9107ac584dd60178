"""Terms that keep codes, prototypes or assignments from collapsing; a method adds weight * function(on something).

`koleo` and `prior_matching` are losses; `coding_rate` and `mean_entropy` are sizes to be enlarged, so methods give
them a negative weight. All compute in float32 at least and stay finite, value and gradient, on degenerate input. Where
processes share the batch (`ranks`) each of them returns the number of the whole batch.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from prototypes_lib import ranks
from prototypes_lib.precision import directions, wide


def koleo(
    x: Float[Tensor, "n dim"],
    *,
    eps: float = 1e-8,
    parts: int = 1,
    generator: torch.Generator | None = None,
    gathered: bool = True,
) -> Float[Tensor, ""]:
    """-mean_k log(d_k + eps), d_k the distance of x_k / |x_k| to its nearest neighbor (PPC, section 4.1; a loss).

    On prototypes it is KoLeo-proto, on features DINOv2's KoLeo-data. PPC prints h = -mean log d_k and speaks of
    maximizing the entropy: h is the entropy's negative, and minimizing it is right.

    Neighbors are found by block-wise products without an n x n matrix, then the distance is recomputed by
    subtraction, because 2 - 2 cos has no digits left where it matters; among near-copies, whose cosines are all 1 to
    rounding, the nearest of 16 candidates by subtraction is taken. At exact duplicates the value is -log eps and the
    gradient zero (the official code's is finite only by its eps); one vector alone gives 0.

    Args:
        x: vectors of any length but zero; only directions count. A zero vector has none, and gets no gradient.
        parts: random partition into this many equal parts with neighbors sought inside a part, as the paper does to
            save memory; d_k is then larger on average and duplicates in different parts go unseen.
        generator: draws the partition; without one, rank 0's is everybody's.
        gathered: where ranks share a batch, neighbors are sought among the rows of all, which makes the loss that of
            one process. False is the official code: each rank among its own rows, d_k larger the more ranks there are.
            What every rank holds whole, as prototypes, belongs into `ranks.alone`.

    Raises:
        ValueError: parts outside 1 .. n.
    """
    x = directions(x)
    x = ranks.rows(x) if gathered else x  # each rank computes it all: the sum over ranks in its gradient is right
    n = len(x)
    if not 1 <= parts <= n:
        raise ValueError(f"parts={parts} must lie between 1 and the number of vectors, {n}")
    if parts > 1:
        device = generator.device if generator is not None else "cpu"
        order = torch.randperm(n, generator=generator, device=device).to(x.device)
        order = ranks.rows(order)[:n] if gathered else order
        groups = [x[rows] for rows in order.tensor_split(parts)]
    else:
        groups = [x]
    logs = [_log_gaps(group, eps) for group in groups if len(group) > 1]
    return -torch.cat(logs).sum() / n if logs else 0.0 * x.sum()


def _log_gaps(x: Tensor, eps: float) -> Tensor:
    gaps = torch.linalg.vector_norm(x - x.index_select(0, nearest(x)), dim=-1)
    # clamp cuts the gradient at d = 0, where the norm has none, and keeps the value finite without an eps
    return torch.log(gaps.clamp_min(math.sqrt(torch.finfo(x.dtype).tiny)) + eps)


@torch.no_grad()
def nearest(x: Float[Tensor, "n dim"], block: int | None = None) -> Int[Tensor, " n"]:
    """Index of each unit vector's nearest other one, from tiles of about `block` similarities at a time.

    A tile serves the rows that it is of and, transposed, those that it is with: half the products of x x^T. Indices are
    looked for only in the group of 32 that holds a maximum: `amax` alone is several times faster than `max`.
    """
    n, device = len(x), x.device
    side = math.isqrt(block or (2**20 if device.type == "cpu" else 2**24)) // _GROUP * _GROUP
    side = max(_GROUP, min(side, -(-n // _GROUP) * _GROUP))
    padded = F.pad(x, (0, 0, 0, -n % _GROUP))
    best = torch.full((len(padded),), -torch.inf, dtype=x.dtype, device=device)
    index = torch.zeros(len(padded), dtype=torch.long, device=device)
    with torch.autocast(device.type, enabled=False):
        for i in range(0, len(padded), side):
            for j in range(i, len(padded), side):
                tile = padded[i : i + side] @ padded[j : j + side].T
                if i == j:
                    tile.fill_diagonal_(-torch.inf)
                if n - j < tile.shape[1]:
                    tile[:, n - j :] = -torch.inf
                _keep_best(best[i : i + side], index[i : i + side], j, *_row_maxima(tile))
                if i != j:
                    _keep_best(best[j : j + side], index[j : j + side], i, *_column_maxima(tile))
        best, index = best[:n], index[:n]
        copies = torch.nonzero(best > 1 - 1e-5)[:, 0]  # closer than 0.0045: a cosine cannot rank these
        for rows in copies.split(max(1, side * side // max(n, 1))) if len(copies) else ():
            similarity = x[rows] @ x.T
            similarity.scatter_(1, rows[:, None], -torch.inf)
            candidates = similarity.topk(min(16, n - 1), dim=-1).indices
            gaps = (x[rows, None] - x[candidates]).square().sum(-1)
            index[rows] = candidates.gather(1, gaps.argmin(-1, keepdim=True))[:, 0]
    return index


_GROUP = 32


def _row_maxima(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry of each row, and its column."""
    groups = tile.unflatten(1, (-1, _GROUP))
    group = groups.amax(2).argmax(1)
    best, place = groups[torch.arange(len(tile), device=tile.device), group].max(1)
    return best, group * _GROUP + place


def _column_maxima(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry of each column, and its row."""
    groups = tile.unflatten(0, (-1, _GROUP))
    group = groups.amax(1).T.contiguous().argmax(1)
    best, place = groups[group, :, torch.arange(tile.shape[1], device=tile.device)].max(1)
    return best, group * _GROUP + place


def _keep_best(best: Tensor, index: Tensor, start: int, value: Tensor, place: Tensor) -> None:
    better = value > best
    best.copy_(torch.where(better, value, best))
    index.copy_(torch.where(better, place + start, index))


def coding_rate(z: Float[Tensor, "n dim"], eps: float, groups: int = 1) -> Float[Tensor, ""]:
    """R = 1/2 logdet(I + (d / eps^2) Z^T Z / n), the size of the codes' second moment (Sim, Eq. 8; to be enlarged).

    eps is the paper's: the official code's argument is its square, so `eps=0.05` there is eps = sqrt(0.05) here.
    "Covariance" in the paper, but nothing is centered. The paper's ln is natural, and so is the unit (nats). Z are the
    rows of all ranks in order, gathered rather than their Gram matrices summed: as few numbers, and singular values
    stay at hand where Z^T Z is too small or too large to add to I.

    Args:
        z: codes, one a row. groups: g emulates g processes that do not reduce their Gram matrix: the whole batch is
            cut into g parts in order, each part's Z^T Z still divided by the whole n, and the g rates averaged (the
            released SimDINO runs are groups = 8; notebook 20 shows what it changes). Any number of ranks will do.

    Raises:
        ValueError: eps not positive, or n not a multiple of groups.
    """
    return _rate(ranks.rows(wide(z)), eps, groups)


def _rate(z: Tensor, eps: float, groups: int) -> Tensor:
    n, dim = z.shape
    if not eps > 0:
        raise ValueError(f"eps={eps}: the distortion must be positive")
    if not n:
        raise ValueError("the coding rate of no codes is undefined")
    if groups < 1 or n % groups:
        raise ValueError(f"groups={groups} must divide the batch of {n}")
    with torch.autocast(z.device.type, enabled=False):
        # float64: I + a Z^T Z spans 1 .. d / eps^2 and more, and a d x d Cholesky costs nothing beside the network
        parts, a = z.double().reshape(groups, n // groups, dim), dim / (n * eps**2)
        gram = a * (parts @ parts.mT if n // groups < dim else parts.mT @ parts)
        size = gram.detach().diagonal(dim1=-2, dim2=-1).amax().item()
        if 1e-8 < size < 1e8:
            factor, _ = torch.linalg.cholesky_ex(torch.eye(gram.shape[-1], dtype=gram.dtype, device=z.device) + gram)
            half_logdet = torch.log(factor.diagonal(dim1=-2, dim2=-1)).sum(-1)
        elif math.isfinite(size):  # in I + a Z^T Z one of the two would drown in the other's rounding
            half_logdet = 0.5 * torch.log1p(a * torch.linalg.svdvals(parts).square()).sum(-1)
        else:  # codes that are not finite: nan, as from any other loss
            half_logdet = gram.sum((-2, -1)) * torch.nan
    return half_logdet.mean().to(z.dtype)


def expansion(z: Float[Tensor, "n dim"], eps: float, groups: int = 1) -> Float[Tensor, ""]:
    """gamma R with gamma = 1/d + 1/n: SimDINO's coding-rate term as its released code weighs it (to be enlarged).

    Sim, section 2.3 proposes gamma of the order of eps sqrt(n / (d min(d, n))), which the code has commented out: it
    grows with n beyond d, while the code's falls. Arguments and errors as `coding_rate`.
    """
    z = ranks.rows(wide(z))
    rate = _rate(z, eps, groups)
    return (1 / z.shape[1] + 1 / len(z)) * rate


def mean_entropy(p: Float[Tensor, "batch k"]) -> Float[Tensor, ""]:
    """H(mean_b p_b), the entropy of the marginal latent class distribution in nats (MSN's me-max; to be enlarged).

    The mean is over the rows of all ranks, of which each may have another number; without any row the entropy is 0.
    """
    marginal = _marginal(p)
    return -(marginal * _log(marginal)).sum()


def prior_matching(p: Float[Tensor, "batch k"], prior: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """KL(mean_b p_b || prior) in nats (PMSN; PPC, section 3; a loss); ln K - mean_entropy for the uniform prior.

    The direction is the papers'; `torch.nn.functional.kl_div(p.log(), prior)` would be the other one.

    Raises:
        ValueError: the prior is not a positive distribution over the k prototypes.
    """
    if prior.shape != p.shape[-1:]:
        raise ValueError(f"a prior over {tuple(prior.shape)} does not fit {p.shape[-1]} prototypes")
    if not (prior > 0).all() or abs(float(prior.sum()) - 1) > 1e-3:
        raise ValueError("the prior must be positive and sum to one")
    return _kl_to(p, prior)


def _kl_to(p: Tensor, prior: Tensor) -> Tensor:
    marginal = _marginal(p)
    return (marginal * (_log(marginal) - torch.log(prior.to(marginal)))).sum()


def power_law_matching(p: Float[Tensor, "batch k"], exponent: float) -> Float[Tensor, ""]:
    """KL(mean_b p_b || pi), pi the power law over the prototypes in their order: PMSN's term (PPC, section 3; a loss).

    With exponent 0 it is ln K - mean_entropy, MSN's up to its constant.
    """
    return _kl_to(p, _power_law(p.shape[-1], exponent, p.device))


def power_law(k: int, exponent: float) -> Float[Tensor, " k"]:
    """pi_j proportional to j^-exponent, j = 1 .. k: PMSN's long-tailed prior; exponent 0 is the uniform one."""
    if k < 1:
        raise ValueError(f"k={k}: a prior needs at least one prototype")
    return _power_law(k, exponent).float()


def _power_law(k: int, exponent: float, device: torch.device | None = None) -> Tensor:
    weights = torch.arange(1, k + 1, dtype=torch.float64, device=device) ** -float(exponent)
    return weights / weights.sum()


def _marginal(p: Tensor) -> Tensor:
    """The mean over the rows of all ranks, each with its share of them; zero where there are none."""
    p = wide(p)
    sums = ranks.total(torch.cat([p.sum(0), p.new_full((1,), len(p))]))  # their number too: no wait for the host
    return sums[:-1] / sums[-1].clamp_min(1)


def _log(p: Tensor) -> Tensor:
    """log p with a finite gradient at p = 0, where p log p is 0."""
    return torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))
