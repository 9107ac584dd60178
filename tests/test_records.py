import csv
import json
import subprocess

import pytest

from prototypes_lib import records
from prototypes_lib.files.storage import write_text
from prototypes_lib.records import Log, commit, environment


def row(step, loss=1.0):
    return {"step": step, "loss": loss, "teacher_entropy": 0.5, "M": 3, "seconds": 2.0 * step}


def test_the_log_keeps_what_was_written_and_rewinds(tmp_path):
    log = Log(tmp_path, "x", 4, 8, 16, progress=False)
    for step in (1, 2, 3):
        log.write(row(step))
    again = Log(tmp_path, "x", 4, 8, 16, progress=False)
    again.rewind(2)
    again.write(row(3, loss=7.0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 7.0)]
    again.finish({"done": True})
    with (tmp_path / "metrics.csv").open() as file:
        assert [int(r["step"]) for r in csv.DictReader(file)] == [1, 2, 3]
    assert json.loads((tmp_path / "result.json").read_text()) == {"done": True}


def test_a_line_tells_speed_and_time_left(tmp_path):
    line = Log(tmp_path, "x", 4, 8, 16, progress=True).line(row(2))
    assert "step 2/4" in line and "4 images/s" in line and "0:04 left" in line and "ln K 2.773" in line


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fails(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_the_environment_names_versions_hardware_and_commit_but_no_path_or_host(tmp_path):
    found = environment()
    assert {"torch", "timm", "python", "hardware", "commit", "prototypes_lib"} <= set(found)
    import socket
    from pathlib import Path

    text = json.dumps(found)
    assert socket.gethostname() not in text and str(Path(records.__file__).parent) not in text


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    assert commit() == "unknown"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert commit() == "unknown"  # somebody else's repository
