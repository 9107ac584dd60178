"""Frozen features of a data set, as kNN and linear probes take them: extracted once, kept, in memory or in a file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.backbones import Backbone, TransformerBackbone
from prototypes_lib.data import Images
from prototypes_lib.data.pixels import available_memory
from prototypes_lib.evaluate import feature_files
from prototypes_lib.precision import wide
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD, eval_view

LARGEST = 1e15  # a feature: squares and sums of larger ones leave float32


@dataclass(frozen=True)
class Features:
    """x: features (n, dim) on the CPU, in memory or in a mapped file; labels (n,).

    `extract` makes them in float32. Others may be of any precision, or whole numbers: protocols compute with them as
    float32, with float64 as such.
    """

    x: Shaped[Tensor, "n dim"]
    labels: Int[Tensor, " n"]


def kind(backbone: Backbone, name: str) -> dict[str, Any]:
    """Options of `extract` for features that have a name, to be given as `**kind(backbone, "D")`.

    "C" (vMF): the class token. "D" (DINO's linear evaluation): for a width up to 384, as ViT-S, the class tokens of the
    last 4 blocks (of all where there are fewer), for a wider one, as ViT-B, that of the last block and the mean patch.
    "MSN" (its few-shot evaluation): the class token before the final norm. A ResNet has one kind under all names.

    Raises ValueError for another name.
    """
    if name not in ("C", "D", "MSN"):
        raise ValueError(f"features={name!r}: choose 'C', 'D' or 'MSN'")
    options = {"blocks": 1, "pool": False, "norm": name != "MSN"}
    if name == "D" and isinstance(backbone, TransformerBackbone):
        options |= {"blocks": min(4, backbone.n_layers)} if backbone.dim <= 384 else {"pool": True}
    return options


@torch.no_grad()
def extract(
    backbone: Backbone,
    images: Images,
    *,
    size: int | None = None,
    blocks: int = 1,
    pool: bool = False,
    norm: bool = True,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    cache: str | Path | None = None,
    transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    in_memory: bool | None = None,
    progress: bool = False,
) -> Features:
    """Features of all images in order, in eval mode: resize to size * 256 / 224, crop the center (DINO).

    Args:
        size: side of the view; by default the images' own side, cut to whole patches.
        blocks: class tokens of the last so many blocks, one after the other, the last block's last; a ResNet has one.
        pool: the mean of the last block's patches is appended. Both go through the final norm, without `norm` neither.
        cache: a folder in which features are kept, and found again for the same weights, view and pixels.
        transform: from uint8 images (batch, 3, h, w) and their indices to uint8 images, on the device, before the view.
            With a cache, its repr must say what it does.
        in_memory: False writes features block by block to a file and maps it; None does so where they would take more
            than half of the free memory. Without a cache that file is a temporary one (in TMPDIR) and has no name.

    The model is put back as it was, also after an error. Features may hold numbers that are not finite; `check` refuses
    them. Differs from DINO's code for "D" of a wide network, which interleaves the entries of class token and mean.

    Raises ValueError for a size, blocks or a transform that does not work, OSError where the cache cannot be written.
    """
    side = min(images.pixels.shape[1:3])
    size = size or side - side % backbone.patch_size
    backbone.check_size(size)
    _check_options(backbone, blocks, pool, batch_size)
    shape = (len(images), backbone.dim * (blocks + pool))
    view = {"size": size, "blocks": blocks, "pool": pool, "norm": norm, "mean": list(mean), "std": list(std)}
    place = feature_files.place(cache, backbone, images, view, transform, device) if cache else None
    in_memory = 2 * 4 * shape[0] * shape[1] <= available_memory() if in_memory is None else in_memory
    labels = torch.from_numpy(np.array(images.labels))
    if place and (found := feature_files.read(place, shape, in_memory)) is not None:
        return Features(found, labels)

    def rows() -> Iterator[Tensor]:
        bar = tqdm(total=len(images), desc="features", unit="img", file=sys.stdout, mininterval=5, disable=not progress)
        with bar:
            for start in range(0, len(images), batch_size):
                pixels = torch.from_numpy(np.array(images.pixels[start : start + batch_size])).to(device)
                if transform is not None:
                    pixels = _transformed(transform, pixels, start)
                tokens, patches = backbone.last_blocks(eval_view(pixels, size, mean, std), blocks, norm)
                yield torch.cat([*tokens, patches.mean(1)] if pool else tokens, dim=1).float().cpu()
                bar.update(len(pixels))

    with _in_eval_mode(backbone, device):
        return Features(_gather(rows(), shape, place, in_memory), labels)


def _gather(rows: Iterator[Tensor], shape: tuple[int, int], place: Path | None, in_memory: bool) -> Tensor:
    if not in_memory and place:
        feature_files.write(place, shape, rows)
        return feature_files.mapped(place, shape)
    if not in_memory:
        return feature_files.temporary(shape, rows)
    x, start = torch.empty(shape), 0
    for block in rows:
        x[start : start + len(block)] = block
        start += len(block)
    if place:
        try:
            feature_files.write(place, shape, [x])
        except OSError as error:  # the work is done: a full disk must not cost it
            print(f"features are not kept: {error}", file=sys.stderr, flush=True)
    return x


def _check_options(backbone: Backbone, blocks: int, pool: bool, batch_size: int) -> None:
    most = backbone.n_layers
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not isinstance(backbone, TransformerBackbone) and (blocks != 1 or pool):
        raise ValueError(f"{backbone.name} has one kind of features: blocks=1, pool=False; not {blocks} and {pool}")
    if not 1 <= blocks <= most:
        raise ValueError(f"blocks={blocks}: {backbone.name} has {most} blocks; take the last 1 to {most} of them")


@contextmanager
def _in_eval_mode(backbone: Backbone, device: str | torch.device) -> Iterator[None]:
    home, modes = next(backbone.parameters()).device, {m: m.training for m in backbone.modules()}
    try:
        backbone.eval().to(device)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        backbone.to(home)


def _transformed(transform: Callable[[Tensor, Tensor], Tensor], pixels: Tensor, start: int) -> Tensor:
    indices = torch.arange(start, start + len(pixels), device=pixels.device)
    made = transform(pixels.permute(0, 3, 1, 2).contiguous(), indices)
    if made.dtype != torch.uint8 or made.ndim != 4 or made.shape[:2] != (len(pixels), 3):
        raise ValueError(f"transform must return uint8 (batch, 3, h, w) images, not {made.dtype} {tuple(made.shape)}")
    return made


def check(train: Features, test: Features, rows: int = 2**14) -> None:
    """Raise ValueError, one line, unless a classifier can be trained on the one and tried on the other.

    Refused: no images, features of different length, features that are not finite or beyond 1e15, labels that are
    unknown (-1).
    """
    for name, part in (("training", train), ("test", test)):
        if not len(part.x):
            raise ValueError(f"there are no {name} images; give at least one")
        if part.x.ndim != 2 or len(part.x) != len(part.labels):
            raise ValueError(
                f"{name} features must be (n, dim) with n labels, not {tuple(part.x.shape)} with {len(part.labels)}"
            )
        good = torch.cat([(wide(x).abs() <= LARGEST).all(1) for x in part.x.split(rows)])  # they may lie in a file
        if not bool(good.all()):
            first, n = int(good.int().argmin()), int((~good).sum())
            fault = f"beyond {LARGEST:g} in size" if bool(part.x[first].isfinite().all()) else "not finite"
            raise ValueError(f"features of {n} {name} images are {fault}, the first of image {first}")
        if int(part.labels.min()) < 0:
            raise ValueError(
                f"{int((part.labels < 0).sum())} {name} images have no label (-1); evaluate on labeled ones"
            )
    if train.x.shape[1] != test.x.shape[1]:
        raise ValueError(
            f"training features have {train.x.shape[1]} dimensions and test features {test.x.shape[1]}: "
            "extract both with the same backbone and options"
        )
