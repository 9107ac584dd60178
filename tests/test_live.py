"""What a person sees of a run: also of one that has just begun, is half-written, broken, or at its end."""

import dataclasses
import io
import json
import math
import os
import re
import time
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prototypes_lib import live
from prototypes_lib.cli import run_command
from prototypes_lib.collapse import diagnose
from prototypes_lib.live.page import page
from prototypes_lib.live.panels import Panel, panels, thin
from prototypes_lib.live.terminal import duration, plot


def row(step, **changes):
    healthy = {
        "step": step, "loss": 5.0 - 0.01 * step, "image": 5.0 - 0.01 * step, "teacher_entropy": 2.0, "kl": 3.0,
        "marginal_entropy": 3.9, "running_marginal_entropy": 4.0, "k": 64, "M": 60, "M_student": 61, "kappa_05": 0.9,
        "kappa_50": 1.0, "kappa_95": 1.2, "effective_rank": 7.5, "code_dim": 16, "coding_rate": 9.0, "void": 0.0,
        "teacher_moved": 1e-3, "teacher_lag": 1e-2, "shared_memory": 0.0, "score_max": 9.0, "grad_norm": 1.0,
        "weight_max": 1.0, "lr": 1e-4, "seconds": 2.0 * step,
    }  # fmt: skip
    return healthy | changes


def made(folder, rows, name="dino-vmf", finished=False, tail="", **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"name": name, "method": {"n_prototypes": 64}} | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    if finished:
        (folder / "result.json").write_text("{}")
    return folder


HEALTHY = [row(step) for step in range(10, 210, 10)]
UNIFORM = [row(s, loss=math.log(64), image=math.log(64), teacher_entropy=math.log(64), marginal_entropy=math.log(64),
               kl=0.0) for s in range(10, 210, 10)]  # fmt: skip


def text_of(rows, tmp_path, **options):
    return live.draw(live.read(made(tmp_path, rows)), **options)


def test_the_picture_has_the_curves_their_newest_values_and_the_levels(tmp_path):
    said = text_of(HEALTHY, tmp_path)
    assert said.startswith("dino-vmf  step 200 after 6:40 min  last row ")
    for words in ("Loss", "loss 3.000", "ln K 4.159", "Entropy of targets", "running 4.000", "batch 3.900",
                  "M / K 0.938", "rank 7.500", "of 16.000", "KL 3.000", "gradient 1",
                  "Nothing wrong to be seen."):  # fmt: skip
        assert words in said, words
    assert re.search(r"[\u2801-\u28ff]", said) and "\x1b" not in said


def test_what_is_wrong_is_said_with_causes_and_what_to_try(tmp_path):
    said = " ".join(text_of(UNIFORM, tmp_path).split())
    (finding,) = diagnose(UNIFORM)
    assert finding.text in said and "UNIFORM" in said and "Nothing wrong" not in said
    assert all(text in said for text in (*finding.causes, *finding.remedies))


def test_what_was_wrong_and_is_no_longer_is_said_apart(tmp_path):
    folder = made(tmp_path, HEALTHY)
    told = [{"step": 30, "kind": "constant", "text": "All the same."}, {"step": 40}, 7]
    (folder / "findings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told) + '{"step": 5')
    assert "earlier, at step 30: constant: All the same." in live.draw(live.read(folder))
    assert "Earlier, at step 30: constant: All the same." in page(live.read(folder))
    folder = made(tmp_path / "now", UNIFORM)
    (folder / "findings.jsonl").write_text(json.dumps({"step": 70, "kind": "uniform", "text": "1/K"}) + "\n")
    assert "earlier" not in live.draw(live.read(folder))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 24, 40, 71, 80, 200])
@pytest.mark.parametrize("rows", [HEALTHY, UNIFORM, HEALTHY[:1], [{"step": 1.0}]])
def test_no_line_is_longer_than_the_terminal_is_wide(tmp_path, width, rows):
    for dots in (True, False):
        lines = text_of(rows, tmp_path, width=width, dots=dots).splitlines()
        assert max(map(len, lines)) <= max(width, 24) and (dots or "".join(lines).isascii())
        colored = re.sub(r"\x1b\[\d+m", "", text_of(rows, tmp_path, width=width, dots=dots, colors=True)).splitlines()
        assert max(map(len, colored)) <= max(width, 24)


def test_a_healthy_run_fits_into_a_terminal(tmp_path):
    for height in (30, 40, 60):
        assert text_of(HEALTHY, tmp_path, width=100, height=height).count("\n") < height


def dots_of(panel, width=30, height=4, dots=False):
    return [text[10:] for text, _ in plot(panel, width, height, dots, False)[2:-1]]


def test_curves_go_where_their_values_are():
    rising = Panel("x", (("y", tuple((float(i), float(i)) for i in range(20))),))
    staircase = ["                ****", "          ******    ", "    ******          ", "****                "]
    assert dots_of(rising) == staircase
    grid = dots_of(dataclasses.replace(rising, level=("top", 57.0)))
    assert grid[0] == "-" * 20 and grid[-1].startswith("*****")
    two = Panel("x", (("a", ((0.0, 1.0), (9.0, 1.0))), ("b", ((0.0, 0.0), (9.0, 0.0)))))
    assert dots_of(two) == ["*" * 20, " " * 20, " " * 20, "o" * 20]
    log = Panel("x", (("y", ((0.0, 1.0), (1.0, 1e3))),), log=True)
    assert log.range() == (0.0, 3.0) and dots_of(log) == staircase
    assert ord(dots_of(rising, dots=True)[-1][0]) & 0x40  # the lowest dot on the left


def test_values_that_differ_by_rounding_are_drawn_level():
    noisy = Panel("x", (("y", tuple((float(i), 1 + 1e-7 * (i % 3)) for i in range(20))),))
    assert {line.strip("*") for line in dots_of(noisy)} == {"", " " * 20}


def test_thinning_keeps_every_peak_and_both_ends():
    points = tuple((float(i), float(i == 777)) for i in range(5000))
    kept = thin(points, 100)
    assert len(kept) < 200 and (777.0, 1.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert list(kept) == sorted(kept) and thin(points[:50], 100) == points[:50]


def test_half_written_and_broken_lines_are_left_out(tmp_path):
    tail = "\n\n[1]\n7\nnull\nNaN\n{}\n" + '{"loss": 2.0}\n{"step": NaN}\n{"step": "3"}\n' + '{"step": 210, "lo'
    found = live.read(made(tmp_path, HEALTHY[:2], tail=tail))
    assert [r["step"] for r in found.rows] == [10, 20]
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(0, len(whole), 23):
        path.write_bytes(whole[:cut] + b"\xff\xfe\x00" * (cut % 2))
        assert len(live.read(tmp_path).rows) <= 2
        live.draw(live.read(tmp_path))


def test_null_text_nan_and_infinity_are_no_curve_but_nan_is_a_finding(tmp_path):
    strange = {"kl": None, "M": "many", "void": True, "coding_rate": math.inf, "grad_norm": -math.inf}
    found = live.read(made(tmp_path, [*HEALTHY, row(210, loss=math.nan, **strange)]))
    assert {"kl", "M", "void"}.isdisjoint(found.rows[-1]) and found.newest("M") == 60
    assert [finding.kind for finding in found.findings] == ["non-finite"]
    assert "NON-FINITE" in live.draw(found) and "non-finite" in page(found)
    for panel in panels(found.rows):
        assert all(map(math.isfinite, panel.range()))


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(st.dictionaries(
    st.sampled_from(["loss", "image", "teacher_entropy", "marginal_entropy", "k", "M", "code_dim", "effective_rank",
                     "grad_norm", "teacher_moved", "void", "seconds"]),
    st.floats(), max_size=12), max_size=6), st.integers(1, 120), st.booleans(), st.booleans())  # fmt: skip
def test_any_numbers_can_be_shown(rows, width, dots, colors):
    rows = tuple({"step": float(10 * i)} | found for i, found in enumerate(rows))
    run = live.Watched(live.run.Path("x"), "x", rows, (), (), False, 1.0)
    live.draw(run, width, 30, dots, colors)
    well_formed(page(run))


def test_runs_of_before_have_k_from_their_config(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "k"} for r in HEALTHY]
    assert "ln K 4.159" in text_of(rows, tmp_path)
    (tmp_path / "config.json").write_text("[")  # cut off
    assert "ln K" not in live.draw(live.read(tmp_path)) and live.read(tmp_path).name == tmp_path.name


def test_a_run_without_prototypes_has_other_curves(tmp_path):
    rows = [{k: r[k] for k in ("step", "loss", "effective_rank", "code_dim", "coding_rate")} for r in HEALTHY]
    said = live.draw(live.read(made(tmp_path, rows, method={"n_prototypes": 0})))
    assert "ln K" not in said and "Entropy" not in said and "Coding rate of codes" in said


def test_the_newest_of_a_folder_of_runs_is_shown(tmp_path):
    for age, name in ((50, "b"), (10, "a"), (90, "deep/c")):
        folder = made(tmp_path / name, HEALTHY)
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000001" / "config.json").write_text("{}")
        stamp = time.time() - age
        os.utime(folder / "metrics.jsonl", (stamp, stamp))
    assert live.find(tmp_path) == tmp_path / "a" and live.find(tmp_path / "b") == tmp_path / "b"
    assert live.find(tmp_path / "deep") == tmp_path / "deep" / "c"
    assert 49 < live.read(tmp_path / "b").age < 60


def test_watching_once_shows_a_run_whether_or_not_it_is_finished(tmp_path):
    for finished in (False, True):
        to = io.StringIO()
        assert live.watch(made(tmp_path, HEALTHY, finished=finished), once=True, to=to) == 0
        assert ("finished" in to.getvalue()) == finished and to.getvalue().count("Entropy of targets") == 1


def test_watching_waits_shows_each_new_row_once_and_ends_with_the_run(tmp_path, monkeypatch):
    to, naps = io.StringIO(), []
    acts = [
        lambda: made(tmp_path / "r", []),
        lambda: (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1, "lo'),
        lambda: made(tmp_path / "r", HEALTHY[:1]),
        lambda: None,
        lambda: made(tmp_path / "r", HEALTHY[:2]),
        lambda: made(tmp_path / "r", HEALTHY[:3], finished=True),
    ]

    def sleep(seconds):
        naps.append(seconds)
        acts[len(naps) - 1]()

    monkeypatch.setattr(time, "sleep", sleep)
    assert live.watch(tmp_path, every=2.5, to=to) == 0
    assert naps == [2.5] * 6 and to.getvalue().count("waiting for metrics") == 1
    assert re.findall(r"dino-vmf  step (\d+)", to.getvalue()) == ["10", "20", "30"]
    assert "\x1b" not in to.getvalue()


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_is_drawn_over_and_ctrl_c_ends_it(tmp_path, monkeypatch):
    def sleep(_):
        made(tmp_path, HEALTHY[: 1 + to.getvalue().count("Loss")])
        if to.getvalue().count("Loss") == 3:
            raise KeyboardInterrupt

    to = Screen()
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert live.watch(made(tmp_path, HEALTHY[:1]), to=to) == 0
    assert to.getvalue().count("\x1b[2J") == 2 and "\x1b[34m" in to.getvalue()


def test_where_nothing_but_ascii_can_be_written_nothing_else_is(tmp_path):
    to = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert live.watch(made(tmp_path, HEALTHY, name="bläse"), once=True, to=to) == 0
    to.seek(0)
    assert "- ln K 4.159" in to.read()


VOID = {"meta", "br", "circle", "path", "polyline", "link"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href") and value]
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def well_formed(text: str) -> list[xml.Element]:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and parser.links == [] and "http-equiv" not in text.replace('http-equiv="refresh"', "")
    return [xml.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]


def test_the_page_needs_nothing_else_and_refreshes_until_the_run_is_finished(tmp_path):
    said = page(live.read(made(tmp_path, HEALTHY, name="<b>&")), every=7.0)
    figures = well_formed(said)
    assert '<meta http-equiv="refresh" content="7">' in said and "&lt;b&gt;&amp;" in said and "<b>" not in said
    assert len(figures) == len(panels(HEALTHY)) and all(f.get("aria-label") for f in figures)
    (curve,) = figures[0].iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
    assert len(points) == 20 and points[0][1] < points[-1][1], "the loss falls"
    done = page(live.read(made(tmp_path, UNIFORM, finished=True)))
    (finding,) = diagnose(UNIFORM)
    assert "refresh" not in done and "<h2>uniform</h2>" in done and finding.remedies[0] in done
    well_formed(done)
    assert "no metrics yet" in page(live.read(made(tmp_path, [])))


def test_the_command_draws_and_writes_pages(tmp_path, capsys):
    folder = made(tmp_path / "run", HEALTHY, finished=True)
    assert run_command(["watch", str(tmp_path)]) == 0
    assert "Entropy of targets" in capsys.readouterr().out
    assert run_command(["watch", str(folder), "--html", str(tmp_path / "deep" / "w.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'deep' / 'w.html'}\n"
    well_formed((tmp_path / "deep" / "w.html").read_text())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["none"], "none does not exist; name a run folder"),
        (["empty", "--once"], "empty holds no metrics yet"),
        (["begun", "--once"], "begun holds no metrics yet"),
        (["zero", "--once"], "zero holds no metrics yet"),
        (["begun/config.json"], "config.json is a file; name the run folder"),
        (["begun", "--every", "0"], "every=0.0"),
        (["begun", "--every", "nan"], "every=nan"),
        (["begun", "--html", "begun"], "begun is a folder; name the page"),
    ],
)
def test_what_cannot_be_shown_is_one_clear_line(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (made(tmp_path / "begun", []) / "metrics.jsonl").unlink()
    made(tmp_path / "zero", [])
    assert run_command(["watch", *argv]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and said.startswith("error: ")


def test_times_are_told_as_people_do():
    assert [duration(s) for s in (3.4, 75, 3600, 7384)] == ["3 s", "1:15 min", "1:00:00", "2:03:04"]
