"""Folder layouts: the right count of every class, or one line that says what is wrong."""

import re

import numpy as np
import pytest
from layouts import LAYOUTS, all_lost

from prototypes_lib import data


def load(root, split):
    return data.load(root, split, root=root.parent / "cache", image_size=8, progress=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_gives_the_right_count_or_one_clear_line(tmp_path, layout):
    root = tmp_path / "set"
    layout.make(root)
    if isinstance(layout.right, dict):
        images = load(root, layout.split)
        assert dict(zip(images.classes, np.bincount(images.labels).tolist(), strict=True)) == layout.right
        assert images.skipped == ()
        return
    with pytest.raises((ValueError, FileNotFoundError), match=layout.right) as error:
        load(root, layout.split)
    said = str(error.value)
    assert said.startswith("data: ") and "\n" not in said and re.search(re.escape(root.name), said)


def test_there_are_25_layouts_and_an_unreadable_one_names_its_first_file(tmp_path):
    assert len(LAYOUTS) == 25 == len({layout.name for layout in LAYOUTS})
    all_lost(tmp_path / "set")
    with pytest.raises(ValueError, match=r"data: none of the 6 files of .*set.*ant.*0\.png"):
        load(tmp_path / "set", "train")
