"""One look for every figure: a style file, a fixed color for each role and method, alt text for each picture."""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from prototypes_lib.evaluate.intervals import over_seeds

# Okabe-Ito, safe for color-blind readers
BLUE, ORANGE, GREEN, VERMILLION, PINK, SKY, YELLOW, BLACK, GRAY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#8C8C8C",
)  # fmt: skip

ROLE = {"data": GRAY, "student": BLUE, "teacher": ORANGE, "prototypes": VERMILLION, "bound": BLACK}
METHOD = {"base": VERMILLION, "kd": ORANGE, "kp": BLUE, "simdino": GREEN, "random": GRAY}
MARKER = {"base": "o", "kd": "s", "kp": "^", "simdino": "D", "random": "x"}

# members of the family, for `look`: a color each kin, a marker each variant
_KIN = {"dino": BLUE, "ibot": SKY, "swav": BLACK, "msn": PINK, "pmsn": PINK, "dinov2": VERMILLION, "simdino": GREEN,
        "simdinov2": GREEN, "untrained": GRAY}  # fmt: skip
_VARIANT = {"": "o", "vmf": "s", "vmf-kd": "D", "vmf-kp": "^", "vmf-me": "v", "kd": "d", "kp": "<"}


def look(name: str) -> dict[str, str]:
    """Color and marker of a name of METHODS, or of "untrained"; two names never look the same."""
    kin, _, variant = name.partition("-")
    if kin not in _KIN or variant not in _VARIANT:
        raise ValueError(f"no color for {name!r}; its kin must be one of {', '.join(_KIN)}")
    marker = {"pmsn": "X", "simdinov2": "P", "untrained": "x"}.get(kin, _VARIANT[variant])
    return {"color": _KIN[kin], "marker": marker}


def compare(columns: Mapping[str, Mapping[str, Mapping[int, float]]], unit: str = "accuracy, %") -> Figure:
    """One panel a metric, one row a method: {metric: {method: {seed: value}}}; mean, 95 % t-interval and seeds (|)."""
    names = list(dict.fromkeys(name for methods in columns.values() for name in methods))
    size = (2 + 1.6 * len(columns), 0.8 + 0.33 * len(names))
    fig, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (metric, methods) in zip(axes[0], columns.items(), strict=True):
        for name, seeds in methods.items():
            place, (mean, half) = names.index(name), over_seeds(list(seeds.values()))
            axis.errorbar(mean, place, xerr=half, capsize=2, lw=1, **look(name))
            axis.plot(list(seeds.values()), [place + 0.28] * len(seeds), "|", color=look(name)["color"])
        axis.set(title=metric, xlabel=unit)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return fig


def table(columns: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """The same as Markdown, a column a metric: mean ± half the 95 % t-interval over seeds."""
    names = list(dict.fromkeys(name for methods in columns.values() for name in methods))
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for methods in columns.values():
            mean, half = over_seeds(list(methods.get(name, {}).values()))
            cells.append("" if mean != mean else f"{mean:.1f}" if half != half else f"{mean:.1f} ± {half:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def use_style() -> None:
    """Apply the course's matplotlib style; call it once in a notebook's import cell."""
    plt.style.use(Path(__file__).with_name("course.mplstyle"))


def show(fig: Figure, alt: str) -> None:
    """Display a figure as PNG with alt text, in a notebook or nowhere, and close it.

    Raises ValueError without alt text: the figure's message has to reach a reader who does not see it.
    """
    if len(alt) < 20:
        raise ValueError("say in the alt text what the figure shows, in a sentence")
    from IPython.display import display

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    # a palette of 256 colors: a third of the bytes, and executed copies live in git
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    display({"image/png": small.getvalue(), "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})
