"""One value a step: the cosine and linear schedules of DINO, as arrays that can be plotted and indexed."""

import numpy as np
from jaxtyping import Float


def cosine(
    start: float, end: float, steps: int, *, warmup_steps: int = 0, warmup_from: float = 0.0, stretch: float = 1.0
) -> Float[np.ndarray, " steps"]:
    """Linear from `warmup_from` to `start` (both ends included), then half a cosine from `start` towards `end`.

    The last value is just short of `end`, as in the official code. A warm-up longer than the run is cut off. With
    `stretch` the wave ends at stretch * steps, after the run, and what lies there is cut off (MSN, 1.25).
    """
    warmup = np.linspace(warmup_from, start, warmup_steps)
    rest = max(round(stretch * steps) - warmup_steps, 0)
    wave = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate([warmup, wave])[:steps]


def linear(start: float, end: float, steps: int, *, stretch: float = 1.0) -> Float[np.ndarray, " steps"]:
    """From `start` towards `end`, which comes at stretch * steps: the teacher momentum of MSN."""
    return start + (end - start) * np.arange(steps) / max(round(stretch * steps), 1)


def linear_warmup(start: float, end: float, steps: int, warmup_steps: int) -> Float[np.ndarray, " steps"]:
    """From `start` to `end` over the first `warmup_steps`, then constant: the teacher temperature.

    Per step, as DINOv2; DINO and iBOT hold the temperature constant within an epoch.
    """
    rise = np.linspace(start, end, max(warmup_steps, 1)) if warmup_steps > 0 else np.empty(0)
    return np.concatenate([rise, np.full(max(steps - len(rise), 0), end)])[:steps]
