"""Other people's checkpoints, most of them pickles, read without doing whatever they ask for.

A pickle is a program. torch's restricted reader (weights_only=True) knows tensors and plain containers only; a few
other names that old checkpoints hold are given to stand-ins of ours. Nothing falls back to the full unpickler.
"""

import contextlib
import io
import math
import pickletools
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_pickle(path: str | Path, on_disk: bool = False) -> dict[Any, Any]:
    """A checkpoint file of others (.pth, .pt, .pth.tar, .bin; or .safetensors) as a dictionary of CPU tensors and data.

    What it is follows from its content, not from its name. Command-line arguments (argparse.Namespace) become
    dictionaries, paths text, NumPy numbers and arrays of numbers are rebuilt from their bytes by code of ours. A zip
    file's checksums are compared, which torch does not do. on_disk: tensors of such files stay there until they are
    used; they must not be written to.

    Raises FileNotFoundError without that file, ValueError, one line, for one that is empty, cut off, no checkpoint, or
    asks for anything else; it is then named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, or no file")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path} is empty; fetch it again")
    if kind := _is_something_else(path):
        raise ValueError(f"{path} is {kind}")
    if _is_safetensors(path):
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({_line(error)}); fetch it again") from error
    try:
        _check_container(path, size)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # of protocols and old storages; what cannot be read is an error
            content = _plain(_loaded(path, on_disk), size)
    except Exception as error:  # whatever a hostile file makes the reader stumble over is a refusal
        raise ValueError(f"{path} is refused: {_reason(error, path)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; is it a checkpoint?")
    return content


def _loaded(path: Path, on_disk: bool) -> Any:
    if on_disk and zipfile.is_zipfile(path) and path.suffix != ".safetensors":  # torch goes by that suffix
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors do, with a length and JSON; a damaged one is told by its suffix."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\3\4" or head[:1] == b"\x80":  # a zip file, a pickle
        return head[8:9] == b"{" and head[4:8] == bytes(4)
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and head[4:8] == bytes(4))


def _is_something_else(path: Path) -> str:
    """What a download that went wrong has left, "" for none of these."""
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a page of the web, no checkpoint; fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, no checkpoint; fetch the file itself (git lfs pull)"
    if head.startswith(b"\x1f\x8b"):
        return "compressed (gzip); unpack it first"
    return ""


def _check_container(path: Path, size: int) -> None:
    """Refuse zip files that torch would not have written: compressed (a bomb, perhaps), with doubled names, damaged."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        infos = file.infolist()
        if sum(info.file_size for info in infos) > size or any(info.compress_type for info in infos):
            raise ValueError("its parts are compressed, which torch never does")
        if len({info.filename for info in infos}) < len(infos):
            raise ValueError("two of its parts have one name")
        bad = [info.filename for info in infos if not _whole(file, info)]
        if 0 < len(bad) < len(infos):  # all of them: torch was told to write no checksums
            raise ValueError(f"{bad[0]} in it is damaged, by its checksum; fetch it again")


def _whole(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with file.open(info) as part:
            while part.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


class _Settings:
    """Stands in for argparse.Namespace: what it holds, and no behavior."""

    def __init__(self):
        self.values: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.values = dict(state)


class _DType:
    """Stands in for numpy.dtype: numbers of a fixed size only, no objects, no records."""

    def __init__(self, code: Any = "", *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([biufc]\d{1,2}|\?)", code):
            raise ValueError(f"a NumPy array of {code!r}, which are no numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError("a NumPy type without a byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for numpy.ndarray; its bytes must be all there."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.value = _numbers(kind, raw, tuple(int(n) for n in shape), "F" if fortran else "C")


def _numbers(kind: Any, raw: Any, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    if not isinstance(kind, _DType) or not isinstance(raw, bytes | str):
        raise ValueError("a NumPy array that is not made of bytes")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # as Python 2 wrote them
    if len(raw) != math.prod(shape) * kind.dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"a NumPy array {shape} of {len(raw):,} bytes")
    return np.frombuffer(raw, kind.dtype).reshape(shape, order=order).copy()


def _array(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, raw: Any) -> float | int | bool | complex:
    return _numbers(kind, raw, ()).item()


def _path(*parts: str) -> str:
    return "/".join(map(str, parts))


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = [
    (_Settings, "argparse.Namespace"), (_Array, "numpy.ndarray"), (_DType, "numpy.dtype"), (OrderedDict, "OrderedDict"),
    *((_array, f"{module}._reconstruct") for module in _NUMPY), *((_scalar, f"{module}.scalar") for module in _NUMPY),
    *((_path, f"pathlib.{name}") for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
]  # fmt: skip


def _plain(content: Any, size: int) -> Any:
    """The content without stand-ins. Raises ValueError where tensors are larger than the file that brought them."""
    storages: dict[int, int] = {}  # views share one
    done: dict[int, Any] = {}

    def walk(x: Any) -> Any:
        if id(x) in done:
            return done[id(x)]
        if isinstance(x, torch.Tensor):
            if x.layout is not torch.strided or x.is_quantized or x.device.type != "cpu":
                raise ValueError(f"a tensor of a kind no checkpoint needs ({x.layout}, {x.device})")
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            if sum(storages.values()) > size or x.numel() * x.element_size() > size:
                raise ValueError("its tensors are larger than the file")
            return x.detach()
        if isinstance(x, dict | OrderedDict | Counter):
            done[id(x)] = new = OrderedDict() if isinstance(x, OrderedDict) else {}
            new.update((walk_key(key), walk(value)) for key, value in x.items())
            return new
        if isinstance(x, list):
            done[id(x)] = new = []
            new.extend(map(walk, x))
            return new
        if isinstance(x, tuple | set | frozenset) and not isinstance(x, torch.Size):
            done[id(x)] = new = type(x)(map(walk, x)) if type(x) in (tuple, set, frozenset) else tuple(map(walk, x))
            return new
        if isinstance(x, _Settings):
            return walk(x.values)
        if isinstance(x, _Array):
            return x.value
        if isinstance(x, _DType):
            return str(x.dtype)
        if x is None or isinstance(x, _DATA):
            return x
        raise ValueError(f"a {type(x).__name__}, which is no data")

    def walk_key(key: Any) -> Any:
        if isinstance(key, str | int | float | bytes | tuple | None):
            return walk(key)
        raise ValueError(f"a {type(key).__name__} as a key")

    return walk(content)


_DATA = (str, bytes, bytearray, int, float, complex, bool, torch.Size, torch.dtype, torch.device)


def _reason(error: Exception, path: Path) -> str:
    """One line of what torch says in many: the name a file asks for, where there is one."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+) (?:was not|whose)|unrecognized function (.+)", text)
    if name := (found[1] or found[2]) if found else _asked(path):
        return f"it asks for {name}, which is no data; such a file can run programs"
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested or grown beyond measure"
    if isinstance(error, EOFError) or "PytorchStreamReader" in text or "EOF" in text:
        return "it is cut off or no checkpoint; fetch it again"
    return f"it is no plain checkpoint ({_line(error)})"


# what torch's reader knows by itself, besides its own
_KNOWN = ("_codecs.encode", *(f"{m}.{c}" for m in ("builtins", "__builtin__") for c in ("set", "bytearray", "complex")))


def _asked(path: Path) -> str | None:
    """The first name in a pickle that is none of ours and not torch's; its instructions are listed, not followed."""
    known = {*_KNOWN, *(name for _, name in _ALLOWED)}
    with contextlib.suppress(Exception):
        data, strings = io.BytesIO(_pickled(path)), []
        while True:  # older files are several pickles in a row
            for code, argument, _ in pickletools.genops(data):
                if code.name not in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    strings += [argument] if isinstance(argument, str) else []
                    continue
                name = ".".join(strings[-2:]) if code.name == "STACK_GLOBAL" else argument.replace(" ", ".")
                if name not in known and not name.startswith(("torch.", "collections.")):
                    return name
    return None


def _pickled(path: Path, most: int = 2**24) -> bytes:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(most)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".pkl"))
        with archive.open(name) as file:
            return file.read(most)


def _line(error: Exception) -> str:
    """A message's first line, of torch's the part that says what was wrong."""
    text = str(error).split("WeightsUnpickler error:")[-1].split(". In PyTorch")[0].strip()
    return ((text.splitlines() or [""])[0] or type(error).__name__)[:200]
