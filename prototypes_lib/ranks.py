"""A batch may lie on several processes: sums, log-sums and rows over all of them, exact and differentiable.

Without a process group every function is the identity, so that an idea is written once and means the whole batch
wherever its rows are. Ranks hold slices of the batch in order. A gradient is right after the mean over ranks that
`DistributedDataParallel` takes of the parameters' gradients.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


def world() -> int:
    """Processes that share the batch; 1 without a process group or inside `alone`."""
    return 1 if _alone or not (dist.is_available() and dist.is_initialized()) else dist.get_world_size()


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is by itself: for what only one rank computes, or each does on its own rows."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Total.apply(grad)


def total(x: Tensor) -> Tensor:
    """The sum of x over ranks, the same everywhere; its gradient is the sum of theirs."""
    return x if world() == 1 else _Total.apply(x)


def count(n: int) -> int:
    """Rows of the whole batch, where this rank has n; ranks may differ."""
    return n if world() == 1 else sum(_counts(n))


@torch.no_grad()
def log_total(x: Tensor) -> Tensor:
    """log of the sum of exp(x) over ranks, elementwise; where all have -inf it stays so."""
    if world() == 1:
        return x
    largest = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    shift = torch.where(largest.isfinite(), largest, 0.0)
    return total((x - shift).exp()).log() + shift


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks (no gradient)."""
    if world() == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        parts = [x.new_empty(max(counts), *x.shape[1:]) for _ in counts]
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        start = sum(ctx.counts[: dist.get_rank()])
        return _Total.apply(grad)[start : start + ctx.counts[dist.get_rank()]], None


def rows(x: Tensor) -> Tensor:
    """The rows of x of all ranks, in their order; ranks may have different numbers of them, also none."""
    return x if world() == 1 else _Rows.apply(x, _counts(len(x)))


def _counts(n: int) -> list[int]:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    found = [torch.zeros((), dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor(n, device=device))
    return [int(c) for c in found]
