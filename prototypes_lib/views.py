"""Multi-crop views of a batch of images on any device, each image with its own random parameters (DINO).

A resized crop is linear and separable, hence two small matrices an image: view = W_y · image · W_xᵀ, with the bicubic
antialiased weights of the crop box in W_y (size × height) and W_x (size × width); a horizontal flip reverses the rows
of W_x. All views of one size are computed together. Random numbers are drawn on the CPU, from a generator, before any
pixel is touched, so that a seed means the same views on every device.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prototypes_lib.photometric import Looks, Photometric, apply_looks, draw_looks

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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

    @torch.no_grad()
    def make(self, images: Tensor, parameters: list[tuple[int, Crops, Looks]]) -> list[Float[Tensor, "batch 3 _ _"]]:
        """Make the views that `parameters` describe; no randomness in here."""
        images = _channels_first(images)
        views = []
        with torch.autocast(images.device.type, enabled=False):
            pixels = images.float() / 255
            for size, crops, looks in parameters:
                x = resized_crops(pixels, crops, size)
                x = _normalize(apply_looks(x.flatten(0, 1), looks), self.mean, self.std)
                views.extend(x.unflatten(0, crops.flip.shape).unbind(0))
        return views


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
    batch, channels, height, width = images.shape
    n_views = len(crops.boxes)
    boxes = crops.boxes.transpose(0, 1).reshape(-1, 4).to(images.device)
    flip = crops.flip.T.reshape(-1).to(images.device)
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], height, size)
    columns = resample_matrix(boxes[:, 1], boxes[:, 3], width, size, flip)
    # Along x: one product an image for all its views. Then along y: one product a view.
    x = images.reshape(batch, channels * height, width) @ columns.view(batch, n_views * size, width).mT
    x = x.view(batch, channels, height, n_views, size).permute(0, 3, 2, 1, 4)
    x = rows @ x.reshape(batch * n_views, height, channels * size)
    x = x.view(batch, n_views, size, channels, size).permute(1, 0, 3, 2, 4)
    return x.contiguous().clamp_(0, 1)


def resample_matrix(
    start: Int[Tensor, "n"],
    length: Int[Tensor, "n"],
    size_in: int,
    size_out: int,
    flip: Bool[Tensor, "n"] | None = None,
) -> Float[Tensor, "n {size_out} {size_in}"]:
    """Weights that resize the pixels start .. start + length of a line of `size_in` to `size_out` pixels.

    Keys' cubic kernel with a = −1/2, widened by the scale when it shrinks (antialiasing, as Pillow has it). Pixels
    outside the crop get no weight and the rest is normalized to sum to one, as if the crop came first.
    """
    start, length = start[:, None, None], length[:, None, None]
    out = torch.arange(size_out, device=start.device)[None, :, None]
    if flip is not None:
        out = torch.where(flip[:, None, None], size_out - 1 - out, out)
    pixel = torch.arange(size_in, device=start.device) - start
    scale = length / size_out
    distance = ((pixel + 0.5 - scale * (out + 0.5)) / scale.clamp_min(1)).abs_()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far) * ((distance < 2) & (pixel >= 0) & (pixel < length))
    return weights / weights.sum(2, keepdim=True)


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
                _resize_and_crop_matrix(side, short * side // shorter, size, images.device) for side in (height, width)
            )
            x = (rows @ x @ columns.mT).clamp_(0, 1)
    return _normalize(x, mean, std)


def _resize_and_crop_matrix(side: int, resized: int, size: int, device: torch.device) -> Tensor:
    whole = torch.tensor([0, side], device=device)
    first = round((resized - size) / 2)
    return resample_matrix(whole[:1], whole[1:], side, resized)[0, first : first + size]


def _normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return x.sub_(mean).div_(std)


def _channels_first(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[-1], images.shape[1]):
        raise ValueError(
            "images must be uint8 of shape (batch, height, width, 3) or (batch, 3, height, width), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[-1] == 3 else images
