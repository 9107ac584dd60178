"""What the records hold beside a printed number: the same method and metric here, with an interval over seeds."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from prototypes_lib.evaluate.intervals import over_seeds
from prototypes_lib.scoreboard import paper
from prototypes_lib.scoreboard.paper import INITIALIZED, KNN, LARGEST, LINEAR, METHOD, TRANSFER, UNIQUE, Printed, split
from prototypes_lib.scoreboard.schema import Record, run_name
from prototypes_lib.sweeps import best

Records = dict[str, Record]
Found = tuple[float, float, float]  # a number of one run and its own interval, nan where it has none
BALANCED, LONG_TAILED, TRANSFERRED = ("80_", "52_"), ("84_",), ("82_",)  # records by the beginning of their names
SAME = {"fine-tuned accuracy (%)": "fine-tuned top-1 (%)"}  # the papers' two names of one metric
FREE = {KNN: {"k"}, LINEAR: {"features"}}  # qualifiers that may be there unprinted; others mean another protocol


@dataclass(frozen=True)
class Measured:
    """Mean and 95 % interval of the runs of a name in a record.

    metric: the score's own, with all its qualifiers. over: what the interval is over, "seeds" (t-interval, two at
    least), "test images" (of a single run), or "nothing". left_out: runs of the name without this number, as those
    that diverged.
    """

    record: str
    run: str
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    over: str
    seeds: tuple[int | None, ...]
    left_out: int = 0

    def __str__(self) -> str:
        digits = 0 if self.value >= 1000 else 1
        spread = "" if self.over == "nothing" else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{spread}"


def measured(row: Printed, records: Records) -> Measured | None:
    """The first record that has it, in the order of `places`, then any that no notebook wrote; None where none has.

    Those, as `prototypes evaluate --json` writes them, count where the run has the name of the method's runs or of the
    row's paper run and was trained on a long tail if the row's was.
    """
    if (row.paper, row.table) == ("PPC", "Fig. 3"):
        return _gain(row, records)
    for beginning, run in places(row):
        for record in beginning_with(records, beginning):
            if found := reading(record, run, row.metric, row.dataset):
                return found
    names = dict.fromkeys([run for _, run in places(row)] + [paper.paper_run(row)])
    tailed = "pretrain" in split(row.method)[1]
    for record in (record for name, record in records.items() if not re.match(r"\d\d_", name)):
        for run in names:
            like = run and any(_on_tail(r) == tailed for r in record.of(run))
            if like and (found := reading(record, run, row.metric, row.dataset)):
                return found
    return None


def _on_tail(run: dict[str, Any]) -> bool:
    data = setting(run, "run", "data") or ""
    return "-lt-" in data or data == "inaturalist-2018"


def beginning_with(records: Records, beginning: str) -> list[Record]:
    """Records by the beginning of their names: "56_" may be there for several data sets."""
    return [record for name, record in records.items() if name.startswith(beginning)]


def places(row: Printed) -> Iterator[tuple[str, str]]:
    """(beginning of a record's name, name of its runs) where the row's method was trained here, best first.

    One small network stands beside every backbone. Batches 256, 512, 1024 (Sim, Table 6) are 32, 64, 256 here; a table
    of other lengths of training, or of patches of 8, has no place.
    """
    (method, asked), table = split(row.method), (row.paper, row.table)
    name = METHOD.get(method)
    if name is None or (table in (("vMF", "Table 11"), ("Sim", "Table 7")) and asked.get("epochs") != "100"):
        return
    if table in (("vMF", "Table 1"), ("vMF", "Table 8")):
        yield "54_", f"{asked['normalization']}-{asked['centering']}"
    elif table == ("vMF", "Table 4"):  # DINO's prototypes have a free length in ViT-S, unit length in ViT-B
        yield "54_", "vMF-probability" if name == "dino-vmf" else "none-logit" if "-S" in row.backbone else "L2-logit"
    elif table in (("Sim", "Table 5"), ("Sim", "Table 6"), ("Sim", "Table 8")):
        yield "58_", name + _change(asked)
    elif table == ("PPC", "Table 1") and name == "dino-vmf":
        yield "56_", "dino-vmf-k2048"
    elif asked.get("pretrain"):
        yield from ((beginning, name) for beginning in LONG_TAILED)
    elif row.dataset in TRANSFER or row.dataset.startswith("transfer average"):
        yield from ((beginning, name) for beginning in TRANSFERRED)
    else:
        yield from ((beginning, name) for beginning in BALANCED)


def _change(asked: dict[str, str]) -> str:
    """The name of notebook 58's variant for Sim's qualifiers."""
    if asked.get("momentum") == "0.90":
        return "-momentum-0.9"
    if asked.get("last-layer-norm") == "no":
        return "-free-last-layer"
    if asked.get("temperature") == "0.07":
        return "-constant-temperature"
    if asked.get("self-distillation") == "no":
        return "-no-self-distillation"
    return {"256": "-batch-32", "1024": "-batch-256"}.get(asked.get("batch", ""), "")


def reading(record: Record, run: str, metric: str, dataset: str = "") -> Measured | None:
    """The runs of a name in one record, by a metric as the papers spell it."""
    runs = record.of(run)
    found = [(r.get("seed"), value(r, metric, dataset)) for r in runs]
    found = [(seed, x) for seed, x in found if x is not None]
    if not found:
        return None
    one = next(r for r in runs if value(r, metric, dataset) is not None)
    return _mean((record.name, run, *evaluated_on(one, metric, dataset)), found, len(runs) - len(found))


def _mean(key: tuple[str, str, str, str], found: Sequence[tuple[int | None, Found]], left_out: int = 0) -> Measured:
    """Numbers of runs by seed as one: key is record, run, data set and metric."""
    seeds, values = tuple(seed for seed, _ in found), [x[0] for _, x in found]
    mean, half = over_seeds(values)
    low, high, over = mean - half, mean + half, "seeds"
    if len(values) == 1:
        low, high = found[0][1][1:]
        over = "test images" if math.isfinite(low) else "nothing"
    if key[3] == INITIALIZED:  # a setting
        low, high, over = math.nan, math.nan, "nothing"
    return Measured(*key, mean, low, high, over, seeds, left_out)


def value(run: dict[str, Any], metric: str, dataset: str = "") -> Found | None:
    """One run's number with its own interval, or None.

    A score with the metric comes first, on the data the run was trained on where the row names no other: a printed
    qualifier must be there, one that is not printed must not, but for those of FREE. Without one: kNN of the run's best
    k on the test images (as the papers pick theirs), M of the last step, K of the recipe.
    """
    if scores := _scores(run, metric, dataset):
        if len(scores) > 1:  # an average over data sets
            return sum(s["value"] for s in scores) / len(scores), math.nan, math.nan
        return _numbers(scores[0])
    if dataset in TRANSFER or dataset.startswith("transfer average"):
        return None
    name, asked = split(metric)
    found: float | None = None
    if name == KNN:
        elsewhere = plain(tested_on(run)) != plain(setting(run, "run", "data") or tested_on(run))
        return None if elsewhere or not run.get("knn") else best(run)
    if "cosine" in asked:
        use = run.get("utilization", {})
        found = {UNIQUE: use.get("M"), LARGEST: (use.get("largest") or [None] * 5)[4]}.get(name)
    elif name == UNIQUE and run.get("diverged") is None:
        found = run.get("last", {}).get("M")
    elif name == INITIALIZED:
        found = setting(run, "method", "n_prototypes")
    return None if found is None else (float(found), math.nan, math.nan)


def _scores(run: dict[str, Any], metric: str, dataset: str) -> list[dict[str, Any]]:
    """The score a printed metric asks for; all of a metric for an average over data sets."""
    (name, asked), found = split(metric), []
    for score in run.get("scores", []):
        theirs, qualifiers = split(score["metric"])
        more = qualifiers.keys() - asked.keys() - FREE.get(name, set())
        if SAME.get(theirs, theirs) == SAME.get(name, name) and asked.items() <= qualifiers.items() and not more:
            found.append(score)
    if not found or dataset.startswith("transfer average"):
        return found if len({plain(s["dataset"]) for s in found}) > 1 else []
    if dataset in TRANSFER:
        found = [s for s in found if plain(s["dataset"]) in (plain(dataset), plain(TRANSFER[dataset]))]
    elif home := setting(run, "run", "data"):
        found = [s for s in found if plain(s["dataset"]) == plain(home)]
    exact = [s for s in found if s["metric"] == metric]
    blocks = [s for s in found if split(s["metric"])[1].get("features") == "DINO"]  # as in PPC's and Sim's columns
    return (exact or blocks or found)[:1]


def _numbers(score: dict[str, Any]) -> Found:
    low, high = (math.nan if score[name] is None else score[name] for name in ("low", "high"))
    return score["value"], low, high


def plain(dataset: str) -> str:
    """A data set's name without its spelling, folder and part: CIFAR-10, cifar10-5k, ./cifar10: cifar10."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-(5k|lt-\d+(-seed\d+)?)$", "", PurePath(dataset.lower()).name))


def tested_on(run: dict[str, Any]) -> str:
    """The data set of a run's own kNN: what it was trained on, unless `prototypes evaluate` took another."""
    return run.get("data") or setting(run, "run", "data") or ""


def setting(run: dict[str, Any], part: str, name: str) -> Any:
    """A setting of a run's config, None where it does not say."""
    return run.get("config", {}).get(part, {}).get(name)


def evaluated_on(run: dict[str, Any], metric: str, dataset: str = "") -> tuple[str, str]:
    """The data set (or how many), and the metric as the run's score spells it."""
    scores = _scores(run, metric, dataset)
    if len(scores) > 1:
        return f"{len(scores)} data sets", metric
    return (scores[0]["dataset"], scores[0]["metric"]) if scores else (tested_on(run), metric)


def difference(record: Record, a: str, b: str, metric: str, dataset: str = "") -> dict[int | None, float]:
    """seed -> the metric of run a less that of run b, for seeds on which both have it."""
    left, right = ({r.get("seed"): value(r, metric, dataset) for r in record.of(name)} for name in (a, b))
    both = [seed for seed in left if left[seed] is not None and right.get(seed) is not None]
    return {seed: left[seed][0] - right[seed][0] for seed in both}


def _gain(row: Printed, records: Records) -> Measured | None:
    """PPC, Fig. 3, in the text: kNN of kp less the baseline's, and of kp by the number of prototypes."""
    _, asked = split(row.metric)
    if "baseline" in asked:
        wanted, share = [(beginning, "ibot-vmf-kp", "ibot-vmf") for beginning in BALANCED], 1.0
    elif "per" in asked:  # 1920 prototypes more, told for 2000
        wanted, share = [("56_", "dino-vmf-kp-k2048", "dino-vmf-kp-k128")], 2000 / 1920
    else:
        return None
    for beginning, a, b in wanted:
        for record in beginning_with(records, beginning):
            if gaps := difference(record, a, b, KNN):
                mean, half = over_seeds([share * gap for gap in gaps.values()])
                over = "seeds" if len(gaps) > 1 else "nothing"
                where = evaluated_on(record.of(a)[0], KNN)
                ends = mean, mean - half, mean + half
                return Measured(record.name, f"{a} less {b}", *where, *ends, over, tuple(gaps))
    return None


def beyond(records: Records, rows: Sequence[Printed]) -> list[Measured]:
    """Mean and interval of every score and kNN that stands beside no printed number: robustness, tails, other data."""
    used = set()
    for row in rows:
        if found := measured(row, records):
            used.add((found.record, found.run, found.dataset, found.metric))
    rest: dict[tuple[str, str, str, str], Measured] = {}
    for record in records.values():
        told = [(run_name(run), run.get("seed"), _told(run)) for run in record.runs]
        for name, _, numbers in told:
            for where in numbers:
                key = record.name, name, *where
                if key not in used and key not in rest:
                    mine = [(seed, theirs[where]) for run, seed, theirs in told if run == name and where in theirs]
                    rest[key] = _mean(key, mine)
    return list(rest.values())


def _told(run: dict[str, Any]) -> dict[tuple[str, str], Found]:
    """(data set, metric) -> what the run has of it: its scores, and kNN at its best k."""
    knn = {(tested_on(run), KNN): best(run)} if run.get("knn") else {}
    return knn | {(score["dataset"], score["metric"]): _numbers(score) for score in run.get("scores", [])}
