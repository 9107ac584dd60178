"""What a record in notebooks/results must be, and the scores that a run in it carries (notebooks/results/README.md)."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """One measured number of one run; `vars(score)` is an entry of the run's list `scores`.

    protocol: the verb of `prototypes evaluate`. dataset: what was evaluated on. metric: as in data/paper_tables.csv
    where a paper has it, ending with its unit. low, high: 95 % interval in the metric's unit, both None where there is
    none. n: test images. seed: of the evaluation (splits, initial weights), None where nothing is random.

    Raises ValueError for a number that is not finite or lies outside its interval, an accuracy outside [0, 100], or
    no test image.
    """

    protocol: str
    dataset: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    seed: int | None = 0

    def __post_init__(self):
        for problem in _score(vars(self), f"score {self.metric!r}"):
            raise ValueError(problem)


@dataclass(frozen=True)
class Record:
    """A record read from its file: name is the file's without ".json"; runs are complete, config and all."""

    name: str
    notebook: str
    command: str
    parameters: dict[str, Any]
    runs: list[dict[str, Any]]
    untrained: list[dict[str, Any]]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The runs of a name, diverged ones too; "untrained" is the networks before their first step."""
        if name == "untrained":
            return self.untrained
        return [run for run in self.runs if run_name(run) == name]


def run_name(run: dict[str, Any]) -> str:
    """What a run is called; records from before runs had names have it in the config."""
    config = run.get("config")
    return run.get("name") or (config.get("name", "") if isinstance(config, dict) else "")


def load(folder: str | Path) -> dict[str, Record]:
    """Every record of a folder by name, in the order of names.

    Raises FileNotFoundError without a folder, ValueError naming file and field of the first thing that is wrong.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}; records lie in notebooks/results")
    return {path.stem: read(path) for path in sorted(Path(folder).glob("*.json"))}


def read(path: str | Path) -> Record:
    """One record, checked, its numbers of neighbors numbers and its configs written out. Raises as `load`."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(), parse_constant=lambda text: text)  # NaN stays a text, hence no number
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from None
    validate(found, path.name)
    first: dict[str | None, Any] = {}
    for row in [*found["runs"], *found.get("untrained", [])]:
        for name in ("knn", "knn_interval"):
            row[name] = {int(k): v for k, v in (row.get(name) or {}).items()}
        if isinstance(row.get("config"), str):
            of_first = first[row.get("name")]
            row["config"] = of_first | {"run": of_first.get("run", {}) | {"seed": row["seed"]}}
        elif "config" in row:
            first[row.get("name")] = row["config"]
    parts = (found[name] for name in ("notebook", "command", "parameters", "runs"))
    return Record(path.stem, *parts, found.get("untrained", []))


def validate(record: Any, name: str) -> None:
    """Raises ValueError in one line, "FILE: FIELD what it must be, not VALUE", for the first thing that is wrong."""
    for problem in _record(record):
        raise ValueError(f"{name}: {problem}")


Check = Callable[[Any], bool]


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _text(x: Any) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _percent(x: Any) -> bool:
    return _number(x) and 0 <= x <= 100


# field: what it must be, in words; the check
RECORD: dict[str, tuple[str, Check]] = {
    "notebook": ("must be a text: the notebook or script that wrote the record", _text),
    "command": ("must be a text: the command that makes the record again", _text),
    "parameters": ("must be an object of settings", lambda x: isinstance(x, dict)),
    "runs": ("must be a list with a run at least", lambda x: isinstance(x, list) and bool(x)),
}
RUN: dict[str, tuple[str, Check]] = {
    "seed": ("must be a whole number, or null where nothing is random", lambda x: x is None or _whole(x)),
    "hash": ("must be 12 hexadecimal digits", lambda x: isinstance(x, str) and bool(re.fullmatch("[0-9a-f]{12}", x))),
    "seconds": ("must be a number from 0 on", lambda x: _number(x) and x >= 0),
    "environment": ("must be an object", lambda x: isinstance(x, dict)),
}
ENVIRONMENT: dict[str, tuple[str, Check]] = dict.fromkeys(("commit", "hardware", "torch"), ("must be a text", _text))
TRAINED: dict[str, tuple[str, Check]] = {  # a run that trained a network, known by its `knn` or `scores`
    "config": ("must be an object, or a text that refers to one before", lambda x: isinstance(x, dict) or _text(x)),
    "last": ("must be an object: the last metrics", lambda x: isinstance(x, dict)),
}
SCORE: dict[str, tuple[str, Check]] = {
    "protocol": ("must be a text: a verb of `prototypes evaluate`", _text),
    "dataset": ("must be a text: what was evaluated on", _text),
    "metric": ("must be a text that ends with its unit in round brackets, then qualifiers in square ones, if any",
               lambda x: isinstance(x, str) and bool(re.fullmatch(r"[^\[\]]+ \([^()]+\)( \[[^\[\]]+=[^\[\]]+\])?", x))),
    "value": ("must be a finite number", _number),
    "low": ("must be a finite number, or null", lambda x: x is None or _number(x)),
    "high": ("must be a finite number, or null", lambda x: x is None or _number(x)),
    "n": ("must be a whole number of test images from 1 on", lambda x: _whole(x) and x > 0),
    "seed": ("must be a whole number, or null where nothing is random", lambda x: x is None or _whole(x)),
}  # fmt: skip


def _fields(found: Any, wanted: dict[str, tuple[str, Check]], where: str) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where} must be an object, not {_said(found)}"
        return
    dot = f"{where}." if where else ""
    for name, (what, good) in wanted.items():
        if name not in found:
            yield f"{dot}{name} is missing; it {what}"
        elif not good(found[name]):
            yield f"{dot}{name} {what}, not {_said(found[name])}"


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _record(found: Any) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"the record must be an object, not {_said(found)}"
        return
    yield from _fields(found, RECORD, "")
    named: set[str | None] = set()
    for i, run in enumerate(found["runs"]):
        where = f"runs[{i}]"
        yield from _fields(run, RUN, where)
        yield from _fields(run["environment"], ENVIRONMENT, f"{where}.environment")
        if "knn" in run or "scores" in run:
            yield from _fields(run, TRAINED, where)
            if isinstance(run["config"], str) and run.get("name") not in named:
                yield f"{where}.config must be an object: it is the first run named {_said(run.get('name'))}"
            named.add(run.get("name"))
        yield from _measured(run, where)
    untrained = found.get("untrained", [])
    if not isinstance(untrained, list):
        yield f"untrained must be a list, not {_said(untrained)}"
    for i, row in enumerate(untrained):
        yield from _fields(row, {}, f"untrained[{i}]")
        yield from _measured(row, f"untrained[{i}]")


def _measured(run: dict[str, Any], where: str) -> Iterator[str]:
    """The accuracy of kNN by number of neighbors, and the scores of other protocols."""
    knn, intervals = run.get("knn") or {}, run.get("knn_interval") or {}
    if not isinstance(knn, dict) or not isinstance(intervals, dict) or set(knn) != set(intervals):
        yield f"{where}.knn and {where}.knn_interval must be objects with the same numbers of neighbors"
        return
    for k, value in knn.items():
        if not k.isdigit() or not _percent(value):
            yield f"{where}.knn[{k}] must be a percentage at a number of neighbors, not {_said(value)}"
        pair = intervals[k]
        inside = isinstance(pair, list) and len(pair) == 2 and all(map(_percent, pair)) and pair[0] <= value <= pair[1]
        if not inside:
            yield f"{where}.knn_interval[{k}] must be [low, high] in percent around {value}, not {_said(pair)}"
    if knn and not (_whole(run.get("n_test")) and run["n_test"] > 0):
        yield f"{where}.n_test must be a whole number of test images from 1 on, not {_said(run.get('n_test'))}"
    scores = run.get("scores", [])
    if not isinstance(scores, list):
        yield f"{where}.scores must be a list, not {_said(scores)}"
        return
    seen = set()
    for i, score in enumerate(scores):
        yield from _score(score, f"{where}.scores[{i}]")
        key = score["dataset"], score["metric"]
        if key in seen:
            yield f"{where}.scores[{i}].metric {key[1]!r} on {key[0]!r} is there twice"
        seen.add(key)


def _score(score: Any, where: str) -> Iterator[str]:
    yield from _fields(score, SCORE, where)
    value, low, high = (score[name] for name in ("value", "low", "high"))
    if re.search(r"(top-1|accuracy) \(%\)", score["metric"]) and not 0 <= value <= 100:
        yield f"{where}.value must lie in [0, 100] as an accuracy in percent, not {value}"
    if (low is None) != (high is None) or (low is not None and not low <= value <= high):
        yield f"{where}.low and high must be an interval around {value}, or both null, not [{low}, {high}]"
    unknown = set(score) - {field.name for field in fields(Score)}
    if unknown:
        yield f"{where}.{min(unknown)} is no field of a score"
