"""Separable resampling of images: every line out is a weighted sum of a few neighboring lines in.

Resizing and blurring multiply an image by a banded matrix from the left and one from the right. A band is narrow (6 of
256 pixels for a crop, at most 21 of 224 for a blur), so a matrix is kept as windows, the first pixel and the weights of
each row, and a product is a weighted gather of whole lines, `torch.nn.functional.embedding_bag`, an order of magnitude
less work than the dense product. A line out depends on its own window alone and is summed in a fixed order: a part of
a batch gives the very bits of the whole.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Windows = tuple[Tensor, Tensor]  # first pixel (n, out), weights (n, out, taps)


def mix(
    images: Float[Tensor, "sources channels height width"],
    rows: Windows,
    columns: Windows,
    source: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, "n channels out_height out_width"]:
    """W_rows · image · W_columnsᵀ for every channel; the i-th windows are those of images[source[i]], or images[i].

    A pixel of a window beyond an edge is the pixel at that edge.
    """
    channels = images.shape[1]
    lines = images.mT.flatten(0, 1)
    if source is None:
        source = torch.arange(len(images), device=images.device)
    every = source[:, None] * channels + torch.arange(channels, device=images.device)
    x = _mix_lines(lines, columns, every)
    x = _mix_lines(x.mT, rows, torch.arange(len(x), device=x.device).view_as(every))
    return x.unflatten(0, every.shape)


def _mix_lines(
    lines: Float[Tensor, "sources size width"], windows: Windows, source: Int[Tensor, "n channels"]
) -> Float[Tensor, "_ out width"]:
    first, weights = windows
    size, width = lines.shape[1:]
    pixel = (first[..., None] + torch.arange(weights.shape[2], device=first.device)).clamp_(0, size - 1)
    place = pixel[:, None] + size * source[:, :, None, None]
    weights = weights[:, None].expand(place.shape)
    taps = weights.shape[-1]
    out = F.embedding_bag(
        place.view(-1, taps), lines.reshape(-1, width), per_sample_weights=weights.reshape(-1, taps), mode="sum"
    )
    return out.view(source.numel(), -1, width)


def cubic_windows(
    start: Int[Tensor, "n"],
    length: Int[Tensor, "n"],
    size: int,
    flip: Bool[Tensor, "n"] | None = None,
    device: torch.device | str = "cpu",
) -> Windows:
    """Windows that resize the pixels start .. start + length of a line to `size` pixels, reversed where flipped.

    Keys' cubic kernel with a = −1/2, widened by the scale when it shrinks (antialiasing, as Pillow has it). Pixels
    outside the crop get no weight and the rest is normalized to sum to one, as if the crop came first. What comes in
    is on the CPU: the widest window is known without waiting for the device.
    """
    taps = math.ceil(4 * max(1.0, int(length.max()) / size))
    start, length = (v.to(device)[:, None] for v in (start, length))
    out = torch.arange(size, device=device).expand(len(start), -1)
    if flip is not None:
        out = torch.where(flip.to(device)[:, None], size - 1 - out, out)
    scale = length / size
    center, widened = scale * (out + 0.5), scale.clamp_min(1)
    first = (center - 2 * widened + 0.5).floor().long()
    pixel = first[..., None] + torch.arange(taps, device=device)
    distance = ((pixel + 0.5 - center[..., None]) / widened[..., None]).abs_()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far)
    weights *= (distance < 2) & (pixel >= 0) & (pixel < length[..., None])
    return start + first, weights / sum(weights.unbind(2))[..., None]


def gaussian_windows(sigma: Float[Tensor, "n"], size: int, device: torch.device | str = "cpu") -> Windows:
    """Windows of normalized Gaussian kernels for lines of `size` pixels; sigma, in pixels, is on the CPU.

    A kernel ends at 5 sigma, which leaves out 6e-7 of it.
    """
    reach = (5 * sigma).ceil().long()
    offset = torch.arange(-int(reach.max()), int(reach.max()) + 1)
    kernel = (-0.5 * (offset / sigma[:, None].double()) ** 2).exp() * (offset.abs() <= reach[:, None])
    kernel = (kernel / sum(kernel.unbind(1))[:, None]).float()
    first = torch.arange(size) + offset[0]
    return first.expand(len(sigma), -1).to(device), kernel[:, None].expand(-1, size, -1).to(device)
