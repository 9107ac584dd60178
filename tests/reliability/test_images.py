"""300 files of the image corpus: the right picture or a report, none lost, none changed, no waiting for ever."""

import dataclasses

import images as corpus_
import numpy as np
import pytest

# what Pillow says, beside its errors, of some of the damaged files
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")


def test_every_file_is_the_right_picture_or_reported_with_its_reason(tmp_path, capsys):
    files = corpus_.corpus()
    assert len(files) == 300 and len({file.name for file in files}) == 300
    folder = corpus_.write(tmp_path / "set", files)
    survived, tried, faults = corpus_.ours(folder, files)
    assert faults == {} and (survived, tried) == (300, 300)
    assert "files skipped" in capsys.readouterr().err


def test_the_judge_tells_every_kind_of_fault():
    white = np.full((30, 40, 3), 255, np.uint8)
    whole = corpus_.File("kind", "a.png", None, white)
    right, wrong = corpus_.square(white), corpus_.square(white // 2)
    for changes, shown, reported, fault in (
        ({}, right, None, None),
        ({}, wrong, None, "another picture"),
        ({}, None, None, "gone without a word"),
        ({}, right, "odd", "used and reported"),
        ({}, None, "odd", "a whole picture is refused: odd"),
        ({"answer": "either"}, None, "odd", None),
        ({"answer": "either"}, wrong, None, "another picture"),
        ({"answer": "refused"}, right, None, "another picture"),
        ({"answer": "refused", "truth": None}, right, None, "a picture out of nothing"),
        ({"answer": "refused", "truth": None}, None, " ", "refused without a reason"),
        ({"answer": "ignored"}, None, None, None),
        ({"answer": "ignored"}, right, None, "taken for an image"),
    ):
        assert corpus_.verdict(dataclasses.replace(whole, **changes), shown, reported) == fault
