"""A run as text: curves in dots of braille, or in letters where there are none, and what is wrong in words."""

import itertools
import math
import textwrap

from prototypes_lib.live.panels import Panel, panels, thin
from prototypes_lib.live.run import Watched

_MARKS = "*o+x"  # curves that share a panel without colors
_COLORS = ("\x1b[34m", "\x1b[33m", "\x1b[32m", "\x1b[35m")
_PLAIN = "\x1b[0m"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille letter: [row][column]
_LABEL = 10  # letters of an axis and its labels
_FIGURES = (
    ("kl", "KL {:.3f}"), ("kappa_50", "|w| {:.3g}"), ("void", "void {:.1%}"), ("coding_rate", "coding rate {:.2f}"),
    ("teacher_lag", "teacher behind {:.2g}"), ("teacher_moved", "moved {:.2g}"), ("grad_norm", "gradient {:.3g}"),
    ("score_max", "scores to {:.3g}"), ("weight_max", "weights to {:.3g}"), ("lr", "lr {:.2g}"),
)  # fmt: skip


def draw(run: Watched, width: int = 80, height: int = 40, dots: bool = True, colors: bool = False) -> str:
    """The whole picture in lines of at most `width` letters, about `height` of them if they suffice.

    dots: whether the reader's letters include braille and the like. colors: whether it is a terminal that has them.
    """
    width = max(width, 24)
    lines = _wrapped(_head(run), width)
    if not run.rows:
        return "\n".join([*lines, *_wrapped("no metrics yet: the first row comes after monitor_steps steps", width)])
    said = _words(run, width)
    figures = [text.format(value) for key, text in _FIGURES if (value := run.newest(key)) is not None]
    said = [*_wrapped(("  " if width > 60 else " ").join(figures), width), "", *said]
    shown = panels(run.rows)[:4]
    across = 2 if width >= 72 and len(shown) > 1 else 1
    rows = -(-len(shown) // across)
    tall = min(9, max(3, (height - len(lines) - len(said) - 1) // max(rows, 1) - 4))
    each = (width - 2 * (across - 1)) // across
    for start in range(0, len(shown), across):
        pieces = [plot(panel, each, tall, dots, colors) for panel in shown[start : start + across]]
        for parts in zip(*pieces, strict=True):
            lines.append("  ".join(text + " " * (each - length) for text, length in parts).rstrip())
        lines.append("")
    text = "\n".join([*lines, *said])
    return text if dots else text.encode("ascii", "replace").decode()


def plot(panel: Panel, width: int, height: int, dots: bool, colors: bool) -> list[tuple[str, int]]:
    """A panel's title, its curves in `height` lines, and its steps; each line with its number of letters."""
    columns = max(width - _LABEL, 8)
    braille = dots and (colors or len(panel.curves) == 1)
    fine, deep = (2, 4) if braille else (1, 1)  # dots of a letter, across and down
    low, high = panel.range()
    first = min(points[0][0] for _, points in panel.curves)
    last = max(points[-1][0] for _, points in panel.curves)
    cells: dict[tuple[int, int], tuple[int, int]] = {}

    def down(y: float) -> int:
        return round((high - panel.place(y)) / (high - low) * (deep * height - 1))

    for number, (_, points) in enumerate(panel.curves):
        path = [
            (round((x - first) / max(last - first, 1e-9) * (fine * columns - 1)), down(y))
            for x, y in thin(points, 4 * columns)
        ]
        for x, y in _line(path):
            place = (y // deep, x // fine)
            bits = cells.get(place, (0, number))[0]
            cells[place] = (bits | _DOTS[y % deep][x % fine] if braille else 1, number)
    level = None if panel.level is None else down(panel.level[1]) // deep
    grid = []
    for row in range(height):
        label = {0: _short(panel.told(high)), height - 1: _short(panel.told(low))}.get(row, "")
        text = f"{label:>{_LABEL - 2}} "
        text += "|" if not dots else "│"
        for column in range(columns):
            if (row, column) in cells:
                bits, number = cells[row, column]
                letter = chr(0x2800 + bits) if braille else _MARKS[number % len(_MARKS)]
                text += f"{_COLORS[number % len(_COLORS)]}{letter}{_PLAIN}" if colors else letter
            else:
                text += ("┄" if dots else "-") if row == level else " "
        grid.append((text, _LABEL + columns))
    steps = f"{first:.0f}"
    end = f"{last:.0f}"
    gap = max(columns - len(steps) - len(end), 1)
    below = f"{'':{_LABEL}}{steps}{' ' * gap}{end}" if last > first else f"{'':{_LABEL}}{end}"
    title = panel.title[:width]
    legend = _legend(panel, width, braille, dots, colors)
    return [(title, len(title)), legend, *grid, (below[:width], len(below[:width]))]


def _legend(panel: Panel, width: int, braille: bool, dots: bool, colors: bool) -> tuple[str, int]:
    """Curves with their newest values, and the level, as far as there is room."""
    pieces = []
    for number, (name, points) in enumerate(panel.curves):
        mark = "" if braille else f"{_MARKS[number % len(_MARKS)]} "
        pieces.append((_COLORS[number % len(_COLORS)] if colors else "", f"{mark}{name} {_short(points[-1][1])}"))
    if panel.level is not None:
        pieces.append(("", f"{'┄' if dots else '-'} {panel.level[0]} {_short(panel.level[1])}"))
    text, length = "", 0
    for color, piece in pieces:
        piece = piece[: max(width - length, 0)]
        text += f"{color}{piece}{_PLAIN}" if color else piece
        length += len(piece)
        if length + 2 < width:
            text, length = text + "  ", length + 2
    return text, length


def _line(path: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots of a polygon."""
    found = path[:1]
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        found += [(x0 + round(i * (x1 - x0) / n), y0 + round(i * (y1 - y0) / n)) for i in range(1, n + 1)]
    return found


def _short(y: float) -> str:
    """A number in eight letters at most."""
    if 0.1 <= abs(y) < 100:
        return f"{y:.3f}"
    return next(text for digits in (3, 2, 1) if len(text := f"{y:.{digits}g}") <= 8)


def _head(run: Watched) -> str:
    text = run.name
    if run.rows:
        text += f"  step {run.rows[-1]['step']:.0f}"
        if math.isfinite(seconds := run.newest("seconds") or 0.0) and seconds > 0:
            text += f" after {duration(seconds)}"
    if run.finished:
        return f"{text}  finished  {run.folder}"
    if run.age is None:
        return f"{text}  {run.folder}"
    return f"{text}  last row {duration(run.age)} ago  {run.folder}"


def duration(seconds: float) -> str:
    """1:02:03, or 2 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"


def _words(run: Watched, width: int) -> list[str]:
    """What is wrong, why that usually is, what to try; what was wrong before."""
    lines = []
    for finding in run.findings:
        lines += _wrapped(f"{finding.kind.upper()}: {finding.text}", width)
        for title, texts in (("usual causes", finding.causes), ("try", finding.remedies)):
            lines += [f"  {title}"]
            for text in texts:
                lines += _wrapped(f"- {text}", width, "    ")
    if not run.findings:
        lines += _wrapped("Nothing wrong to be seen.", width)
    for step, kind, text in run.earlier:
        lines += _wrapped(f"earlier, at step {step}: {kind}: {text}", width)
    return lines


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent and indent + "  ")
