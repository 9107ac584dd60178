"""Files and folders that are whole or not there: written aside, flushed to disk, checked, and renamed.

A folder carries manifest.json with size and sha256 of each of its files; `verify` compares. What cannot be written is
one clear OSError, leaves nothing behind and harms nothing older. A process that dies halfway leaves a hidden
`.name.PID.new` or `.name.PID.old`; the next write, or `tidy`, puts that in order.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
_writing: set[Path] = set()  # what this very process has under way


def write_folder(
    place: str | Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Any], label: str = ""
) -> None:
    """Write a folder of safetensors and JSON files with its manifest: all of it or nothing.

    An older folder of that name is replaced: renamed aside, then the new one takes its name, then the old one goes. A
    crash between the two renames leaves the old one under its hidden name, from which `tidy` brings it back.

    Args:
        place: the folder. tensors: {file: {name: tensor}}. texts: {file: anything JSON can hold}.
        label: words kept in the header of each safetensors file (`label_of`), to tell whose it is.

    Raises OSError, in one line with the folder, the cause and the remedy.
    """
    place = Path(place)
    with all_or_nothing(place) as aside:
        aside.mkdir()
        for name, content in tensors.items():
            save_file(dict(content), aside / name, {"of": label} if label else None)
        for name, content in texts.items():
            (aside / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        for path in aside.iterdir():
            if not readable(path):
                raise OSError(errno.EIO, f"{path.name} was written short")
            _sync(path)
        manifest = {"format": FORMAT, "files": {path.name: _entry(path) for path in sorted(aside.iterdir())}}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync(aside / MANIFEST)
        _sync(aside)
        old, moved = _aside(place, "old"), False
        try:
            if place.exists():
                remove(old)
                place.rename(old)
                moved = True
            aside.rename(place)
            _sync(place.parent)
        except BaseException:
            if moved:
                if place.exists():
                    place.rename(aside)
                old.rename(place)
            raise
    remove(old)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file aside and rename it, so that a reader finds the old one or the new one, never half.

    Raises OSError, in one line with the file, the cause and the remedy.
    """
    path = Path(path)
    with all_or_nothing(path) as aside:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)


def verify(place: str | Path, needs: Iterable[str] = ()) -> str | None:
    """Why a folder is not what its manifest says, in a few words; None where every file is there and the same.

    needs: files that the manifest must list. Files that it does not list are nobody's concern.
    """
    place = Path(place)
    if not place.is_dir():
        return "the folder is missing"
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
        found, files = manifest["format"], dict(manifest["files"])
        wanted = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"{MANIFEST} is damaged"
    if found != FORMAT or any(name in (".", "..", "") or Path(name).name != name for name in wanted):
        return f"{MANIFEST} is damaged or of another version"
    if missing := [name for name in needs if name not in wanted]:
        return f"{missing[0]} is not in {MANIFEST}"
    for name, (size, digest) in wanted.items():
        path = place / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
            if _entry(path)["sha256"] != digest:
                return f"the content of {name} has changed (sha256)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def readable(path: Path) -> bool:
    """Whether a JSON file parses, and a safetensors file has a header that fits its length to the byte."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        json.loads(path.read_bytes())
        return True
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False


def label_of(path: Path) -> str:
    """The label in the header of a safetensors file, "" where there is none."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("of", "")


def tidy(parent: str | Path, name: str | None = None) -> None:
    """Remove what dead processes left half-written in `parent`, and bring back what they had moved aside.

    name: only what belongs to the file or folder of this name. What belongs to a living process of this machine is left
    alone, and so is everything where this process may not write; whether one on another machine lives cannot be seen,
    so this is for the one who holds the folder (locks.py), not for readers.
    """
    parent = Path(parent)
    with contextlib.suppress(OSError):
        for entry in list(parent.iterdir()):
            match = re.fullmatch(r"\.(.+)\.(\d+)\.(new|old)", entry.name)
            if not match or name not in (None, match[1]) or _under_way(parent / match[1], int(match[2])):
                continue
            if match[3] == "old" and not (parent / match[1]).exists():  # it died between the two renames
                entry.rename(parent / match[1])
            else:
                remove(entry)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; a folder is hidden first, so that nobody finds half of it."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.name.startswith("."):
            path = path.rename(_aside(path, "new"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def all_or_nothing(place: Path) -> Iterator[Path]:
    """A hidden name beside `place` to write under; what remains of it goes away, and errors become one clear line."""
    aside = _aside(place, "new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tidy(place.parent, place.name)
        _writing.add(place)
        remove(aside)
        yield aside
    except (OSError, SafetensorError) as error:
        raise clear_error(place, error) from error
    finally:
        remove(aside)
        _writing.discard(place)


def clear_error(place: Path, error: OSError | SafetensorError) -> OSError:
    """The system's word for what failed, as one line with the file or folder, the cause and the remedy."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"os error (\d+)", str(error))):  # safetensors', from below Python
        number = int(match[1])
    cause = getattr(error, "strerror", None) or (os.strerror(number) if number else str(error).splitlines()[0])
    if number in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        fix = "free space or choose another out"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "allow writing there or choose another out"
    else:
        fix = "check that disk or choose another out"
    text = f"{place} could not be written: {cause}; {fix} (what was there before is as it was)"
    return OSError(number, text) if number else OSError(text)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _aside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}.{kind}")


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows flushes names by itself
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network disks know no such thing
            raise
    finally:
        os.close(descriptor)


def _under_way(place: Path, pid: int) -> bool:
    """Whether process `pid` may still be writing `place`; process numbers come back, as 1 does in every container."""
    if pid == os.getpid():
        return place in _writing
    if os.name == "nt":  # no harmless question there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
