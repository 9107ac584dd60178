"""Weather: four corruptions of ImageNet-C, snow, frost, fog and bright sun."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from prototypes_lib.evaluate.corruptions.blur import swept, zoomed
from prototypes_lib.evaluate.corruptions.noise import normal, uniform

LUMA = (0.299, 0.587, 0.114)


def snow(x: Float[Tensor, "batch 3 h w"], c: tuple[float, ...], draws: Sequence[Generator]) -> Tensor:
    """Flakes that fall, and all turned whiter. c = (mean, deviation, zoom, threshold, radius, sigma, kept).

    Normal noise, zoomed, zero below the threshold, swept along a direction within 45° of the vertical; it is added, as
    it is and turned by 180°, to kept · x + (1 − kept) · max(x, 1.5 luma + 0.5). No rounding to 8 bits in between.
    """
    mean, deviation, zoom, threshold, radius, sigma, kept = c
    flakes = zoomed(mean + deviation * normal(draws, 1, *x.shape[2:]).to(x.device), zoom)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp_(0, 1)
    flakes = swept(flakes, radius, sigma, 90 * uniform(draws).double() - 135)
    luma = sum(weight * x[:, i : i + 1] for i, weight in enumerate(LUMA))
    return kept * x + (1 - kept) * torch.maximum(x, 1.5 * luma + 0.5) + flakes + flakes.rot90(2, (2, 3))


def frost(x: Float[Tensor, "batch 3 h w"], c: tuple[float, float], draws: Sequence[Generator]) -> Tensor:
    """c₀ x + c₁ crystals. Ours are drawn (`crystals`), the official ones photographs that we may not pass on."""
    return c[0] * x + c[1] * crystals(draws, *x.shape[2:], x.device)


def crystals(
    draws: Sequence[Generator], height: int, width: int, device: torch.device | str = "cpu", n: int = 9
) -> Float[Tensor, "batch 3 {height} {width}"]:
    """Frost on a window, each image its own: n stars with feathered arms on a shorter side, blue-white on dark glass.

    A pixel belongs to the nearest star. Folded into one sixth, with u along the arm and v across, an arm is a ridge at
    v = 0 and its feather stripes of constant u − v / √3, at 60° to it. Clouds bend the arms and thin the frost. Sizes
    are shares of the shorter side; stripes are 5 pixels wide at least. All this was chosen by looking.
    """
    side = min(height, width)
    slow, fast, bent = (
        plasma(draws, max(height, width), decay)[:, :height, :width].to(device) for decay in (1.7, 1.25, 1.6)
    )
    rows, columns = ((torch.arange(m, device=device) + 0.5) / side for m in (height, width))
    y, x = rows[:, None] + 0.25 * (bent - 0.5), columns + 0.25 * (slow - 0.5)
    stars = uniform(draws, n, 4).to(device)[..., None, None]
    dy = y[:, None] - (1.2 * stars[:, :, 0] - 0.1) * (height / side)
    dx = x[:, None] - (1.2 * stars[:, :, 1] - 0.1) * (width / side)
    near = (dy.square() + dx.square()).argmin(1, keepdim=True)
    dy, dx = (v.gather(1, near)[:, 0] for v in (dy, dx))
    turn, width_of = (stars[:, :, i, 0, 0].gather(1, near.flatten(1)).view_as(dy) for i in (2, 3))
    sixth = math.pi / 3
    angle = (torch.atan2(dy, dx) + sixth * turn).remainder(sixth) - sixth / 2
    radius = (dy.square() + dx.square()).sqrt()
    u, v = radius * angle.cos(), (radius * angle.sin()).abs()
    stripes = (8 + 14 * width_of).clamp_max(side / 5)
    feather = (math.tau * stripes * (u - v / 3**0.5)).cos().mul(0.5).add(0.5)
    ridge = (-v / 0.015).exp()
    light = (0.15 + 0.55 * torch.maximum(ridge, feather * fast.mul(1.6).clamp_max(1)) + 0.5 * fast) * (0.3 + slow)
    tint = torch.tensor([0.88, 0.95, 1.0], device=device)[:, None, None]
    return (light[:, None] * tint).clamp(0, 1)


def fog(x: Float[Tensor, "batch 3 h w"], c: tuple[float, float], draws: Sequence[Generator]) -> Tensor:
    """(x + amount · plasma) m / (m + amount) with m the largest value of the image. c = (amount, decay)."""
    amount, decay = c
    mist = plasma(draws, max(x.shape[2:]), decay)[:, : x.shape[2], : x.shape[3]].to(x.device)
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * mist[:, None]) * brightest / (brightest + amount)


def plasma(draws: Sequence[Generator], side: int, decay: float) -> Float[Tensor, "batch power power"]:
    """Clouds in [0, 1] by diamonds and squares, on the least torus of 2^m pixels a side that holds `side`.

    Each new point is the mean of its four neighbors plus noise, whose size falls by decay² from one scale to the next.
    """
    side = 2 ** math.ceil(math.log2(side))
    noise = 2 * uniform(draws, side, side) - 1
    height, step, size = torch.zeros_like(noise), side, 100.0**2
    while step > 1:
        half = step // 2
        corner = height[:, ::step, ::step]
        square = corner + corner.roll(-1, 1)
        center = (square + square.roll(-1, 2)) / 4 + size * noise[:, half::step, half::step]
        height[:, half::step, half::step] = center
        above = (center + center.roll(1, 1) + corner + corner.roll(-1, 2)) / 4
        height[:, ::step, half::step] = above + size * noise[:, ::step, half::step]
        left = (center + center.roll(1, 2) + corner + corner.roll(-1, 1)) / 4
        height[:, half::step, ::step] = left + size * noise[:, half::step, ::step]
        step, size = half, size / decay**2
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)


def brightness(x: Float[Tensor, "batch 3 h w"], c: float, draws: Sequence[Generator]) -> Tensor:
    """V + c in HSV, at most 1, hue and saturation kept: colors are scaled, and black, which has neither, turns gray."""
    value = x.amax(1, keepdim=True)
    lit = (value + c).clamp_(max=1)
    return torch.where(value > 0, x * (lit / value), lit)
