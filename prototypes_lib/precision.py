"""Two rules for every idea: compute in float32 at least, and take directions of vectors of any length."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already, whatever the network's precision or autocast says."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def directions(x: Tensor) -> Tensor:
    """x / |x| along the last dimension in float32 at least, for lengths from 1e-30 to 1e30; zero stays zero.

    Rows are first divided by their largest entry, whose square would under- or overflow; a zero row gets no gradient.
    """
    x = wide(x)
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = torch.where(largest > 0, x / torch.where(largest > 0, largest, 1.0), x.detach())
    return F.normalize(x, dim=-1)


def without_autocast(function: Callable) -> Callable:
    """Run a function of tensors with autocast off on their device, so that products stay in their own precision."""

    @functools.wraps(function)
    def exact(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            return function(*args, **kwargs)

    return exact
