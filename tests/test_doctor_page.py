"""The doctor's page and files: self-contained, every figure told in words, written whole or not at all."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from official_files import make, planted
from PIL import Image

from prototypes_lib import doctor
from prototypes_lib.cli import run_command
from prototypes_lib.doctor import report

TRUTH = planted((9, 1, 4, 2, 1, 1), 16, void=5)


def call(*argv) -> int:
    return run_command(list(map(str, argv)))


class Page(HTMLParser):
    """What a browser would see: tags in order, with attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a file with teacher and student, beside data."""
    place = tmp_path_factory.mktemp("page")
    path = make("dino", place / "<b>&file", TRUTH.w, student=TRUTH.w.flip(0))
    options = ("--data", "cifar10-5k", "--size", 32, "--limit", 240, "--no-progress")
    assert call("doctor", path, *options, "--out", place / "report") == 0
    return place / "report"


@pytest.mark.slow
def test_the_folder_holds_the_page_and_the_numbers_and_nothing_else(made):
    assert sorted(p.name for p in made.iterdir()) == ["index.html", "report.json"]


@pytest.mark.slow
def test_every_figure_is_embedded_and_told_in_words(made):
    page = Page((made / "index.html").read_text())
    figures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(figures) >= 12
    assert len({f["alt"] for f in figures}) >= 8  # both networks have some alike
    for figure in figures:
        assert len(figure["alt"]) > 40 and "nan" not in figure["alt"]
        kind, _, data = figure["src"].partition(",")
        assert kind == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.width > 1000 and picture.convert("L").getextrema()[0] < 128  # something is drawn


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(made):
    page = Page((made / "index.html").read_text())
    assert not page.open  # every tag is closed
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "a"}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("href", "action")]
        assert tag == "img" or "src" not in attrs
    text = re.sub(r'base64,[^"]+', "", (made / "index.html").read_text())
    assert "http" not in text and "url(" not in text and "@import" not in text


@pytest.mark.slow
def test_the_verdict_comes_first_and_the_page_says_what_the_json_says(made):
    content = json.loads((made / "report.json").read_text(), parse_constant=pytest.fail)
    page = Page((made / "index.html").read_text())
    words = " ".join(" ".join(page.words).split())
    verdict = "7 of 23 prototypes are unique (30.4 %): partial prototype collapse; the largest group of copies has 9"
    verdict += " (39.1 %)."
    assert content["verdict"]["text"] == verdict
    tags = [tag for tag, _ in page.tags]
    assert words.index(verdict) < words.index("How many are unique")
    assert tags.index("p") < tags.index("img") and tags.index("p") < tags.index("table")
    for remark in content["verdict"]["remarks"]:
        assert remark in words
    assert content["file"]["sha256"] in words and content["commit"] in words and content["command"] in words
    assert "No row of the papers is of this model" in words
    assert "teacher, crops" in words and "student, crops" in words


@pytest.mark.slow
def test_a_report_has_version_commit_command_and_seeds(made):
    content = json.loads((made / "report.json").read_text())
    assert content["format"] == "prototypes doctor" and content["format_version"] == 1
    assert content["prototypes_lib"] and content["commit"] and content["environment"]["torch"]
    assert (content["seed"], content["orders"], content["eps"]) == (0, 10, 0.025)
    assert content["command"].startswith("prototypes doctor ") and "--data cifar10-5k" in content["command"]
    documented = set(re.findall(r"[a-z_]+", report.__doc__))
    keys = {*content, *content["sets"][0], *content["data"], *content["data"]["void"]}
    assert keys <= documented, keys - documented


@pytest.mark.slow
def test_names_are_escaped(tmp_path):
    path = make("msn", tmp_path, TRUTH.w)
    path = path.rename(tmp_path / "a<script>&.pth.tar")
    assert call("doctor", path, "--no-progress", "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "index.html").read_text()
    assert "<script>" not in text and "a&lt;script&gt;&amp;.pth.tar" in text


def test_an_earlier_report_is_replaced_and_anything_else_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prototypes_lib.doctor.page.page", lambda report, content: "")
    path = make("msn", tmp_path / "file", TRUTH.w)
    out = tmp_path / "out"
    for _ in range(2):
        assert call("doctor", path, "--no-progress", "--out", out) == 0
    (out / "mine.txt").write_text("keep")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "index.html").write_text("<p>my home page")
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text('{"format": "another"}')
    file = tmp_path / "file.txt"
    file.write_text("x")
    capsys.readouterr()
    for place in (out, foreign, other, file, file / "below"):
        assert call("doctor", path, "--no-progress", "--out", place) == 2
        said = capsys.readouterr()
        assert str(place) in said.err and len(said.err.splitlines()) == 1 and said.out == ""
    assert (foreign / "index.html").read_text() == "<p>my home page" and file.read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert call("doctor", path, "--no-progress", "--out", empty) == 0


def test_a_failure_while_drawing_leaves_no_report(tmp_path, monkeypatch):
    path = make("msn", tmp_path / "file", TRUTH.w)

    def fail(report, content):
        raise OSError("no")

    monkeypatch.setattr("prototypes_lib.doctor.page.page", fail)
    assert call("doctor", path, "--no-progress", "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_become_null():
    told = report.plain({"a": float("nan"), 0.5: torch.tensor([1.0, float("inf")]), "b": (1, None, True)})
    assert told == {"a": None, "0.5": [1.0, None], "b": [1, None, True]}
    with pytest.raises(TypeError):
        report.plain(object())


@pytest.mark.slow
@pytest.mark.parametrize(
    "w",
    [
        torch.ones(1, 4),
        torch.ones(30, 4),
        torch.eye(12),
        torch.randn(40, 2, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["one prototype", "all equal", "orthogonal", "on the circle"],
)
def test_extreme_sets_have_a_page_too(w, tmp_path):
    path = make("msn", tmp_path / "file", w)
    opened = doctor.opened(path)
    seen = doctor.examine(opened.sets[0], progress=False)
    index = doctor.write(doctor.Report(opened, (seen,)), tmp_path / "out")
    assert Page(index.read_text()).tags.count(("figcaption", {})) == (3 if len(w) == 1 else 4)
