"""Which patches the student does not see: the block masks of BEiT, drawn as iBOT and DINOv2 draw them.

MSN takes patches away instead, the same of every image (`dropped`).

A mask is a random parameter of a training step like a crop box, so it is drawn on the CPU from a generator and then
moved; all images of a batch advance together, one block at a time.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def block_masks(
    n: int,
    grid: tuple[int, int],
    ratio: float | tuple[float, float] = (0.1, 0.5),
    *,
    generator: torch.Generator,
    masked: float = 0.5,
    stratified: bool = False,
    shape: str = "block",
    min_area: int | None = None,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, "n height width"]:
    """Draw n masks over a grid of (height, width) patches; True is hidden from the student.

    `ratio` (low, high) and `masked` are those of `mask_ratios`; one number instead masks each image by that ratio.
    `shape` is "block" or "rand" (patches independently of each other). `min_area` is the area in patches where block
    areas start, ⌊min(height, width) / 3⌋² unless given (DINOv2: 4). An image gets at most ⌊ratio · patches⌋ masked
    patches, in blocks often a few less.

    Raises: ValueError for a ratio outside [0, 1], another shape, or a grid too small for blocks.
    """
    fixed = isinstance(ratio, int | float)
    low, high = (ratio, ratio) if fixed else ratio
    if not 0 <= low <= high <= 1 or not 0 <= masked <= 1:
        raise ValueError(f"mask ratios must satisfy 0 <= low <= high <= 1, got ratio {ratio}, masked {masked}")
    if shape not in ("block", "rand"):
        raise ValueError(f'mask shape must be "block" or "rand", got "{shape}"')
    if min(grid) < (2 if shape == "block" else 1):
        raise ValueError(f'a grid of {grid[0]} x {grid[1]} patches is too small for "{shape}" masks')
    if fixed:
        ratios = torch.full((n,), float(ratio))
    else:
        ratios = mask_ratios(n, ratio, generator=generator, masked=masked, stratified=stratified)
    # A quota is not a whole number (iBOT); DINOv2 rounds it down. The small term is against 0.3 · 10 giving 2.
    quotas = ratios * math.prod(grid) + 1e-4
    quotas = quotas.floor() if stratified else quotas
    masks = _random(quotas, grid, generator) if shape == "rand" else _blocks(quotas, grid, min_area, generator)
    return masks.to(device)


def dropped(grid: tuple[int, int], share: float, *, generator: torch.Generator) -> Bool[Tensor, "height width"]:
    """Draw which patches a whole batch goes without: N - floor(N (1 - share)) of the N at random (MSN's patch drop).

    Raises: ValueError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} of dropped patches must lie in [0, 1)")
    patches = math.prod(grid)
    kept = int(patches * (1 - share) + 1e-9)
    return torch.randperm(patches, generator=generator).view(grid) >= kept


def mask_ratios(
    n: int,
    ratio: tuple[float, float] = (0.1, 0.5),
    *,
    generator: torch.Generator,
    masked: float = 0.5,
    stratified: bool = False,
) -> Float[Tensor, "n"]:
    """Draw the fraction of patches to mask in each of n images.

    iBOT: each image is masked with probability `masked`, its ratio uniform in `ratio`. `stratified` (DINOv2): exactly
    ⌊n · masked⌋ images are masked, one ratio uniform in each of as many equal parts of the interval, shuffled.
    """
    low, high = ratio
    u = torch.rand(n, generator=generator)
    if not stratified:
        chosen = torch.rand(n, generator=generator) < masked
        return torch.where(chosen, low + (high - low) * u, 0.0)
    n_masked = int(n * masked)
    part = torch.arange(n)
    ratios = torch.where(part < n_masked, low + (high - low) * (part + u) / max(n_masked, 1), 0.0)
    return ratios[torch.randperm(n, generator=generator)]


def _random(quotas: Float[Tensor, "n"], grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    rank = torch.rand(len(quotas), math.prod(grid), generator=generator).argsort(1).argsort(1)
    return (rank < quotas.floor()[:, None]).view(-1, *grid)


def _blocks(
    quotas: Float[Tensor, "n"], grid: tuple[int, int], min_area: int | None, generator: torch.Generator
) -> Tensor:
    """Add blocks to each mask until its quota is reached or ten proposals in a row do not fit."""
    height, width = grid
    least = (min(grid) // 3) ** 2 if min_area is None else min_area
    masks = torch.zeros(len(quotas), height, width, dtype=torch.bool)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    active = (quotas >= 1).nonzero().squeeze(1)
    while len(active):
        mask = masks[active]
        remaining = (quotas[active] - mask.sum((1, 2)))[:, None]
        top, left, tall, wide, fits = _proposals(remaining, grid, max(least, 1), generator)
        # A summed-area table gives the patches of each proposal that are masked already.
        table = torch.nn.functional.pad(mask.int().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)

        def corner(row, column, table=table):
            return table.gather(1, row * (width + 1) + column)

        bottom, right = top + tall, left + wide
        old = corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)
        new = tall * wide - old
        accepted = fits & (new > 0) & (new <= remaining)
        first = accepted.byte().argmax(1, keepdim=True)
        t, b, l, r = (v.gather(1, first)[:, :, None] for v in (top, bottom, left, right))
        block = (y >= t) & (y < b) & (x >= l) & (x < r)
        progress = accepted.any(1)
        masks[active] = mask | (block & progress[:, None, None])
        active = active[progress & (masks[active].sum((1, 2)) <= quotas[active] - 1)]
    return masks


def _proposals(
    remaining: Float[Tensor, "n 1"], grid: tuple[int, int], least: int, generator: torch.Generator, attempts: int = 10
) -> tuple[Tensor, ...]:
    """Blocks of area uniform between `least` and the remaining patches, aspect log-uniform in (0.3, 1 / 0.3)."""
    height, width = grid
    u = torch.rand(4, len(remaining), attempts, generator=generator)
    area = least + (remaining - least) * u[0]
    aspect = torch.exp(math.log(0.3) * (1 - 2 * u[1]))
    tall, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (tall < height) & (wide < width)
    tall, wide = tall.clamp_max(height), wide.clamp_max(width)
    top = (u[2] * (height - tall + 1)).floor().long()
    left = (u[3] * (width - wide + 1)).floor().long()
    return top, left, tall, wide, fits
