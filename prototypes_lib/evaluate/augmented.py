"""Training images as supervised training of transformers wants them: timm's crops, RandAugment, erasing, mixup, cutmix.

timm draws from the global states of Python, NumPy and torch. Each image and each mixture seeds them with a number of
its own, so what is drawn is a function of (seed, step, place); `random_state` puts them back at the end.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomCrop

from prototypes_lib.batches import generator, number
from prototypes_lib.data import Images
from prototypes_lib.evaluate.recipes import FineTuning
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD, eval_view


class _Augmented(Dataset):
    """Training images as timm's transform makes them (Pillow), each by numbers of its own: of seed, step and place."""

    def __init__(
        self,
        images: Images,
        settings: FineTuning,
        size: int,
        seed: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ):
        self.images, self.seed, self.size, self.transform = images, seed, size, None
        self.colors = {"mean": mean, "std": std}
        if settings.augment:
            self.transform = create_transform(
                size, is_training=True, auto_augment=settings.rand_augment or None, color_jitter=0.4,
                interpolation="bicubic", re_prob=settings.erase, re_mode="pixel", re_count=1, **self.colors,
            )  # fmt: skip
            if size <= 32 and images.pixels.shape[1:3] == (size, size):
                self.transform.transforms[0] = RandomCrop(size, padding=4)
            for augment in (t for t in self.transform.transforms if isinstance(t, RandAugment)):
                for operation in augment.ops:
                    if operation.aug_fn is posterize:
                        operation.aug_fn = _posterize

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[tuple[Tensor, int]]:
        """Image and label for each (step, place in the batch, row)."""
        rows = [row for *_, row in keys]
        labels = self.images.labels[rows].tolist()
        pixels = np.ascontiguousarray(self.images.pixels[rows])
        if self.transform is None:
            return list(zip(eval_view(torch.from_numpy(pixels), self.size, **self.colors), labels, strict=True))
        made = []
        for (step, place, _), picture in zip(keys, pixels, strict=True):
            reseed(number(self.seed, "augment", step, place))
            made.append(self.transform(Image.fromarray(picture)))
        return list(zip(made, labels, strict=True))


def _posterize(picture: Image.Image, bits: int, **options) -> Image.Image:
    """timm's; but newer versions of Pillow refuse to keep 0 bits, which timm draws sometimes: black, as it was."""
    return posterize(picture, bits, **options) if bits else Image.new(picture.mode, picture.size)


def batches(
    train: Images, settings: FineTuning, size: int, seed: int, workers: int, **colors: tuple[float, float, float]
) -> DataLoader:
    """Normalized images and labels of each part of each step of all epochs, made by so many processes ahead (or none).

    colors: mean and std, ImageNet's by default. Part j of a step has places j, j + accumulate, ... of its batch, so
    copies of an image fall into different parts.
    """
    n, per_epoch = settings.batch_size, len(train) // settings.batch_size

    def parts() -> Iterator[list[tuple[int, int, int]]]:
        for epoch in range(settings.epochs):
            order = torch.randperm(len(train), generator=generator(seed, "order", epoch))
            rows = order.repeat_interleave(settings.repeats)[: per_epoch * n].view(per_epoch, n).tolist()
            for step, batch in enumerate(rows, epoch * per_epoch):
                keys = [(step, place, row) for place, row in enumerate(batch)]
                yield from (keys[part :: settings.accumulate] for part in range(settings.accumulate))

    dataset = _Augmented(train, settings, size, seed, **colors)
    return DataLoader(dataset, batch_sampler=parts(), num_workers=workers, generator=torch.Generator())


@contextlib.contextmanager
def random_state(device: torch.device) -> Iterator[None]:
    """Global random states are put back at the end: Python's, NumPy's, torch's on the CPU and on the device."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def reseed(seed: int, device: str | torch.device = "cpu") -> None:
    """Seed all that timm and a network draw from, on the CPU and on the device; to be used within `random_state`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def mix(
    images: Float[Tensor, "batch 3 height width"], labels: Int[Tensor, " batch"], n_classes: int, settings: FineTuning
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch classes"]]:
    """Mixup or cutmix of images with the batch in reverse (timm), drawn from NumPy's global state; smoothed targets."""
    if not (settings.mixup or settings.cutmix):
        return images, mixup_target(labels, n_classes, smoothing=settings.smoothing)
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=n_classes)(
        images.clone(), labels
    )
