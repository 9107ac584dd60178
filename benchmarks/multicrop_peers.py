"""Multi-crop augmentation, ours and others': DINO's views of images that are decoded already, in images a second.

Each side makes the same kinds of views with parameters of its own: random resized crop (bicubic), flip, color jitter,
grayscale, blur, solarization, normalization. Ours has both cores as threads of one process; the Pillow pipeline of the
official code has two worker processes of a torch DataLoader, kept alive from pass to pass; kornia, where it is
installed, works on the batch with parameters drawn for each image.

    python benchmarks/multicrop_peers.py [--kornia]
"""

import functools
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prototypes_lib.views import MultiCrop

# name: (side of the images, images in a pass, the views); blur scales with the size of a view, as in a run
SETTINGS = {
    "2 x 224 + 10 x 96 of 256 px": (256, 64, MultiCrop()),
    "2 x 32 + 8 x 16 of 32 px": (
        32,
        1024,
        MultiCrop(n_local=8, global_size=32, local_size=16, blur_sigma=(0.1 / 7, 2 / 7)),
    ),
}
Batch = list[Tensor]


def pictures(n: int, side: int, seed: int = 0) -> Tensor:
    """uint8 (n, side, side, 3): smooth colors and some noise, as of photographs."""
    numbers = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 8, 8, generator=numbers)
    x = torch.nn.functional.interpolate(coarse, side, mode="bicubic") * 255
    x = x + 12 * torch.randn(n, 3, side, side, generator=numbers)
    return x.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


# ------------------------------------------------------------------------------------------------- ours


def ours(images: Tensor, crop: MultiCrop, n: int, batch: int = 32) -> Iterator[Batch]:
    """Views of n images, drawn from `images` in turn, `batch` at a time."""
    for start in range(0, n, batch):
        chosen = torch.arange(start, min(start + batch, n)) % len(images)
        yield crop.views(images[chosen], torch.Generator().manual_seed(start))


# ------------------------------------------------------------------------------------------------- Pillow


class Blur:
    """Pillow's Gaussian blur of a random radius in pixels."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def pil_views(crop: MultiCrop) -> list[Callable[[Image.Image], Tensor]]:
    """DINO's pipeline of one Pillow image, a function a view."""

    def view(size, scale, look):
        jitter = T.ColorJitter(look.brightness, look.contrast, look.saturation, look.hue)
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(crop.flip),
                T.RandomApply([jitter], p=look.jitter),
                T.RandomGrayscale(look.gray),
                T.RandomApply([Blur(*crop.blur_sigma)], p=look.blur),
                *([T.RandomSolarize(128, p=look.solarize)] if look.solarize else []),
                T.ToTensor(),
                T.Normalize(crop.mean, crop.std),
            ]
        )

    globals_ = [view(crop.global_size, crop.global_scale, k) for k in (crop.first, crop.second)[: crop.n_global]]
    return globals_ + [view(crop.local_size, crop.local_scale, crop.local)] * crop.n_local


class Pictures(Dataset):
    """n items of decoded images in turn, each all views of one."""

    def __init__(self, images: Tensor, crop: MultiCrop, n: int):
        self.images = [Image.fromarray(image.numpy()) for image in images]
        self.views, self.n = pil_views(crop), n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Batch:
        return [view(self.images[i % len(self.images)]) for view in self.views]


def pil_two_workers(images: Tensor, crop: MultiCrop, n: int, batch: int = 32) -> Iterator[Batch]:
    """The same by Pillow and torchvision in two worker processes; workers start at the first pass and stay."""
    yield from _loader(images, crop, n, batch)


_LOADERS: dict[tuple, DataLoader] = {}


def _loader(images: Tensor, crop: MultiCrop, n: int, batch: int) -> DataLoader:
    key = id(images), crop, n, batch
    if key not in _LOADERS:
        data = Pictures(images, crop, n)
        _LOADERS[key] = DataLoader(data, batch, num_workers=2, persistent_workers=True, worker_init_fn=_one_thread)
    return _LOADERS[key]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    random.seed(worker)


def close() -> None:
    """End the worker processes."""
    _LOADERS.clear()


# ------------------------------------------------------------------------------------------------- kornia


def kornia_batches(images: Tensor, crop: MultiCrop, n: int, batch: int = 32) -> Iterator[Batch]:
    """The same by kornia on whole batches, parameters drawn for each image (antialiased by its own means)."""
    views = _kornia_views(crop)
    for start in range(0, n, batch):
        chosen = torch.arange(start, min(start + batch, n)) % len(images)
        x = images[chosen].permute(0, 3, 1, 2).float() / 255
        yield [view(x) for view in views]


@functools.cache
def _kornia_views(crop: MultiCrop) -> list[torch.nn.Module]:
    import kornia.augmentation as K

    def view(size, scale, look):
        high = max(crop.blur_sigma[1], 1e-3)
        side = 2 * max(1, round(3 * high)) + 1
        blur = (K.RandomGaussianBlur((side, side), crop.blur_sigma, p=look.blur),) if look.blur else ()
        return K.AugmentationSequential(
            K.RandomResizedCrop((size, size), scale=scale, resample="BICUBIC", cropping_mode="resample"),
            K.RandomHorizontalFlip(p=crop.flip),
            K.ColorJitter(look.brightness, look.contrast, look.saturation, look.hue, p=look.jitter),
            K.RandomGrayscale(p=look.gray),
            *blur,
            *((K.RandomSolarize(0.0, 0.0, p=look.solarize),) if look.solarize else ()),
            K.Normalize(torch.tensor(crop.mean), torch.tensor(crop.std)),
        )

    globals_ = [view(crop.global_size, crop.global_scale, k) for k in (crop.first, crop.second)[: crop.n_global]]
    return globals_ + [view(crop.local_size, crop.local_scale, crop.local)] * crop.n_local


# ------------------------------------------------------------------------------------------------- together


def cases(small: bool = False, with_kornia: bool = True) -> dict[str, tuple[Callable, dict[str, Callable], Callable]]:
    """name: (ours, {peer: the same by it}, check). Every function makes all views of one pass and returns the last.

    `check()` raises AssertionError unless both sides give views of the same shapes, mean and spread.
    """
    found = {}
    for name, (side, n, crop) in SETTINGS.items():
        n = n // 4 if small else n
        images = pictures(64, side)
        sides = {"ours": ours, "Pillow, 2 workers": pil_two_workers}
        if with_kornia and importlib.util.find_spec("kornia"):
            sides["kornia"] = kornia_batches
        run = {side_: functools.partial(_pass, make, images, crop, n) for side_, make in sides.items()}
        found[name] = run.pop("ours"), run, functools.partial(_check, images, crop)
    return found


def _pass(make: Callable, images: Tensor, crop: MultiCrop, n: int) -> Batch:
    batch = 32 if crop.global_size > 64 else 256
    if make is pil_two_workers:
        batch //= 4  # several batches a worker, so that both end together
    for views in make(images, crop, n, min(n, batch)):
        last = views
    return last


def _check(images: Tensor, crop: MultiCrop) -> None:
    n = 64
    both = [[torch.cat(v) for v in zip(*make(images, crop, n), strict=True)] for make in (ours, pil_two_workers)]
    for a, b in zip(*both, strict=True):
        assert a.shape == b.shape and bool(a.isfinite().all())
        for statistic in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
            x, y = statistic(a), statistic(b)
            assert abs(x.mean() - y.mean()) < 5 * ((x.var() + y.var()) / n).sqrt(), "views of another distribution"


def main(repeats: int = 5) -> None:
    torch.set_num_threads(2)
    for name, (mine, peers, check) in cases(with_kornia="--kornia" in sys.argv).items():
        check()
        n, sides = SETTINGS[name][1], {"ours": mine, **peers}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for i in range(repeats + 1):  # in turn, so that what else the machine does falls on all
            for side, function in sides.items():
                started = time.perf_counter()
                function()
                if i:
                    seconds[side].append(time.perf_counter() - started)
        ratios = {side: np.divide(taken, seconds["ours"]) for side, taken in seconds.items()}
        for side, taken in seconds.items():
            print(f"{name}: {side:20} {n / statistics.median(taken):8.0f} images/s, ours is "
                  f"{np.median(ratios[side]):.2f} times as fast (lowest {ratios[side].min():.2f})")  # fmt: skip
    close()


if __name__ == "__main__":
    main()
