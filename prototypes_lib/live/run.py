"""A run as its folder tells of it just now, also while it is being written; never a word to the run itself."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prototypes_lib.collapse import Finding, diagnose


@dataclass(frozen=True)
class Watched:
    """What is known of a run: its rows, what is wrong at the newest of them, and what was found before.

    findings: of now. earlier: (step, kind, text) that the run has written down and that hold no longer. finished:
    whether it is at its end. age: seconds since the last row, None without any.
    """

    folder: Path
    name: str
    rows: tuple[dict[str, float], ...]
    findings: tuple[Finding, ...]
    earlier: tuple[tuple[int, str, str], ...]
    finished: bool
    age: float | None

    def newest(self, key: str) -> float | None:
        """The last number under this key, which not every row needs to have."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)


def find(place: str | Path) -> Path | None:
    """The run folder that is meant: this one, or the newest within a folder of runs; None where there is none yet.

    Raises FileNotFoundError or NotADirectoryError for what can never be one.
    """
    place = Path(place)
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist; name a run folder, or the folder that runs are made in")
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file; name the run folder that it lies in")
    if _is_run(place):
        return place
    names = ("config.json", "metrics.jsonl")
    found = [path.parent for name in names for depth in ("*/", "*/*/") for path in place.glob(depth + name)]
    return max(found, key=_written, default=None)


def read(folder: str | Path) -> Watched:
    """A run folder. Lines that are cut off, and values that are no numbers, are left out."""
    folder = Path(folder)
    config = _object(folder / "config.json")
    method = config.get("method")
    k = method.get("n_prototypes") if isinstance(method, dict) else None
    known = {"k": float(k)} if isinstance(k, int) and k > 0 else {}  # older runs' rows lack it
    rows = tuple(known | row for line in _lines(folder / "metrics.jsonl") if (row := _numbers(line)))
    now = diagnose(rows)
    told = [line for line in _lines(folder / "findings.jsonl") if _is_finding(line)]
    kinds = {finding.kind for finding in now}
    earlier = tuple((int(t["step"]), str(t["kind"]), str(t["text"])) for t in told if t["kind"] not in kinds)
    age = max(0.0, time.time() - _written(folder)) if rows else None
    finished = (folder / "result.json").is_file()
    return Watched(folder, str(config.get("name") or folder.name), rows, now, earlier, finished, age)


def _is_finding(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and all(isinstance(line.get(name), str) for name in ("kind", "text"))


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "metrics.jsonl").is_file()


def _written(folder: Path) -> float:
    """When a run last wrote a row, or began."""
    for name in ("metrics.jsonl", "config.json"):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; the last may be half-written."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    return [found for line in lines if isinstance(found := _parsed(line), dict)]


def _object(path: Path) -> dict[str, Any]:
    try:
        found = _parsed(path.read_bytes())
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _numbers(line: dict[str, Any]) -> dict[str, float] | None:
    """The numbers of a row, also infinite ones and nan; no row without a step."""
    row = {key: float(v) for key, v in line.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return row if math.isfinite(row.get("step", math.nan)) else None
