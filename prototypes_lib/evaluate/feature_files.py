"""Files of features: named by what they were made of, whole or not there, mapped where they do not fit in memory.

A file is NumPy's .npy (float32, one row an image) with the sha256 of all of it appended, which np.load does not mind.
What does not verify is made anew. Labels are not in it: they are the caller's.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from prototypes_lib.backbones import Backbone
from prototypes_lib.data import Images
from prototypes_lib.files import storage

VERSION = 1  # part of every name; raise it when the same weights, view and pixels would give other features
WHOLE = 2 * 10**9  # bytes of pixels up to which all are looked at
SAMPLES = 4096  # images that are looked at of more


def place(
    folder: str | Path,
    backbone: Backbone,
    images: Images,
    view: dict[str, Any],
    transform: Callable[[Tensor, Tensor], Tensor] | None,
    device: str | torch.device,
) -> Path:
    """The file for these features, in a folder that is made if need be.

    Its name is a hash of the weights and the architecture, of the view and the transform, and of the pixels: all of
    them up to 2 GB, else of shape, labels and 4096 evenly spaced images. Weights of the mask token, batch size and
    device play no part, but autocast does.

    Raises ValueError for a transform whose repr does not say what it does, OSError where the folder cannot be made.
    """
    device, folder = torch.device(device), Path(folder).expanduser()
    cast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else ""
    digest = hashlib.sha256(json.dumps([VERSION, view, cast, _of_transform(transform)]).encode())
    _add_weights(digest, backbone)
    _add_pixels(digest, images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.clear_error(folder, error) from error
    return folder / f"features-{digest.hexdigest()[:32]}.npy"


def _of_transform(transform: Callable[[Tensor, Tensor], Tensor] | None) -> list[str]:
    if transform is None:
        return []
    name = getattr(transform, "__qualname__", type(transform).__qualname__)
    text = repr(transform)
    if " at 0x" in text or "..." in text:  # an address means another function in another process
        raise ValueError(
            f"transform {name}: its repr must say all it does for its features to be kept; "
            "make it a frozen dataclass of plain numbers with __call__, or pass no cache"
        )
    return [getattr(transform, "__module__", ""), name, text]


def _add_weights(digest: Any, backbone: Backbone) -> None:
    heads = [module.num_heads for module in backbone.modules() if hasattr(module, "num_heads")]
    digest.update(f"{backbone.name} {backbone.interpolation} {heads} {backbone!r}".encode())
    for name, tensor in backbone.state_dict().items():
        if name != "mask_token":
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _add_pixels(digest: Any, images: Images) -> None:
    pixels, rows = images.pixels, range(len(images))
    digest.update(repr(pixels.shape).encode())
    if pixels.nbytes > WHOLE:
        digest.update(images.fingerprint().encode())
        rows = np.unique(np.linspace(0, len(pixels) - 1, SAMPLES).astype(np.int64))
    for start in range(0, len(rows), 256):
        digest.update(np.ascontiguousarray(pixels[rows[start : start + 256]]))


def write(place: Path, shape: tuple[int, int], rows: Iterable[Tensor]) -> None:
    """Write blocks of rows aside, then give the file its name; of several processes at once, the last one's stays.

    Raises OSError, one line, where it cannot be written.
    """
    with storage.all_or_nothing(place) as aside:
        with aside.open("xb") as file:
            fill(file, shape, rows)
            os.fsync(file.fileno())
        aside.replace(place)


def temporary(shape: tuple[int, int], rows: Iterable[Tensor]) -> Tensor:
    """The rows in a file without a name, mapped; it goes with the tensor.

    Raises OSError, one line, where it cannot be written.
    """
    try:
        with tempfile.TemporaryFile() as file:
            fill(file, shape, rows)
            return mapped(file, shape)
    except OSError as error:
        raise storage.clear_error(Path(tempfile.gettempdir()) / "features", error) from error


def fill(file: BinaryIO, shape: tuple[int, int], rows: Iterable[Tensor]) -> None:
    """Write header, blocks of rows, and the checksum of both; by plain writes, which a full disk answers with an error
    and not, as it does a map, by ending the process."""
    digest = hashlib.sha256(_header(shape))
    file.write(_header(shape))
    for block in rows:
        for part in block.split(2**14):
            data = np.ascontiguousarray(part.numpy(), "<f4")
            digest.update(data)
            file.write(data)
    file.write(digest.digest())
    file.flush()


def read(place: Path, shape: tuple[int, int], in_memory: bool) -> Tensor | None:
    """Features of this shape, in memory or mapped; None where there are none, or (a line on stderr) damaged ones."""
    if not place.is_file():
        return None
    try:
        reason = _damage(place, shape)
        if not reason:
            return torch.from_numpy(_map(place, shape)).clone() if in_memory else mapped(place, shape)
    except OSError as error:
        reason = str(error.strerror or error)
    print(f"{place} is damaged ({reason}) and made anew", file=sys.stderr, flush=True)
    return None


def mapped(file: Path | BinaryIO, shape: tuple[int, int]) -> Tensor:
    """The rows of a file as a tensor; what is written into it goes to memory and not to the file."""
    return torch.from_numpy(_map(file, shape))


def _map(file: Path | BinaryIO, shape: tuple[int, int]) -> np.ndarray:
    if not shape[0]:
        return np.empty(shape, np.float32)  # nothing cannot be mapped
    return np.memmap(file, "<f4", "c", offset=len(_header(shape)), shape=shape)


def _damage(place: Path, shape: tuple[int, int]) -> str | None:
    header, wanted = _header(shape), len(_header(shape)) + 4 * shape[0] * shape[1] + 32
    if (size := place.stat().st_size) != wanted:
        return f"{size:,} bytes, not {wanted:,}"
    digest, left = hashlib.sha256(), wanted - 32
    with place.open("rb") as file:
        while left and (block := file.read(min(left, 2**22))):
            if left == wanted - 32 and not block.startswith(header):
                return "another header"
            digest.update(block)
            left -= len(block)
        return None if file.read() == digest.digest() else "its content has changed (sha256)"


def _header(shape: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()
