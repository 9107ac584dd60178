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

    def change(which, operation, *parameters):
        chosen = which.flatten().nonzero().squeeze(1)
        if len(chosen):
            here = chosen.to(x.device)
            x[here] = operation(x[here], *(p.flatten()[chosen] for p in parameters))

    for place in looks.order.unbind(-1):
        for i, operation in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
            change(looks.jitter & (place == i), operation, looks.factors[..., i])
    change(looks.gray, lambda y: grayscale(y).expand_as(y))
    change(looks.sigma > 0, gaussian_blur, looks.sigma)
    change(looks.solarize, solarize)
    return x


def grayscale(x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1 height width"]:
    """Luma 0.2989 R + 0.587 G + 0.114 B."""
    r, g, b = GRAY_WEIGHTS
    return r * x[:, 0:1] + g * x[:, 1:2] + b * x[:, 2:3]


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    factor = factor.to(x.device)[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def adjust_brightness(x: Float[Tensor, "n 3 height width"], factor: Float[Tensor, "n"]) -> Tensor:
    """Blend with black: clamp(f x, 0, 1)."""
    return _blend(x, 0.0, factor)


def adjust_contrast(x: Float[Tensor, "n 3 height width"], factor: Float[Tensor, "n"]) -> Tensor:
    """Blend with the image's mean luma m: clamp(f x + (1 − f) m, 0, 1)."""
    return _blend(x, grayscale(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Float[Tensor, "n 3 height width"], factor: Float[Tensor, "n"]) -> Tensor:
    """Blend each pixel with its luma: clamp(f x + (1 − f) luma(x), 0, 1)."""
    return _blend(x, grayscale(x), factor)


def adjust_hue(x: Float[Tensor, "n 3 height width"], shift: Float[Tensor, "n"]) -> Tensor:
    """Rotate the hue of HSV by `shift` turns, with value V = max(R, G, B) and chroma C = V − min(R, G, B) kept.

    Back to RGB without sectors: a channel is V − C clamp(min(k, 4 − k), 0, 1), k = (n + 6 hue) mod 6, n = 5, 3, 1.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    # The difference and the offset of the channel that is largest; a tie gives the same hue either way.
    red, green = value == r, value == g
    difference = torch.where(red, g - b, torch.where(green, b - r, r - g))
    offset = torch.where(red, 0.0, torch.where(green, 2.0, 4.0))
    hue6 = difference / chroma.masked_fill(chroma == 0, 1.0) + offset + 6 * shift.to(x.device)[:, None, None]
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None] + hue6[:, None]).remainder_(6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value[:, None] - chroma[:, None] * k


def gaussian_blur(x: Float[Tensor, "n 3 height width"], sigma: Float[Tensor, "n"]) -> Tensor:
    """Blur each image by its own Gaussian (sigma in pixels), edge pixels repeated outside: T_h x T_wᵀ."""
    height, width = x.shape[-2:]
    rows = blur_matrix(sigma, height, x.device)[:, None]
    columns = rows if width == height else blur_matrix(sigma, width, x.device)[:, None]
    return (rows @ x @ columns.mT).clamp_(0, 1)


def blur_matrix(
    sigma: Float[Tensor, "n"], size: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "n {size} {size}"]:
    """Toeplitz matrices of normalized Gaussian kernels, the weight beyond an edge added to the edge pixel."""
    reach = math.ceil(5 * float(sigma.max()))  # leaves out 6e-7 of the widest kernel
    offset = torch.arange(-reach, reach + 1)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1).to(device)
    # Row i of a padded matrix has the kernel in columns i .. i + 2 reach: windows over the zero-padded kernel.
    padded = torch.nn.functional.pad(kernel, (size - 1, size - 1)).unfold(1, size + 2 * reach, 1).flip(1)
    matrix = padded[:, :, reach : reach + size].clone()
    matrix[:, :, 0] += padded[:, :, :reach].sum(2)
    matrix[:, :, -1] += padded[:, :, reach + size :].sum(2)
    return matrix


def solarize(x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 height width"]:
    """Invert the bright half: 1 − x where x ≥ 1/2 (an 8-bit value of 128 or more)."""
    return torch.where(x >= 0.5, 1 - x, x)
