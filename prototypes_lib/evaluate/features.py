"""Frozen features of a data set: the class token after the final norm, as kNN and linear probes take it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prototypes_lib.backbones import Backbone
from prototypes_lib.data import Images
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD, eval_view


@dataclass(frozen=True)
class Features:
    """x: features (n, dim) in float32 on the CPU; labels (n,)."""

    x: Float[Tensor, "n dim"]
    labels: Int[Tensor, " n"]


@torch.no_grad()
def extract(
    backbone: Backbone,
    images: Images,
    *,
    size: int | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Features:
    """Class-token features of all images in order, in eval mode: resize to size * 256 / 224, crop the center (DINO).

    size: side of the view; by default the images' own side, cut to whole patches. The model is put back as it was.
    """
    side = min(images.pixels.shape[1:3])
    size = size or side - side % backbone.patch_size
    backbone.check_size(size)
    was_training, home = backbone.training, next(backbone.parameters()).device
    backbone.eval().to(device)
    found = []
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels[start : start + batch_size])).to(device)
        found.append(backbone(eval_view(pixels, size, mean, std))[0].float().cpu())
    backbone.train(was_training).to(home)
    return Features(torch.cat(found), torch.from_numpy(np.asarray(images.labels)))
