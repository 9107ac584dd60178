"""Training processes that are asked to stop by SIGTERM, SIGINT or SIGUSR1: saved within seconds, status 75, resumed.

Each case is a child that trains through the command line, gets the signal at a random instant of a place, and is
started again; the end must equal that of a run which nobody disturbed.
"""

import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gloo import together
from kills import METHOD, Child, commanded, trained
from resume import at_forward, differ, given, method, pictures, tiny

from prototypes_lib import checkpoints
from prototypes_lib import train as training
from prototypes_lib.cli import INTERRUPTED
from prototypes_lib.interrupts import NAMES, Interrupted

PLACES = (  # what the child has begun, for which time
    ("build", 1), ("rehearsal", 1), ("forward", 1), ("forward", 4), ("backward", 3), ("optimizer", 2),
    ("save", 1), ("save", 2), ("log", 3), ("step", 5),
)  # fmt: skip
WITHIN_S = 5.0


def cases() -> list[tuple[str, tuple[str, int], int]]:
    """(signal, place, workers): sixty."""
    return list(itertools.product(NAMES, PLACES, (0, 2)))


def interruptions(
    chosen: list[tuple[str, tuple[str, int], int]], seed: int = 0, folder: Path | None = None
) -> Iterator[tuple[str, str | None]]:
    """Each case's name, and what went wrong, or None. Two workers read a memory map."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        with Child(trained, folder / "whole") as child:
            if child.rest():
                raise RuntimeError("a run that nobody disturbs does not end well")
        (whole,) = (folder / "whole").iterdir()
        for i, (name, place, workers) in enumerate(chosen):
            said = _interrupted(folder / f"run {i}", whole, name, place, workers, random.Random(f"{seed} {i}").random())
            yield f"{name} at {place[0]} {place[1]}, {workers} workers", said


def _interrupted(out: Path, whole: Path, name: str, place: tuple[str, int], workers: int, share: float) -> str | None:
    mapped = out.with_suffix(".pixels") if workers else None
    with Child(commanded, out, workers, mapped) as child:
        if not child.until(*place):
            return f"it ended after {child.heard[-3:]}"
        time.sleep(0.03 * share)
        sent = time.monotonic()
        os.kill(child.process.pid, getattr(signal, name))
        status, seconds = child.rest(), time.monotonic() - sent
        if child.last("done") or (status == 0 and place == PLACES[-1]):
            return None  # it was done before the signal came
        said, finished = child.last("stderr") or "", child.last("finished") or 0
    if status != INTERRUPTED:
        return f"its status was {status}: {said}"
    if seconds > WITHIN_S:
        return f"that took {seconds:.1f} s"
    folder = next(out.glob("x-*"), None)
    step = (checkpoints.newest(folder) if folder else None) or 0
    if not finished <= step <= finished + 1 or name not in said or (step and f"after step {step};" not in said):
        return f"step {finished} was finished, step {step} is saved: {said}"
    with Child(commanded, out, workers, mapped) as child:
        if status := child.rest():
            return f"the next process ended with {status}: {child.last('stderr')}"
        if child.last("resumed") != step:
            return f"it went on from step {child.last('resumed')}, not {step}"
    return differ(next(out.iterdir()), whole)


def of_ranks(names: tuple[str, ...] = NAMES) -> Iterator[tuple[str, str | None]]:
    """The signal reaches one of two ranks in the middle of a step: both stop after it, with that step saved."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            ends = together(2, _one_is_asked, Path(folder), name)
            wrong = None if ends == [(3, name), (3, "a signal to another rank")][::-1] else f"ranks ended with {ends}"
            again = together(2, _to_the_end, Path(folder))
            whole = together(2, _to_the_end, Path(folder, "whole"))
            yield f"{name} to one of two ranks", wrong or differ(again[0], whole[0])


def _one_is_asked(rank: int, out: Path, name: str) -> tuple[int, str]:
    def ask() -> None:
        if rank == 1:
            os.kill(os.getpid(), getattr(signal, name))

    try:
        with given(pictures()), at_forward(2, 0, ask):
            training.train(method(METHOD), tiny(out), "x")
    except Interrupted as stopped:
        return stopped.step, stopped.signal
    return -1, ""


def _to_the_end(rank: int, out: Path) -> Path:
    with given(pictures()):
        return training.train(method(METHOD), tiny(out), "x").folder
