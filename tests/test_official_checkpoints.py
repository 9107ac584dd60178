"""The list of official checkpoints, the tool that fetches and examines them, and torch.hub's entry points."""

import csv
import http.server
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from official_files import make, planted

from prototypes_lib import checkpoints, doctor, official

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import official_checkpoints as tool  # noqa: E402

PLANTED = planted([5, 1, 30, *[1] * 9], 24)


def test_the_list_and_the_page_name_the_same_files():
    listed = tool.checkpoints()
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    assert len({one.name for one in listed}) == len({one.url for one in listed}) == len(listed) >= 20
    assert re.findall(r"\| `([\w-]+)`: .*<(https://\S+)>", page) == [(one.name, one.url) for one in listed]
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target


def test_the_rows_of_the_papers_that_can_be_checked_are_these():
    rows = {one.name: one.rows for one in tool.checkpoints() if one.paper}
    unique, largest = "unique prototypes M", "largest duplicate set (prototypes)"
    assert rows == {
        "dino-vits16": {(unique, 0.1): 961, (largest, 0.1): 2087},
        "dino-vitb16": {(unique, 0.1): 775, (largest, 0.1): 54877},
        "ibot-vitb16": {(unique, 0.025): 875},
        "ibot-vitl16": {(unique, 0.025): 969},
    }


def a_list(folder, *files):
    """A list of files by name, as dino-vitb16 and others would be."""
    path = folder / "list.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(tool.Checkpoint.__dataclass_fields__)
        for name, url, paper in files:
            writer.writerow(
                [name, url, "x", "DINO", "ViT-B/16", "ImageNet-1K", *(("vMF", "Table 4") if paper else ("", ""))]
            )
    return path


def here(path, out):
    """`tool.examine` without its page, and without the seconds that another process needs to start."""
    subject = doctor.opened(path)
    seen = tuple(doctor.examine(found, orders=1, progress=False) for found in subject.sets)
    return json.loads(json.dumps(doctor.Report(subject, seen, None, None, (), "").to_json()))


def test_every_file_is_fetched_examined_and_put_beside_the_paper(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "examine", here)
    dino, swav = make("dino", tmp_path / "a", PLANTED.w), make("swav", tmp_path / "b", PLANTED.w)
    files = [("a", dino.as_uri(), True), ("b", swav.as_uri(), False), ("d", (tmp_path / "gone").as_uri(), False)]
    where = ["--table", str(a_list(tmp_path, *files)), "--cache", str(tmp_path / "cache"), "--quiet"]
    assert tool.main([*where, "--out", str(tmp_path / "report"), "--only", "a", "b"]) == 0
    with (tmp_path / "report" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if row["set"] == "teacher, crops" and row["name"] == "a"]
    assert [(r["metric"].split()[0], r["eps"], r["paper"], r["ours"]) for r in first] == [
        ("unique", "0.025", "", "12"), ("unique", "0.1", "775", "12"), ("largest", "0.1", "54877", "30")
    ]  # fmt: skip
    assert {row["name"] for row in rows} == {"a", "b"} and {row["K"] for row in rows} == {"45"}
    assert "54877" in capsys.readouterr().out
    assert tool.main([*where, "--out", str(tmp_path / "report"), "--only", "b", "d"]) == 1
    said = capsys.readouterr()
    assert "gone" in said.err and "failed: d" in said.err and "\nb  " in said.out


@pytest.mark.slow
def test_the_doctor_runs_in_a_process_of_its_own_whose_last_word_is_told(tmp_path):
    report = tool.examine(make("swav", tmp_path / "b", PLANTED.w), tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()
    assert report["sets"][0]["m"] == PLANTED.m and report["sets"][0]["k"] == 45
    with pytest.raises(ValueError, match="a backbone alone"):
        tool.examine(make("dino-backbone", tmp_path / "c", PLANTED.w), tmp_path / "other")


def test_the_list_is_printed_and_unknown_names_are_refused(capsys):
    assert tool.main(["--list", "--only", "swav-800ep"]) == 0
    assert "swav_800ep_pretrain.pth.tar" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main(["--only", "swav-8000ep"])
    assert "unknown: swav-8000ep" in capsys.readouterr().err


class Ranges(http.server.BaseHTTPRequestHandler):
    """Sends b"0123456789" * 1000, from where it is asked for, and half of it once."""

    content, asked, cut = b"0123456789" * 1000, [], True

    def do_GET(self):
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append(begin)
        if begin >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.content) - begin))
        self.end_headers()
        self.wfile.write(self.content[begin : 5000 if Ranges.cut else None])
        Ranges.cut = False

    def log_message(self, *_):
        pass


def test_a_download_that_was_cut_off_goes_on(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/x.pth"
    try:
        with pytest.raises(OSError, match="5,000 of 10,000 bytes came"):
            tool.fetch(url, tmp_path / "a", progress=False)
        assert not (tmp_path / "a" / "x.pth").exists()
        assert tool.fetch(url, tmp_path / "a", progress=False).read_bytes() == Ranges.content
        tool.fetch(url, tmp_path / "a", progress=False)  # is there
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "x.pth.part").write_bytes(Ranges.content)  # all there, not yet renamed
        assert tool.fetch(url, tmp_path / "b", progress=False).read_bytes() == Ranges.content
        (tmp_path / "b" / "x.pth").rename(tmp_path / "b" / "x.pth.part")
        with (tmp_path / "b" / "x.pth.part").open("ab") as file:
            file.write(b"more")
        with pytest.raises(OSError, match="another file"):
            tool.fetch(url, tmp_path / "b", progress=False)
        assert tool.fetch(url, tmp_path / "b", progress=False).read_bytes() == Ranges.content
    finally:
        server.shutdown()
        server.server_close()
    assert Ranges.asked == [0, 5000, 10000, 10004, 0]


def test_torch_hub_gives_backbone_projector_and_prototypes(tmp_path):
    path = make("dino", tmp_path, PLANTED.w)
    load = lambda entry, *args, **kwargs: torch.hub.load(str(ROOT), entry, *args, source="local", **kwargs)
    assert torch.equal(load("prototypes", path, "student"), checkpoints.load_prototypes(path, "student"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        codes = load("projector", path)(load("backbone", path)(images)[0])
        assert torch.equal(codes, official.projector(path)(official.load(path)(images)[0]))
        assert load("backbone", path, num_heads=2).vit.blocks[0].attn.num_heads == 2
