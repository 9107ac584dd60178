"""Noise of sensors and of transmission: three corruptions of ImageNet-C, and the random numbers of the other twelve.

Numbers are drawn on the CPU, image by image, each from a generator of its own: they depend on neither batch nor device.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor


def normal(draws: Sequence[Generator], *shape: int) -> Float[Tensor, "batch ..."]:
    """Standard normal numbers, `shape` of them an image, on the CPU."""
    return torch.stack([torch.randn(shape, generator=g) for g in draws])


def uniform(draws: Sequence[Generator], *shape: int) -> Float[Tensor, "batch ..."]:
    """Uniform numbers in [0, 1), `shape` of them an image, on the CPU."""
    return torch.stack([torch.rand(shape, generator=g) for g in draws])


def integers(draws: Sequence[Generator], low: int, high: int, *shape: int) -> Int[Tensor, "batch ..."]:
    """Integers low .. high - 1, `shape` of them an image, on the CPU."""
    return torch.stack([torch.randint(low, high, shape, generator=g) for g in draws])


def gaussian_noise(x: Float[Tensor, "batch 3 h w"], c: float, draws: Sequence[Generator]) -> Tensor:
    """x + c · normal, every value on its own: little light."""
    return x + c * normal(draws, *x.shape[1:]).to(x.device)


def shot_noise(x: Float[Tensor, "batch 3 h w"], c: float, draws: Sequence[Generator]) -> Tensor:
    """Poisson(c x) / c: light arrives in about c photons where it is brightest."""
    counts = [torch.poisson(c * image, generator=g) for image, g in zip(x.cpu(), draws, strict=True)]
    return torch.stack(counts).to(x.device) / c


def impulse_noise(x: Float[Tensor, "batch 3 h w"], c: float, draws: Sequence[Generator]) -> Tensor:
    """A share c of the values, each channel on its own, becomes 0 or 1 with equal chance: salt and pepper."""
    u = uniform(draws, *x.shape[1:]).to(x.device)
    return torch.where(u < c, (u < c / 2).to(x.dtype), x)
