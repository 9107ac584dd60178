"""Runs that are stopped and go on, in one process: bit for bit what they would have been without the stop.

Also what the other files of this folder train: a tiny network on pictures made on the spot.
"""

import contextlib
import errno
import functools
import gc
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mutants
import numpy as np
import psutil

from prototypes_lib import checkpoints, records
from prototypes_lib import train as training
from prototypes_lib.data import Images
from prototypes_lib.interrupts import Interrupted
from prototypes_lib.methods import METHODS, Method, Queue, Views, Warmup
from prototypes_lib.settings import Run
from prototypes_lib.trainer import Trainer

N, BATCH, STEPS = 48, 16, 5  # three steps an epoch
STOPS = ("epoch edge", "mid-epoch", "mid-accumulation")
TIMES = ("seconds", "data_wait")  # columns of metrics that no two runs share


def method(name: str) -> Method:
    """A recipe with 16 prototypes and one local crop; a queue is full after two steps, and in use from then on."""
    base = METHODS[name]
    changes = {"n_prototypes": 16 * bool(base.n_prototypes), "views": Views(2, 1, n_targets=base.views.n_targets)}
    changes |= {"teacher_temp": Warmup(base.teacher_temp.start, base.teacher_temp.end, 1)}
    return base.but(**changes, **({"queue": Queue(24, epoch=0.3)} if base.queue else {}))


def tiny(out: Path, **changes: Any) -> Run:
    """Five steps of 16 images; every second one is saved, every one is monitored."""
    small = {
        "batch_size": BATCH, "epochs": STEPS * BATCH / N, "warmup_epochs": 0.4, "hidden": 16, "bottleneck": 8,
        "head_batch_norm": True, "drop_path": 0.2, "freeze_last_layer": 0.3, "monitor_steps": 1,
        "checkpoint_epochs": 0.7, "backbone_options": {"depth": 1}, "out": out, "progress": False,
    }  # fmt: skip
    return Run.small(**(small | changes))


def pictures(n: int = N, mapped: Path | None = None) -> Images:
    """Colors at random, in memory or as a memory map of this file."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    if mapped is not None:
        with contextlib.suppress(FileExistsError), mapped.open("xb") as file:
            file.write(pixels.tobytes())
        pixels = np.memmap(mapped, np.uint8, "r", shape=pixels.shape)
    return Images(pixels, np.arange(n) % 2, ("a", "b"), "pictures")


@contextlib.contextmanager
def given(images: Images) -> Iterator[None]:
    """`train` finds these images, whatever its run names; who asks for the environment is told what it was before."""
    once = functools.cache(records.environment)
    with mock.patch.object(training, "load", lambda *_, **__: images), mock.patch.object(training, "environment", once):
        yield


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """All that a finished run leaves but its times: the bytes of its last checkpoint's tensors, and its metrics."""
    place = folder / "checkpoints" / f"step-{checkpoints.steps(folder)[-1]:08d}"
    tensors = {path.name: path.read_bytes() for path in place.glob("*.safetensors")}
    rows = training.read(folder).metrics
    return tensors, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def differ(folder: Path, other: Path) -> str | None:
    """What two finished runs differ in, None where they are the same to the last bit."""
    (tensors, rows), (others, other_rows) = outcome(folder), outcome(other)
    for name in tensors | others:
        if tensors.get(name) != others.get(name):
            return f"{name} differs"
    if rows != other_rows:
        return f"metrics differ: {next(p for p in itertools.zip_longest(rows, other_rows) if p[0] != p[1])}"
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]  # an empty word
    return f"{left} was left behind" if left else None


@contextlib.contextmanager
def at_forward(step: int, part: int, happens: Callable[[], None]) -> Iterator[None]:
    """Something happens, once, before the forward pass of this part of this step."""
    right, left = Trainer.forward, [1]

    def forward(self, views, masks, now, place=0, **options):
        if (now, place) == (step, part) and "precision" not in options and left:  # precision: the rehearsal
            left.pop()
            happens()
        return right(self, views, masks, now, place, **options)

    with mock.patch.object(Trainer, "forward", forward):
        yield


def interrupt() -> None:
    raise Interrupted("a test")


def cells(names: list[str] | None = None) -> list[tuple[str, str, str, int]]:
    """(method, precision, stop, workers) of the whole matrix."""
    return list(itertools.product(names or METHODS, ("fp32", "bf16"), STOPS, (0, 2)))


def matrix(chosen: list[tuple[str, str, str, int]], folder: Path | None = None) -> Iterator[tuple[str, str | None]]:
    """Each cell's name, and what differs between its stopped run and an uninterrupted one, or None.

    Two workers read a memory map, which the other run has in memory.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.object(os, "fsync", lambda _: None))  # of the disk's faults others take care
        for name, precision, stop, workers in chosen:
            yield f"{name}, {precision}, {stop}, {workers} workers", _resumed(folder, name, precision, stop, workers)


def _resumed(folder: Path, name: str, precision: str, stop: str, workers: int) -> str | None:
    parts = 2 if stop == STOPS[2] else 1
    run = tiny(folder / f"whole {name} {precision} {parts}", precision=precision, accumulate=parts)
    composed = method(name)
    with given(pictures()):
        whole = training.train(composed, run, name)  # the second time it is only read
    run = run.but(out=str(folder / f"{name} {precision} {stop} {workers}"), workers=workers)
    with given(pictures(mapped=folder / "pixels" if workers else None)):
        if parts == 2:
            try:
                with at_forward(3, 1, interrupt):
                    training.train(composed, run, name)
                return "it was not interrupted"
            except Interrupted as stopped:
                at = stopped.step
        else:
            at = 3 if stop == STOPS[0] else 4
            training.train(composed, run, name, stop_after=at)
        (place,) = Path(run.out).iterdir()
        if (saved := checkpoints.newest(place)) != at or at not in (3, 4):
            return f"stopped after step {at}, but step {saved} was saved"
        return differ(training.train(composed, run, name).folder, whole.folder)


CALLS = (("os.fsync", 39), ("os.rename", 6), ("io.open", 20))  # and how often a run makes them, about


def full_disk(folder: Path, call: str, number: int, at: int) -> tuple[bool, str | None]:
    """Whether a run noticed that its at-th call failed for want of room, and what is wrong after it and its repetition.

    A call that tidies up may fail unnoticed: the run must be right all the same.
    """
    composed, run, noticed = method("dino"), tiny(folder / "full"), False
    with given(pictures()):
        whole = training.train(composed, run.but(out=str(folder / "whole")), "x")
        try:
            with mutants._fails(call, number, at):
                training.train(composed, run, "x")
        except OSError as error:
            noticed, text = True, str(error)
            if "\n" in text or error.errno != number or "choose another out" not in text:
                return True, f"it says {text}"
        places = list((folder / "full").glob("x-*"))
        if bad := [step for place in places for step in checkpoints.steps(place) if checkpoints.damage(place, step)]:
            return noticed, f"checkpoints {bad} are damaged"
        return noticed, differ(training.train(composed, run, "x").folder, whole.folder)


def full_disks(n: int, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """n runs on a disk that is full, or broken, once."""
    r = random.Random(seed)
    for _ in range(n):
        (call, count), number = r.choice(CALLS), r.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))
        at = r.randrange(count)
        with tempfile.TemporaryDirectory() as folder:
            noticed, wrong = full_disk(Path(folder), call, number, at)
            yield f"{errno.errorcode[number]} in {call} {at}{', unnoticed' * (not noticed)}", wrong


def growth(steps: int) -> Iterator[tuple[str, str | None]]:
    """One long run with many checkpoints: memory, open files and threads after its first fifth, and at its end."""
    process, seen = psutil.Process(), []
    right = Trainer.step

    def step(self: Trainer, number: int, *args: Any) -> bool:
        if number in (steps // 5, steps - 1):
            gc.collect()
            seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        return right(self, number, *args)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Trainer, "step", step):
        run = tiny(Path(folder, "runs"), epochs=steps * BATCH / N, checkpoint_epochs=10 * BATCH / N)
        with given(pictures(mapped=Path(folder, "pixels"))), mock.patch.object(os, "fsync", lambda _: None):
            training.train(method("dinov2"), run, "x")
    (memory, files, threads), (memory_now, files_now, threads_now) = seen
    grown = (memory_now - memory) / memory
    yield f"memory over {steps} steps", None if grown < 0.01 else f"{memory / 2**20:.0f} MiB grew by {grown:.1%}"
    yield f"open files over {steps} steps", None if files_now <= files else f"{files}, then {files_now}"
    yield f"threads over {steps} steps", None if threads_now <= threads else f"{threads}, then {threads_now}"
