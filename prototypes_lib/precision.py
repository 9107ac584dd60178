"""Two rules for every idea: compute in float32 at least, and take directions of vectors of any length."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already, whatever the network's precision or autocast says."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def directions(x: Tensor) -> Tensor:
    """x / |x| along the last dimension in float32 at least, for lengths from 1e-30 to 1e30; zero stays zero.

    Rows are first divided by their largest entry, whose square would under- or overflow; a zero row gets no gradient.
    """
    return _Directions.apply(wide(x))[0]


class _Directions(torch.autograd.Function):
    """y = x / |x| and r = 1 / |x|, both 0 for a row of zeros; nothing else as large as x is made or kept.

    dy = (dx - y <y, dx>) r and dr = -<y, dx> r^2, so backward is made of y and r, and can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        largest = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))
        largest = torch.where(largest == 0, 1.0, largest)
        y = x / largest
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y /= torch.where(length == 0, 1.0, length)
        return y, torch.where(length == 0, 0.0, 1 / (length * largest))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, grad, grad_r):
        y, r = ctx.saved_tensors
        along = (y * grad).sum(-1, keepdim=True)
        return torch.addcmul(grad, y, along + grad_r * r, value=-1).mul_(r)


def without_autocast(function: Callable) -> Callable:
    """Run a function of tensors with autocast off on their device, so that products stay in their own precision."""

    @functools.wraps(function)
    def exact(*args, **kwargs):
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return exact
