"""Photometric augmentation of a batch of images, each image with its own parameters.

The chain of DINO: color jitter in a random order, grayscale, Gaussian blur, solarization. Random numbers and pixels
are kept apart: `draw_looks` says what happens to each image, `apply_looks` does it and is deterministic. The
parameters stay on the CPU, so the images an operation concerns are known without waiting for an accelerator.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prototypes_lib.resampling import gaussian_windows, mix

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, the digits torchvision uses


@dataclass(frozen=True)
class Photometric:
    """Probabilities (jitter, gray, blur, solarize) and strengths of the photometric operations on one kind of view.

    A factor of brightness, contrast or saturation is uniform in [max(0, 1 − s), 1 + s], a hue shift in [−s, s] turns.

    Raises: ValueError for a probability outside [0, 1], a negative strength, or a hue strength above 0.5.
    """

    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0

    def __post_init__(self):
        highest = dict.fromkeys(("brightness", "contrast", "saturation"), math.inf) | {"hue": 0.5}
        for field in fields(self):
            value, high = getattr(self, field.name), highest.get(field.name, 1.0)
            if not 0 <= value <= high:
                raise ValueError(f"Photometric.{field.name} must be in [0, {high:g}], got {value}")


@dataclass(frozen=True)
class Looks:
    """What happens to each image: CPU tensors with the views of a batch in the leading dimensions."""

    jitter: Bool[Tensor, "*n"]
    factors: Float[Tensor, "*n 4"]  # brightness, contrast, saturation, hue
    order: Int[Tensor, "*n 4"]  # permutations of 0..3: which of the factors comes first, second, ...
    gray: Bool[Tensor, "*n"]
    sigma: Float[Tensor, "*n"]  # standard deviation of the blur in pixels, 0 where there is none
    solarize: Bool[Tensor, "*n"]


def draw_looks(
    kinds: tuple[Photometric, ...], n: int, blur_sigma: tuple[float, float], generator: torch.Generator
) -> Looks:
    """Draw the looks of n images in each of the views `kinds`; leading dimensions (views, n)."""
    shape = (len(kinds), n)

    def rand(*extra: int) -> Tensor:
        return torch.rand(*shape, *extra, generator=generator)

    def happens(name: str) -> Tensor:
        return rand() < torch.tensor([getattr(kind, name) for kind in kinds])[:, None]

    strength = torch.tensor([[k.brightness, k.contrast, k.saturation, k.hue] for k in kinds])[:, None]
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low = torch.maximum(neutral - strength, torch.tensor([0.0, 0.0, 0.0, -0.5]))
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * rand()
    return Looks(
        jitter=happens("jitter"),
        factors=low + (neutral + strength - low) * rand(4),
        order=rand(4).argsort(-1),
        gray=happens("gray"),
        sigma=torch.where(happens("blur"), sigma, 0.0),
        solarize=happens("solarize"),
    )


def apply_looks(x: Float[Tensor, "n 3 height width"], looks: Looks) -> Float[Tensor, "n 3 height width"]:
    """Apply jitter, gray, blur and solarize, in this order, to images in [0, 1]. `x` is overwritten.

    Differs from the official pipeline, which rounds to 8 bits after each operation and whose blur (Pillow) is three
    box filters: here pixels stay float32 and the blur is a Gaussian.
    """
    where = torch.arange(len(x))  # the image at each place of x
    spare = torch.empty_like(x)  # where the sorted images go; the two take turns

    def sorted_by(kind, n_kinds=1):
        """Sort the images by what comes next; the images of kinds 0, 1, ... and their numbers, runs of memory."""
        nonlocal x, spare, where
        order = kind.flatten()[where].argsort(stable=True)
        if (order.diff() < 0).any():
            x, spare, where = torch.index_select(x, 0, order.to(x.device), out=spare), x, where[order]
        counts = kind.flatten().bincount(minlength=n_kinds).tolist()[:n_kinds]
        ends = [sum(counts[: i + 1]) for i in range(n_kinds)]
        return [(x[end - n : end], where[end - n : end]) for n, end in zip(counts, ends, strict=True)]

    factors, sigma = looks.factors.flatten(0, -2), looks.sigma.flatten()
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for operation in looks.order.unbind(-1):
        runs = sorted_by(torch.where(looks.jitter, operation, len(operations)), len(operations))
        for i, (images, which) in enumerate(runs):
            if len(which):
                operations[i](images, factors[which, i])
    for chosen, change in (
        (looks.gray, lambda images, which: images.copy_(grayscale(images))),
        (looks.sigma > 0, lambda images, which: gaussian_blur(images, sigma[which])),
        (looks.solarize, lambda images, which: solarize(images)),
    ):
        ((images, which),) = sorted_by((~chosen).long())
        if len(which):
            change(images, which)
    return torch.index_select(x, 0, where.argsort().to(x.device), out=spare)


def grayscale(x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1 height width"]:
    """Luma 0.2989 R + 0.587 G + 0.114 B."""
    r, g, b = GRAY_WEIGHTS
    return (r * x[:, 0:1]).add_(g * x[:, 1:2]).add_(b * x[:, 2:3])


def _each(values: Float[Tensor, "n"], x: Tensor) -> Float[Tensor, "n 1 1 1"]:
    return values.to(x.device)[:, None, None, None]


def adjust_brightness(x: Float[Tensor, "n 3 height width"], factor: Float[Tensor, "n"]) -> Tensor:
    """Blend with black, in place: clamp(f x, 0, 1)."""
    return x.mul_(_each(factor, x)).clamp_(0, 1)


def adjust_contrast(x: Float[Tensor, "n 3 height width"], factor: Float[Tensor, "n"]) -> Tensor:
    """Blend with the image's mean luma m, in place: clamp(f x + (1 − f) m, 0, 1)."""
    rows = grayscale(x).mean(3, keepdim=True)  # in two steps, whose order depends neither on n nor on threads
    mean, factor = rows.mean(2, keepdim=True), _each(factor, x)
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Float[Tensor, "n 3 height width"], factor: Float[Tensor, "n"]) -> Tensor:
    """Blend each pixel with its luma, in place: clamp(f x + (1 − f) luma(x), 0, 1)."""
    luma, factor = grayscale(x), _each(factor, x)
    return x.mul_(factor).add_(luma.mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(x: Float[Tensor, "n 3 height width"], shift: Float[Tensor, "n"]) -> Tensor:
    """Rotate the hue of HSV by `shift` turns, in place; V = max(R, G, B) and chroma C = V − min(R, G, B) are kept.

    Back to RGB without sectors: a channel is V − C clamp(2 − d, 0, 1), where d is how far the hue lies from the
    channel's opposite (cyan 3, magenta 5, yellow 1) on a circle of 6. Masks are numbers: branches would be slow.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(r, g)
    chroma = torch.minimum(r, g)
    torch.maximum(value, b, out=value)
    torch.sub(value, torch.minimum(chroma, b, out=chroma), out=chroma)
    # The difference and the offset of the channel that is largest; a tie gives the same hue either way.
    red, green = value.clone().eq_(r), value.clone().eq_(g)
    green -= red * green
    blue = 1 - red - green
    hue = (g - b).mul_(red).add_((b - r).mul_(green)).add_((r - g).mul_(blue))
    hue.div_(chroma.clamp_min(1e-12))  # a gray pixel has 0 / 1e-12: any hue will do
    hue.add_(green.mul_(2)).add_(blue.mul_(4)).add_(6 * shift.to(x.device)[:, None, None])
    share = (hue[:, None] - torch.tensor([3.0, 5.0, 1.0], device=x.device)[:, None, None]).div_(6)
    share.sub_(share.round()).abs_().mul_(-6).add_(2).clamp_(0, 1).mul_(chroma[:, None])
    return torch.sub(value[:, None], share, out=x)


def gaussian_blur(x: Float[Tensor, "n 3 height width"], sigma: Float[Tensor, "n"]) -> Tensor:
    """Blur each image by its own Gaussian (sigma in pixels, on the CPU), in place, edge pixels repeated outside."""
    rows, columns = (gaussian_windows(sigma, size, x.device) for size in x.shape[-2:])
    return torch.clamp(mix(x, rows, columns), 0, 1, out=x)


def solarize(x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 height width"]:
    """Invert the bright half, x ≥ 1/2 (an 8-bit value of 128 or more), in place: min(x, 1 − x)."""
    return torch.minimum(x, 1 - x, out=x)
