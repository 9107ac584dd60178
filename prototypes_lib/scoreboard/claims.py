"""What a claim is, and how the records decide it: holds, tie, fails or not run, by intervals over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prototypes_lib.evaluate.intervals import over_seeds
from prototypes_lib.scoreboard.measured import Records, beginning_with, difference, setting, value
from prototypes_lib.scoreboard.paper import KNN, Printed, gap
from prototypes_lib.scoreboard.schema import Record

Kind = Literal["holds", "tie", "fails", "not run"]
KINDS: tuple[Kind, ...] = ("holds", "tie", "fails", "not run")
Gaps = dict[int | None, float]  # seed -> how far on the side that is claimed; below zero on the other


@dataclass(frozen=True)
class Test:
    """How one record would decide: record is the beginning of its name, gaps reads it, unit is the gaps' unit.

    margin: for a claim that two are equal, how far apart still counts as equal, in the unit.
    """

    record: str
    gaps: Callable[[Record], Gaps]
    unit: str = "points"
    margin: float | None = None

    __test__ = False  # no test of pytest's


@dataclass(frozen=True)
class Claim:
    """A claim of a paper in our words; the first of its tests that finds its runs decides.

    tests: the record made for the question first; no test where nothing recorded could decide, and then command says
    what would. pairs: (table, method, baseline, metric), whose printed differences show what the paper measured.
    """

    paper: str
    where: str
    text: str
    tests: tuple[Test, ...] = ()
    command: str = ""
    pairs: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """One record's decision: mean gap over seeds, its 95 % t-interval, and the gaps by seed."""

    kind: Kind
    record: str
    mean: float
    low: float
    high: float
    gaps: Gaps
    unit: str
    margin: float | None = None

    @property
    def interval(self) -> str:
        """Mean and interval in words, with the digits that small ones need."""
        digits = 2 if max(abs(self.low), abs(self.high)) >= 0.1 else 4
        return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}] {}".format(self.mean, self.low, self.high, self.unit, d=digits)

    def __str__(self) -> str:
        seeds, right = ", ".join(map(str, self.gaps)), sum(gap > 0 for gap in self.gaps.values())
        side = f"{right} of {len(self.gaps)} seeds on the claimed side"
        told = side if self.margin is None else f"equal would be within {self.margin:.2g}"
        return f"{self.interval}, {told}; {self.record}, seeds {seeds}"


@dataclass(frozen=True)
class Decision:
    """A claim and all that the records say of it, the deciding evidence first; printed: the paper's differences."""

    claim: Claim
    evidence: tuple[Evidence, ...]
    printed: tuple[float, ...] = ()

    @property
    def kind(self) -> Kind:
        return self.evidence[0].kind if self.evidence else "not run"

    @property
    def contested(self) -> bool:
        """Another record decides the other way: holds against fails."""
        return {"holds", "fails"} <= {found.kind for found in self.evidence}


def decide(gaps: Gaps, margin: float | None = None) -> tuple[Kind, float, float, float]:
    """(kind, mean, low, high) by the 95 % t-interval of the gaps over seeds.

    Holds if the interval is clear of zero on the claimed side, fails if clear on the other, else a tie. With a margin
    the claim is that two are equal: holds if the interval lies within it, fails if clear of zero, else a tie. Fewer
    than two seeds have no interval: not run.
    """
    mean, half = over_seeds(list(gaps.values()))
    low, high = mean - half, mean + half
    if len(gaps) < 2 or not math.isfinite(mean):
        return "not run", mean, math.nan, math.nan
    if margin is not None and -margin < low and high < margin:
        return "holds", mean, low, high
    if low > 0:
        return ("fails" if margin is not None else "holds"), mean, low, high
    return ("fails" if high < 0 else "tie"), mean, low, high


def judge(claim: Claim, records: Records, rows: Sequence[Printed] = ()) -> Decision:
    """The claim against the records; rows: the papers' numbers, for the differences that they print."""
    found = []
    for test in claim.tests:
        for record in beginning_with(records, test.record):
            gaps = test.gaps(record)
            kind, mean, low, high = decide(gaps, test.margin)
            if kind != "not run":
                found.append(Evidence(kind, record.name, mean, low, high, gaps, test.unit, test.margin))
    printed = [x for pair in claim.pairs for x in gap(rows, claim.paper, *pair).values()]
    return Decision(claim, tuple(found), tuple(printed))


# how a record is read: functions of names of runs, each giving a function of the record


def more(metric: str, a: str, b: str, dataset: str = "") -> Callable[[Record], Gaps]:
    """The metric of a less that of b, seed by seed."""
    return lambda record: difference(record, a, b, metric, dataset)


def mean_more(metric: str, a: str, b: str) -> Callable[[Record], Gaps]:
    """The same averaged over all scores whose metric starts with `metric`: few-shot settings, data sets of transfer."""

    def gaps(record: Record) -> Gaps:
        scores = {
            name: {
                (run["seed"], s["dataset"], s["metric"]): s["value"]
                for run in record.of(name)
                for s in run.get("scores", [])
                if s["metric"].startswith(metric)
            }
            for name in (a, b)
        }
        found: dict[int | None, list[float]] = {}
        for key, x in scores[a].items():
            if key in scores[b]:
                found.setdefault(key[0], []).append(x - scores[b][key])
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    return gaps


def runs(read: Callable[[dict[str, Any]], float | None], name: str) -> Callable[[Record], Gaps]:
    """A number of each run of a name that did not diverge, where `read` finds one."""

    def gaps(record: Record) -> Gaps:
        found = {run.get("seed"): read(run) for run in record.of(name) if run.get("diverged") is None}
        return {seed: x for seed, x in found.items() if x is not None}

    return gaps


def less(a: Callable[[Record], Gaps], b: Callable[[Record], Gaps]) -> Callable[[Record], Gaps]:
    """a less b on the seeds of both."""

    def gaps(record: Record) -> Gaps:
        left, right = a(record), b(record)
        return {seed: left[seed] - right[seed] for seed in left if seed in right}

    return gaps


def share(run: dict[str, Any]) -> float | None:
    """M / K at the last step."""
    m, k = run.get("last", {}).get("M"), setting(run, "method", "n_prototypes")
    return None if m is None or not k else m / k


def knn(run: dict[str, Any]) -> float | None:
    found = value(run, KNN)
    return None if found is None else found[0]


def information(run: dict[str, Any]) -> float | None:
    """What the targets say of the image at the last step, as a share of ln K: zero if every image has the same one."""
    last, k = run.get("last", {}), setting(run, "method", "n_prototypes")
    if "teacher_entropy" not in last or not k:
        return None
    return (last["marginal_entropy"] - last["teacher_entropy"]) / math.log(k)


def at(path: str) -> Callable[[dict[str, Any]], float | None]:
    """A number inside a run by its path: "usage.ranks.0"."""

    def read(run: dict[str, Any]) -> float | None:
        found: Any = run
        for part in path.split("."):
            if found is None or (isinstance(found, dict) and part not in found):
                return None
            found = found[int(part)] if isinstance(found, list) else found[part]
        return None if found is None else float(found)

    return read


def lift(run: dict[str, Any]) -> float | None:
    """kNN accuracy in the upper two fifths of prototype precision less that in the lower two, in points."""
    table = run.get("precision") or []
    sides = {1: -0.5, 2: -0.5, 3: 0.0, 4: 0.5, 5: 0.5}
    return sum(sides[q["fifth"]] * q["knn"] for q in table) if len(table) == 5 else None


def fixed(x: float, gaps: Callable[[Record], Gaps], sign: float = 1.0) -> Callable[[Record], Gaps]:
    """How far a number lies above the bound x; below it for sign = -1."""
    return lambda record: {seed: sign * (found - x) for seed, found in gaps(record).items()}
