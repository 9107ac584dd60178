"""The scoreboard as pictures: a panel a table with printed and measured values, a row a claim with its verdicts."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from prototypes_lib import figures
from prototypes_lib.scoreboard.claims import Decision
from prototypes_lib.scoreboard.measured import Records, measured
from prototypes_lib.scoreboard.paper import Printed, split

KIND = {"kNN": figures.BLUE, "linear": figures.ORANGE, "few-shot": figures.GREEN, "fine-tuned": figures.PINK,
        "prototypes": figures.VERMILLION, "dense tasks": figures.GRAY}  # fmt: skip
SIZE = {"S": "o", "B": "s", "L": "^", "u": "D"}  # by the letter of ViT-S/16 and so on; u: unstated
VERDICT = {"holds": (figures.BLUE, "o"), "tie": (figures.GRAY, "_"), "fails": (figures.VERMILLION, "X")}


def kind(metric: str) -> str:
    """Which color a metric has."""
    name, _ = split(metric)
    if "prototypes" in name:
        return "prototypes"
    if "gain" in name:
        return "kNN"
    return next((word for word in KIND if name.startswith(word)), "dense tasks")


def panel(axis: Axes, rows: Sequence[Printed], records: Records) -> tuple[int, int]:
    """Draw a table: hollow marks as printed, filled ones with intervals as measured; returns how many of each.

    A training that failed is an x at the left edge. Where a table has percentages and counts, the counts are drawn on
    an axis of their own at the top; alone they have a logarithmic one.
    """
    labels = _labels(rows)
    counts = [row for row in rows if kind(row.metric) == "prototypes"]
    mixed = 0 < len(counts) < len(rows)
    other = axis.twiny() if mixed else axis
    if mixed:
        other.grid(False)
        other.spines["top"].set_visible(True)
        other.spines["top"].set_color(KIND["prototypes"])
    elif counts:
        other.set_xscale("log")
        other.xaxis.set_minor_formatter(NullFormatter())
    drawn, here = 0, set()
    for row in rows:
        place, color = list(labels.values()).index(labels[row.method]), KIND[kind(row.metric)]
        on = other if row in counts else axis
        if math.isnan(x := float(row.value)):
            transform = on.get_yaxis_transform()
            on.plot(0.02, place - 0.15, "x", color=figures.BLACK, ms=5, transform=transform, clip_on=False)
        else:
            on.plot(x, place - 0.15, SIZE[row.backbone.removeprefix("ViT-")[0]], mfc="none", color=color, ms=4, mew=0.8)
        drawn += 1
        if found := measured(row, records):
            here.add(row)
            bars = [[found.value - found.low], [found.high - found.value]] if math.isfinite(found.low) else None
            on.errorbar(found.value, place + 0.2, xerr=bars, fmt="D", ms=3.5, color=color, capsize=2, lw=1)
    names = list(dict.fromkeys(labels.values()))
    axis.set_yticks(range(len(names)), names, fontsize=6.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=6.5)
    other.tick_params(axis="x", labelsize=6.5)
    state = f"{len(here)} of {len(rows)} here" if here else f"{len(rows)}, not run here"
    axis.set_title(f"{rows[0].table}: {state}", fontsize=8)
    return drawn, len(here)


def legend(figure: Figure, rows: Sequence[Printed]) -> None:
    """What the marks of `panel` mean, for the kinds of metric and the backbones that the rows have."""
    entries = {word: ("o", color, color) for word, color in KIND.items() if word in {kind(row.metric) for row in rows}}
    sizes = {row.backbone.removeprefix("ViT-")[0] for row in rows}
    entries |= {f"printed, {_BACKBONE[size]}": (SIZE[size], "none", figures.BLACK) for size in SIZE if size in sizes}
    entries["here, with its interval"] = ("D", figures.BLACK, figures.BLACK)
    look = {"ls": "", "ms": 4}
    handles = [Line2D([], [], marker=m, mfc=fill, mec=edge, label=x, **look) for x, (m, fill, edge) in entries.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=7)


_BACKBONE = {"S": "ViT-S", "B": "ViT-B", "L": "ViT-L", "u": "unstated backbone"}


def _labels(rows: Sequence[Printed]) -> dict[str, str]:
    """method -> its name with only those qualifiers that tell the table's rows apart."""
    methods = list(dict.fromkeys(row.method for row in rows))
    asked = [split(method)[1] for method in methods]
    varying = [k for k in dict.fromkeys(k for a in asked for k in a) if len({a.get(k) for a in asked}) > 1]
    found = {}
    for method, a in zip(methods, asked, strict=True):
        words = [
            a[k] if k in ("normalization", "centering") else f"{_SHORT.get(k, k)} {a[k]}" for k in varying if k in a
        ]
        found[method] = ", ".join(words) if len(words) > 1 else " ".join([split(method)[0], *words])
    return found


_SHORT = {"self-distillation": "self-dist.", "last-layer-norm": "norm", "momentum": "mom.", "temperature": "temp."}


def verdicts(matrix: Axes, gaps: Axes, decisions: Sequence[Decision], columns: Sequence[str]) -> None:
    """A row a claim: in `matrix` what each record says (the deciding one ringed), in `gaps` the points behind it.

    columns: names of records. In `gaps` a hollow diamond is a difference that the paper prints, the filled mark ours
    with its interval, right of zero as claimed; claims in other units than points have theirs written out.
    """
    for place, found in enumerate(decisions):
        for i, evidence in enumerate(found.evidence):
            color, marker = VERDICT[evidence.kind]
            x = columns.index(evidence.record)
            matrix.plot(x, place, marker, color=color, ms=6, mew=2.5 if marker == "_" else 0.5)
            if i == 0:
                matrix.plot(x, place, "s", mfc="none", color=figures.BLACK, ms=11, mew=0.7)
        gaps.plot(
            found.printed, [place - 0.2] * len(found.printed), "D", mfc="none", color=figures.BLACK, ms=3.5, mew=0.7
        )
        if not found.evidence:
            matrix.text(len(columns) / 2 - 0.5, place, "not run", fontsize=6, ha="center", va="center", alpha=0.6)
        else:
            first = found.evidence[0]
            color, _ = VERDICT[first.kind]
            if first.unit == "points":
                bar = [[first.mean - first.low], [first.high - first.mean]]
                gaps.errorbar(first.mean, place + 0.15, xerr=bar, fmt="o", ms=4, color=color, capsize=2, lw=1.2)
            else:
                gaps.text(0.3, place, first.interval, fontsize=6, va="center", color=color)
    numbers = [name.split("_")[0] for name in columns]
    labels = [number + "'" * numbers[:i].count(number) for i, number in enumerate(numbers)]  # a second record of one
    matrix.set_xticks(range(len(columns)), labels, fontsize=7)
    matrix.set_yticks(range(len(decisions)), [found.claim.text for found in decisions], fontsize=6.5)
    matrix.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(decisions) - 0.4, -0.6), xlabel="record of notebook")
    gaps.axvline(0, color=figures.ROLE["bound"], lw=0.8)
    gaps.set(xlabel="points in the claimed direction")
    gaps.tick_params(labelsize=7)
