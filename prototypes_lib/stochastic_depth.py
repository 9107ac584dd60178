"""Stochastic depth by leaving rows out: a residual branch computes only the rows of the batch that keep it.

As a distribution this is timm's DropPath, x + mask * branch(x) / keep with a Bernoulli(keep) mask over rows, but a
dropped row costs nothing. Masks are made for the whole batch, wherever its rows are, before the blocks run: the split
over processes and parts changes nothing, and activations that are computed twice meet the same mask.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import no_type_check

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prototypes_lib import ranks

# of one branch in one call: the rows that compute it, and their weights 1 / keep; None where all do
Rows = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Place:
    """Where the rows of this process are: of each view of `batch` images, those from `start` on, `size` of them."""

    generator: torch.Generator
    batch: int
    start: int
    size: int


_place: _Place | None = None


@contextlib.contextmanager
def at(seed: int, batch: int, part: int = 0, parts: int = 1) -> Iterator[None]:
    """Inside, masks are a function of (seed, call, branch, place in the batch), drawn from no global generator.

    A call has rows [view 0, view 1, ...], of each view this process's slice of the batch; calls are told apart by their
    order, and a network that drops nothing (a teacher, eval mode) takes no part.

    Args:
        seed: of the step. batch: images of the step, over all processes and parts.
        part, parts: which of the equal parts that the batch is cut into, one after the other (`accumulate`).

    Raises:
        ValueError: a batch that does not cut into as many equal slices.
    """
    global _place
    size, rest = divmod(batch, parts * ranks.world())
    if rest:
        raise ValueError(f"a batch of {batch} images does not cut into {parts} parts on {ranks.world()} processes each")
    start = part * (batch // parts) + ranks.rank() * size
    before, _place = _place, _Place(torch.Generator().manual_seed(seed), batch, start, size)
    try:
        yield
    finally:
        _place = before


class SkippingBlock(Block):
    """timm's block, whose two branches can be computed for some of the rows only."""

    @no_type_check  # so that under pytest no check of types comes between a block and torch.compile
    def forward(self, x, *args, kept=None, **options):
        """timm's own forward, or, with the (rows, weights) of both branches, theirs; see `draw`."""
        if kept is None:
            return super().forward(x, *args, **options)
        x = _add(x, kept[0], lambda rows: self.ls1(self.attn(self.norm1(rows))))
        return _add(x, kept[1], lambda rows: self.ls2(self.mlp(self.norm2(rows))))


@no_type_check
def _add(x, kept, branch):
    if kept is None:
        return x + branch(x)
    index, weight = kept
    rows = branch(x.index_select(0, index)) * weight[:, None, None]
    return x.index_add(0, index, rows.to(x.dtype))


class _Masked(DropPath):
    """timm's DropPath with the rows that `run` sets."""

    kept: Rows = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return super().forward(x)
        index, weight = self.kept
        mask = weight.new_zeros(len(x)).index_copy(0, index, weight)
        return x * mask.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def prepare(blocks: Iterable[nn.Module]) -> None:
    """Let these blocks take masks, in place; their weights, names and rates (`drop_prob`) stay as they are.

    Transformer blocks skip the rows they drop. Others (a ResNet's, whose BatchNorm wants the whole batch) compute all
    and weight them. Called without masks, a block is timm's own.
    """
    for block in blocks:
        if type(block) is Block:
            block.__class__ = SkippingBlock  # so copies, hooks and state dicts need nothing
            for name in ("drop_path1", "drop_path2"):  # all blocks alike: torch.compile then makes one program
                if not isinstance(getattr(block, name), DropPath):
                    setattr(block, name, DropPath(0.0))
        else:
            for path in _paths(block):
                path.__class__ = _Masked


def draw(blocks: Iterable[nn.Module], x: Tensor) -> list[list[Rows] | None]:
    """Masks for one call with the rows of x: for each block None, or the rows that each of its branches keeps.

    Outside `at` they come from torch's global generator; where nothing is dropped, none is touched. A branch that fewer
    than two rows keep computes the first two all the same, with weight 0: without any its parameters would have no
    gradient, and for a single one torch.compile makes a program of its own.

    Raises:
        ValueError: rows that are no whole number of this process's slices of the batch.
    """
    rates = [[p.drop_prob if p.training else 0.0 for p in _paths(block)] for block in blocks]
    dropping = torch.tensor([rate for branches in rates for rate in branches if rate], dtype=torch.float64)
    if not len(dropping) or not len(x):
        return [None] * len(rates)
    keep = _uniform(len(dropping), len(x)) >= dropping[:, None]
    weight = keep / (1 - dropping[:, None]).clamp_min(1e-9)
    keep[keep.sum(1) < 2, :2] = True
    sizes = keep.sum(1).tolist()
    index = keep.nonzero()[:, 1].to(x.device, non_blocking=True)
    weight = weight[keep].to(x.device, torch.promote_types(x.dtype, torch.float32), non_blocking=True)
    found = zip(index.split(sizes), weight.split(sizes), strict=True)
    return [[next(found) if rate else None for rate in branches] if any(branches) else None for branches in rates]


def run(block: nn.Module, x: Tensor, kept: list[Rows] | None) -> Tensor:
    """The block's output with what `draw` made for it."""
    if kept is None:
        return block(x)
    if isinstance(block, SkippingBlock):
        return block(x, kept=kept)
    paths = _paths(block)
    for path, rows in zip(paths, kept, strict=True):
        path.kept = rows
    try:
        return block(x)
    finally:  # also where a checkpoint stops a recomputation half-way
        for path in paths:
            path.kept = None


def _paths(block: nn.Module) -> list[DropPath]:
    """The block's drop paths, one a branch."""
    return [m for m in block.modules() if isinstance(m, DropPath)]


def _uniform(branches: int, rows: int) -> Tensor:
    """A number in [0, 1) for each branch and row: drawn for the whole batch, these rows cut out of it."""
    if _place is None:
        return torch.rand(branches, rows)
    views, rest = divmod(rows, _place.size)
    if rest:
        raise ValueError(f"{rows} rows are no whole number of views of {_place.size} images, as stochastic depth needs")
    whole = torch.rand(branches, views, _place.batch, generator=_place.generator)
    return whole[..., _place.start : _place.start + _place.size].flatten(1)
