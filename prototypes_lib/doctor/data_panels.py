"""The doctor's figures of prototypes beside data: who is used, by how much, and what the images look like."""

import math
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from prototypes_lib.data import Images
from prototypes_lib.doctor.data import DataExamination, Row
from prototypes_lib.doctor.examination import Examination
from prototypes_lib.doctor.panels import WIDE, Panel, plain_log
from prototypes_lib.figures import BLACK, GRAY, GREEN, ORANGE, SKY, VERMILLION

_GRIDS = {
    "most used": "A row a prototype, one of each group of copies; on the left its index and the images assigned to it.",
    "least used": "The same of the groups with fewest images; what is shown may be assigned to other prototypes.",
    "copies side by side": "Members of the same group: rows that look alike are what partial collapse is.",
}


def with_data(seen: Examination, data: DataExamination, images: Images) -> Iterator[Panel]:
    """Panels of what the data say."""
    reading = (
        "The marginal latent class distribution (PPC, section 3): with copies, an even use of all prototypes can hide "
        "an uneven use of the unique ones."
    )
    yield Panel("Which prototypes do the data use?", *marginal(seen, data), reading)
    if len(data.redundancy.factor) > 1:
        reading = "Each image goes to one unique prototype, copies left out (PPC, Fig. 2); bars are 95 % intervals."
        yield Panel("Do prototypes with more copies get more data?", *shares(data), reading)
    if data.void is not None:
        reading = "Unused prototypes drift away from all data, to a cosine of −1 with their mean (vMF, section 5.2)."
        yield Panel("Is there a void set?", *void(seen, data), reading)
    reading = "The two curves part where images prefer long prototypes, or short ones."
    if data.knn:
        reading += (
            " Right: kNN accuracy of the images between percentiles of their prototype's precision, one half of them "
            "classified by the other half (vMF, Fig. 2); bars are 95 % intervals."
        )
    yield Panel("How precise are the prototypes of the images?", *precision(seen, data), reading)
    for heading, rows in data.grids.items():
        yield Panel(f"Images nearest to prototypes: {heading}", *grid(heading, rows, images), _GRIDS[heading])


def marginal(seen: Examination, data: DataExamination) -> tuple[Figure, str]:
    """Mean assignment, sorted, over all and over unique prototypes, beside the uniform one."""
    fig, axes = plt.subplots(1, 2, figsize=WIDE, sharey=True)
    entropies = (data.marginal.entropy, data.marginal.unique_entropy)
    for axis, p, h, name, color in (
        (axes[0], data.marginal.p, entropies[0], f"all {seen.k:,}", SKY),
        (axes[1], data.marginal.unique_p, entropies[1], f"the {seen.unique.count:,} unique, alone", VERMILLION),
    ):
        times = (len(p) * p.double().sort(descending=True).values).clamp_min(1e-4)
        axis.plot(np.arange(1, len(p) + 1), times.numpy(), color=color, lw=2)
        axis.axhline(1, color=BLACK, ls="--", lw=0.9)
        axis.set(xscale="log", yscale="log", xlabel="prototype, most used first")
        axis.set_title(f"{name}: entropy {h:.2f} of ln {len(p):,} = {math.log(len(p)):.2f}", fontsize=9)
        plain_log(axis.xaxis, whole=True)
    axes[1].text(0.99, 1, "uniform", fontsize=8, ha="right", va="bottom", transform=axes[1].get_yaxis_transform())
    plain_log(axes[0].yaxis)
    axes[0].set_ylabel("mean assignment, times uniform")
    return fig, (
        f"The marginal over all prototypes has entropy {entropies[0]:.2f} of at most {math.log(seen.k):.2f} nats, over "
        f"the unique ones alone {entropies[1]:.2f} of {math.log(seen.unique.count):.2f}."
    )


def shares(data: DataExamination) -> tuple[Figure, str]:
    """Average share of the data of a unique prototype with r copies (PPC, Fig. 2)."""
    fig, axis = plt.subplots(figsize=WIDE)
    found = data.redundancy
    low = [max(a - interval[0], 0) for a, interval in zip(found.average, found.interval, strict=True)]
    high = [max(interval[1] - a, 0) for a, interval in zip(found.average, found.interval, strict=True)]
    axis.errorbar(found.factor, found.average, [low, high], fmt="o", color=VERMILLION, ecolor=GRAY, capsize=2, lw=1)
    axis.axhline(100 / found.m, color=BLACK, ls="--", lw=0.9, label="equal shares, 1 / M")
    axis.set(xscale="log", xlabel="r, copies of the prototype", ylabel="% of the data, each, on average")
    plain_log(axis.xaxis, whole=True)
    axis.set_ylim(bottom=0)
    axis.legend()
    trend = "" if math.isnan(found.trend) else f" Rank correlation of copies with images: {found.trend:+.2f}."
    return fig, (
        f"Share of {found.n:,} images a unique prototype gets when only unique ones compete, by the copies it "
        f"has.{trend}"
    )


def void(seen: Examination, data: DataExamination) -> tuple[Figure, str]:
    """Cosine of each prototype with the mean code; the void set lies at -1."""
    fig, axis = plt.subplots(figsize=WIDE)
    axis.hist(data.void.cosine.numpy(), np.linspace(-1, 1, 81), color=SKY, label="prototypes")
    if data.void.count:
        axis.hist(data.void.cosine[data.void.mask].numpy(), np.linspace(-1, 1, 81), color=VERMILLION,
                  label=f"void set: {data.void.count:,}")  # fmt: skip
    axis.set(xlabel="cosine with the mean code of the data", ylabel="prototypes", yscale="log", xlim=(-1.02, 1.02))
    axis.legend()
    return fig, (
        f"Cosines of the prototypes with the mean of the data; {data.void.count:,} of {seen.k:,} are opposite to it, "
        "the void set."
    )


def precision(seen: Examination, data: DataExamination) -> tuple[Figure, str]:
    """|w| by percentile, of all prototypes and of the images' prototypes; with labels kNN accuracy (vMF, Fig. 2)."""
    fig, axes = plt.subplots(1, 2 if data.knn else 1, figsize=WIDE, squeeze=False)
    at = np.linspace(0, 1, 101)
    for values, color, name in (
        (seen.lengths, GRAY, "all prototypes"), (seen.lengths[data.assigned], GREEN, "prototypes of the images"),
    ):  # fmt: skip
        axes[0, 0].plot(100 * at, np.quantile(values.numpy(), at), color=color, label=name, lw=2)
    axes[0, 0].set(xlabel="percentile", ylabel="|w|" + (f" (κ = |w| / {seen.tau:g})" if seen.tau else ""))
    axes[0, 0].legend()
    text = ""
    if data.knn:
        found, axis = data.knn, axes[0, 1]
        middle = [(a + b) / 2 for a, b in zip(found.percentiles, found.percentiles[1:], strict=False)]
        keep = [i for i, n in enumerate(found.n) if n]
        bars = [[found.accuracy[i] - found.interval[i][0] for i in keep],
                [found.interval[i][1] - found.accuracy[i] for i in keep]]  # fmt: skip
        axis.errorbar([middle[i] for i in keep], [found.accuracy[i] for i in keep], np.maximum(bars, 0), fmt="o-",
                      color=ORANGE, capsize=2)  # fmt: skip
        axis.axhline(found.overall, color=BLACK, ls="--", lw=0.9)
        axis.set(xlabel="percentile of precision of an image's prototype", ylabel="kNN accuracy, %", xlim=(0, 100))
        if not math.isnan(found.trend):
            text = f" kNN accuracy and precision have a rank correlation of {found.trend:+.2f}."
    a, b = float(seen.lengths.median()), float(seen.lengths[data.assigned].median())
    return fig, f"Median length of the images' prototypes {b:.3g}, of all prototypes {a:.3g}.{text}"


def grid(heading: str, rows: tuple[Row, ...], images: Images) -> tuple[Figure, str]:
    """A row a prototype: the images nearest to it, nearest first."""
    columns = max(len(row.images) for row in rows)
    size = (8.2, 0.7 * len(rows))
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="none")
    fig.subplots_adjust(0.16, 0.01, 0.995, 0.99, 0.03, 0.05)
    for line, row in zip(axes, rows, strict=True):
        for axis, index in zip(line, row.images, strict=True):
            _picture(axis, images.pixels[index])
        label = f"no. {row.prototype:,}\n{row.label}".replace("; ", "\n").replace(" in ", "\nin ")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    told = "; ".join(f"prototype {row.prototype}, {row.label}" for row in rows)
    return fig, f"The {columns} images nearest to each of {len(rows)} prototypes ({heading}): {told}."


def _picture(axis: Axes, pixels: np.ndarray | Tensor) -> None:
    axis.imshow(np.asarray(pixels), interpolation="nearest" if len(pixels) < 48 else "antialiased", aspect="equal")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
