"""The scoreboard: records are checked, every printed number is shown, and intervals alone decide claims."""

import copy
import csv
import inspect
import json
import math
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prototypes_lib import scoreboard
from prototypes_lib.data import DATASETS
from prototypes_lib.methods import METHODS
from prototypes_lib.paper_runs import PAPER_RUNS
from prototypes_lib.scoreboard import page, panels, paper
from prototypes_lib.scoreboard.claims import at, fixed, lift, mean_more, more, runs
from prototypes_lib.scoreboard.measured import plain, value
from prototypes_lib.scoreboard.paper import INITIALIZED, KNN, LINEAR, UNIQUE, qualified

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "notebooks" / "results"
ROWS = scoreboard.printed()
COMMITTED = scoreboard.load(RESULTS)
CLS, FEW = qualified(LINEAR, features="CLS"), "few-shot top-1 (%)"
ENVIRONMENT = {"commit": "0123456789", "hardware": "a processor, 1 thread", "torch": "2.15.0"}


def a_score(metric: str, x: float, dataset: str = "CIFAR-10", **changes) -> dict:
    protocol = metric.split()[0].lower()
    return {"protocol": protocol, "dataset": dataset, "metric": metric, "value": x, "low": x - 1, "high": x + 1,
            "n": 10000, "seed": 0} | changes  # fmt: skip


def a_run(name: str, seed: int, knn: float, scores: list[dict] = (), m: int = 40, data: str = "cifar10") -> dict:
    return {
        "name": name, "seed": seed, "hash": f"{abs(hash((name, seed))) % 16**12:012x}", "seconds": 60.0,
        "environment": dict(ENVIRONMENT), "diverged": None,
        "config": {"method": {"n_prototypes": 512}, "run": {"data": data, "seed": seed}},
        "last": {"step": 100, "M": m, "teacher_entropy": 3.0, "marginal_entropy": 5.0},
        "knn": {"10": knn - 0.5, "20": knn}, "knn_interval": {"10": [knn - 3, knn + 2], "20": [knn - 2, knn + 2]},
        "n_test": 1000, "scores": list(scores),
    }  # fmt: skip


def a_record(found: list[dict], notebook: str = "80_classification", **more) -> dict:
    return {"notebook": notebook, "command": "prototypes run --only 80", "parameters": {}, "runs": found} | more


def written(folder: Path, **records: dict) -> dict[str, scoreboard.Record]:
    for name, record in records.items():
        (folder / f"{name.lstrip('_')}.json").write_text(json.dumps(record))
    return scoreboard.load(folder)


def row(paper_name: str, table: str, method: str, metric: str, dataset: str = "", backbone: str = "") -> paper.Printed:
    found = [r for r in ROWS if (r.paper, r.table, r.method, r.metric) == (paper_name, table, method, metric)
             and r.dataset.startswith(dataset) and r.backbone.startswith(backbone)]  # fmt: skip
    return found[0]


# records


def test_every_committed_record_is_valid_and_is_loaded():
    assert set(COMMITTED) == {path.stem for path in RESULTS.glob("*.json")}
    for record in COMMITTED.values():
        assert record.runs and all(isinstance(run.get("config", {}), dict) for run in record.runs), record.name


def test_the_numbers_of_a_record_are_those_of_its_file():
    for name, record in COMMITTED.items():
        raw = json.loads((RESULTS / f"{name}.json").read_text())
        for run, theirs in zip(record.runs, raw["runs"], strict=True):
            assert run["knn"] == {int(k): x for k, x in (theirs.get("knn") or {}).items()}
            assert all(run[k] == theirs[k] for k in theirs if k not in ("knn", "knn_interval", "config"))


def test_a_text_instead_of_a_config_stands_for_the_first_of_its_name_with_another_seed(tmp_path):
    found = [a_run("dino", 0, 30.0), a_run("simdino", 0, 31.0), a_run("dino", 1, 32.0)]
    found[2]["config"] = "as the first of this name, but for the seed"
    record = written(tmp_path, _80_x=a_record(found))["80_x"]
    assert record.runs[2]["config"] == {"method": {"n_prototypes": 512}, "run": {"data": "cifar10", "seed": 1}}
    old = COMMITTED["50_cifar10-5k_time-lapse_dino-vmf_k512-2048"]  # its runs have no name
    assert [len(old.of(f"dino-vmf{kind}-k512")) for kind in ("", "-kd", "-kp")] == [2, 2, 2]


def broken(path: str, new) -> dict:
    """A record with one field changed; new = ... takes it away."""
    record = a_record([a_run("dino", 0, 30.0, [a_score(CLS, 40.0)]), a_run("dino", 1, 31.0)])
    at, *parts = record, *path.split(".")
    for part in parts[:-1]:
        at = at[int(part) if part.isdigit() and isinstance(at, list) else part]
    last = int(parts[-1]) if isinstance(at, list) else parts[-1]
    if new is ...:
        del at[last]
    else:
        at[last] = new
    return record


BROKEN = [
    ("notebook", ..., r"notebook is missing; it must be a text"),
    ("command", " ", r"command must be a text: the command that makes the record again, not ' '"),
    ("parameters", [1], r"parameters must be an object of settings, not \[1\]"),
    ("runs", [], r"runs must be a list with a run at least, not \[\]"),
    ("runs.1", 7, r"runs\[1\] must be an object, not 7"),
    ("runs.1.seed", 0.5, r"runs\[1\].seed must be a whole number, or null where nothing is random, not 0.5"),
    ("runs.0.hash", "xyz", r"runs\[0\].hash must be 12 hexadecimal digits, not 'xyz'"),
    ("runs.0.seconds", -1, r"runs\[0\].seconds must be a number from 0 on, not -1"),
    ("runs.0.seconds", math.nan, r"runs\[0\].seconds must be a number from 0 on, not 'NaN'"),
    ("runs.0.environment.commit", ..., r"runs\[0\].environment.commit is missing; it must be a text"),
    ("runs.0.config", "as the first", r"runs\[0\].config must be an object: it is the first run named 'dino'"),
    ("runs.0.last", ..., r"runs\[0\].last is missing; it must be an object: the last metrics"),
    ("runs.0.knn", {"10": 30.0}, r"runs\[0\].knn and runs\[0\].knn_interval must be objects with the same numbers"),
    ("runs.0.knn.20", 101.0, r"runs\[0\].knn\[20\] must be a percentage at a number of neighbors, not 101.0"),
    ("runs.0.knn_interval.20", [31, 32], r"runs\[0\].knn_interval\[20\] must be \[low, high\] in percent around 30.0"),
    ("runs.0.n_test", 0, r"runs\[0\].n_test must be a whole number of test images from 1 on, not 0"),
    ("runs.0.scores", {}, r"runs\[0\].scores must be a list, not \{\}"),
    ("runs.0.scores.0.value", "40", r"runs\[0\].scores\[0\].value must be a finite number, not '40'"),
    ("runs.0.scores.0.value", 140.0, r"runs\[0\].scores\[0\].value must lie in \[0, 100\] as an accuracy"),
    ("runs.0.scores.0.low", 45.0, r"runs\[0\].scores\[0\].low and high must be an interval around 40.0"),
    ("runs.0.scores.0.low", None, r"runs\[0\].scores\[0\].low and high must be an interval .* or both null"),
    ("runs.0.scores.0.metric", "accuracy", r"runs\[0\].scores\[0\].metric must be a text that ends with its unit"),
    ("runs.0.scores.0.n", True, r"runs\[0\].scores\[0\].n must be a whole number of test images from 1 on, not True"),
    ("runs.0.scores.0.protocol", ..., r"runs\[0\].scores\[0\].protocol is missing"),
    ("runs.0.scores.0.mean", 1.0, r"runs\[0\].scores\[0\].mean is no field of a score"),
    ("runs.0.scores", [a_score(CLS, 40.0)] * 2, r"runs\[0\].scores\[1\].metric .* on 'CIFAR-10' is there twice"),
    ("untrained", {}, r"untrained must be a list, not \{\}"),
]  # fmt: skip


@pytest.mark.parametrize("path, new, told", BROKEN, ids=lambda x: str(x)[:40])
def test_a_broken_record_is_refused_in_one_line_with_file_and_field(tmp_path, path, new, told):
    (tmp_path / "80_x.json").write_text(json.dumps(broken(path, new)))
    with pytest.raises(ValueError, match=rf"^80_x\.json: {told}") as refused:
        scoreboard.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_what_is_no_record_at_all_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="records lie in notebooks/results"):
        scoreboard.load(tmp_path / "none")
    for text, told in (("{", "not JSON"), ("[]", "the record must be an object")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^x\.json: {told}"):
            scoreboard.load(tmp_path)


def test_a_score_is_refused_where_it_is_made():
    good = scoreboard.Score("linear", "cifar10", CLS, 40.0, 39.0, 41.0, 10000)
    assert vars(good) == a_score(CLS, 40.0, "cifar10")
    for change in ({"value": math.nan}, {"value": 42.0}, {"n": 0}, {"metric": "linear"}, {"dataset": ""}):
        with pytest.raises(ValueError, match="score "):
            scoreboard.Score(**(vars(good) | change))
    assert scoreboard.Score("robustness", "cifar10", "mCE (%)", 130.0, None, None, 10).seed == 0  # may exceed 100


# commands


def test_every_printed_number_has_a_command_that_could_run_or_a_reason_why_none():
    from prototypes_lib.cli import EVALUATE
    from prototypes_lib.cli.task import On
    from prototypes_lib.settings import Run

    commands = {scoreboard.command(r) for r in ROWS} | {c.command for c in scoreboard.CLAIMS if c.command}
    commands |= {picture.not_run for picture in scoreboard.PICTURES if picture.not_run}
    notebooks = {path.stem[:2] for path in (ROOT / "notebooks").glob("*.py")}
    for text in commands:
        assert text.startswith(("prototypes ", paper.NO_PROTOCOL, paper.NO_RUN, "the records hold")), text
        assert set(re.findall(r"--paper-run ([\w-]+)", text)) <= set(PAPER_RUNS), text
        assert set(re.findall(r"--only (\d+)", text)) <= notebooks, text
        for verb, rest in re.findall(r"evaluate (\S+) RUN([^;&]*)", text):
            known = {*inspect.signature(EVALUATE[verb]).parameters, *On.__dataclass_fields__}
            assert {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", rest)} <= known, text
        for rest in re.findall(r"prototypes train --paper-run [\w-]+([^;&,#]*)", text):
            flags = {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", rest)}
            assert flags <= set(Run.__dataclass_fields__), text
    assert {*paper.METHOD.values()} <= set(METHODS) and {*paper.TRANSFER.values()} <= set(DATASETS)


def test_the_command_trains_the_method_and_the_backbone_of_the_row():
    expected = {"DINO": "dino", "DINO-vMF": "dino", "iBOT": "ibot", "iBOT-vMF": "ibot", "MSN": "msn", "PMSN": "msn",
                "SimDINO": "simdino", "SimDINOv2": "simdinov2", "DINOv2": "dinov2"}  # fmt: skip
    seen = 0
    for r in ROWS:
        found = re.search(r"--paper-run (\S+)(.*)", scoreboard.command(r))
        if not found:
            continue
        run, seen = PAPER_RUNS[found[1]].run, seen + 1
        size = {"S": "small", "B": "base", "L": "large"}[r.backbone[4]]
        assert f"vit_{size}" in run.backbone and ("patch8" in found[2]) == r.backbone.endswith("/8"), r
        assert (run.data == "inaturalist-2018") == ("pretrain=iNat-2018" in r.method), r
        name = paper.split(r.method)[0].split(" (")[0]
        assert expected[name] in found[1] and ("vmf" in found[1]) == ("vMF" in name), r
        assert ("-kp" in found[1], "-kd" in found[1]) == ("(kp)" in r.method, "(kd)" in r.method), r
    assert seen > 300


def test_fine_tuning_is_asked_for_with_the_recipe_of_its_data():
    seen = Counter()
    for r in ROWS:
        if r.metric.startswith("fine-tuned") and "--paper-run" in (told := scoreboard.command(r)):
            small = r.dataset in ("CIFAR10", "CIFAR100", "Flowers", "Aircraft")
            inat = {"ViT-S/16": "inat-s", "ViT-B/16": "inat-b"}[r.backbone] if r.dataset == "iNat-2018" else None
            recipe = re.search(r"fine-tune RUN --data \S+ --recipe (\S+)$", told)
            assert (recipe and recipe[1]) == ("small-sets" if small else inat), r
            seen[recipe and recipe[1]] += 1
    assert set(seen) == {None, "small-sets", "inat-s", "inat-b"}


def test_every_figure_of_the_papers_is_listed_with_what_shows_it():
    figures = {p: {x.name for x in scoreboard.PICTURES if x.paper == p} for p in ("PPC", "vMF", "Sim")}
    assert figures["PPC"] == {f"Fig. {i}" for i in (1, 2, 3)}
    assert figures["vMF"] == {f"Fig. {i}" for i in range(1, 8)}
    assert figures["Sim"] == {f"Fig. {i}" for i in range(1, 6)} | {"Table 4"}
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.py")}
    for picture in scoreboard.PICTURES:
        assert bool(picture.here) != bool(picture.not_run), picture
        assert set(re.findall(r"\d\d_\w+", picture.here)) <= notebooks, picture


# every number is shown


class Cells(HTMLParser):
    """The cells of all rows of all tables, and how many items each list has."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.lists, self.open = [], [], []
        self.feed(text)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "ol":
            self.lists.append(0)
        elif tag == "li":
            self.lists[-1] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("records", [COMMITTED, {}], ids=["committed", "none"])
def test_the_tables_have_every_row_of_the_papers_once_with_a_command(records):
    shown = Cells(page.numbers(ROWS, records))
    body = [cells for cells in shown.rows if cells[0] != "method"]
    with (ROOT / "data" / "paper_tables.csv").open() as file:
        printed = Counter(tuple(r[name] for name in ("method", "backbone", "dataset", "metric", "value"))
                          for r in csv.DictReader(file))  # fmt: skip
    assert len(body) == sum(printed.values()) == len(ROWS) == 571
    assert Counter((*cells[:4], cells[4].removesuffix(" (training failed)")) for cells in body) == printed
    assert len(shown.lists) == len(scoreboard.tables(ROWS)) == 26
    assert all(1 <= int(cells[6]) <= max(shown.lists) for cells in body)
    measured = sum(scoreboard.measured(r, records) is not None for r in ROWS)
    assert sum(cells[5] != page.NOT_RUN for cells in body) == measured and (measured > 60) == bool(records)


@pytest.mark.slow
def test_the_panels_have_every_row_of_the_papers():
    drawn = 0
    for rows in scoreboard.tables(ROWS).values():
        fig, axis = plt.subplots()
        n, here = panels.panel(axis, rows, COMMITTED)
        marks = sum(len(line.get_xdata()) for a in fig.axes for line in a.lines if line.get_linestyle() == "None")
        assert marks >= n + here  # caps of intervals are marks too
        panels.legend(fig, rows)
        drawn += n
        plt.close(fig)
    assert drawn == len(ROWS)


def test_the_pages_tables_are_well_formed_and_complete():
    decisions = [scoreboard.judge(claim, COMMITTED, ROWS) for claim in scoreboard.CLAIMS]
    claims = [cells for cells in Cells(page.claims(decisions)).rows if cells[0] != "where"]
    assert [cells[1] for cells in claims] == [claim.text for claim in scoreboard.CLAIMS]
    assert all(cells[4] for cells in claims), "evidence, or what would decide"
    pictures = Cells(page.pictures(COMMITTED)).rows[1:]
    assert len(pictures) == len(scoreboard.PICTURES) == 16
    assert sum(page.NOT_RUN in cells[2] for cells in pictures) == 4
    assert sum(page.NOT_RUN in cells[2] for cells in Cells(page.pictures({})).rows[1:]) == 10


# what stands beside a number


def family(
    knn: dict[str, list[float]], linear: dict[str, list[float]] | None = None, data: str = "cifar10", **m
) -> list:
    """Runs by name and seed with kNN, and with linear and few-shot scores where given."""
    found = []
    for name, values in knn.items():
        for seed, x in enumerate(values):
            scores = []
            if linear:
                y = linear[name][seed]
                scores = [a_score(CLS, y), *(a_score(qualified(FEW, images=n), y - 20) for n in ("1/class", "1%"))]
            found.append(a_run(name, seed, x, scores, m.get(name.replace("-", "_"), 40), data))
    return found


def test_the_mean_and_interval_over_seeds_are_students(tmp_path):
    values = [50.0, 51.5, 52.0]
    records = written(tmp_path, _80_x=a_record(family({"ibot-vmf": values})))
    found = scoreboard.measured(row("PPC", "Table 2", "iBOT-vMF", KNN), records)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((sum(values) / 3, low, high))
    assert (found.record, found.run, found.over, found.seeds) == ("80_x", "ibot-vmf", "seeds", (0, 1, 2))


def test_a_single_run_has_the_interval_of_its_test_images_and_a_diverged_one_is_counted_as_left_out(tmp_path):
    runs_ = family({"ibot-vmf": [50.0, 51.0]})
    runs_[1] |= {"knn": {}, "knn_interval": {}, "diverged": 20}
    found = scoreboard.measured(row("PPC", "Table 2", "iBOT-vMF", KNN), written(tmp_path, _80_x=a_record(runs_)))
    assert (found.value, found.low, found.high, found.over, found.left_out) == (50, 48, 52, "test images", 1)


def test_80_comes_before_52_and_a_long_tail_stands_beside_inaturalist_alone(tmp_path):
    balanced, tailed = (family({"ibot-vmf": [x] * 2}, {"ibot-vmf": [x] * 2}) for x in (50.0, 30.0))
    records = written(tmp_path, _52_x=a_record(family({"ibot-vmf": [10.0] * 2, "ibot": [11.0] * 2})),
                      _80_x=a_record(balanced), _84_x=a_record(tailed))  # fmt: skip
    where = lambda *asked: (found := scoreboard.measured(row(*asked), records)) and found.record
    assert where("PPC", "Table 2", "iBOT-vMF", KNN) == where("vMF", "Table 2", "iBOT-vMF", CLS) == "80_x"
    assert where("vMF", "Table 2", "iBOT", KNN) == "52_x"
    assert where("PPC", "Table 3", "iBOT-vMF [pretrain=iNat-2018]", LINEAR) == "84_x"
    assert where("PPC", "Table 3", "iBOT-vMF (kp) [pretrain=iNat-2018]", LINEAR) is None
    del records["84_x"]
    assert where("PPC", "Table 3", "iBOT-vMF [pretrain=iNat-2018]", LINEAR) is None


def test_a_score_stands_beside_its_own_metric_and_data_set_only(tmp_path):
    scores = [a_score(CLS, 40.0), a_score(qualified(FEW, images="1%"), 35.0), a_score(KNN, 44.0, "cifar100"),
              a_score(KNN, 55.0, "cifar10"), a_score("linear accuracy (%)", 60.0, "CIFAR-100"),
              a_score("linear accuracy (%)", 70.0, "stl10"), a_score("head top-1 (%)", 80.0)]  # fmt: skip
    run = a_run("ibot-vmf", 0, 50.0, scores)
    asked = {
        (CLS, ""): 40.0, (LINEAR, ""): 40.0, (qualified(LINEAR, features="DINO"), ""): None,
        (qualified(FEW, images="1%"), ""): 35.0, (qualified(FEW, images="1/class"), ""): None, (KNN, ""): 55.0,
        ("linear accuracy (%)", "CIFAR100"): 60.0, ("linear accuracy (%)", "CIFAR10"): None,
        ("linear accuracy (%)", "transfer average"): 65.0, ("fine-tuned top-1 (%)", ""): None, (UNIQUE, ""): 40.0,
        (INITIALIZED, ""): 512.0,
    }  # fmt: skip
    found = {key: (x := value(run, *key)) and x[0] for key in asked}
    assert found == asked
    records = written(tmp_path, _80_x=a_record([run]))
    beyond = {(x.metric, x.dataset): x.value for x in scoreboard.beyond(records, ROWS)}
    assert {"head top-1 (%)": 80.0}.items() <= {metric: x for (metric, _), x in beyond.items()}.items()
    assert (KNN, "cifar100") in beyond and (KNN, "cifar10") not in beyond and (CLS, "CIFAR-10") not in beyond


def test_transfer_stands_beside_its_data_sets_and_their_average(tmp_path):
    sets = {"cifar100": 60.0, "flowers102": 70.0, "stl10": 80.0}
    scores = [a_score("linear accuracy (%)", x, name) for name, x in sets.items()]
    records = written(tmp_path, _82_transfer=a_record([a_run("ibot-vmf", s, 50.0, scores) for s in (0, 1)]))
    found = {name: scoreboard.measured(row("vMF", "Table 5", "iBOT-vMF", "linear accuracy (%)", name), records)
             for name in ("CIFAR100", "Flowers", "CIFAR10", "Food", "transfer average")}  # fmt: skip
    assert {name: x and x.value for name, x in found.items()} == {
        "CIFAR100": 60.0, "Flowers": 70.0, "CIFAR10": None, "Food": None, "transfer average": 70.0}  # fmt: skip
    assert found["transfer average"].dataset == "3 data sets"


def evaluated(name: str, knn: float = 40.0, trained: str = "cifar10", data: str = "cifar10", **more) -> dict:
    """A record of a run as `prototypes evaluate` writes it."""
    return a_record([a_run(name, 0, knn, data=trained) | {"data": data} | more], "prototypes evaluate")


def test_a_record_of_the_command_stands_beside_the_methods_numbers_after_the_notebooks_own(tmp_path):
    here = {"knn": evaluated("ibot-vmf", 40.0), "long": evaluated("ibot-vmf", 41.0, "cifar10-lt-100"),
            "other": evaluated("ibot-vmf", 42.0, data="stl10"), "paper": evaluated("simdino-vitb16", 43.0)}  # fmt: skip
    records = written(tmp_path, **here)
    found = lambda *asked, **of: (x := scoreboard.measured(row(*asked, **of), records)) and (x.record, x.value)
    assert found("PPC", "Table 2", "iBOT-vMF", KNN) == ("knn", 40.0)
    assert found("Sim", "Table 1", "SimDINO [epochs=100]", KNN, backbone="ViT-B") == ("paper", 43.0)
    assert found("Sim", "Table 1", "SimDINO [epochs=100]", KNN, backbone="ViT-L") is None
    beside = {(x.record, x.dataset, x.metric): x.value for x in scoreboard.beyond(records, ROWS)}
    assert beside[("other", "stl10", KNN)] == 42.0 and ("knn", "cifar10", KNN) not in beside
    records |= written(tmp_path, _80_x=a_record(family({"ibot-vmf": [50.0, 52.0]})))
    assert found("PPC", "Table 2", "iBOT-vMF", KNN) == ("80_x", 51.0)
    assert ("knn", "cifar10", KNN) in {(x.record, x.dataset, x.metric) for x in scoreboard.beyond(records, ROWS)}


def test_a_record_of_the_command_trained_on_a_long_tail_stands_beside_inaturalist_alone(tmp_path):
    scores = [a_score(CLS, 30.0, "cifar10-lt-100")]
    records = written(tmp_path, long=evaluated("ibot-vmf", 41.0, "cifar10-lt-100", scores=scores))
    assert scoreboard.measured(row("PPC", "Table 3", "iBOT-vMF [pretrain=iNat-2018]", LINEAR), records).value == 30.0
    assert scoreboard.measured(row("PPC", "Table 2", "iBOT-vMF", LINEAR), records) is None


@pytest.mark.parametrize("qualifier", ["protocol=nearest alone", "k=20; weights=uniform", "metric=euclidean",
                                       "normalize=none", "temperature=1", "features=D"])  # fmt: skip
def test_knn_of_another_protocol_stands_beside_no_printed_number(tmp_path, qualifier):
    other = a_score(f"kNN top-1 (%) [{qualifier}]", 10.0, "cifar10")
    records = written(tmp_path, _80_x=a_record([a_run("ibot-vmf", 0, 50.0, [other])]))
    assert scoreboard.measured(row("PPC", "Table 2", "iBOT-vMF", KNN), records).value == 50.0
    assert 10.0 in {x.value for x in scoreboard.beyond(records, ROWS)}


def test_a_linear_classifier_that_is_not_the_official_one_stands_beside_no_printed_number():
    short = a_score(qualified(LINEAR, features="CLS", frozen="yes", epochs="2"), 90.0)
    assert value(a_run("dino", 0, 50.0, [short]), LINEAR) is value(a_run("dino", 0, 50.0, [short]), CLS) is None
    assert value(a_run("dino", 0, 50.0, [short, a_score(CLS, 40.0)]), LINEAR)[0] == 40.0


def test_fine_tuned_numbers_of_the_command_meet_those_of_the_papers(tmp_path):
    small, own = (a_score("fine-tuned top-1 (%)", x, data) for x, data in ((90.0, "flowers102"), (80.0, "cifar10")))
    per_class = a_score("fine-tuned mean-per-class accuracy (%)", 70.0, "aircraft")
    records = written(tmp_path, fine=evaluated("ibot-vmf", scores=[small, own, per_class]),
                      plane=evaluated("ibot", scores=[per_class]))  # fmt: skip
    found = lambda *asked: (x := scoreboard.measured(row(*asked), records)) and x.value
    assert found("vMF", "Table 15", "iBOT-vMF", "fine-tuned accuracy (%)", "Flowers") == 90.0
    assert found("vMF", "Table 15", "iBOT-vMF", "fine-tuned accuracy (%)", "CIFAR100") is None
    assert found("PPC", "Table 2", "iBOT-vMF", "fine-tuned top-1 (%)") == 80.0
    assert found("vMF", "Table 15", "iBOT", "fine-tuned mean-per-class accuracy (%)", "Aircraft") == 70.0


def test_spellings_of_a_data_set_are_one():
    assert {
        plain(x) for x in ("./data/cifar10", "CIFAR-10", "cifar10", "CIFAR10", "cifar10-5k", "cifar10-lt-100-seed3")
    } == {"cifar10"}
    assert plain("cifar100") != plain("cifar10")


def test_the_committed_ablations_stand_in_their_cells():
    name = "DINO [normalization=vMF; centering=probability; epochs=100; seed=mean of 2]"
    found = scoreboard.measured(row("vMF", "Table 1", name, KNN), COMMITTED)
    assert found.run == "vMF-probability" and found.record.startswith("54_")
    fast = "DINO [momentum=0.90; last-layer-norm=yes; temperature=0.04 to 0.07]"
    collapsed = scoreboard.measured(row("Sim", "Table 5", fast, KNN), COMMITTED)
    assert collapsed.run == "dino-momentum-0.9" and COMMITTED[collapsed.record].of(collapsed.run)
    for r in ROWS:  # whatever a place names is there, if its record is
        if (r.paper, r.table) in paper.WHOLE and r.metric == KNN:
            assert scoreboard.measured(r, COMMITTED) or "self-distillation" in r.method, r


# claims

GAPS = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=2, max_size=6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(GAPS, st.none() | st.floats(0.1, 3))
def test_a_claim_is_decided_by_students_interval(gaps, margin):
    kind, mean, low, high = scoreboard.decide(dict(enumerate(gaps)), margin)
    if len(set(gaps)) == 1:
        assert low == pytest.approx(high) and mean == pytest.approx(gaps[0])
        return
    expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-9)
    side = "holds" if low > 0 else "fails" if high < 0 else "tie"
    if margin is not None:
        side = "holds" if max(abs(low), abs(high)) < margin else "tie" if side == "tie" else "fails"
    assert kind == side


def test_one_seed_decides_nothing_and_equal_gaps_do():
    assert scoreboard.decide({0: 5.0})[0] == scoreboard.decide({})[0] == "not run"
    assert scoreboard.decide({0: 0.1, 1: 0.1})[0] == "holds" and scoreboard.decide({0: 0.0, 1: 0.0})[0] == "tie"


PLANTED = [
    ("KoLeo-proto gains in kNN, marginally", "80_x"),
    ("KoLeo-proto gains in linear classification, marginally", "80_x"),
    ("KoLeo-proto gains in few-shot classification (mean of the settings)", "80_x"),
    ("KoLeo-proto is better than KoLeo-data in kNN", "80_x"), ("SimDINO beats DINO in kNN", "80_x"),
    ("SimDINO beats DINO in linear classification", "80_x"),
    ("Long tail: KoLeo-proto gains in linear classification", "84_x"),
    ("Long tail: iBOT-vMF is far better than MSN in linear classification", "84_x"),
    ("Long tail: a uniform prior (MSN) beats a power law (PMSN), linear", "84_x"),
]  # fmt: skip
BETTER = {"pmsn": 0, "msn": 1, "dino": 1, "simdino": 2, "ibot-vmf": 2, "ibot-vmf-kd": 3, "ibot-vmf-kp": 4}


@pytest.mark.slow
@pytest.mark.parametrize("sign, noise, kind", [(1, 0.1, "holds"), (-1, 0.1, "fails"), (1, 5.0, "tie")])
def test_a_planted_difference_between_methods_decides_the_claims_that_are_about_it(tmp_path, sign, noise, kind):
    jitter = lambda name, seed: noise * random.Random(f"{name}, {seed}").uniform(-1, 1)
    of = lambda *names: {n: [40 + sign * BETTER[n] + jitter(n, s) for s in range(3)] for n in names}
    first, second = of("ibot-vmf", "ibot-vmf-kd", "ibot-vmf-kp", "simdino", "dino"), of(*BETTER)
    records = written(tmp_path, _80_x=a_record(family(first, first)), _84_x=a_record(family(second, second)))
    claims = {claim.text: claim for claim in scoreboard.CLAIMS}
    found = {text: scoreboard.judge(claims[text], records, ROWS) for text, _ in PLANTED}
    assert {text: decision.kind for text, decision in found.items()} == {text: kind for text, _ in PLANTED}
    assert [decision.evidence[0].record for decision in found.values()] == [name for _, name in PLANTED]
    few = found[PLANTED[2][0]].evidence[0]
    a, b = first["ibot-vmf-kp"], first["ibot-vmf"]  # few-shot scores are the linear ones less 20
    assert few.gaps == pytest.approx({s: a[s] - b[s] for s in range(3)}) and len(found[PLANTED[2][0]].printed) == 8


def test_m_decides_who_collapses_and_a_second_record_may_disagree(tmp_path):
    names = ("ibot-vmf", "ibot-vmf-kd", "ibot-vmf-kp")
    fallen = family({n: [40.0, 41.0] for n in names}, ibot_vmf=50, ibot_vmf_kd=60, ibot_vmf_kp=512)
    full = family({n: [40.0, 41.0] for n in names}, ibot_vmf=512, ibot_vmf_kd=512, ibot_vmf_kp=512)
    records = written(tmp_path, _80_x=a_record(fallen), _84_x=a_record(full))
    collapse, kept, data = (scoreboard.judge(scoreboard.CLAIMS[i], records) for i in range(3))
    assert [x.kind for x in (collapse, kept, data)] == ["holds"] * 3
    assert [e.kind for e in collapse.evidence] == ["holds", "fails"] and collapse.contested and data.contested
    assert not kept.contested and "1 contested" in page.tally([collapse, kept])
    assert kept.evidence[0].gaps == {0: pytest.approx(0.1), 1: pytest.approx(0.1)}


def test_without_records_no_claim_is_decided_and_each_says_what_would():
    found = [scoreboard.judge(claim, {}, ROWS) for claim in scoreboard.CLAIMS]
    assert {x.kind for x in found} == {"not run"} and all(
        "prototypes run" in page.missing(x) or x.claim.command for x in found
    )
    assert page.tally(found).startswith(f"{len(found)} claims: 0 hold, 0 tie, 0 fail, {len(found)} not run")


def test_each_claim_is_told_once_and_what_its_paper_prints_agrees_with_it():
    assert len({(claim.paper, claim.text) for claim in scoreboard.CLAIMS}) == len(scoreboard.CLAIMS) > 50
    against = {}
    for claim in scoreboard.CLAIMS:
        found = scoreboard.judge(claim, {}, ROWS)
        assert bool(found.printed) == bool(claim.pairs), claim.text
        if found.printed and min(found.printed) < 0:
            against[claim.text] = found.printed
    assert not against


def test_the_evidence_of_a_committed_claim_is_the_record_recomputed_by_hand():
    raw = json.loads((RESULTS / "52_methods_cifar10-5k.json").read_text())["runs"]
    best = {(r["name"], r["seed"]): max(r["knn"].values()) for r in raw if r["knn"]}
    claim = next(c for c in scoreboard.CLAIMS if c.text == "SimDINO beats DINO in kNN")
    found = next(e for e in scoreboard.judge(claim, COMMITTED).evidence if e.record.startswith("52_"))
    assert found.gaps == pytest.approx({s: best["simdino", s] - best["dino", s] for s in (0, 1, 2)})
    low, high = stats.ttest_1samp(list(found.gaps.values()), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.kind == ("holds" if low > 0 else "tie")


def test_readers_of_runs_skip_what_is_not_there():
    good, bad = a_run("dino", 0, 40.0), a_run("dino", 1, 41.0)
    bad["diverged"] = 7
    record = scoreboard.Record("80_x", "", "", {}, [copy.deepcopy(good), bad], [])
    for found in record.runs:
        found["knn"] = {20: 40.0}
        found["knn_interval"] = {20: [39.0, 41.0]}
    assert runs(at("last.M"), "dino")(record) == {0: 40.0} and runs(at("usage.ranks.0"), "dino")(record) == {}
    assert fixed(50, runs(at("last.M"), "dino"), -1)(record) == {0: 10.0}
    assert more(KNN, "dino", "none")(record) == mean_more(FEW, "dino", "none")(record) == {}
    fifths = [{"fifth": i, "knn": 10.0 * i} for i in range(1, 6)]
    assert lift({"precision": fifths}) == pytest.approx(30) and lift({"precision": fifths[:4]}) is None


# the notebook


def test_the_notebook_reads_records_and_the_papers_numbers_and_nothing_else():
    text = (ROOT / "notebooks" / "90_scoreboard.py").read_text()
    assert not re.search(
        r"\bopen\(|read_text|\btrain\b\(|sweeps|load\((?!Path\(results\))", text.replace("scoreboard.load", "load")
    )
    assert not re.search(r"\b\d+ (of|claims|numbers) ", text), "counts come from the records"
