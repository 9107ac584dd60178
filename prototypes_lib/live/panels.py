"""Which curves tell whether a run is alive, and beside which line each of them is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis: (name, points) each, and a level to read them against.

    log: whether the axis is logarithmic. floor: where it begins, whatever the values. reads: what to see in it.
    """

    title: str
    curves: tuple[tuple[str, Points], ...]
    level: tuple[str, float] | None = None
    log: bool = False
    floor: float | None = None
    reads: str = ""

    def range(self) -> tuple[float, float]:
        """Lowest and highest of all that is shown, on the axis (a logarithm where it is one); never the same."""
        values = [self.place(y) for _, points in self.curves for _, y in points]
        values += [] if self.level is None else [self.place(self.level[1])]
        values += [] if self.floor is None else [self.floor]
        low, high = min(values), max(values)
        pad = 0.5 * max(abs(low), abs(high), 1e-6)  # of curves that are level but for their last digits
        return (low, high) if high - low > 1e-5 * pad else (low - pad, high + 1.2 * pad)

    def place(self, y: float) -> float:
        """Where a value lies on the axis; what does not fit float's squares lies at its end."""
        return math.log10(y) if self.log else max(-1e150, min(1e150, y))

    def told(self, y: float) -> float:
        """The value at a place of the axis."""
        return 10.0 ** min(y, 300.0) if self.log else y


def panels(rows: Sequence[dict[str, float]]) -> list[Panel]:
    """All panels that these rows have anything for, the most telling first."""
    k = next((row["k"] for row in reversed(rows) if 1 < row.get("k", 0) < math.inf), None)
    ceiling = None if k is None else ("ln K", math.log(k))
    dim = next((row["code_dim"] for row in reversed(rows) if 0 < row.get("code_dim", 0) < math.inf), None)
    shares = [row | {n: row[n] / row["k"] for n in ("M", "M_student") if n in row and row.get("k")} for row in rows]
    parts = {"image": "views", "loss": "all terms"}
    if all(row.get("image", row.get("loss")) == row.get("loss") for row in rows):
        parts = {"loss": "loss"}
    entropies = {"running_marginal_entropy": "running", "marginal_entropy": "batch", "teacher_entropy": "teacher"}
    found = [
        _panel(rows, "Loss", parts, ceiling, reads="at ln K nothing is learned yet, or nothing more"),
        _panel(rows, "Entropy of targets", entropies, ceiling, floor=0.0,
               reads="of the mean target (of a batch, of the last rows), and of each: all at ln K is uniform, "
               "all equal one answer for all images"),
        _panel(shares, "Unique prototypes", {"M": "M / K", "M_student": "student's"}, floor=0.0,
               reads="below a half, prototypes are copies of each other"),
        _panel(rows, "Effective rank of codes", {"effective_rank": "rank"}, ("of", dim) if dim else None, floor=0.0,
               reads="1 is one code for all images"),
        _panel(rows, "KL to the teacher", {"kl": "KL"}),
        _panel(rows, "Coding rate of codes", {"coding_rate": "nats"}),
        _panel(rows, "Gradient before clipping", {"grad_norm": "norm"}, log=True),
        _panel(rows, "Teacher", {"teacher_lag": "behind the student", "teacher_moved": "moved"}, log=True,
               reads="shares of its length; moved since the row before"),
        _panel(rows, "Lengths of prototypes", {f"kappa_{q}": f"{int(q)} %" for q in ("95", "50", "05")}),
        _panel(rows, "Void set", {"void": "share of K"}, floor=0.0, reads="prototypes that point away from all data"),
        _panel(rows, "Largest score and weight", {"score_max": "score", "weight_max": "weight"}, log=True),
        _panel(rows, "Learning rate", {"lr": "rate"}),
    ]  # fmt: skip
    return [panel for panel in found if panel is not None]


def _panel(
    rows: Sequence[dict[str, float]],
    title: str,
    names: dict[str, str],
    level: tuple[str, float] | None = None,
    log: bool = False,
    floor: float | None = None,
    reads: str = "",
) -> Panel | None:
    def points(key: str) -> Points:
        found = ((row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan)))
        return tuple((x, y) for x, y in found if y > 0 or not log)

    curves = tuple((name, found) for key, name in names.items() if (found := points(key)))
    return Panel(title, curves, level, log, floor, reads) if curves else None


def thin(points: Points, n: int) -> Points:
    """About n of the points, with every peak: of each stretch the lowest and the highest."""
    if len(points) <= max(n, 2):
        return points
    size = -(-2 * len(points) // n)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return tuple(dict.fromkeys((points[0], *kept, points[-1])))
