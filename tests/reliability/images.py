"""300 image files, whole and damaged, whose truth their maker knows, and a judge of what a loader makes of them.

A file is survived if the loader gives the right picture, or leaves the file out and says so with its path and a reason;
a picture that is not the right one is a silent change. Bits are flipped in PNG files only: a JPEG has no checksum, so
no reader can tell (`prototypes_lib.data.images.decode` says so).

    python tests/reliability/images.py     # the figures of this library and of the peers that are installed
"""

import contextlib
import io
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

N = 300
SIZE = 24  # pictures are compared as squares of this side
CLASS = "files"


@dataclass(frozen=True)
class File:
    """name: below the class folder. make: writes it. truth: the picture, None where there is none.

    answer: "picture" (nothing else is right), "refused", "either" (a damaged file that may still be whole), or
    "ignored" (no image of the set: hidden, or of another kind).
    """

    kind: str
    name: str
    make: Callable[[Path], object]
    truth: np.ndarray | None = None
    answer: str = "picture"


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth and colorful, so that JPEG keeps it almost unchanged; every seed another one."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def _writes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _ycck(rgb: np.ndarray) -> bytes:
    """A JPEG of luma, two differences and black, by an Adobe marker on planes that hold them already."""
    planes = 255 - np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    black = np.zeros_like(planes[..., :1])
    content = encoded(Image.fromarray(np.concatenate([planes, black], 2), "CMYK"), "JPEG", quality=95)
    place = content.index(b"Adobe") + 11
    return content[:place] + b"\x02" + content[place + 1 :]


def _modes(seed: int) -> Iterator[tuple[str, str, bytes, np.ndarray]]:
    """(kind, extension, content, truth) of every way to store a picture."""
    rgb = picture(seed)
    gray = np.asarray(Image.fromarray(rgb).convert("L"))
    gray3, deep = np.repeat(gray[..., None], 3, 2), gray.astype(np.uint16) * 257
    alpha = np.linspace(0, 255, rgb.shape[1]).astype(np.uint8)[None].repeat(rgb.shape[0], 0)
    on_white = lambda x: np.rint(255 + alpha[..., None] / 255 * (x.astype(float) - 255)).astype(np.uint8)
    palette = Image.fromarray(rgb).quantize(64)
    flat = np.asarray(palette.convert("RGB"))
    index = np.asarray(palette)
    hole = np.where((index == index[0, 0])[..., None], 255, flat).astype(np.uint8)
    bits = Image.fromarray(gray).convert("1", dither=Image.Dither.NONE)
    black_white = np.asarray(bits.convert("RGB"))
    other = Image.fromarray(255 - rgb)
    good = {"quality": 95}
    yield "RGB", "png", encoded(rgb, "PNG"), rgb
    yield "RGB", "bmp", encoded(rgb, "BMP"), rgb
    yield "RGB", "ppm", encoded(rgb, "PPM"), rgb
    yield "RGB", "tif", encoded(rgb, "TIFF", compression="tiff_lzw"), rgb
    yield "RGB", "webp", encoded(rgb, "WEBP", lossless=True), rgb
    yield "JPEG", "jpg", encoded(rgb, "JPEG", **good), rgb
    yield "JPEG", "jpeg", encoded(gray, "JPEG", **good), gray3
    yield "progressive", "jpg", encoded(rgb, "JPEG", progressive=True, **good), rgb
    yield "CMYK", "jpg", encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", **good), rgb
    yield "CMYK", "tif", encoded(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb
    yield "YCCK", "jpg", _ycck(rgb), rgb
    yield "LA", "png", encoded(np.dstack([gray, alpha]), "PNG"), on_white(gray3)
    yield "RGBA", "png", encoded(np.dstack([rgb, alpha]), "PNG"), on_white(rgb)
    yield "RGBA", "webp", encoded(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True), on_white(rgb)
    yield "P", "png", encoded(palette, "PNG"), flat
    yield "P + tRNS", "png", encoded(palette, "PNG", transparency=int(index[0, 0])), hole
    yield "gray", "png", encoded(gray, "PNG"), gray3
    yield "1 bit", "png", encoded(bits, "PNG"), black_white
    yield "1 bit", "tif", encoded(bits, "TIFF", compression="group4"), black_white
    yield "I;16", "png", encoded(deep, "PNG"), gray3
    yield "I;16", "tif", encoded(deep, "TIFF"), gray3
    yield "I;16", "pgm", b"P5 60 40 65535\n" + deep.astype(">u2").tobytes(), gray3
    yield "I", "tif", encoded(deep.astype(np.int32), "TIFF"), gray3
    yield "F", "tif", encoded((gray / 255).astype(np.float32), "TIFF"), gray3
    yield "F", "tiff", encoded(gray.astype(np.float32), "TIFF"), gray3
    yield "animated", "gif", encoded(palette, "GIF", save_all=True, append_images=[other.quantize(64)]), flat
    yield "animated", "webp", encoded(rgb, "WEBP", lossless=True, save_all=True, append_images=[other]), rgb
    yield "animated", "png", encoded(rgb, "PNG", save_all=True, append_images=[other]), rgb
    yield "ICC", "jpg", encoded(rgb, "JPEG", icc_profile=b"\0" * 200, **good), rgb
    yield "ICC", "png", encoded(rgb, "PNG", icc_profile=b"\0" * 200), rgb
    yield "damaged EXIF", "png", encoded(rgb, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09 broken"), rgb


def _upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """How a viewer moves a stored picture, in array terms."""
    turned = stored.transpose(1, 0, 2)
    return {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: turned, 6: np.rot90(stored, -1), 7: stored[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(stored, 1),
    }[orientation]  # fmt: skip


def _whole() -> Iterator[File]:
    for seed in (1, 2):
        for i, (kind, extension, content, truth) in enumerate(_modes(seed)):
            yield File(kind, f"mode{seed}-{i:02}.{extension}", _writes(content), truth)
    for form, extension, options in (("JPEG", "jpg", {"quality": 95}), ("PNG", "png", {})):
        for orientation in range(1, 9):
            stored, exif = picture(100 + orientation), Image.Exif()
            exif[0x0112] = orientation
            content = encoded(stored, form, exif=exif, **options)
            yield File("EXIF", f"exif{orientation}.{extension}", _writes(content), _upright(stored, orientation))
    for name, height, width in (("dot", 1, 1), ("wide", 1, 5000), ("tall", 5000, 1), ("strip", 3, 4000)):
        rgb = picture(200 + height, height, width)
        yield File(f"{height} x {width}", f"{name}.png", _writes(encoded(rgb, "PNG")), rgb)
    for i, (form, extension) in enumerate(
        (("PNG", "jpg"), ("JPEG", "png"), ("WEBP", "jpg"), ("BMP", "jpeg"), ("TIFF", "png"), ("PNG", "gif"))
    ):
        rgb = picture(300 + i)
        options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
        yield File("wrong extension", f"wrong{i}.{extension}", _writes(encoded(rgb, form, **options)), rgb)
    odd = (
        *("line\nbreak.png", "n" * 240 + ".png", "tab\t.png", "-rf.png", "quote'\".png", "two  spaces.png"),
        *("a.b.c.png", "SHOUT.PNG", "é composed.png", "e\u0301 apart.png", "\U0001f98a.png", "%s %d {}.png"),
        "back\\slash.png",
    )
    for i, name in enumerate((*odd, os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"\xff\xfe.png"))):
        rgb = picture(400 + i)
        yield File("odd name", name, _writes(encoded(rgb, "PNG")), rgb)
    yield File("link", "link.png", lambda path: path.symlink_to(path.parent / "mode1-00.png"), picture(1))


def _cut(whole: bytes, n: int) -> Iterator[bytes]:
    for place in np.linspace(1, len(whole) - 1, n).astype(int):
        yield whole[:place]


def _damaged() -> Iterator[File]:
    rgb = picture(500)
    jpegs = {
        "baseline": encoded(rgb, "JPEG", quality=95),
        "progressive": encoded(rgb, "JPEG", quality=95, progressive=True),
        "gray": encoded(Image.fromarray(rgb).convert("L"), "JPEG", quality=95),
    }
    for name, whole in jpegs.items():
        truth = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
        for i, content in enumerate(_cut(whole, 20)):
            yield File("cut JPEG", f"cut-{name}-{i:02}.jpg", _writes(content), truth, "either")
    forms = {"png": ("PNG", 12, {}), "webp": ("WEBP", 8, {"lossless": True}), "tif": ("TIFF", 8, {}),
             "gif": ("GIF", 8, {}), "bmp": ("BMP", 6, {})}  # fmt: skip
    for extension, (form, n, options) in forms.items():
        whole = encoded(rgb, form, **options)
        truth = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
        for i, content in enumerate(_cut(whole, n)):
            yield File(f"cut {form}", f"cut-{i:02}.{extension}", _writes(content), truth, "either")
    header = struct.pack(">IIBBBBB", 60, 40, 8, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in rgb))
    parts = ((b"IHDR", header), (b"IDAT", lines), (b"IEND", b""))
    for wrong in range(3):
        content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p, 1 if i == wrong else None) for i, p in enumerate(parts))
        yield File("PNG CRC", f"crc-{wrong}.png", _writes(content), rgb, "either" if wrong == 2 else "refused")


def _refused() -> Iterator[File]:
    def bomb(side: int) -> bytes:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    bmp, gif = encoded(picture(1), "BMP"), encoded(picture(1), "GIF")
    contents = {
        "no bytes": {f"empty.{e}": b"" for e in ("jpg", "png", "gif", "webp", "bmp", "tif")},
        "HTML": {"page.jpg": b"<!DOCTYPE html><html>404 Not Found</html>", "error.png": b"<html>Access denied</html>"},
        "no picture": {
            "text.png": b"not a picture", "zeros.jpg": bytes(4000), "archive.jpg": b"PK\x03\x04" + bytes(100),
            "pickle.png": pickle.dumps({"a": 1}), "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
            "signature.png": b"\x89PNG\r\n\x1a\n", "marker.jpg": b"\xff\xd8\xff\xe0",
        },
        "bomb": {"bomb.png": bomb(20_000), "bomb.jpg": bomb(60_000),
                 "bomb.bmp": bmp[:18] + struct.pack("<ii", 30_000, 30_000) + bmp[26:],
                 "bomb.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]},
        "no area": {"flat.bmp": bmp[:18] + bytes(4) + bmp[22:]},
        "not finite": {"nan.tif": encoded(np.full((4, 4), np.nan, np.float32), "TIFF")},
    }  # fmt: skip
    for kind, files in contents.items():
        for name, content in files.items():
            yield File(kind, name, _writes(content), None, "refused")
    yield File("link", "broken.jpg", lambda path: path.symlink_to(path.parent / "nowhere.jpg"), None, "refused")
    yield File("link", "loop.jpg", lambda path: path.symlink_to(path), None, "refused")
    yield File("link", "device.jpg", lambda path: path.symlink_to("/dev/zero"), None, "refused")
    yield File("link", "folder.jpg", lambda path: path.symlink_to(path.parent / "deep"), None, "ignored")
    yield File("FIFO", "pipe.jpg", os.mkfifo, None, "refused")
    yield File("socket", "socket.png", _socket, None, "refused")
    yield File("no permission", "locked.png", _locked, None, "refused")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(path.parent):  # a socket's path must be short
        end.bind(path.name)


def _locked(path: Path) -> None:
    """A file that cannot be read; permissions do not stop a superuser, but its own memory from byte 0 does."""
    if os.geteuid():
        path.write_bytes(encoded(picture(1), "PNG"))
        path.chmod(0)
    else:
        path.symlink_to("/proc/self/mem")


def _ignored() -> Iterator[File]:
    png = encoded(picture(600), "PNG")
    for name in (".hidden.png", "._mode1-00.png", "__MACOSX/._a.png", "__MACOSX/b.png", ".cache/c.png", "deep/.d.jpg"):
        yield File("hidden", name, _writes(png), None, "ignored")
    for name in ("Thumbs.db", "notes.txt", "labels.csv", "mode.png.part"):
        yield File("no image's name", name, _writes(png), None, "ignored")


def corpus() -> list[File]:
    """The files, the same ones each time."""
    files = [*_whole(), *_damaged(), *_refused(), *_ignored()]
    rgb = np.random.default_rng(7).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    whole = encoded(rgb, "PNG")
    bits = np.random.default_rng(8).choice(8 * len(whole), N - len(files), replace=False)
    for i, bit in enumerate(bits.tolist()):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        files.append(File("flipped bit", f"flip-{i:02}.png", _writes(bytes(content)), rgb, "either"))
    return files


def write(root: Path, files: list[File]) -> Path:
    """A data set of one class with these files; returns its folder."""
    for file in files:
        path = root / CLASS / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        file.make(path)
    return root


# ------------------------------------------------------------------------------------------------- judging


def square(pixels: np.ndarray, size: int = SIZE) -> np.ndarray:
    height, width = pixels.shape[:2]
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def same(shown: np.ndarray, truth: np.ndarray) -> bool:
    """Whether two squares are one picture, up to the losses of JPEG (pictures differ by tens of levels)."""
    return shown.shape == (SIZE, SIZE, 3) and np.abs(shown.astype(int) - square(truth).astype(int)).mean() <= 5


def verdict(file: File, shown: np.ndarray | None, reported: str | None) -> str | None:
    """What is wrong with an answer: a picture, a reported refusal, or neither; None where nothing is."""
    if shown is not None and reported is not None:
        return "used and reported"
    if shown is None and reported is None:
        return None if file.answer == "ignored" else "gone without a word"
    if file.answer == "ignored":
        return "taken for an image"
    if shown is not None:
        if file.truth is None:
            return "a picture out of nothing"
        return None if file.answer != "refused" and same(shown, file.truth) else "another picture"
    if file.answer == "picture":
        return f"a whole picture is refused: {reported}"
    return None if reported.strip() else "refused without a reason"


def ours(folder: Path, files: list[File]) -> tuple[int, int, dict[str, str]]:
    """(survived, tried, name -> fault) of `prototypes_lib.data.load`; the count of images is a part of the judgment."""
    from prototypes_lib import data

    images = data.load(folder, "train", root=folder.parent / "cache", image_size=SIZE, progress=False)
    reasons = {entry.path: entry.reason for entry in images.skipped}
    paths = sorted(folder / CLASS / file.name for file in files if file.answer != "ignored")
    kept = [path for path in paths if str(path) not in reasons]
    shown = dict(zip(map(str, kept), images.pixels, strict=True))  # as many images as files that are not reported
    faults = {}
    for file in files:
        path = str(folder / CLASS / file.name)
        if fault := verdict(file, shown.get(path), reasons.get(path)):
            faults[file.name] = f"{file.kind}: {fault}"
    return len(files) - len(faults), len(files), faults


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def late(*_):
        raise TimeoutError(f"nothing within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _judge_peer(read: Callable[[int], Image.Image], names: list[str], files: list[File]) -> tuple[int, int, Counter]:
    """A peer has no report: an exception counts as one if it names the file, and a loader that waits for ever not."""
    answers = {}
    for i, name in enumerate(names):
        try:
            with _limit(5):
                answers[name] = square(np.asarray(read(i).convert("RGB"))), None
        except TimeoutError:
            answers[name] = None, None
        except Exception as error:
            said = f"{error} {getattr(error, 'filename', '')}"
            answers[name] = (None, said) if Path(name).name in said else (None, "")
    faults = Counter()
    for file in files:
        if fault := verdict(file, *answers.get(file.name, (None, None))):
            fault = fault.split(":")[0].replace("refused without a reason", "an error that does not name the file")
            faults[f"{file.kind}: {fault}"] += 1
    return len(files) - sum(faults.values()), len(files), faults


def peers(folder: Path, files: list[File]) -> dict[str, tuple[int, int, Counter]]:
    """The same files through the loaders of others, as they are by default; those not installed are left out."""
    found = {}
    with contextlib.suppress(ImportError):
        from torchvision.datasets import ImageFolder

        data = ImageFolder(folder)
        names = [os.path.relpath(path, folder / CLASS) for path, _ in data.samples]
        found["torchvision ImageFolder"] = _judge_peer(lambda i: data[i][0], names, files)
    with contextlib.suppress(ImportError):
        from lightly.data import LightlyDataset

        lightly = LightlyDataset(str(folder))
        names = [os.path.relpath(name, CLASS) for name in lightly.get_filenames()]
        found["lightly LightlyDataset"] = _judge_peer(lambda i: lightly[i][0], names, files)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        files = corpus()
        folder = write(Path(temporary, "set"), files)
        survived, tried, faults = ours(folder, files)
        print(f"prototypes_lib: {survived} of {tried} {faults or ''}")
        for name, (survived, tried, kinds) in peers(folder, files).items():
            print(f"{name}: {survived} of {tried}; {', '.join(f'{n} x {kind}' for kind, n in kinds.most_common())}")


if __name__ == "__main__":
    sys.exit(main())
