"""Multi-crop views of a batch of images on any device, each image with its own random parameters (DINO).

A resized crop is linear and separable, view = W_y · image · W_xᵀ, with the bicubic antialiased weights of the crop box
in W_y (size × height) and W_x (size × width), both banded (`resampling`); a horizontal flip reverses the rows of W_x.
Random numbers are drawn on the CPU, from a generator, before any pixel is touched, so that a seed means the same views
on every device. All views of one size are made together, on a CPU those of so many images that they stay in its cache.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prototypes_lib.photometric import Looks, Photometric, apply_looks, draw_looks
from prototypes_lib.resampling import Windows, cubic_windows, mix

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TOGETHER = {True: 2**20, False: 2**29}  # pixels of views made at once on a CPU (4 MB, within its cache), on a GPU


@dataclass(frozen=True)
class Crops:
    """Where each view looks: top, left, height, width of its box in pixels, and whether it is flipped (on the CPU)."""

    boxes: Int[Tensor, "views batch 4"]
    flip: Bool[Tensor, "views batch"]


# What DINO does to the colors of its first global, further global, and local views.
GLOBAL_1 = Photometric(blur=1.0)
GLOBAL_2 = Photometric(blur=0.1, solarize=0.2)
LOCAL = Photometric(blur=0.5)
MSN = Photometric(saturation=0.4, blur=0.5)
SWAV = Photometric(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)
# a method's `Views.colors`, as the arguments first, second, local of MultiCrop
COLORS = {
    name: dict(zip(("first", "second", "local"), looks, strict=True))
    for name, looks in {"dino": (GLOBAL_1, GLOBAL_2, LOCAL), "msn": (MSN,) * 3, "swav": (SWAV,) * 3}.items()
}


@dataclass(frozen=True)
class MultiCrop:
    """The views of DINO: n_global large crops and n_local small ones, ordered [global 1, global 2, local 1, ...].

    Sizes are in pixels, scales are fractions of the image area, `blur_sigma` is in pixels of the view (for small
    images, scale it with the size). The first global view is always blurred, a further one seldom but sometimes
    solarized: `first`, `second` and `local` hold these differences.

    Differs from the official code: float32 from crop to normalization (no rounding to 8 bits in between), a Gaussian
    instead of Pillow's approximation of it, images as one array.

    Raises: ValueError for a count, size, scale, probability or std that makes no sense.
    """

    n_global: int = 2
    n_local: int = 10
    global_size: int = 224
    local_size: int = 96
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    flip: float = 0.5
    first: Photometric = GLOBAL_1
    second: Photometric = GLOBAL_2
    local: Photometric = LOCAL
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        for name, least in (("n_global", 1), ("n_local", 0), ("global_size", 1), ("local_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"MultiCrop.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"MultiCrop.{name} must satisfy 0 < low <= high <= 1, got {(low, high)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"MultiCrop.flip must be a probability in [0, 1], got {self.flip}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise ValueError(f"MultiCrop.blur_sigma must satisfy 0 < low <= high, got {self.blur_sigma}")
        if min(self.std) <= 0:
            raise ValueError(f"MultiCrop.std must be positive, got {self.std}")

    def views(self, images: Tensor, generator: torch.Generator) -> list[Float[Tensor, "batch 3 _ _"]]:
        """Draw and make all views of uint8 images (batch, height, width, 3) or (batch, 3, height, width).

        The same images and generator state give the same views bit for bit.

        Raises: ValueError for images of another type or shape, or a generator that is not on the CPU.
        """
        images = _channels_first(images)
        parameters = self.draw(images.shape[0], images.shape[2], images.shape[3], generator)
        return self.make(images, parameters)

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> list[tuple[int, Crops, Looks]]:
        """Draw the parameters of all views of n images: one (size in pixels, crops, looks) a size, globals first."""
        if generator.device.type != "cpu":
            raise ValueError("draw views from a CPU generator, so that a seed means the same on every device")
        further = (self.second,) * (self.n_global - 1)
        groups = [(self.global_size, self.global_scale, (self.first, *further))]
        if self.n_local:
            groups.append((self.local_size, self.local_scale, (self.local,) * self.n_local))
        parameters = []
        for size, scale, kinds in groups:
            boxes = draw_boxes(len(kinds) * n, height, width, scale, generator).view(len(kinds), n, 4)
            flip = torch.rand(len(kinds), n, generator=generator) < self.flip
            parameters.append((size, Crops(boxes, flip), draw_looks(kinds, n, self.blur_sigma, generator)))
        return parameters

    def make(self, images: Tensor, parameters: list[tuple[int, Crops, Looks]]) -> list[Float[Tensor, "batch 3 _ _"]]:
        """Make the views that `parameters` describe; no randomness in here, and no image depends on another one."""
        images = _channels_first(images)
        views = []
        for size, crops, looks in parameters:
            made = torch.empty(len(crops.flip), len(images), 3, size, size, device=images.device)
            _over_images(functools.partial(self._make, images, size, crops, looks, made), made)
            views.extend(made.unbind(0))
        return views

    @torch.no_grad()
    def _make(self, images: Tensor, size: int, crops: Crops, looks: Looks, made: Tensor, own: slice) -> None:
        with torch.autocast(images.device.type, enabled=False):
            x = resized_crops(images[own].float().div_(255), part_of(crops, own), size)
            x = apply_looks(x.flatten(0, 1), part_of(looks, own))
            _normalize(x.unflatten(0, (len(made), -1)), self.mean, self.std, made[:, own])


def _over_images(make: Callable[[slice], None], made: Float[Tensor, "views batch 3 _ _"]) -> None:
    """Call `make` with slices of the images: on a CPU a few at a time, in as many threads as torch has.

    Threads that do one slice each never wait for each other, as threads that share every operation would.
    """
    cpu = made.device.type == "cpu"
    n, threads = made.shape[1], torch.get_num_threads() if cpu else 1
    together = min(-(-n // threads), max(1, TOGETHER[cpu] // made[:, 0].numel()))
    slices = [slice(start, start + together) for start in range(0, n, together)]
    if threads == 1:
        for own in slices:
            make(own)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(make, slices))
    finally:
        torch.set_num_threads(threads)  # what a thread sets for itself is the default of those to come


def part_of(parameters: Crops | Looks, images: slice | Tensor) -> Crops | Looks:
    """The parameters of some of the images."""
    return replace(parameters, **{f.name: getattr(parameters, f.name)[:, images] for f in fields(parameters)})


def draw_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Int[Tensor, "n 4"]:
    """Draw crop boxes (top, left, height, width in pixels) as torchvision's RandomResizedCrop does.

    Area uniform in scale · height · width, aspect log-uniform in `ratio`; of ten attempts the first box that fits,
    placed uniformly; if none fits, the largest central box of an allowed aspect.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * rand(n, 10))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (log_low + (log_high - log_low) * rand(n, 10)).exp()
    tall, wide = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    attempt = fits.byte().argmax(1, keepdim=True)  # the first that fits
    tall, wide = tall.gather(1, attempt).squeeze(1), wide.gather(1, attempt).squeeze(1)
    place = rand(n, 2)
    top, left = (place[:, 0] * (height - tall + 1)).floor(), (place[:, 1] * (width - wide + 1)).floor()
    boxes = torch.stack([top, left, tall, wide], 1).long()

    w = min(width, round(height * ratio[1])) if width > height * ratio[1] else width
    h = min(height, round(width / ratio[0])) if width < height * ratio[0] else height
    central = torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
    return torch.where(fits.any(1, keepdim=True), boxes, central)


def resized_crops(
    images: Float[Tensor, "batch 3 height width"], crops: Crops, size: int
) -> Float[Tensor, "views batch 3 {size} {size}"]:
    """Crop, flip and resize to size × size pixels (bicubic, antialiased, clamped to [0, 1]), several views an image."""
    top, left, height, width = crops.boxes.flatten(0, 1).unbind(1)
    rows = cubic_windows(top, height, size, device=images.device)
    columns = cubic_windows(left, width, size, crops.flip.flatten(), images.device)
    source = torch.arange(len(images), device=images.device).repeat(len(crops.boxes))
    return mix(images, rows, columns, source).unflatten(0, crops.flip.shape).clamp_(0, 1)


@torch.no_grad()
def eval_view(
    images: Tensor,
    size: int,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "batch 3 {size} {size}"]:
    """The view features are evaluated on: shorter side to 256/224 · size pixels (bicubic), then the central square.

    Images that already are size × size are only normalized. Takes uint8 (batch, height, width, 3) or
    (batch, 3, height, width).

    Raises: ValueError for images of another type or shape, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    images = _channels_first(images)
    height, width = images.shape[2:]
    x = images.float() / 255
    if (height, width) != (size, size):
        short, shorter = size * 256 // 224, min(height, width)
        with torch.autocast(images.device.type, enabled=False):
            rows, columns = (
                _resize_and_crop(side, short * side // shorter, size, len(x), x.device) for side in (height, width)
            )
            x = mix(x, rows, columns).clamp_(0, 1)
    return _normalize(x, mean, std, x)


def _resize_and_crop(side: int, resized: int, size: int, n: int, device: torch.device) -> Windows:
    start = round((resized - size) / 2)
    windows = cubic_windows(torch.tensor([0]), torch.tensor([side]), resized, device=device)
    return tuple(v[:, start : start + size].expand(n, *[-1] * (v.ndim - 1)) for v in windows)


def _normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return torch.sub(x, mean, out=out).div_(std)


def _channels_first(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[-1], images.shape[1]):
        raise ValueError(
            "images must be uint8 of shape (batch, height, width, 3) or (batch, 3, height, width), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[-1] == 3 else images
