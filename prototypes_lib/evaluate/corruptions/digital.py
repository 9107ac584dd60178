"""What displays and files do to images: four corruptions of ImageNet-C."""

import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from prototypes_lib.evaluate.corruptions.blur import mirrored
from prototypes_lib.evaluate.corruptions.noise import uniform
from prototypes_lib.resampling import Windows, mix


def contrast(x: Float[Tensor, "batch 3 h w"], c: float, draws: Sequence[Generator]) -> Tensor:
    """c x + (1 − c) mean, the mean that of the image's channel."""
    mean = (x * 255).round().long().sum((2, 3), keepdim=True) / (255 * x[0, 0].numel())  # exact in any order
    return (x - mean) * c + mean


def elastic_transform(
    x: Float[Tensor, "batch 3 h w"], c: tuple[float, float, float], draws: Sequence[Generator]
) -> Tensor:
    """An affine map, then a smooth displacement. c = (alpha, sigma, shift), in shares of the shorter side.

    The affine map moves three points, two thirds of the image apart, by up to `shift` each way, the displacement is
    alpha · Gauss(sigma) ∗ uniform(−1, 1). Interpolation is linear, twice as in the official code, edges are mirrored.
    Difference: exact, where OpenCV rounds the affine map's places to 1/32 pixel.
    """
    height, width = x.shape[2:]
    alpha, sigma, shift = (share * min(height, width) for share in c)
    moves = shift * (2 * uniform(draws, 3, 2).double() - 1)
    x = _sampled(x, *_affine(moves, height, width), mirrored)
    down, right = (alpha * _gauss(2 * uniform(draws, height, width).double() - 1, sigma) for _ in range(2))
    rows, columns = torch.arange(height).double()[:, None], torch.arange(width).double()
    return _sampled(x, rows + down, columns + right, _reflected)


def _affine(moves: Float[Tensor, "batch 3 2"], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns to look at for each pixel: the inverse of the map that moves three points (x, y) by `moves`."""
    cy, cx, third = height // 2, width // 2, min(height, width) // 3
    points = torch.tensor([[cx + third, cy + third], [cx + third, cy - third], [cx - third, cy - third]]).double()
    ones = torch.ones(3, 1, dtype=torch.float64)
    there = torch.cat([points + moves, ones.expand(len(moves), -1, -1)], 2)
    back = torch.stack([torch.linalg.solve(one, points) for one in there])[..., None, None]  # one by one: same bits
    y, x = torch.arange(height).double()[:, None], torch.arange(width).double()
    columns, rows = (back[:, 0, i] * x + back[:, 1, i] * y + back[:, 2, i] for i in (0, 1))
    return rows, columns


def _gauss(field: Float[Tensor, "batch h w"], sigma: float) -> Float[Tensor, "batch h w"]:
    """Gaussian blur that ends at 3 sigma, edges mirrored with the edge pixel repeated."""
    for n in field.shape[:0:-1]:  # columns, then rows; each time the field is turned
        field = torch.stack(
            [(one @ _gauss_matrix(n, sigma)).mT for one in field]
        )  # one by one: the same bits in any batch
    return field


@functools.lru_cache(8)
def _gauss_matrix(n: int, sigma: float) -> Float[Tensor, "{n} {n}"]:
    reach = int(3 * sigma + 0.5)
    tap = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (tap / max(sigma, 1e-9)).double() ** 2).exp()
    weights /= weights.sum()
    places = _reflected(torch.arange(n)[:, None] + tap, n)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, places, weights.expand(n, -1)).T


def _reflected(place: Tensor, n: int) -> Tensor:
    """Pixels 0 .. n - 1 that places beyond the edges mirror, the edge pixel repeated (scipy.ndimage's "reflect")."""
    place = place.remainder(2 * n)
    return torch.minimum(place, 2 * n - 1 - place)


def _sampled(
    x: Float[Tensor, "batch 3 h w"], rows: Tensor, columns: Tensor, border: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "batch 3 h w"]:
    """Linear interpolation at rows and columns (batch, h, w), float64."""
    height, width = x.shape[2:]
    rows, columns = rows.to(x.device), columns.to(x.device)
    top, left = rows.floor().long(), columns.floor().long()
    down, right = (rows - top).to(x.dtype), (columns - left).to(x.dtype)
    flat, out = x.flatten(2), torch.zeros_like(x)
    for y, across in ((0, 1 - down), (1, down)):
        row = border(top + y, height) * width
        for z, along in ((0, 1 - right), (1, right)):
            place = (row + border(left + z, width)).flatten(1)
            out += flat.gather(2, place[:, None].expand(-1, 3, -1)).view_as(x) * (across * along)[:, None]
    return out


def pixelate(x: Float[Tensor, "batch 3 h w"], c: float, draws: Sequence[Generator]) -> Tensor:
    """Shrunk to the share c of its sides and enlarged again, with Pillow's box filter: large square pixels."""
    small = [max(1, int(n * c)) for n in x.shape[2:]]
    for start, end in zip(((x.shape[2], x.shape[3]), small), (small, x.shape[2:]), strict=True):
        rows, columns = (_box_windows(a, b, len(x), x.device) for a, b in zip(start, end, strict=True))
        x = mix(x, rows, columns)
    return x


def _box_windows(side: int, size: int, n: int, device: torch.device) -> Windows:
    """A pixel out is the mean of those in whose centers lie in its box, or the one that it lies in itself."""
    scale = side / size
    center, widened = (torch.arange(size).double()[:, None] + 0.5) * scale, max(scale, 1.0)
    first = (center - widened / 2 + 0.5).floor()
    pixel = first + torch.arange(math.ceil(widened) + 1)
    place = (pixel - center + 0.5) * (1 / widened)  # as Pillow computes it: the rounding decides whether an edge is in
    weights = (place > -0.5) & (place <= 0.5) & (pixel < side)
    weights = weights / weights.sum(1, keepdim=True)
    return first[:, 0].long().expand(n, -1).to(device), weights.float().expand(n, -1, -1).to(device)


def jpeg_compression(x: Float[Tensor, "batch 3 h w"], c: int, draws: Sequence[Generator]) -> Tensor:
    """Written as JPEG of quality c and read again, by the codec of Pillow (on the CPU)."""
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    read = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=c)
        read.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(read)).to(x.device).permute(0, 3, 1, 2) / 255
