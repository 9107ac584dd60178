"""How well does code y fit prototype w? Three answers, as log-scores whose softmax over k is the assignment.

With kappa = |w| / tau and mu = w / |w|, <w, y> / tau = kappa <mu, y> is the exponent of a von Mises-Fisher density.
`dot` leaves its normalizer out, `cosine` makes it constant, `vmf` puts it in (vMF, sections 3.2 and 3.3).
All three compute in float32 at least, whatever autocast says.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prototypes_lib import vmf as _vmf
from prototypes_lib.precision import directions, wide


def dot(y: Float[Tensor, "*batch dim"], w: Float[Tensor, "k dim"], tau: float) -> Float[Tensor, "*batch k"]:
    """<w_k, y> / tau with prototypes of any length: DINO with norm_last_layer=False (vMF, Eq. 3).

    Args: y unit codes; w prototypes, one a row; tau temperature > 0. Raises ValueError where tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau}: the temperature must be positive")
    with torch.autocast(y.device.type, enabled=False):
        dtype = torch.promote_types(wide(y).dtype, wide(w).dtype)
        return F.linear(y.to(dtype), w.to(dtype) / tau)


def cosine(y: Float[Tensor, "*batch dim"], w: Float[Tensor, "k dim"], tau: float) -> Float[Tensor, "*batch k"]:
    """<w_k, y> / (tau |w_k|): unit prototypes, DINO with norm_last_layer=True, SwAV, MSN (vMF, section 3.1).

    Only w is normalized here; the code y is unit by construction. Arguments and errors as `dot`.
    """
    return dot(y, directions(w), tau)


def vmf(
    y: Float[Tensor, "*batch dim"], w: Float[Tensor, "k dim"], tau: float, *, terms: int | None = None
) -> Float[Tensor, "*batch k"]:
    """<w_k, y> / tau + log C_p(|w_k| / tau): DINO-vMF and iBOT-vMF (vMF, Eqs. 6 and 7).

    With unit prototypes log C_p is one constant and the softmax is that of `cosine`. terms=1 takes the paper's
    approximation of log C_p (it differs by at most 1e-3 at p = 256); None the exact value.
    Arguments and errors as `dot`.
    """
    logits = dot(y, w, tau)
    kappa = torch.linalg.vector_norm(w.to(logits.dtype), dim=-1) / tau
    return logits + _vmf.log_normalizer(kappa, w.shape[-1], terms=terms)


class Affine(NamedTuple):
    """A score as a function of the code y alone: scale <slopes_k, y> + offsets_k, offsets None for none."""

    slopes: Float[Tensor, "k dim"]
    offsets: Float[Tensor, " k"] | None
    scale: float


def affine(score: Callable[..., Tensor], w: Float[Tensor, "k dim"], tau: float) -> Affine:
    """A score's slopes and offsets for these prototypes, differentiable: all of `blockwise` needs no more.

    Those of `dot`, `cosine` and `vmf` are known; another score's are found by asking it for the code 0 and for each
    unit vector. Raises ValueError where tau is not positive, or the score is not affine in the code.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau}: the temperature must be positive")
    known = score.func if isinstance(score, functools.partial) else score
    with torch.autocast(w.device.type, enabled=False):
        w = wide(w)
        if known is dot:
            return Affine(w, None, 1 / tau)
        if known is cosine:
            return Affine(directions(w), None, 1 / tau)
        if known is vmf:
            kappa = torch.linalg.vector_norm(w, dim=-1) / tau
            terms = score.keywords.get("terms") if isinstance(score, functools.partial) else None
            return Affine(w, _vmf.log_normalizer(kappa, w.shape[-1], terms=terms), 1 / tau)
        offsets = score(w.new_zeros(1, w.shape[1]), w, tau)[0]
        slopes = (score(torch.eye(w.shape[1], dtype=w.dtype, device=w.device), w, tau) - offsets).T
        with torch.no_grad():
            y = F.normalize(torch.arange(1.0, w.shape[1] + 1, dtype=w.dtype, device=w.device), dim=0)
            told, made = score(y[None], w, tau)[0], slopes @ y + offsets
            if not torch.allclose(told, made, rtol=1e-3, atol=1e-3):
                raise ValueError(f"{score} is not affine in the code; scores are <a_k, y> + b_k")
        return Affine(slopes, offsets, 1.0)
