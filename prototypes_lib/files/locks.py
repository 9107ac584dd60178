"""One process at a time writes a run folder.

The lock is the kernel's (flock) on `folder/.lock`, and goes with its process however that ends: no lock is ever stale,
and no clock plays a part. The text in the file is for people. Where there is no flock (Windows, some network disks)
nothing is locked, and a line on stderr says so.
"""

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None


@contextlib.contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process, made if need be; a folder made here that stays empty is removed at the end.

    A forked child inherits the lock and holds it as long as it lives; a spawned one does not.

    Raises ValueError, one line, where another process (or another place in this one) holds it; OSError where the folder
    cannot be written.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _acquire(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / ".lock").unlink()  # still locked: whoever opened it meanwhile sees that it is gone, and retries
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _acquire(folder: Path) -> int:
    path = folder / ".lock"
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError) as error:  # removed by its last holder between these two lines
            if folder.exists() and not folder.is_dir():
                raise OSError(error.errno, f"{folder} is no folder; move it or choose another out") from error
            continue
        except OSError as error:
            text = f"{folder} cannot be written: {error.strerror}; allow writing there or choose another out"
            raise OSError(error.errno, text) from error
        try:
            if _lock(descriptor, folder) and not _is(path, descriptor):
                os.close(descriptor)
                continue
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(who).encode())
        except BlockingIOError as error:
            text = f"{folder} is in use by {_holder(descriptor)}; wait for it, stop it, or choose another out"
            os.close(descriptor)
            raise ValueError(text) from error
        except OSError:  # a full disk: the lock holds, its text is for people only
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
    raise OSError(errno.EAGAIN, f"{folder} is made and removed again and again by another process")


def _lock(descriptor: int, folder: Path) -> bool:
    """Take the lock or raise BlockingIOError; False where this system or disk has none."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(error.errno, "locked") from error
    print(f"{folder} cannot be locked here: start no second run in it", file=sys.stderr, flush=True)
    return False


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that now has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.read(descriptor, 4096))
        return f"process {int(who['pid'])} on {who['host']} since {who['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
