"""The fifteen common corruptions of ImageNet-C at five severities, made on the fly (Hendrycks & Dietterich 2019).

`TABLE` holds every published parameter; what they mean is said where the corruption is (noise, blur, weather, digital).
"""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prototypes_lib.evaluate.corruptions import blur, digital, noise, weather
from prototypes_lib.views import eval_view


@dataclass(frozen=True)
class Kind:
    """A corruption: its group, its function, and its parameters at severities 1 .. 5 for large and for small images."""

    group: str
    function: Callable[..., Tensor]
    imagenet: tuple[Any, ...]  # ImageNet-C, 224 px
    cifar: tuple[Any, ...]  # CIFAR-10-C, 32 px


_AFFINE = 244 / 224  # elastic_transform is made for 244 pixels in the official code, of images of 224
TABLE = {
    "gaussian_noise": Kind(
        "noise", noise.gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.1)
    ),
    "shot_noise": Kind("noise", noise.shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": Kind("noise", noise.impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Kind(
        "blur", blur.defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": Kind(
        "blur", blur.glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": Kind(
        "blur", blur.motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": Kind(
        "blur", blur.zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": Kind(
        "weather", weather.snow,
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    ),
    "frost": Kind(
        "weather", weather.frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": Kind(
        "weather", weather.fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": Kind("weather", weather.brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Kind("digital", digital.contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Kind(
        "digital", digital.elastic_transform,
        tuple(tuple(_AFFINE * share for share in c) for c in (
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02),
        )),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Kind("digital", digital.pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Kind("digital", digital.jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}  # fmt: skip
CORRUPTIONS = tuple(TABLE)
SEVERITIES = (1, 2, 3, 4, 5)
GROUPS = {g: tuple(n for n, k in TABLE.items() if k.group == g) for g in ("noise", "blur", "weather", "digital")}
SMALL = 85  # pixels: an image with a shorter side than this is nearer, by ratio, to 32 than to 224
TOGETHER = {True: 2**19, False: 2**27}  # values of images corrupted at once on a CPU (2 MB, within its cache), on a GPU


@dataclass(frozen=True)
class Corruption:
    """A corruption as `features.extract` takes it: called with pixels and the images' numbers.

    size: side of the evaluation view (`views.eval_view`) that is made first, as ImageNet-C is made of central squares
    of 224 pixels; None takes the images as they are. The view is rounded to 8 bits.

    Raises: ValueError, one line, for an unknown name, a severity outside 1 .. 5 or a size below 8.
    """

    name: str
    severity: int
    seed: int = 0
    size: int | None = None

    def __post_init__(self):
        check(self.name, self.severity)
        if self.size is not None and self.size < 8:
            raise ValueError(f"corruptions need images of 8 pixels at least, not size={self.size}")

    def __call__(self, pixels: Tensor, indices: Tensor) -> Tensor:
        if self.size is not None and tuple(pixels.shape[2:]) != (self.size, self.size):
            view = eval_view(pixels, self.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
            pixels = (view * 255).round_().byte()
        return corrupt(pixels, self.name, self.severity, indices, self.seed)


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, indices: Tensor, seed: int = 0) -> Tensor:
    """Corrupt uint8 images (batch, 3, height, width), each a function of (seed, name, severity, its index) alone.

    Random numbers are drawn on the CPU, so that neither batch nor device change them; pixels are made on the images'
    device (JPEG on the CPU), in float32. Parameters are those of CIFAR-10-C for images nearer to 32 than to 224 pixels
    (shorter side below 85), else ImageNet-C's.

    Differences from the official code: frost is drawn instead of photographed; values are rounded to 8 bits at the end,
    not cut off; there is no JPEG of quality 85 in between, in which ImageNet-C is stored; Gaussians end at 5 sigma
    instead of 4; elastic places are exact, not in 1/32 pixels; other random numbers. Its quirks are kept: the defocus
    kernel's border, the shuffling of glass, which copies instead of swapping.

    Raises: ValueError, one line, for images, indices, a name or a severity that are none.
    """
    check(name, severity)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 8:
        raise ValueError(
            "corruptions take uint8 images (batch, 3, height, width) of 8 pixels at least, "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if indices.shape != images.shape[:1] or indices.is_floating_point():
        raise ValueError(f"corruptions need a number for each of {len(images)} images, not {tuple(indices.shape)}")
    kind, made = TABLE[name], torch.empty_like(images, memory_format=torch.contiguous_format)
    c = (kind.cifar if min(images.shape[2:]) < SMALL else kind.imagenet)[severity - 1]
    step = max(1, TOGETHER[images.device.type == "cpu"] // max(1, images[:1].numel()))
    for start in range(0, len(images), step):
        own = slice(start, start + step)
        draws = [_generator(seed, name, severity, i) for i in indices[own].tolist()]
        with torch.autocast(images.device.type, enabled=False):
            x = kind.function(images[own].float() / 255, c, draws)
            made[own] = (x.clamp(0, 1) * 255).round().byte()
    return made


def check(name: str, severity: int) -> None:
    """Raise ValueError, one line, unless there is such a corruption of such a severity."""
    if name not in TABLE:
        near = difflib.get_close_matches(str(name), TABLE, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TABLE)}"
        raise ValueError(f"no corruption {name!r}; {hint}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r} of {name} must be 1, 2, 3, 4 or 5")


def _generator(seed: int, name: str, severity: int, index: int) -> torch.Generator:
    """A stream of its own for each image: the seed is a hash, since near seeds could give streams that resemble."""
    words = f"{seed} {name} {severity} {index}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1)
