"""One look for every figure: a style file, a fixed color for each role and method, alt text for each picture."""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

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
