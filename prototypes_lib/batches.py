"""The batch of a step: its images, views and masks, as a function of (seed, step) and of the place in the batch.

Nothing is remembered from step to step, so a run goes on anywhere, with any number of processes and parts, and sees
what it would have seen. Every process draws the parameters of the whole batch, which is cheap, and makes the views of
its own images: part j of a step are the images j B / a .. (j + 1) B / a of its batch, an equal slice of them a rank.
"""

import hashlib
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prototypes_lib import ranks
from prototypes_lib.data import Images, check_batch
from prototypes_lib.masks import block_masks, dropped
from prototypes_lib.methods import Method
from prototypes_lib.settings import Run
from prototypes_lib.views import COLORS, Crops, Looks, MultiCrop, part_of


def number(*key: Any) -> int:
    """A seed made of anything that has a repr, such as (seed, "views", step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def generator(*key: Any) -> torch.Generator:
    return torch.Generator().manual_seed(number(*key))


def multicrop(method: Method, run: Run) -> MultiCrop:
    """The views of a method at a run's sizes. DINO's blur is for crops of 224 px; smaller ones get less."""
    scale = min(1.0, run.image_size / 224)
    return MultiCrop(
        n_global=method.views.n_global, n_local=method.views.n_local,
        global_size=run.image_size, local_size=run.local_size,
        global_scale=method.views.global_scale, local_scale=method.views.local_scale,
        blur_sigma=(0.1 * scale, 2.0 * scale), **COLORS[method.views.colors],
    )  # fmt: skip


def images_at_once(run: Run) -> int:
    """Images of one part on one process. Raises ValueError where the batch does not divide evenly."""
    pieces = ranks.world() * run.accumulate
    if run.batch_size % pieces:
        raise ValueError(
            f"batch_size={run.batch_size} does not divide into {ranks.world()} processes x accumulate={run.accumulate} "
            f"equal parts; take a multiple of {pieces}"
        )
    return run.batch_size // pieces


class Batches:
    """Views and masks of every step of a run, on `device`, for this process.

    Images stay on the device as uint8 where they take less than 0.4 of its free memory; where not, or on a CPU where
    they are a memory map, `run.workers` threads read the next parts while the device computes.

    Args:
        images: what to train on. run: batch_size, accumulate, workers, seed, sizes. method: views and masks.
        grid: (height, width) in patches of a global crop, for masks.

    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide into processes and parts.
    """

    def __init__(self, images: Images, run: Run, method: Method, grid: tuple[int, int], device: torch.device | str):
        check_batch(images, run.batch_size)
        self.images, self.run, self.method, self.grid, self.device = images, run, method, grid, torch.device(device)
        self.size = images_at_once(run)
        self.steps_per_epoch = len(images) // run.batch_size
        self.steps = max(1, round(run.epochs * self.steps_per_epoch))
        self.crop = multicrop(method, run)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else math.inf
        mapped = isinstance(images.pixels, np.memmap) and self.device.type == "cpu"
        fits = not mapped and images.pixels.nbytes < 0.4 * free
        self.resident = torch.from_numpy(images.pixels).to(self.device) if fits else None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._drawn: tuple[int, list[tuple[int, Crops, Looks]], Tensor | None] = (-1, [], None)
        self._threads = ThreadPoolExecutor(run.workers, "reader") if run.workers and not fits else None
        self._coming: dict[int, Future] = {}
        self._seconds = 0.0

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the threads that read ahead; what they have begun is finished first, so there is nothing left of them."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._coming.clear()

    def batch(self, step: int, part: int = 0) -> tuple[list[Tensor], Bool[Tensor, "*crops height width"] | None]:
        """This process's views of part `part` of a step, and what the student does not see of them.

        Masks are those of all first global crops, then of all second ones; MSN's dropped patches are one mask.
        """
        own = self._own(part)
        pixels = self._pixels(step, part)
        parameters, masks = self._parameters(step)
        views = self.crop.make(pixels, [(size, part_of(c, own), part_of(l, own)) for size, c, l in parameters])
        if masks is not None and masks.ndim == 4:
            masks = masks[:, own].flatten(0, 1)
        return views, None if masks is None else masks.to(self.device)

    def rows(self, step: int) -> Int[Tensor, "batch"]:
        """Which images a step is made of, all parts and processes, in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        known, order = self._order
        if known != epoch:
            order = torch.randperm(len(self.images), generator=generator(self.run.seed, "order", epoch))
            self._order = epoch, order  # one assignment: threads read this too
        return order[place * self.run.batch_size : (place + 1) * self.run.batch_size]

    def waited(self) -> float:
        """Seconds since the last call of this in which `batch` waited for images."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _own(self, part: int) -> slice:
        if not 0 <= part < self.run.accumulate:
            raise ValueError(f"part={part} of a step in accumulate={self.run.accumulate} parts")
        start = (part * ranks.world() + ranks.rank()) * self.size
        return slice(start, start + self.size)

    def _parameters(self, step: int) -> tuple[list[tuple[int, Crops, Looks]], Tensor | None]:
        """Crops, looks and masks of the whole batch, (patches) or (global crops, batch, patches), on the CPU."""
        if self._drawn[0] != step:
            numbers = generator(self.run.seed, "views", step)
            n = self.run.batch_size
            parameters = self.crop.draw(n, *self.images.pixels.shape[1:3], numbers)
            self._drawn = step, parameters, self._masks(n, numbers)
        return self._drawn[1:]

    def _masks(self, n: int, numbers: torch.Generator) -> Tensor | None:
        method, patch = self.method, self.method.patch
        if method.mask_student:
            return dropped(self.grid, method.mask_student, generator=numbers)
        if patch is None:
            return None
        crops = method.views.n_global
        return block_masks(
            crops * n, self.grid, patch.ratio, generator=numbers, masked=patch.probability,
            shape=patch.shape, stratified=patch.stratified, min_area=patch.min_area,
        ).unflatten(0, (crops, n))  # fmt: skip

    def _pixels(self, step: int, part: int) -> Tensor:
        started = time.perf_counter()
        if self.resident is not None:
            pixels = self.resident[self.rows(step)[self._own(part)].to(self.device)]
        else:
            pixels = self._ahead(step, part).to(self.device, non_blocking=True)
        self._seconds += time.perf_counter() - started
        return pixels

    def _ahead(self, step: int, part: int) -> Tensor:
        """The images of a part from the threads, which are told to read the parts that will be next."""
        if self._threads is None:
            return self._read(step, part)
        parts = self.run.accumulate
        now = step * parts + part
        wanted = range(now, max(now + 1, min(now + 1 + self.run.workers, self.steps * parts)))
        for place in [place for place in self._coming if place not in wanted]:  # after a jump: not needed any more
            self._coming.pop(place).cancel()
        for place in wanted:
            if place not in self._coming:
                self._coming[place] = self._threads.submit(self._read, *divmod(place, parts))
        try:
            return self._coming.pop(now).result()
        except Exception as error:
            raise OSError(f"data: the images of step {step} could not be read: {error}") from error

    def _read(self, step: int, part: int) -> Tensor:
        rows = self.rows(step)[self._own(part)]
        pixels = torch.empty(
            len(rows), *self.images.pixels.shape[1:], dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        np.take(self.images.pixels, rows.numpy(), axis=0, out=pixels.numpy(), mode="clip")  # without Python's lock
        return pixels
