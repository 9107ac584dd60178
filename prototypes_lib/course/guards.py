"""What surrounds a run: one at a time in a folder, and signals that end it in order."""

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOCK = ".running"


class Interrupted(KeyboardInterrupt):
    """A signal asked the runner to end; `code` is the exit status a shell expects."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


@contextlib.contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """One run at a time in a folder. The system drops the lock with its process, so none can be left behind."""
    path = out_dir / _LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            mine = False
        if not mine:
            file.seek(0)
            raise ValueError(f"another run (process {file.read().strip() or '?'}) is at work in {out_dir}")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP become an exception, so that the kernel ends with the runner."""

    def stop(signum: int, _frame: Any) -> None:
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
