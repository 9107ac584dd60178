"""Where a data set's files lie: folders of images, torchvision's classes, iNaturalist's lists.

Every reader returns a `Listing`: what to decode (paths) or what is decoded already (one uint8 array), with
labels and class names. Nothing is decoded here, so a broken layout is found before any work starts.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prototypes_lib.data.datasets import WITHOUT_VAL
from prototypes_lib.files.archives import guarded

EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".jp2"),
}


@dataclass(frozen=True)
class Listing:
    """Items to read: paths of image files or one uint8 array (N, H, W, 3); labels (N,), -1 where unknown."""

    items: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def subset(self, indices: np.ndarray) -> "Listing":
        items = self.items[indices] if isinstance(self.items, np.ndarray) else [self.items[i] for i in indices.tolist()]
        return Listing(items, self.labels[indices], self.classes)


# ---------------------------------------------------------------------------------------------- folders


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _raise(error: OSError) -> None:
    raise error


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders directly under `folder`, sorted; hidden ones and __MACOSX are left out."""
    return sorted(entry.name for entry in folder.iterdir() if _visible(entry.name) and entry.is_dir())


def image_files(folder: Path) -> list[Path]:
    """Files under `folder`, at any depth, that carry an image's extension in any case, sorted.

    Links to folders below a class are not followed (they may form loops); links to files are.
    """
    found = []
    for here, below, names in os.walk(folder, onerror=_raise):
        below[:] = [name for name in below if _visible(name)]
        for name in names:
            if _visible(name) and os.path.splitext(name)[1].lower() in EXTENSIONS:  # noqa: PTH122 (a bare name)
                found.append(Path(here, name))
    return sorted(found)


def folder(root: Path, split: str) -> Listing:
    """ImageFolder layout: root/train/CLASS/x.jpg and root/val/... or root/test/..., or root/CLASS/x.jpg.

    The split "test" is `test/` where that holds class folders, else `val/` (as in ImageNet, whose test images
    carry no labels). A root without these folders is one set of classes, which is its "train".

    Raises:
        FileNotFoundError: the folder, the split, every class or every image is missing.
        ValueError: a class without images, or train and test with different classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data: {root} is not a folder")
    parts = {"train": ("train",), "test": ("test", "val"), "val": ("val",)}.get(split)
    if parts is None:
        raise ValueError(f"data: a folder has the splits train, test and val, not {split!r}")
    divided = any((root / part).is_dir() for part in ("train", "val", "test"))
    candidates = [root / part for part in parts if (root / part).is_dir()]
    if not divided and split == "train":
        candidates = [root]
    if not candidates:
        raise FileNotFoundError(f"data: {root} has no folder {' or '.join(p + '/' for p in parts)}")
    chosen = next((path for path in candidates if class_folders(path)), candidates[-1])
    classes = class_folders(chosen)
    if not classes:
        loose = len(image_files(chosen))
        what = f"{loose:,} images but no class folders (CLASS/image.jpg)" if loose else "no class folders"
        raise FileNotFoundError(f"data: {chosen} has {what}; put each class's images in a folder of its name")
    if split != "train" and (root / "train").is_dir():
        same_classes(class_folders(root / "train"), classes, f"{root / 'train'}", f"{chosen}")
    return class_listing(chosen, classes)


def class_listing(root: Path, classes: Sequence[str]) -> Listing:
    """One folder a class under `root`, in the order of `classes`; an empty class is an error."""
    files = [image_files(root / name) for name in classes]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty and len(empty) == len(classes):
        raise FileNotFoundError(f"data: {root} has {len(classes)} class folders and no image in any of them")
    if empty:
        raise ValueError(
            f"data: {len(empty)} of {len(classes)} classes in {root} have no images: "
            f"{', '.join(map(repr, empty[:5]))}; remove these folders or fill them"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in files])
    return Listing([path for found in files for path in found], labels, tuple(classes))


def same_classes(train: Sequence[str], test: Sequence[str], train_name: str, test_name: str) -> None:
    """Raise ValueError naming the differing classes unless both splits have the same, in the same order."""
    if list(train) == list(test):
        return
    only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    what = [f"only in {train_name}: {only_train[:5]}"] if only_train else []
    what += [f"only in {test_name}: {only_test[:5]}"] if only_test else []
    raise ValueError(f"data: the splits' classes differ; {'; '.join(what) or 'their order differs'}")


# ------------------------------------------------------------------------------------------ torchvision


def _open(make: Callable, download: bool):
    """`make(download=False)`, and only if nothing is there `make(download=True)`: some classes fetch anew."""
    try:
        return make(download=False)
    except (RuntimeError, FileNotFoundError) as missing:
        if not download:
            raise FileNotFoundError(str(missing).splitlines()[0]) from missing
    with guarded():
        return make(download=True)


def torchvision_set(name: str, root: Path, split: str, download: bool) -> Listing:
    """The official splits of a torchvision data set, as `Listing`; see data/README.md."""
    from torchvision import datasets as tv

    train = split == "train"
    part = "train" if split == WITHOUT_VAL else split  # where train and val are apart
    as_path = {"loader": Path}  # the classes' own loader would turn the path into an image
    match name:
        case "cifar10" | "cifar100":
            cls = tv.CIFAR10 if name == "cifar10" else tv.CIFAR100
            data = _open(lambda **k: cls(root, train=train, **k), download)
            return Listing(data.data, np.array(data.targets, np.int64), tuple(data.classes))
        case "fashion-mnist":
            data = _open(lambda **k: tv.FashionMNIST(root, train=train, **k), download)
            gray = data.data.numpy()
            return Listing(np.repeat(gray[..., None], 3, axis=3), data.targets.numpy(), tuple(data.classes))
        case "stl10":
            data = _open(lambda **k: tv.STL10(root, split=split, **k), download)
            pixels = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))
            return Listing(pixels, np.array(data.labels, np.int64), tuple(data.classes))
        case "imagenette":
            part = "train" if train else "val"
            found = [_open(lambda **k: tv.Imagenette(root, part, size="320px", **as_path, **k), download)]
        case "flowers102" | "dtd":
            cls = tv.Flowers102 if name == "flowers102" else tv.DTD
            parts = ("train", "val") if train else (part,)
            found = [_open(lambda p=p, **k: cls(root, p, **as_path, **k), download) for p in parts]
        case "food101":
            found = [_open(lambda **k: tv.Food101(root, split, **as_path, **k), download)]
        case "aircraft":
            part = "trainval" if train else part
            found = [_open(lambda **k: tv.FGVCAircraft(root, part, **as_path, **k), download)]
        case "pets":
            part = "trainval" if train else "test"
            data = _open(lambda **k: tv.OxfordIIITPet(root, part, **k), download)
            return Listing(list(data._images), np.array(data._labels, np.int64), tuple(data.classes))
        case "caltech101":
            # torchvision's class counts the files of a folder and guesses their names; listing them is safer
            images = root / "caltech101" / "101_ObjectCategories"
            if not images.is_dir():
                _open(lambda **k: tv.Caltech101(root, **k), download)
            names = [name for name in class_folders(images) if name != "BACKGROUND_Google"]
            everything = class_listing(images, names)
            return seeded_split(everything, split, n_train=30, n_test=None)
        case "sun397":
            data = _open(lambda **k: tv.SUN397(root, **as_path, **k), download)
            pairs = sorted(data[i] for i in range(len(data)))  # their order is the file system's
            labels = np.array([label for _, label in pairs], np.int64)
            everything = Listing([path for path, _ in pairs], labels, tuple(data.classes))
            return seeded_split(everything, split, n_train=50, n_test=50)
        case _:
            raise ValueError(f"data: no reader for {name!r}")
    pairs = [data[i] for data in found for i in range(len(data))]
    names = tuple(c if isinstance(c, str) else c[0] for c in found[0].classes)
    return Listing([path for path, _ in pairs], np.array([label for _, label in pairs], np.int64), names)


def seeded_split(everything: Listing, split: str, n_train: int, n_test: int | None, seed: int = 0) -> Listing:
    """`n_train` images a class for "train", the next `n_test` (None: all others) for "test".

    For sets without an official split in torchvision. Each class's sorted files are permuted by
    numpy's default generator seeded with (seed, class index), so the draw does not depend on other classes.
    """
    chosen = []
    for label in range(len(everything.classes)):
        (own,) = np.nonzero(everything.labels == label)
        own = own[np.random.default_rng((seed, label)).permutation(len(own))]
        stop = None if n_test is None else n_train + n_test
        chosen.append(np.sort(own[:n_train] if split == "train" else own[n_train:stop]))
    return everything.subset(np.concatenate(chosen))


# --------------------------------------------------------------------------- Tiny-ImageNet, iNaturalist

_TINY = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")  # with its MD5


def tiny_imagenet(root: Path, split: str, download: bool) -> Listing:
    """train/WNID/images/*.JPEG and, for "test", val/images/*.JPEG with their classes in val/val_annotations.txt.

    The labels of the official test images are not public, so val is the test split, as is usual. Classes are WordNet
    ids, sorted (wnids.txt has them in another order).
    """
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        if not download:
            raise FileNotFoundError(f"{folder} not found")
        from torchvision.datasets.utils import download_and_extract_archive

        with guarded():
            download_and_extract_archive(_TINY[0], str(root), md5=_TINY[1])
    names = class_folders(folder / "train")
    if split == "train":
        return class_listing(folder / "train", names)
    row = {name: i for i, name in enumerate(names)}
    notes = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    try:
        labels = [row[note[1]] for note in notes]
    except (KeyError, IndexError) as error:
        raise ValueError(f"data: {folder / 'val' / 'val_annotations.txt'} does not fit train/ ({error!r})") from error
    paths = [folder / "val" / "images" / Path(note[0]).name for note in notes]
    return Listing(paths, np.array(labels, np.int64), tuple(names))


def inaturalist_2018(root: Path, split: str, download: bool) -> Listing:
    """The competition's split by train2018.json / val2018.json, which must lie in `root`.

    torchvision's class reads every image of train_val2018 and ignores these lists, so training on it
    trains on the validation images; it is used here for the download and its checksum only.
    """
    list_file = root / ("train2018.json" if split == "train" else "val2018.json")
    if not list_file.is_file():  # before 120 GB are fetched
        raise FileNotFoundError(
            f"data: inaturalist-2018 needs {list_file.name}, the competition's list of the {split} images; "
            f"take {list_file.name}.tar.gz from https://github.com/visipedia/inat_comp/tree/master/2018, "
            f"unpack it and put the file at {list_file}"
        )
    images = root / "2018"  # where torchvision puts train_val2018
    if not images.is_dir():
        if not download:
            raise FileNotFoundError(f"{images} not found")
        from torchvision.datasets import INaturalist

        with guarded():
            INaturalist(root, version="2018", download=True)
    content = json.loads(list_file.read_text())
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        row = {category["id"]: i for i, category in enumerate(categories)}
        label_of = {note["image_id"]: row[note["category_id"]] for note in content["annotations"]}
        paths = [Path(image["file_name"]) for image in content["images"]]
        labels = [label_of[image["id"]] for image in content["images"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"data: {list_file} is not an iNaturalist list ({error!r} is missing)") from error
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        raise ValueError(f"data: {list_file} names files outside {images}")
    paths = [images.joinpath(*path.parts[1:]) for path in paths]  # "train_val2018/Aves/12/x.jpg"
    names = tuple(str(category.get("name", category["id"])) for category in categories)
    return Listing(paths, np.array(labels, np.int64), names)
