"""Hostile checkpoints and archives, made on the spot, and what becomes of them: none may do what it asks for.

`pickles(folder)` and `archives(folder)` write the files and yield (name, path). `refused_pickles` and
`contained_archives` read them all with the library and count.
"""

import argparse
import contextlib
import cProfile
import ctypes
import functools
import gzip
import importlib
import io
import itertools
import logging
import marshal
import operator
import os
import pickle
import posixpath
import runpy
import shutil
import struct
import subprocess
import tarfile
import timeit
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from prototypes_lib.files import archives as library_archives
from prototypes_lib.files import foreign

CANARY = "CANARY"  # the file that a hostile pickle would write, in the folder of the pickles


class Call:
    """Pickled as a call of `function`, which the full unpickler makes while it reads."""

    def __init__(self, function: Callable, *args: object):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Steps:
    """Pickled as an object of `cls` with any state: BUILD in place of REDUCE."""

    def __init__(self, make: Callable, args: tuple, state: object):
        self.made = (make, args, state)

    def __reduce__(self):
        return self.made


def pickles(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write hostile, broken or senseless checkpoints into `folder`, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    canary = str(folder / CANARY)
    touch = f"touch '{canary}'"
    python = f"open({canary!r}, 'w').close()"
    number = itertools.count()

    def place(name: str) -> Path:
        return folder / f"{next(number):03d}_{''.join(c if c.isalnum() else '_' for c in name)[:40]}.pth"

    def raw(name: str, data: bytes) -> tuple[str, Path]:
        path = place(name)
        path.write_bytes(data)
        return name, path

    def saved(name: str, thing: object, **options: object) -> tuple[str, Path]:
        path = place(name)
        torch.save({"model": thing}, path, **options)
        return name, path

    def zipped(name: str, data: bytes, **parts: bytes) -> tuple[str, Path]:
        """data.pkl of one's own in a container as torch writes them."""
        path = place(name)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", data)
            for part, content in ({"version": b"3\n"} | parts).items():
                file.writestr(f"archive/{part.replace('__', '/')}", content)
        return name, path

    for protocol in range(6):
        yield raw(f"os.system, protocol {protocol}", pickle.dumps({"model": Call(os.system, touch)}, protocol))
        yield raw(f"exec, protocol {protocol}", pickle.dumps(Call(exec, python), protocol))
    code = marshal.dumps(compile(python, "x", "exec"))
    calls = {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "os.spawnlp": Call(os.spawnlp, os.P_WAIT, "touch", "touch", canary),
        "os.open": Call(os.open, canary, os.O_CREAT),
        "os.mkdir": Call(os.mkdir, canary),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "open": Call(open, canary, "w"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", canary]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", canary]),
        "subprocess.getoutput": Call(subprocess.getoutput, touch),
        "getattr": Call(getattr, Path(canary), "touch"),
        "__import__": Call(__import__, "antigravity"),
        "importlib.import_module": Call(importlib.import_module, "this"),
        "functools.partial": Call(functools.partial(os.system, touch)),
        "functools.reduce": Call(functools.reduce, os.system, [touch], touch),
        "operator.attrgetter": operator.attrgetter("system"),
        "operator.methodcaller": Call(operator.methodcaller("touch"), Path(canary)),
        "map": Call(list, Call(map, os.system, [touch])),
        "Path.touch": Call(Path.touch, Path(canary)),
        "Path.write_text": Call(Path.write_text, Path(canary), "x"),
        "runpy": Call(runpy.run_path, canary),
        "timeit": Call(timeit.timeit, python, "pass"),
        "cProfile": Call(cProfile.run, python),
        "marshal": Call(marshal.loads, code),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(exec, python))),
        "io.FileIO": Call(io.FileIO, canary, "w"),
        "logging.FileHandler": Call(logging.FileHandler, canary),
        "shutil.copyfile": Call(shutil.copyfile, __file__, canary),
        "shutil.rmtree": Call(shutil.rmtree, canary),
        "ctypes.CDLL": Call(ctypes.CDLL, None),
        "numpy.savetxt": Call(np.savetxt, canary, np.zeros(1)),
        "numpy.load": Call(np.load, canary, None, True),
        "numpy.memmap": Call(np.memmap, canary, "uint8", "w+", 0, (1,)),
        "torch.load": Call(torch.load, canary),
        "torch.save": Call(torch.save, [1], canary),
        "torch.hub.load": Call(torch.hub.load, "x/y", "z"),
        "torch.from_file": Call(torch.UntypedStorage.from_file, canary, True, 1),
        "torch.jit.load": Call(torch.jit.load, canary),
        "a whole network": torch.nn.Linear(2, 2),
        "a class": Call,
        "a function": os.system,
        "a module's state": Steps(torch.nn.Identity, (), {"forward": os.system}),
        "posixpath.join": Call(posixpath.join, "a", "b"),
        "an object array": np.array([Call(os.system, touch)], dtype=object),
        "a record array": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
        "a NumPy date": np.array(["2020-01-01"], dtype="M8[D]"),
        "a sparse tensor": torch.eye(3).to_sparse(),
        "a tensor on meta": torch.zeros(3, device="meta"),
    }
    for name, thing in calls.items():
        yield saved(f"{name}, zip", thing)
        if isinstance(thing, Call):
            yield saved(f"{name}, older format", thing, _use_new_zipfile_serialization=False)

    # instructions written by hand: what pickle.dumps would not write, or needs modules of other systems
    line = touch.encode()
    by_hand = {
        "getattr chain": b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(Vos\ntRVsystem\ntR(V" + line + b"\ntR.",
        "getattr of an allowed class": b"cbuiltins\ngetattr\n(ctorch\nTensor\nV__subclasses__\ntR)R.",
        "GLOBAL posix system": b"cposix\nsystem\n(V" + line + b"\ntR.",
        "GLOBAL nt system": b"cnt\nsystem\n(V" + line + b"\ntR.",
        "GLOBAL __builtin__ eval": b"c__builtin__\neval\n(V" + python.encode() + b"\ntR.",
        "GLOBAL sys modules": b"csys\nmodules\n.",
        "GLOBAL pty spawn": b"cpty\nspawn\n(V" + line + b"\ntR.",
        "GLOBAL torch.ops load_library": b"ctorch\nops.load_library\n(Vx.so\ntR.",
        "GLOBAL torch.os system": b"ctorch\nos.system\n(V" + line + b"\ntR.",
        "GLOBAL torch.storage os": b"ctorch.storage\nos\n.",
        "GLOBAL numpy runstring": b"cnumpy.testing._private.utils\nrunstring\n(V" + python.encode() + b"\n}tR.",
        "GLOBAL webbrowser open": b"cwebbrowser\nopen\n(Vfile:///\ntR.",
        "GLOBAL argparse of another name": b"cargparse\n_sys.modules\n.",
        "GLOBAL pathlib os": b"cpathlib\nos.system\n(V" + line + b"\ntR.",
        "INST": b"(V" + line + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + line + b"\no.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(V" + line + b"\nt\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(V" + line + b"\nt}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93(V" + line + b"\ntR.",
        "STACK_GLOBAL in frames": b"\x80\x04\x95\x20\0\0\0\0\0\0\0\x8c\x02os\x8c\x06system\x93.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Pos.system\n.",
        "BINPERSID of a word": b"\x80\x02X\x09\0\0\0os.systemQ.",
        "BINPERSID of a module": b"\x80\x02(X\x06\0\0\0module" + b"X\x02\0\0\0ostQ.",
        "BUILD of a type": b"\x80\x02ctorch\nTensor\n}X\x01\0\0\0aK\x01sb.",
        "BUILD of an OrderedDict's items": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemscos\nsystem\nsb.",
        "REDUCE of a string": b"\x80\x02X\x02\0\0\0hi)R.",
        "REDUCE of the storage's reader": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(cos\nsystem\n\x89}tR.",
        "rebuild from any type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(V"
        + line
        + b"\nt}tR.",
        "bytes that do not end": b"\x80\x02X\xff\xff\xff\x7fa.",
        "a memo that is not there": b"\x80\x02h\x63.",
        "an empty stack": b"\x80\x02R.",
        "mark without end": b"\x80\x02(((((t.",
        "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "no STOP": b"\x80\x02}",
        "nothing but STOP": b".",
    }
    for name, data in by_hand.items():
        yield raw(f"{name}, bare", data)
        yield zipped(f"{name}, zip", data)

    # NumPy's own rebuilders, with what they should not be given
    reconstruct = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02%s\x89\x88tR"
    yield zipped("NumPy array of objects", reconstruct + b"(K\x01K\x01\x85" + kind % b"O8" + b"\x89](K\x01etb.")
    yield zipped("NumPy array without its bytes", reconstruct + b"(K\x01M\xff\xff\x85" + kind % b"f8" + b"\x89U\x00tb.")
    yield zipped(
        "NumPy array of negative size",
        reconstruct + b"(K\x01J\xff\xff\xff\xff\x85" + kind % b"f8" + b"\x89U\x08aaaaaaaatb.",
    )
    yield zipped("NumPy array of nothing", reconstruct + b"(K\x01K\x01\x85N\x89U\x08aaaaaaaatb.")
    yield zipped("NumPy array of arrays", b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.")
    yield zipped(
        "NumPy scalar that is an object", b"\x80\x02cnumpy.core.multiarray\nscalar\n(" + kind % b"O8" + b"U\x02hitR."
    )
    yield zipped(
        "NumPy scalar without its bytes", b"\x80\x02cnumpy.core.multiarray\nscalar\n(" + kind % b"f8" + b"U\x01atR."
    )
    yield zipped("NumPy loads", b"\x80\x02cnumpy.core.multiarray\nfromfile\n(X\x01\0\0\0atR.")

    # tensors whose storage is not what they say
    def tensor(n_storage: int, size: tuple, stride: tuple, offset: int, content: bytes | None, name: str):
        out = io.BytesIO()
        out.write(b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n")
        out.write(b"X\x01\0\0\x000X\x03\0\0\0cpu" + _integer(n_storage) + b"tQ" + _integer(offset))
        out.write(b"(" + b"".join(map(_integer, size)) + b"t(" + b"".join(map(_integer, stride)) + b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtRs.")
        return zipped(name, out.getvalue(), **({} if content is None else {"data__0": content}))

    yield tensor(4, (4,), (1,), 0, None, "storage without data")
    yield tensor(4, (4,), (1,), 0, b"\0" * 8, "storage shorter than it says")
    yield tensor(2**40, (4,), (1,), 0, b"\0" * 16, "storage of 4 TB")
    yield tensor(2**61, (4,), (1,), 0, b"\0" * 16, "storage beyond 64 bits")
    yield tensor(-4, (4,), (1,), 0, b"\0" * 16, "storage of negative size")
    yield tensor(4, (2**34,), (1,), 0, b"\0" * 16, "tensor larger than its storage")
    yield tensor(4, (2**20,), (1,), 0, b"\0" * 16, "tensor a little larger than its storage")
    yield tensor(4, (2**50,), (0,), 0, b"\0" * 16, "one number repeated without end")
    yield tensor(4, (4,), (1,), 2**40, b"\0" * 16, "tensor that starts after its storage")
    yield tensor(4, (4,), (1,), -8, b"\0" * 16, "tensor that starts before its storage")
    yield tensor(4, (2, 2), (-8, 1), 0, b"\0" * 16, "tensor with a negative stride")
    yield tensor(4, (-1,), (1,), 0, b"\0" * 16, "tensor of negative size")

    # containers
    inner = pickle.dumps({"model": Call(os.system, touch)}, 2)
    good = io.BytesIO()
    torch.save({"w": torch.arange(300.0)}, good)
    name, path = zipped("a second pickle beside", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", inner)
        file.writestr("../data.pkl", inner)
    yield name, path
    name, path = zipped("two parts of one name", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as file, _silent():
        file.writestr("archive/data.pkl", inner)
    yield name, path
    yield zipped("TorchScript", inner, **{"constants.pkl": inner, "code__x.py": python.encode()})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/data/0", b"\0" * 2**22)
    yield raw("compressed parts that swell up", out.getvalue())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("inner.zip", good.getvalue())
    yield raw("a zip in a zip", out.getvalue())
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for part in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(part)
            info.size = len(inner)
            file.addfile(info, io.BytesIO(inner))
    yield raw("the oldest format, a tar", out.getvalue())
    for cut in (1, 10, 100, len(good.getvalue()) // 2, len(good.getvalue()) - 1):
        yield raw(f"cut off after {cut} bytes", good.getvalue()[:cut])
    yield raw("gzip", gzip.compress(good.getvalue()))
    yield raw("empty", b"")
    yield raw("zeros", b"\0" * 1000)
    yield raw("a web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    yield raw("text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    name, path = place("a list"), place("a list")
    torch.save([torch.zeros(2)], path)
    yield "a list", path
    for name, data in {
        "safetensors without an end": struct.pack("<Q", 2**40) + b"{}",
        "safetensors of nothing": struct.pack("<Q", 2) + b"{]",
        "safetensors beyond its file": struct.pack("<Q", 59)
        + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}    ',
        "safetensors that is a pickle": inner,
    }.items():
        path = place(name).with_suffix(".safetensors")
        path.write_bytes(data)
        yield name, path


def _integer(n: int) -> bytes:
    """LONG1: an integer of any size."""
    data = pickle.encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refused_pickles(folder: Path) -> tuple[int, int, list[str]]:
    """(refused, tried, what was wrong): refused is one line of ValueError that names the file, and nothing done."""
    tried, wrong = 0, []
    for name, path in pickles(folder):
        tried += 1
        try:
            content = foreign.read_pickle(path)
            wrong.append(f"{name}: read as {str(content)[:80]}")
        except ValueError as error:
            if "\n" in str(error) or path.name not in str(error):
                wrong.append(f"{name}: {str(error)[:300]!r}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {error}")
        if (folder / CANARY).exists():
            wrong.append(f"{name}: it did what it asked for")
            (folder / CANARY).unlink()
    return tried - len(wrong), tried, wrong


# ---------------------------------------------------------------------------------------------------- archives


def archives(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write archives that leave their folder, hide links and devices, swell up or are damaged, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    number = itertools.count()
    outside = str(folder.parent / "escaped")

    def place(name: str, suffix: str) -> Path:
        return folder / f"{next(number):03d}_{''.join(c if c.isalnum() else '_' for c in name)[:40]}{suffix}"

    def tarred(name: str, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w", **options) -> tuple[str, Path]:
        path = place(name, ".tar" + mode[1:].replace(":", "."))
        with tarfile.open(path, mode, **options) as file:
            for info, content in members:
                info.size = info.size or len(content)
                file.addfile(info, io.BytesIO(content))
        return f"tar: {name}", path

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more: object):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        for key, value in more.items():
            setattr(info, key, value)
        return info, b"" if kind != tarfile.REGTYPE else b"content"

    def zipped(name: str, *members: tuple[str | zipfile.ZipInfo, bytes], deflated: bool = False) -> tuple[str, Path]:
        path = place(name, ".zip")
        method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as file, _silent():
            for info, content in members:
                file.writestr(info, content)
        return f"zip: {name}", path

    good = member("good.txt")
    leaving = {
        "..": "../escaped",
        "deep ..": "a/b/../../../escaped",
        ".. at the end": "a/..",
        "absolute": outside,
        "absolute, twice a slash": "/" + outside,
        "a drive": "C:\\escaped",
        "a drive, forward": "C:/escaped",
        "backslashes": "..\\escaped",
        "a share": "\\\\host\\escaped",
        "a long name": "a" * 300,
        "a long name of ..": "a/" * 60 + "../" * 70 + "escaped",
    }
    for name, where in leaving.items():
        yield tarred(name, good, member(where))
        yield tarred(f"{name}, gzip", good, member(where), mode="w:gz")
        yield zipped(name, ("good.txt", b"good"), (where, b"content"))
    yield tarred(".. as a pax header", good, member("x", pax_headers={"path": "../escaped"}), format=tarfile.PAX_FORMAT)
    yield tarred("absolute as a GNU name", good, member("/tmp/" + "a/" * 60 + "escaped"), format=tarfile.GNU_FORMAT)
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        yield tarred("link out", good, member("link", tarfile.SYMTYPE, "../escaped"), mode=mode)
    yield tarred("absolute link", member("link", tarfile.SYMTYPE, outside))
    yield tarred("link inside", good, member("link", tarfile.SYMTYPE, "good.txt"))
    yield tarred("file through a link", member("d", tarfile.SYMTYPE, ".."), member("d/escaped"))
    yield tarred("file over a link", member("d", tarfile.SYMTYPE, "../escaped"), member("d"))
    yield tarred("link to a link", member("a", tarfile.SYMTYPE, "."), member("a/b", tarfile.SYMTYPE, "../escaped"))
    yield tarred("hard link out", member("hard", tarfile.LNKTYPE, "../../etc/passwd"))
    yield tarred("absolute hard link", member("hard", tarfile.LNKTYPE, "/etc/passwd"))
    yield tarred("hard link inside", good, member("hard", tarfile.LNKTYPE, "good.txt"))
    yield tarred("character device", member("null", tarfile.CHRTYPE, devmajor=1, devminor=3))
    yield tarred("block device", member("disk", tarfile.BLKTYPE, devmajor=8, devminor=0))
    yield tarred("FIFO", member("pipe", tarfile.FIFOTYPE))
    yield tarred("set-user-ID", member("run", mode=0o6777))
    yield tarred("twice", member("a"), member("a"))
    yield tarred("twice, spelled differently", member("a/b"), member("a/./b"))
    yield tarred("below a file", member("a"), member("a/b"))
    yield tarred("a folder in place of a file", member("a"), member("a", tarfile.DIRTYPE))
    yield tarred("dot", member("."))
    yield tarred("unknown kind", member("a", b"Z"))
    zeros = tarfile.TarInfo("zeros")
    yield tarred("swells up", (zeros, b"\0" * 2**22), mode="w:gz")
    yield tarred("swells up, xz", (tarfile.TarInfo("zeros"), b"\0" * 2**22), mode="w:xz")
    yield tarred("swells up in a header", member("a", pax_headers={"comment": "a" * (2**24 + 2**20)}), mode="w:gz")
    many = [member(f"{i}") for i in range(4_000)]
    yield tarred("swells up in members", *many, mode="w:xz")
    path = place("says 1 TB", ".tar")
    info = tarfile.TarInfo("a")
    info.size = 2**40
    path.write_bytes(info.tobuf() + b"\0" * 2048)
    yield "tar: says 1 TB", path
    path = place("with holes", ".tar")
    sparse = tarfile.TarInfo("holes")
    sparse.type, sparse.pax_headers = tarfile.REGTYPE, {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes", "GNU.sparse.realsize": str(2**40),
    }  # fmt: skip
    content = b"1\n1099511627775\n1\n".ljust(512, b"\0") + b"x"
    sparse.size = len(content)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(sparse, io.BytesIO(content))
    yield "tar: with holes", path
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as file:
        for i in range(20):
            info = tarfile.TarInfo(f"{i}")
            info.size = 4000
            file.addfile(info, io.BytesIO(np.random.default_rng(i).bytes(4000)))
    for cut in (0, 5, 500, len(whole.getvalue()) // 2):
        path = place(f"cut off after {cut} bytes", ".tar.gz")
        path.write_bytes(whole.getvalue()[:cut])
        yield f"tar: cut off after {cut} bytes", path
    path = place("a flipped bit", ".tar.gz")
    data = bytearray(whole.getvalue())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    yield "tar: a flipped bit", path

    link = zipfile.ZipInfo("link")
    link.external_attr, link.create_system = 0o120777 << 16, 3
    yield zipped("link", (link, b"../escaped"))
    device = zipfile.ZipInfo("null")
    device.external_attr, device.create_system = 0o020666 << 16, 3
    yield zipped("device", (device, b""))
    yield zipped("twice", ("a", b"1"), ("a", b"2"))
    yield zipped("twice, spelled differently", ("a/b", b"1"), ("a//b", b"2"))
    yield zipped("below a file", ("a", b"1"), ("a/b", b"2"))
    yield zipped("swells up", ("zeros", b"\0" * 2**22), deflated=True)
    yield zipped("swells up in parts", *((f"{i}", b"\0" * 2**19) for i in range(16)), deflated=True)
    yield zipped("a zip that swells up, inside", ("inner.zip", _bomb()))
    yield _edited("encrypted", place, b"good", flag=(6, 8, b"\x01\x00"))
    yield _edited("unknown method", place, b"good", flag=(8, 10, b"\x63\x00"))
    yield _edited("wrong checksum", place, b"good", flag=(14, 16, b"\x00\x00\x00\x01"))
    yield _edited("says more than it holds", place, b"good", flag=(22, 24, struct.pack("<I", 2**31)))
    yield _edited("says less than it holds", place, b"good" * 100, flag=(22, 24, struct.pack("<I", 2)))
    yield _overlapping(place)
    name, path = zipped("a zero in its name", ("good.txt~.png", b"good"))
    path.write_bytes(path.read_bytes().replace(b"~", b"\0"))
    yield name, path
    name, path = zipped("cut off", *((f"{i}", b"x" * 1000) for i in range(9)))
    path.write_bytes(path.read_bytes()[:-100])
    yield name, path
    name, path = zipped("the names twice, the second different", ("safe.txt", b"good"))
    data = path.read_bytes()
    path.write_bytes(data[:40].replace(b"safe.txt", b"../e.txt") + data[40:])
    yield name, path
    for name, data in {"empty": b"", "a web page": b"<html>404</html>", "zeros": b"\0" * 10_240}.items():
        path = place(name, ".zip")
        path.write_bytes(data)
        yield f"zip: {name}", path


def _bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", b"\0" * 2**22)
    return out.getvalue()


def _edited(name: str, place: Callable, content: bytes, flag: tuple[int, int, bytes]) -> tuple[str, Path]:
    """A zip of one member with some bytes of its two headers (offset in the local one, in the central one) changed."""
    path = place(name, ".zip")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("good.txt", content)
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    here, there, value = flag
    data[here : here + len(value)] = value
    data[central + there : central + there + len(value)] = value
    path.write_bytes(data)
    return f"zip: {name}", path


def _overlapping(place: Callable) -> tuple[str, Path]:
    """Many names for one compressed stream: every member is small, the sum is not."""
    path = place("many names for one stream", ".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0000", b"\0" * 2**20)
    data = path.read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, n = data[start:end], 64
    many = b"".join(entry.replace(b"0000", b"%04d" % i) for i in range(n))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, n, n, len(many), start, 0)
    path.write_bytes(data[:start] + many + tail)
    return "zip: many names for one stream", path


def contained_archives(folder: Path) -> tuple[int, int, list[str]]:
    """(refused or contained, tried, what was wrong) of all archives, unpacked beside files that must stay as they are.

    Refused: one line of ValueError that names the archive, and no folder. Contained: plain files inside, no rights
    beyond their owner's.
    """
    tried, wrong = 0, []
    arena = folder / "arena"
    arena.mkdir(parents=True)
    (arena / "mine.txt").write_text("untouched")
    for name, path in archives(folder / "archives"):
        tried += 1
        to = arena / "to" / "here"
        try:
            library_archives.extract(path, to)
            for found in to.rglob("*"):
                if found.is_symlink() or not (found.is_file() or found.is_dir()) or found.stat().st_mode & 0o6000:
                    wrong.append(f"{name}: {found.name} is no plain file")
            if any(word in name for word in ("cut off", "flipped", "checksum")):
                wrong.append(f"{name}: the damage went unseen")
            if sum(found.stat().st_size for found in to.rglob("*")) > 2**21:
                wrong.append(f"{name}: it swelled up")
            shutil.rmtree(to)
        except ValueError as error:
            if "\n" in str(error) or path.name not in str(error):
                wrong.append(f"{name}: {str(error)[:300]!r}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {error}")
        shutil.rmtree(arena / "to", ignore_errors=True) if not list((arena / "to").glob("*")) else None
        left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if (folder / "archives") not in p.parents)
        if left != ["archives", "arena", "arena/mine.txt"] or (arena / "mine.txt").read_text() != "untouched":
            wrong.append(f"{name}: left {left}")
            return tried - len(wrong), tried, wrong
    return tried - len(wrong), tried, wrong


def friendly(folder: Path) -> dict[str, Path]:
    """Checkpoints as others really write them, which must be read."""
    folder.mkdir(parents=True, exist_ok=True)
    w = torch.arange(12.0).reshape(3, 4)
    args = argparse.Namespace(lr=0.1, out=Path("runs"), betas=(0.9, 0.999), extra=argparse.Namespace(a=[1, None]))
    things = {
        "weights": OrderedDict(w=w, half=w.half(), view=w[1], count=torch.tensor(3)),
        "full": {"student": {"w": w}, "args": args, "epoch": np.float64(1.5), "n": np.int64(7), "on": np.bool_(True)},
        "arrays": {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "w": w},
        "optimizer": {"state": {0: {"step": 1, "m": torch.nn.Parameter(w)}}, "groups": [{"params": [0]}], "w": w},
    }
    paths = {}
    for name, thing in things.items():
        for new in (True, False):
            paths[f"{name}-{'zip' if new else 'old'}"] = path = folder / f"{name}-{new}.pth"
            torch.save(thing, path, _use_new_zipfile_serialization=new)
    return paths
