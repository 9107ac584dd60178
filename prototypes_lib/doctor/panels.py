"""The doctor's figures of prototypes alone: each a function of an examination, with the words that tell its message."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from prototypes_lib.collapse import UniquePrototypes
from prototypes_lib.doctor.examination import PPC, VMF, Examination, quantiles
from prototypes_lib.figures import BLACK, BLUE, GRAY, ROLE, SKY, VERMILLION

WIDE = (8.2, 3.3)  # inches


class Panel(NamedTuple):
    """A figure on the page: the question over it, what it shows for those who do not see it, and how to read it."""

    heading: str
    figure: Figure
    alt: str
    reading: str


def without_data(seen: Examination) -> Iterator[Panel]:
    """Panels of what needs no data."""
    reading = (
        "A prototype joins the first one before it that is closer than eps, or stands for itself. Where M is flat the "
        "count does not hang on the threshold: groups of copies are tight, and far from each other."
    )
    yield Panel("How many are unique, at which threshold?", *curve(seen), reading)
    reading = (
        f"Groups of copies at 1 − cos < {seen.eps:g} by their size r, which doubles from bar to bar: on the left each "
        "group counts once, on the right with all its members."
    )
    yield Panel("How many copies has a prototype?", *copies(seen.unique), reading)
    if seen.nearest is not None:
        reading = (
            "What lies left of the blue line has a copy. Without collapse the outline falls on the gray area, or to "
            "its right where KoLeo spreads prototypes."
        )
        yield Panel("How far is the nearest other prototype?", *apart(seen), reading)
    reading = (
        "Left: the length of a prototype, which is its precision in the vMF reading. Right: eigenvalues of the second "
        "moment of the directions; the effective rank is exp of their entropy."
    )
    yield Panel("How long are they, and in how many directions do they point?", *shape(seen), reading)
    if seen.other is not None:
        reading = (
            "The teacher averages the student over time, so prototypes of one index stay close. Where they do not, the "
            "teacher does not follow."
        )
        yield Panel(f"Is the {seen.other.network} the same?", *against(seen), reading)


def plain_log(axis: Axis, whole: bool = False) -> None:
    """A logarithmic axis with ticks in plain figures, not as powers; at 1, 2 and 5 where it spans little."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 100 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if whole else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def curve(seen: Examination) -> tuple[Figure, str]:
    """M and the largest group over eps, both papers' thresholds marked."""
    fig, axis = plt.subplots(figsize=WIDE)
    eps, m, largest = (np.array(column) for column in zip(*seen.curve, strict=True))
    axis.axhline(seen.k, color=BLACK, lw=0.8, ls=":")
    axis.text(eps[0], 1.15 * seen.k, f" K = {seen.k:,}", va="bottom", ha="left", fontsize=8)
    axis.plot(eps, m, "o-", color=VERMILLION, label="M, unique prototypes", zorder=3)
    axis.plot(eps, largest, "s--", color=GRAY, ms=3.5, lw=1, label="largest group of copies")
    places = {PPC: (f"PPC: 1 − cos < {PPC}", "right"), VMF: (f"vMF: cos > {1 - VMF:g}", "left")}
    if seen.eps not in places:
        places[seen.eps] = (f"asked: {seen.eps:g}", "right" if seen.eps < PPC / 4 or seen.eps > VMF else "left")
    for at, (name, side) in places.items():
        axis.axvline(at, color=BLUE, lw=0.9, zorder=1)
        axis.annotate(f"{name}\nM = {seen.at(at)[0]:,}", (at, 0.98), (-4 if side == "right" else 4, 0),
                      axis.get_xaxis_transform(), "offset points", ha=side, va="top", fontsize=8,
                      color=BLUE)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="eps: copies are closer than this cosine distance, 1 − cos",
             ylabel="prototypes", ylim=(0.8, 9 * seen.k), xlim=(eps[0] * 0.8, eps[-1] * 1.25))  # fmt: skip
    plain_log(axis.xaxis)
    plain_log(axis.yaxis, whole=True)
    axis.legend(loc="center left")
    (a, _), (b, _) = seen.at(PPC), seen.at(VMF)
    return fig, (
        f"Unique prototypes against the threshold: {a:,} of {seen.k:,} at a cosine distance of {PPC}, {b:,} at {VMF}."
    )


def copies(unique: UniquePrototypes) -> tuple[Figure, str]:
    """Histogram of redundancy in bins that double: unique prototypes, and all the prototypes they stand for."""
    r, k = unique.redundancy.double(), len(unique.assignment)
    top = max(1, math.ceil(math.log2(float(r.max()) + 1)))
    place = torch.floor(torch.log2(r)).long()
    parts = torch.bincount(place, minlength=top).tolist()
    members = torch.zeros(top, dtype=torch.float64).index_add_(0, place, r).tolist()
    names = [f"{2**i:,}" if i == 0 else f"{2**i:,}–{2 ** (i + 1) - 1:,}" for i in range(top)]
    fig, axes = plt.subplots(1, 2, figsize=WIDE, sharey=True)
    for axis, values, total, color, title in (
        (axes[0], parts, unique.count, VERMILLION, f"the {unique.count:,} unique prototypes"),
        (axes[1], members, k, SKY, f"all {k:,} prototypes"),
    ):
        axis.barh(range(top), [100 * v / total for v in values], color=color, height=0.7)
        for i, value in enumerate(values):
            if value:
                axis.text(100 * value / total, i, f" {value:,.0f}", va="center", fontsize=8)
        axis.set(title=title, xlabel="share, %", xlim=(0, 118))
        axis.set_xticks(range(0, 101, 25))
        axis.grid(axis="y", visible=False)
    axes[0].set(ylabel="size of the group, r", ylim=(-0.7, max(top, 5) - 0.3))
    axes[0].set_yticks(range(top), names)
    single = parts[0]
    return fig, (
        f"Group sizes: {single:,} of {unique.count:,} unique prototypes have no copy; the largest group holds "
        f"{int(r.max()):,} of {k:,} prototypes."
    )


def apart(seen: Examination) -> tuple[Figure, str]:
    """Cosine distance to the nearest other prototype, beside the same of points drawn evenly on the sphere."""
    fig, axis = plt.subplots(figsize=WIDE)
    ours, even = seen.nearest, seen.uniform
    both = torch.cat([ours, even]).clamp_min(1e-6)
    bins = np.geomspace(min(0.01, 0.8 * float(both.min())), min(2.0, max(1.0, 1.15 * float(both.max()))), 70)
    for values, color, name, filled in (
        (even, GRAY, "points drawn evenly on the sphere", True), (ours, VERMILLION, "prototypes", False),
    ):  # fmt: skip
        weights = np.full(len(values), 100 / len(values))
        axis.hist(values.clamp_min(bins[0]).numpy(), bins, weights=weights, color=color, label=name, lw=1.6,
                  histtype="stepfilled" if filled else "step", alpha=0.55 if filled else 1)  # fmt: skip
    axis.axvline(PPC, color=BLUE, lw=0.9)
    axis.annotate(f"copies: 1 − cos < {PPC} (PPC)", (PPC, 0.98), (-4, 0), axis.get_xaxis_transform(), "offset points",
                  ha="right", va="top", fontsize=8, color=BLUE)  # fmt: skip
    axis.set(xscale="log", xlabel="1 − cos to the nearest other prototype", ylabel="prototypes, %")
    axis.set_ylim(top=1.12 * axis.get_ylim()[1])
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    plain_log(axis.xaxis)
    a, b = float(ours.median()), float(even.median())
    return fig, (
        f"Distance to the nearest other prototype: {a:.3g} at the median, against {b:.3g} for as many random points in "
        f"{seen.found.w.shape[1]} dimensions."
    )


def shape(seen: Examination) -> tuple[Figure, str]:
    """Lengths (and kappa where tau is known), and the spectrum of the directions' second moment."""
    fig, (left, right) = plt.subplots(1, 2, figsize=WIDE)
    at, rank, dim = quantiles(seen.lengths), seen.effective_rank, len(seen.eigenvalues)
    if at["1"] - at["0"] <= 1e-4 * at["1"]:
        left.hist(seen.lengths.numpy(), [0.8 * at["0.5"], 0.99 * at["0.5"], 1.01 * at["0.5"], 1.2 * at["0.5"]],
                  color=VERMILLION)  # fmt: skip
        left.set_title(f"lengths: all {at['0.5']:.3g}")
    else:
        left.hist(seen.lengths.numpy(), 40, color=VERMILLION)
        left.set_title("lengths")
    left.set(xlabel="|w|", ylabel="prototypes")
    left.xaxis.set_major_locator(MaxNLocator(4))
    if seen.tau:
        tau = seen.tau
        kappa = left.secondary_xaxis("top", functions=(lambda x: x / tau, lambda x: x * tau))
        kappa.set_xlabel(f"κ = |w| / τ, τ = {tau:g}", fontsize=8)
        kappa.tick_params(labelsize=8)
        kappa.xaxis.set_major_locator(MaxNLocator(4))
        left.set_title("")
    place = np.arange(1, dim + 1)
    right.plot(place, 100 * seen.eigenvalues.numpy(), "o-" if dim <= 32 else "-", color=VERMILLION)
    right.axhline(100 / dim, color=GRAY, ls="--", lw=1, label="evenly on the sphere")
    right.axvline(rank, color=BLUE, lw=0.9)
    right.text(rank, 0.75, f" effective rank {rank:.1f} " if rank < 0.6 * dim else f"effective rank {rank:.1f} ",
               color=BLUE, fontsize=8, va="top", ha="left" if rank < 0.6 * dim else "right",
               transform=right.get_xaxis_transform())  # fmt: skip
    right.set(title="spectrum of the directions", xlabel="eigenvalue", ylabel="share, %", ylim=(0, None))
    right.legend(loc="upper center" if rank < 0.6 * dim else "lower left")
    return fig, (
        f"Left, the lengths of the prototypes, {at['0']:.3g} to {at['1']:.3g}. Right, the spectrum of their "
        f"directions: an effective rank of {rank:.1f} in {dim} dimensions."
    )


def against(seen: Examination) -> tuple[Figure, str]:
    """Cosine of each prototype with the same one of the other network, and M of both."""
    fig, (left, right) = plt.subplots(1, 2, figsize=WIDE, width_ratios=[3, 1])
    other = seen.other
    values = (1 - other.cosine.double()).clamp_min(1e-8)
    low, high = float(values.min()), max(float(values.max()), float(values.min()) * 10)
    left.hist(values.numpy(), np.geomspace(low * 0.9, high * 1.1, 50), color=SKY)
    left.set(xscale="log", xlabel=f"1 − cos of a prototype in {seen.found.network} and {other.network}",
             ylabel="prototypes")  # fmt: skip
    plain_log(left.xaxis)
    for name, m in ((seen.found.network, seen.unique.count), (other.network, other.count)):
        right.bar(name, m, color=ROLE.get(name, GRAY), width=0.6)
        right.text(name, m, f"{m:,}", ha="center", va="bottom", fontsize=8)
    right.axhline(seen.k, color=BLACK, lw=0.8, ls=":")
    right.set(ylabel="M, unique prototypes", ylim=(0, 1.12 * seen.k))
    right.grid(axis="x", visible=False)
    middle = quantiles(other.cosine)["0.5"]
    return fig, (
        f"Matching prototypes of {seen.found.network} and {other.network} have a median cosine of {middle:.4f}; "
        f"{seen.unique.count:,} and {other.count:,} of {seen.k:,} are unique."
    )
