"""Training processes that are killed outright, again and again, until their run is done: nothing saved is ever lost.

A child forked from a process that has imported torch trains, says through a pipe where it is, and dies of SIGKILL:
sent by this process at a random instant of a phase of the step, or by itself at the n-th system call on files. It is
started again until the run is finished, which must then equal an uninterrupted one in every bit.
"""

import contextlib
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gloo import CONTEXT
from resume import differ, given, method, pictures, tiny

from prototypes_lib import checkpoints, distributed, records
from prototypes_lib import train as training
from prototypes_lib.cli import run_command
from prototypes_lib.distributed.watch import STATUS
from prototypes_lib.files import storage
from prototypes_lib.trainer import Trainer

CONTEXT.set_forkserver_preload(
    ["torch", "pytest", "prototypes_lib.distributed", "prototypes_lib.cli", "prototypes_lib.train"]
)
METHOD = "dinov2"  # centers, two heads, masks
PHASES = ("rehearsal", "forward", "backward", "optimizer", "save", "log", "step")  # a child says when each begins
KINDS = ("start", *PHASES, "call", "call", "call", "torn tensors", "torn line")  # ways to die
CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.truncate")
LIMIT_S = 60.0


class Child:
    """`function(say, *args)` in a process of its own; what it says is read with `hear`, to the end with `rest`."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self._pipe, there = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_serve, args=(there, function, args), daemon=True)
        self.process.start()
        there.close()
        self.heard: list[tuple[str, Any]] = []

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def hear(self, seconds: float = LIMIT_S) -> tuple[str, Any] | None:
        """The next word and its value, None at the end. Raises TimeoutError."""
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"nothing was heard for {seconds:.0f} s after {self.heard[-3:]}")
        try:
            self.heard.append(self._pipe.recv())
        except (EOFError, ConnectionResetError):
            return None
        return self.heard[-1]

    def until(self, word: str, times: int = 1) -> bool:
        """Wait for a word to be said so many times; whether it was."""
        while times and (said := self.hear()):
            times -= said[0] == word
        return not times

    def rest(self) -> int:
        """The exit status, after everything that was still to be heard."""
        while self.hear():
            pass
        self.process.join(LIMIT_S)
        return self.process.exitcode

    def last(self, word: str) -> Any:
        """What was last said with this word; None if nothing was."""
        return next((value for said, value in reversed(self.heard) if said == word), None)


def _serve(pipe: Connection, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)

    def say(word: str, value: Any = None) -> None:
        pipe.send((word, value))

    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    sys.exit(function(say, *args))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trained(say: Callable, out: Path, plan: tuple = (), workers: int = 0, mapped: Path | None = None) -> None:
    """Train the tiny run, saying what begins and what is done; plan: how this process kills itself, if it does."""
    telling(say)
    if plan:
        {"call": _at_call, "torn tensors": _torn_tensors, "torn line": _torn_line}[plan[0]](say, *plan[1:])
    with given(pictures(mapped=mapped)):
        training.train(method(METHOD), tiny(out, workers=workers), "x")
    say("done")


def commanded(say: Callable, out: Path, workers: int = 0, mapped: Path | None = None) -> int:
    """The same through the command line, whose words on stderr are said too; its exit status."""
    telling(say)
    patches = {
        "prototypes_lib.methods.METHODS": {METHOD: method(METHOD)},
        "prototypes_lib.cli._defaults": lambda _: tiny(out, workers=workers),
        "sys.stderr": _Said(say),
    }
    with contextlib.ExitStack() as stack:
        for target, value in patches.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(given(pictures(mapped=mapped)))
        return run_command(["train", METHOD, "--name", "x"])


class _Said:
    """A stream whose text is said."""

    def __init__(self, say: Callable):
        self._say = say

    def write(self, text: str) -> int:
        if text.strip():
            self._say("stderr", text.strip())
        return len(text)

    def flush(self) -> None:
        pass


def telling(say: Callable) -> None:
    """From now on this process says "resumed" and "saved" with the step, and the name of each phase as it begins."""

    def around(owner: Any, name: str, before: str = "", after: str = "", value: Callable = lambda *_: None) -> None:
        right = getattr(owner, name)

        def told(*args: Any, **options: Any) -> Any:
            if before:
                say(before)
            result = right(*args, **options)
            if after:
                say(after, value(result, *args))
            return result

        setattr(owner, name, told)

    say("start")
    around(checkpoints, "newest", after="resumed", value=lambda step, *_: step or 0)
    around(checkpoints, "save", "save", "saved", lambda _, folder, model, optimizer, state, *__: state["step"])
    around(training, "build", "build")
    around(Trainer, "_rehearse", "rehearsal")
    around(Trainer, "step", "step", "finished", lambda _, trainer, *__: trainer.done)
    around(Trainer, "forward", "forward")
    around(torch.Tensor, "backward", "backward")
    around(Trainer, "_move", "optimizer")
    around(records.Log, "write", "log")


def _at_call(say: Callable, n: int) -> None:
    """Die before the n-th call on files from the first save on."""
    left, right, save, inside = [n], os.fsync, checkpoints.save, []

    def count(event: str) -> None:
        if inside and event in CALLS:
            if not left[0]:
                die()
            left[0] -= 1

    def fsync(descriptor: int) -> None:
        count(CALLS[0])
        right(descriptor)

    def counted(*args: Any, **options: Any) -> Any:
        inside.append(True)
        return save(*args, **options)

    sys.addaudithook(lambda event, _: count(event))
    os.fsync, checkpoints.save = fsync, counted


def _torn_tensors(say: Callable, n: int, share: float) -> None:
    """Die when a part of the n-th file of tensors is written."""
    left, right = [n], storage.save_file

    def torn(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        right(tensors, path, metadata)
        if not left[0]:
            os.truncate(path, int(path.stat().st_size * share))
            die()
        left[0] -= 1

    storage.save_file = torn


def _torn_line(say: Callable, n: int, share: float) -> None:
    """Die when a part of the n-th line of metrics is written."""
    left, right = [n], records.Log.write

    def torn(self: records.Log, row: dict) -> None:
        path = self.folder / "metrics.jsonl"
        before = path.stat().st_size if path.exists() else 0
        right(self, row)
        if not left[0]:
            os.truncate(path, before + int((path.stat().st_size - before) * share))
            die()
        left[0] -= 1

    records.Log.write = torn


@dataclass(frozen=True)
class _Life:
    """One process: how it was to die, its exit status, the steps it resumed at and saved last (-1: it did not)."""

    how: str
    status: int
    resumed: int
    saved: int


def _live(out: Path, r: random.Random | None) -> _Life:
    """Start a process, and kill it unless it is to live (r=None)."""
    kind = r.choice(KINDS) if r else ""
    n, share = (r.randrange(3), r.random()) if r else (0, 0.0)
    plan = ("call", r.randrange(90)) if kind == "call" else (kind, n, share) if "torn" in kind else ()
    with Child(trained, out, plan) as child:
        if kind and not plan and child.until(kind, 1 if kind in ("start", "rehearsal") else 1 + n):
            time.sleep(share * (0.5 if kind == "start" else 0.05))
            child.process.kill()
        status = child.rest()
        steps = (child.last(word) for word in ("resumed", "saved"))
        return _Life(f"{kind} {plan[1:] or n}", status, *(-1 if step is None else step for step in steps))


def kills(n: int, seed: int = 0, folder: Path | None = None) -> Iterator[tuple[str, str | None]]:
    """n kills, of as many runs as these take: how each process died, and what was wrong afterwards, or None.

    A kill is survived if the process after it resumes at the last step said to be saved, or later, and the run, once
    finished, equals one that was never killed.
    """
    r, done = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        if _live(folder / "whole", None).status:
            raise RuntimeError("a run that nobody kills does not end well")
        (whole,) = (folder / "whole").iterdir()
        for number in itertools.count():
            deaths: dict[str, str | None] = {}
            out, promised, how = folder / f"run {number}", 0, ""
            while True:
                life = _live(out, r if done + len(deaths) < n else None)
                if how and life.status not in (0, -signal.SIGKILL):
                    deaths[how] = f"the next process ended with {life.status}"
                if how and -1 < life.resumed < promised:
                    deaths[how] = f"step {promised} was saved, but the next process resumed at {life.resumed}"
                promised = max(promised, life.resumed, life.saved)
                if life.status != -signal.SIGKILL:
                    break
                how = f"kill {done + len(deaths) + 1}: {life.how}"
                deaths[how] = None
            said = differ(next(out.iterdir()), whole) if not life.status else "the run was not finished"
            yield from ((how, wrong or said) for how, wrong in deaths.items())
            done += len(deaths)
            if done >= n:
                return


# --------------------------------------------------------------------------------------- one of two ranks, and doubles


def ranked(say: Callable, rank: int, port: int, out: Path, patience: dict[str, float]) -> None:
    """Train as one of two ranks that torchrun would have started; what it writes to stderr is in a file."""
    descriptor = os.open(out.with_suffix(f".{rank}.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    telling(say)
    right = distributed.group
    with mock.patch.object(distributed, "group", lambda device: right(device, **patience)), given(pictures()):
        training.train(method(METHOD), tiny(out), "x")
    say("done")


def _pair(out: Path, patience: dict[str, float]) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(ranked, rank, port, out, patience) for rank in range(2)]


def _lost(out: Path, whole: Path, who: int, what: signal.Signals, step: int, patience: dict[str, float]) -> str | None:
    pair = _pair(out, patience)
    with pair[0], pair[1]:
        victim, other = pair[who], pair[1 - who]
        if not victim.until("step", step):
            return f"rank {who} ended after {victim.heard[-3:]}"
        os.kill(victim.process.pid, what)
        start = time.monotonic()
        status, seconds = other.rest(), time.monotonic() - start
        said = out.with_suffix(f".{1 - who}.err").read_text()
        if status == 0 and other.last("done"):
            return "the run was over before"
        if status != STATUS or f"rank {who} (pid {victim.process.pid}" not in said or seconds > 30:
            return f"status {status} after {seconds:.0f} s: {said[-300:]}"
    pair = _pair(out, patience)
    with pair[0], pair[1]:
        if any([child.rest() for child in pair]):
            return "the run cannot be finished: " + out.with_suffix(".0.err").read_text()[-300:]
    return differ(next(out.iterdir()), whole)


def lost_ranks(
    folder: Path | None = None, patience: dict[str, float] | None = None
) -> Iterator[tuple[str, str | None]]:
    """Either of two ranks is killed or suspended in mid-run: the other ends within 30 s, naming it; the run goes on."""
    patience = patience or {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        pair = _pair(folder / "whole", patience)
        with pair[0], pair[1]:
            if any([child.rest() for child in pair]):
                raise RuntimeError((folder / "whole.0.err").read_text())
        (whole,) = (folder / "whole").iterdir()
        for what in (signal.SIGKILL, signal.SIGSTOP):
            for who in (1, 0):
                out = folder / f"{what.name} {who}"
                yield f"{what.name} to rank {who} of 2", _lost(out, whole, who, what, 4, patience)


def doubles(n: int, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """n times a second process wants to train in the folder of a first: refused; and, the first killed, admitted."""
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(n):
            out, phase, times = Path(temporary, f"{i}"), r.choice(PHASES[1:]), r.randrange(1, 3)
            with Child(trained, out) as first:
                first.until(phase, times)
                os.kill(first.process.pid, signal.SIGSTOP)
                with Child(commanded, out) as second:
                    status, said = second.rest(), second.last("stderr") or ""
                wrong = None
                if status != 2 or f"in use by process {first.process.pid} " not in said or "\n" in said:
                    wrong = f"status {status}: {said}"
            if _live(out, None).status:  # the first has been killed
                wrong = wrong or "the lock outlived its process"
            yield f"a second process at {phase} {times}", wrong
