"""Many image files to one uint8 array, in memory or memory-mapped, with a list of those that were left out."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prototypes_lib.data.images import DECODER, decode, square


@dataclass(frozen=True)
class Skipped:
    """A file that is not among the images, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Decoded:
    """`pixels` (kept, H, W, 3), the indices of the items that were `kept`, and the others with reasons."""

    pixels: np.ndarray
    kept: np.ndarray
    skipped: tuple[Skipped, ...]


def decode_all(
    items: Sequence[Path] | np.ndarray,
    image_size: int | None,
    *,
    cache_folder: Path,
    cache: bool | None = None,
    progress: bool = True,
    name: str = "images",
) -> Decoded:
    """Decode paths (or resize an array's images) on all cores into one uint8 array (N, image_size, image_size, 3).

    With `image_size=None` images keep their size, which must then be the same for all. The array is a file in
    `cache_folder`, memory-mapped copy-on-write, when `cache` is True, or when it is None and the array would
    take more than half of the memory that is free; such a file is found again by the files' names, sizes and
    times. `cache=False` always stays in memory.

    Raises:
        ValueError: not one item could be read, or sizes differ under `image_size=None`.
        OSError: the disk has no room for the memory map.
    """
    if isinstance(items, np.ndarray) and (image_size is None or items.shape[1:3] == (image_size, image_size)):
        return Decoded(items, np.arange(len(items)), ())
    shape = (len(items), *_shape(items, image_size), 3)
    n_bytes = int(np.prod(shape, dtype=np.int64))
    if cache or (cache is None and n_bytes > available_memory() // 2):
        key = _key(items, shape)
        target = cache_folder / f"{name}-{key}.bin"
        if (found := _cached(target)) is not None:
            return found
        cache_folder.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            pixels = _new_map(temporary, shape, n_bytes)
            kept, skipped = _fill(pixels, items, image_size, progress, name)
            pixels.flush()
            del pixels  # unmap before the file changes its size
            os.truncate(temporary, len(kept) * (n_bytes // len(items)))
            record = {"shape": [len(kept), *shape[1:]], "kept": kept.tolist(), "skipped": [*map(asdict, skipped)]}
            _write_json(target.with_suffix(".json"), record)
            temporary.replace(target)  # last: a target without its record does not exist
        finally:
            temporary.unlink(missing_ok=True)
        return _cached(target)
    pixels = np.empty(shape, np.uint8)
    kept, skipped = _fill(pixels, items, image_size, progress, name)
    return Decoded(pixels[: len(kept)], kept, skipped)


def _shape(items: Sequence[Path] | np.ndarray, image_size: int | None) -> tuple[int, int]:
    if image_size is not None:
        return image_size, image_size
    for path in items:
        try:
            return decode(path).shape[:2]
        except Exception:  # reported with its reason when its turn comes
            continue
    return 1, 1  # nothing is readable: _fill says so


def _fill(
    pixels: np.ndarray, items: Sequence[Path] | np.ndarray, image_size: int | None, progress: bool, name: str
) -> tuple[np.ndarray, tuple[Skipped, ...]]:
    """Decode into `pixels`, moving rows up over the skipped ones; returns the kept indices and the skipped."""
    reasons: dict[int, str] = {}

    def block(start: int) -> int:
        stop = min(start + 32, len(items))
        for i in range(start, stop):
            try:
                picture = items[i] if isinstance(items, np.ndarray) else decode(items[i])
                picture = picture if image_size is None else square(picture, image_size)
            except Exception as error:  # a damaged file can make a decoder raise anything
                reasons[i] = _reason(error)
                continue
            if picture.shape != pixels.shape[1:]:
                height, width = picture.shape[:2]
                raise ValueError(
                    f"data: the images of {name} have different sizes ({pixels.shape[2]} x {pixels.shape[1]} and "
                    f"{width} x {height} in {str(items[i])!r}); pass image_size, for example image_size=224"
                )
            pixels[i] = picture
        return stop - start

    # Threads are enough: Pillow decodes and resizes without Python's lock.
    bar = tqdm(total=len(items), desc=name, unit="img", mininterval=2, file=sys.stdout, disable=not progress)
    with bar, ThreadPoolExecutor(_cores()) as pool:
        for done in pool.map(block, range(0, len(items), 32)):
            bar.update(done)
    if len(reasons) == len(items):
        first = next(iter(sorted(reasons)))
        raise ValueError(
            f"data: none of the {len(items)} files of {name} could be read; {str(items[first])!r}: {reasons[first]}"
        )
    kept = np.array([i for i in range(len(items)) if i not in reasons], np.int64)
    for row, i in enumerate(kept.tolist() if reasons else ()):
        if row != i:
            pixels[row] = pixels[i]
    return kept, tuple(Skipped(str(items[i]), reasons[i]) for i in sorted(reasons))


def _reason(error: Exception) -> str:
    """One line; Pillow's messages for files in memory name a BytesIO object, which says nothing."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if "cannot identify image file" in text:
        return "not an image of a known format"
    return f"{text[:200]} ({type(error).__name__})" if text else type(error).__name__


def _key(items: Sequence[Path] | np.ndarray, shape: tuple[int, ...]) -> str:
    digest = hashlib.blake2b(repr((DECODER, shape)).encode(), digest_size=8)
    if isinstance(items, np.ndarray):
        digest.update(sample(items))
    else:
        for path in items:
            try:
                status = path.stat()
                line = f"{str(path)!r} {status.st_size} {status.st_mtime_ns}"
            except OSError:
                line = f"{str(path)!r} missing"
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def sample(pixels: np.ndarray) -> bytes:
    """The bytes of at most 256 evenly spaced images: enough to tell sets apart without reading a memory map."""
    rows = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), 256)).astype(np.int64))
    return np.ascontiguousarray(pixels[rows]).tobytes()


def _cached(target: Path) -> Decoded | None:
    try:
        record = json.loads(target.with_suffix(".json").read_text())
        shape, kept = tuple(record["shape"]), np.array(record["kept"], np.int64)
        if target.stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        skipped = tuple(Skipped(**entry) for entry in record["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: decode again
    # copy-on-write: writable for torch, the file stays as it is
    return Decoded(np.memmap(target, np.uint8, "c", shape=shape), kept, skipped)


def _new_map(path: Path, shape: tuple[int, ...], n_bytes: int) -> np.memmap:
    # A map on a full disk ends the process with SIGBUS, so the room is taken first.
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                file.truncate(n_bytes)
        except OSError as error:
            raise OSError(
                f"data: {path.parent} has no room for {n_bytes / 1e9:.1f} GB of decoded images "
                f"({error.strerror}); use a smaller image_size or limit, or another root"
            ) from error
    return np.memmap(path, np.uint8, "r+", shape=shape)


def _write_json(path: Path, record: dict) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.json.tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 32)


def available_memory() -> int:
    """Bytes of memory a new array may take: what the system calls available, within a container's limit."""
    free = [4 * 2**30]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = [int(line.split()[1]) * 1024]
    except (OSError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: half of what is built in
            free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, min(free))
