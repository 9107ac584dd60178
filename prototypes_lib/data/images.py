"""One image file to uint8 RGB: whatever its mode, depth and orientation, the right picture or an error."""

import io
import os
import stat
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

# Formats whose decoders are part of Pillow; left out are those that start programs (EPS) or fetch (WMF).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 178_956_970  # Pillow's own limit (twice MAX_IMAGE_PIXELS), kept if someone switched that off
DECODER = 1  # part of a decoded array's name; raise it when the same file would decode to other pixels

_UPRIGHT = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: str | Path) -> UInt8[np.ndarray, "height width 3"]:
    """One image file as uint8 RGB, upright.

    The format is read from the content, not from the name. EXIF orientation is applied; transparency (alpha,
    palette or color key) is composited on white; 16-bit values are divided by 257, not clipped; animations give
    their first frame. 32-bit integer and float images have no agreed white: values within 0..1 (floats only),
    0..255 or 0..65535 are taken to span that range, others are stretched from their minimum to their maximum.
    CMYK is converted without color management and ICC profiles are ignored.

    Raises:
        OSError, ValueError and whatever Pillow raises for a file that is not a whole picture. Truncated files
        are always refused, also when another library has set Pillow's LOAD_TRUNCATED_IMAGES, and so are PNG files
        with a wrong checksum. Damage that still decodes in a format without checksums (a JPEG closed early by a
        valid end marker, a BMP or TIFF with zeros in it) cannot be told from a picture.
    """
    content = _read(Path(path))
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.format == "PNG":  # Pillow decodes a tail of zeros without a word; the checksums tell
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return np.array(rgb if upright is None else rgb.transpose(upright))


def _read(path: Path) -> bytes:
    if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for a loop on 3.11)
        raise FileNotFoundError("broken symbolic link")
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise OSError("not a regular file")
    content = path.read_bytes()
    if not content:
        raise OSError("empty file")
    return content


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 when there is none or the EXIF block, which is not the picture, is damaged."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image).astype(np.float64) / 257)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow's older name for their 16 bits
        return _gray(np.asarray(image) / 257)
    if image.mode in ("I", "F"):
        return _gray(_unit_range(np.asarray(image).astype(np.float64), image.mode == "F") * 255)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def _unit_range(values: np.ndarray, is_float: bool) -> np.ndarray:
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("pixels that are not finite")
    for white in (1, 255, 65535):
        if low >= 0 and high <= white and (is_float or white > 1):
            return values / white
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def square(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The central square, resized to `size` x `size` (bicubic, antialiased).

    Equal to resizing the short side and cropping the center, up to the crop's rounding to whole pixels; but the
    crop comes first, so that an extremely long image costs nothing.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
