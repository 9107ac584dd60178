"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which schedulers send before a time limit.

    with Signals() as signals:
        try:
            for step in ...:
                ...                         # forward, backward: may be cut off at any instant
                with signals.whole():
                    ...                     # optimizer, teacher, save: never cut
        except Interrupted:
            with signals.whole(last=True):
                ...                         # save the last finished step; further signals change nothing

A signal raises at once, so that a long step does not delay the save; Python's handlers run between two operations of
the main thread, so "at once" means after the kernel or backward pass that is running.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop: by which signal, after which finished step, with its checkpoint in which folder."""

    def __init__(self, signal: str, step: int | None = None, folder: Path | None = None):
        super().__init__(signal, step, folder)
        self.signal, self.step, self.folder = signal, step, folder

    def __str__(self) -> str:
        if self.step is None:
            return f"stopped by {self.signal}"
        return f"stopped by {self.signal} after step {self.step}; run the same again to go on from {self.folder}"


class Signals:
    """Turns the signals that ask to stop into `Interrupted`, never inside a section marked `whole`.

    raise_now: False only notes them in `asked`, for a run of several ranks, which must agree before they stop.

    Handlers are installed in the main thread only (elsewhere Python allows none, and nothing happens) and the old ones
    are back at the end. A process forked meanwhile dies of these signals as if there were no handlers.
    """

    def __init__(self, raise_now: bool = True):
        self.raise_now = raise_now
        self.asked: str | None = None
        self._raised = False
        self._depth = 0
        self._old: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if (old := signal.getsignal(number)) is not None:  # None: installed by C code, could not be put back
                    self._old[number] = old
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    @contextlib.contextmanager
    def whole(self, last: bool = False) -> Iterator[None]:
        """A section that no signal cuts: one that comes inside is noted, and raised at its end.

        last: the final save; from here on signals are noted only.

        Raises Interrupted at its end if a signal has come, also one whose first `Interrupted` got lost (Python drops
        what is raised inside a destructor).
        """
        if last:
            self.raise_now = False
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self.asked and self.raise_now and not self._depth:
            self._raised = True
            raise Interrupted(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = self.asked or signal.Signals(number).name
        if self.raise_now and not self._depth and not self._raised:
            self._raised = True
            raise Interrupted(self.asked)
