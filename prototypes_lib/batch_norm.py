"""Batch normalization over the rows of all processes: nn.BatchNorm1d and 2d, which one process alone has anyway."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prototypes_lib import ranks
from prototypes_lib.precision import wide


class _OverRanks(_BatchNorm):
    """In training y = (x - mean) / sqrt(var + eps) * weight + bias with mean and variance over all ranks' rows.

    First the mean, then the variance around it, so nothing cancels. Ranks may have different numbers of rows, also
    none, but every rank must make the call. Where the batch has a single row, which torch refuses, its variance is 0:
    the output is the bias, the gradient to the input 0, and the running statistics stay; so they do without any row.
    `accumulate` cuts a batch into parts, each with statistics of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        rows = x.numel() // max(x.shape[1], 1)
        if not (self.training or self.running_mean is None) or (ranks.world() == 1 and rows > 1):
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        z = wide(x)
        # the count goes with the sum: to read it here would make the processor wait for the GPU
        sums = ranks.total(torch.cat([z.sum(dims), z.new_tensor([rows])]))
        n = sums[-1].detach().clamp_min(1)
        mean = sums[:-1] / n
        z = z - mean.view(shape)
        var = ranks.total(z.square().sum(dims)) / n
        if self.training and self.track_running_stats and self.running_mean is not None and ranks.world() > 1:
            self._remember(mean.detach(), var.detach(), n)
        z = z * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            z = z * self.weight.view(shape) + self.bias.view(shape)
        return z.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        many = n > 1
        self.num_batches_tracked.add_(many)
        share = 1 / self.num_batches_tracked.clamp_min(1) if self.momentum is None else self.momentum
        unbiased = var * (n / (n - 1).clamp_min(1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.add_(torch.where(many, share * (new.to(running.dtype) - running), 0.0))


class BatchNorm1d(_OverRanks, nn.BatchNorm1d):
    """nn.BatchNorm1d over all processes' rows; see `_OverRanks`."""


class BatchNorm2d(_OverRanks, nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes' images; see `_OverRanks`."""


def over_ranks(network: nn.Module) -> nn.Module:
    """Make every BatchNorm1d and BatchNorm2d inside one over all ranks, in place: weights and names stay."""
    ours = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}
    for module in network.modules():
        module.__class__ = ours.get(type(module), type(module))
    return network


class Unremembered:
    """A context that leaves running statistics as they were: for activations that are computed a second time."""

    def __init__(self, network: nn.Module):
        self.modules = [m for m in network.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.buffers = [dict(m.named_buffers()) for m in self.modules]
        for module in self.modules:
            for name, buffer in module.named_buffers():
                setattr(module, name, buffer.clone())

    def __exit__(self, *_) -> None:
        for module, buffers in zip(self.modules, self.buffers, strict=True):
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
