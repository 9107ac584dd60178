"""25 ways in which people lay out a folder of images, each with the count that is right or the words of its error."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee")


@dataclass(frozen=True)
class Layout:
    """make(root) writes it. right: images a class of `split`, as {class: n}, or a pattern the error must match."""

    name: str
    make: Callable[[Path], object]
    right: dict[str, int] | str
    split: str = "train"


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), "PNG")
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, form)


def classes(root: Path, names=CLASSES, each: int = 3, extension: str = "png") -> Path:
    for name in names:
        for i in range(each):
            image(root / name / f"{i}.{extension}", 20 * i)
    return root


def splits(root: Path, **parts: tuple[str, ...]) -> None:
    for i, (part, names) in enumerate(parts.items()):
        classes(root / part, names, each=3 - i)


def flat(root: Path) -> None:
    for i in range(3):
        image(root / f"{i}.png")


def gap(root: Path) -> None:
    (classes(root) / "cow").mkdir()


def hollow(root: Path) -> None:
    for name in CLASSES:
        (root / name).mkdir(parents=True)


def mostly_empty(root: Path) -> None:
    for i in range(2000):
        (root / f"class{i:05}").mkdir(parents=True)
    image(root / "zebra" / "0.png")


def nested(root: Path) -> None:
    classes(root, each=1)
    image(root / "ant" / "red" / "a.png")
    image(root / "ant" / "red" / "small" / "b.png")


def mixed_extensions(root: Path) -> None:
    for name in CLASSES:
        for file in ("a.PNG", "b.Jpg", "c.jpeg", "d.JPEG", "e.png"):
            image(root / name / file)


def other_files(root: Path) -> None:
    classes(root)
    (root / "README.md").write_text("about")
    (root / "labels.csv").write_text("a,b")
    (root / "ant" / "Thumbs.db").write_bytes(b"x")
    (root / "ant" / "0.txt").write_text("caption")


def system_files(root: Path) -> None:
    classes(root)
    for name in ("__MACOSX/ant/._0.png", ".ipynb_checkpoints/0.png", "ant/._0.png", "bee/.DS_Store", ".git/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"resource fork")


def text_only(root: Path) -> None:
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text("no image")


def lost_class(root: Path) -> None:
    for path in (classes(root) / "bee").iterdir():
        path.write_bytes(b"broken")


def all_lost(root: Path) -> None:
    for path in classes(root).rglob("*.png"):
        path.write_bytes(b"broken")


def unlabeled_test(root: Path) -> None:
    splits(root, train=CLASSES, val=CLASSES)
    image(root / "test" / "0001.png")


def linked_class(root: Path) -> None:
    classes(root.parent / f"{root.name}-elsewhere", ("cow",), each=2)
    (classes(root) / "cow").symlink_to(root.parent / f"{root.name}-elsewhere" / "cow")


def looping_link(root: Path) -> None:
    (classes(root) / "ant" / "up").symlink_to(root)


def folder_like_image(root: Path) -> None:
    image(classes(root) / "ant" / "album.png" / "3.png")


def odd_names(root: Path) -> None:
    classes(root, ("a b", "line\nbreak", "é", os.fsdecode(b"caf\xe9")), each=1)


def case_twins(root: Path) -> None:
    classes(root, ("Ant", "ant"), each=2)


LAYOUTS = [
    Layout("classes", classes, {"ant": 3, "bee": 3}),
    Layout("train and val", lambda root: splits(root, train=CLASSES, val=CLASSES), {"ant": 2, "bee": 2}, "test"),
    Layout("train, val and test", lambda root: splits(root, train=CLASSES, val=CLASSES, test=CLASSES),
           {"ant": 1, "bee": 1}, "test"),
    Layout("a test without labels", unlabeled_test, {"ant": 2, "bee": 2}, "test"),
    Layout("one class", lambda root: classes(root, ("ant",)), {"ant": 3}),
    Layout("one image a class", lambda root: classes(root, each=1), {"ant": 1, "bee": 1}),
    Layout("folders in a class", nested, {"ant": 3, "bee": 1}),
    Layout("extensions in any case", mixed_extensions, {"ant": 5, "bee": 5}),
    Layout("other files beside", other_files, {"ant": 3, "bee": 3}),
    Layout("files of operating systems", system_files, {"ant": 3, "bee": 3}),
    Layout("a class that is a link", linked_class, {"ant": 3, "bee": 3, "cow": 2}),
    Layout("a link in circles", looping_link, {"ant": 3, "bee": 3}),
    Layout("a folder with an image's name", folder_like_image, {"ant": 4, "bee": 3}),
    Layout("odd names of classes", odd_names, {"a b": 1, os.fsdecode(b"caf\xe9"): 1, "line\nbreak": 1, "é": 1}),
    Layout("classes that differ in case", case_twins, {"Ant": 2, "ant": 2}),
    Layout("nothing there", lambda root: None, "is not a folder"),
    Layout("a file", lambda root: root.write_bytes(b"x"), "is not a folder"),
    Layout("an empty folder", lambda root: root.mkdir(), "no class folders"),
    Layout("images without classes", flat, "3 images but no class folders"),
    Layout("empty classes", hollow, "no image in any"),
    Layout("2000 empty classes and one image", mostly_empty, "2000 of 2001 classes .* have no images"),
    Layout("one empty class", gap, "1 of 3 classes .*'cow'"),
    Layout("text in place of images", text_only, "no image in any"),
    Layout("no image of a class is readable", lost_class, "no image of 1 classes .*'bee'"),
    Layout("other classes in val", lambda root: splits(root, train=CLASSES, val=("ant", "cow")),
           r"classes differ.*'bee'.*'cow'", "test"),
]  # fmt: skip
