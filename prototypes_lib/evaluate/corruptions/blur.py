"""Blur of lenses, glass and motion: four corruptions of ImageNet-C.

All sums run over taps in a fixed order, elementwise over the images, so that an image's pixels do not depend on the
batch it comes in, as those of a matrix product or a convolution may.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from prototypes_lib.evaluate.corruptions.noise import integers, uniform
from prototypes_lib.resampling import Windows, gaussian_windows, mix


def mirrored(place: Tensor, n: int) -> Tensor:
    """Pixels 0 .. n - 1 that places beyond the edges mirror, the edge pixel not repeated (OpenCV's default border)."""
    period = max(1, 2 * (n - 1))
    place = place.remainder(period)
    return torch.minimum(place, period - place)


def disk(radius: float, sigma: float) -> Float[Tensor, "side side"]:
    """A disk in a square of 17 (or 2 · radius + 1) pixels, sum one, blurred by 3 x 3 (5 x 5) taps, zeros cut off.

    The official kernel, with its quirk: the blur mirrors at the edge of the square, so that disks that fill it
    (severities 4 and 5 at 224 px) sum to 1.01 and brighten the image.
    """
    half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    at = torch.arange(-half, half + 1).double()
    kernel = (at[:, None] ** 2 + at**2 <= radius**2).double()
    kernel /= kernel.sum()
    tap = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (tap / sigma).double() ** 2).exp()
    weights /= weights.sum()
    places = mirrored(torch.arange(2 * half + 1)[:, None] + tap, 2 * half + 1)
    kernel = (kernel[places] * weights[:, None]).sum(1)
    kernel = (kernel[:, places] * weights).sum(2)
    extent = int((kernel.amax(0) > 1e-12).nonzero().sub(half).abs().max())
    return kernel[half - extent : half + extent + 1, half - extent : half + extent + 1].float()


def defocus_blur(x: Float[Tensor, "batch 3 h w"], c: tuple[float, float], draws: Sequence[Generator]) -> Tensor:
    """Convolution with `disk(*c)`, mirrored at the edges: a lens out of focus."""
    kernel = disk(*c)
    reach = len(kernel) // 2
    height, width = x.shape[2:]
    rows, columns = (mirrored(torch.arange(-reach, n + reach), n).to(x.device) for n in (height, width))
    padded, out = x[:, :, rows][..., columns], torch.zeros_like(x)
    for dy, line in enumerate(kernel.tolist()):
        for dx, weight in enumerate(line):
            if weight:
                out.add_(padded[..., dy : dy + height, dx : dx + width], alpha=weight)
    return out


def smoothed(x: Float[Tensor, "batch 3 h w"], sigma: float) -> Tensor:
    """Gaussian blur, edge pixels repeated outside."""
    each = torch.full((len(x),), float(sigma))
    return mix(x, *(gaussian_windows(each, n, x.device) for n in x.shape[2:]))


def glass_blur(x: Float[Tensor, "batch 3 h w"], c: tuple[float, int, int], draws: Sequence[Generator]) -> Tensor:
    """Blur by sigma, move pixels by up to delta `times` times, blur again: frosted glass. c = (sigma, delta, times)."""
    sigma, delta, times = c
    came = shuffled(*x.shape[2:], delta, times, draws).to(x.device)
    x = smoothed(x, sigma)
    moved = x.flatten(2).gather(2, came[:, None].expand(-1, 3, -1))
    return smoothed(moved.view_as(x), sigma)


def shuffled(
    height: int, width: int, delta: int, times: int, draws: Sequence[Generator]
) -> Int[Tensor, "batch {height}*{width}"]:
    """Where each pixel of the shuffled image comes from, rows after rows, after `times` passes of the official loop.

    The loop visits pixels from the last to the first and means to swap each with one up to delta away. Its swap
    is of two numpy views, and so a copy: the visited pixel takes the other's value, the other keeps it. A pixel
    takes what is there at that time: a pixel not yet visited is as before the pass, a visited one has in its turn
    what it took. Following visited ones to their end (by doubling the steps) gives the pass without a loop.
    """
    home = torch.arange(height * width).expand(len(draws), -1)
    visited = torch.zeros(height, width, dtype=torch.bool)
    visited[delta + 1 : height - delta + 1, delta + 1 : width - delta + 1] = True
    visited = visited.flatten()
    came = home
    for _ in range(times):
        dy, dx = integers(draws, -delta, delta, 2, height * width).unbind(1)
        taken = torch.where(visited, home + dy * width + dx, home)
        end = torch.where((taken > home) & visited[taken], taken, home)
        while not torch.equal(end, further := end.gather(1, end)):
            end = further
        came = came.gather(1, taken.gather(1, end))
    return came


def motion_blur(x: Float[Tensor, "batch 3 h w"], c: tuple[int, float], draws: Sequence[Generator]) -> Tensor:
    """Blur in one direction, at most 45° from the horizontal: a camera that moves. c = (radius, sigma) in pixels."""
    return swept(x, *c, 90 * uniform(draws).double() - 45)


def swept(x: Float[Tensor, "batch c h w"], radius: int, sigma: float, degrees: Float[Tensor, " batch"]) -> Tensor:
    """Half a Gaussian of 2 · radius + 1 taps along a line from each pixel, as ImageMagick blurs motion.

    Taps lie at the nearest pixels, the edge is repeated outside; degrees (CPU), clockwise from the right.
    """
    tap = torch.arange(2 * radius + 1).double()
    weights = (-0.5 * (tap / sigma) ** 2).exp()
    weights /= weights.sum()
    angle = degrees.double()[:, None].deg2rad()
    right, down = ((tap * f(angle) - 0.5).ceil().long().to(x.device) for f in (torch.cos, torch.sin))
    height, width = x.shape[2:]
    y, column = (torch.arange(n, device=x.device) for n in (height, width))
    out = torch.zeros_like(x)
    for t, weight in enumerate(weights.tolist()):
        rows = (y + down[:, t, None]).clamp(0, height - 1)
        columns = (column + right[:, t, None]).clamp(0, width - 1)
        place = (rows[:, :, None] * width + columns[:, None]).flatten(1)
        out.add_(x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1)).view_as(x), alpha=weight)
    return out


def zoom_blur(x: Float[Tensor, "batch 3 h w"], c: tuple[float, float], draws: Sequence[Generator]) -> Tensor:
    """Mean of the image and its zooms 1, 1 + step, ... below `end`: a camera that closes in. c = (end, step)."""
    factors = np.arange(1, *c).tolist()  # its rounding decides whether `end` is the last: the official list
    total = x.clone()
    for factor in factors:
        total += zoomed(x, factor)
    return total / (len(factors) + 1)


def zoomed(x: Float[Tensor, "batch c h w"], factor: float) -> Float[Tensor, "batch c h w"]:
    """The central part, enlarged by `factor` with linear interpolation between corner pixels (scipy.ndimage.zoom)."""
    return mix(x, *(_zoom_windows(n, factor, len(x), x.device) for n in x.shape[2:]))


def _zoom_windows(side: int, factor: float, n: int, device: torch.device) -> Windows:
    kept = math.ceil(side / factor)
    made = round(kept * factor)
    at = (torch.arange(side).double() + (made - side) // 2) * ((kept - 1) / (made - 1))
    first = at.floor()
    weights = torch.stack([1 - (at - first), at - first], 1).float()
    first = (side - kept) // 2 + first.long()
    return first.expand(n, -1).to(device), weights.expand(n, -1, -1).to(device)
