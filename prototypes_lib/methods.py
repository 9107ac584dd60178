"""The family: every method is one sentence with a few words changed, so it is a composition and never a class.

views -> encoder -> projector -> unit code y -> score against prototypes -> targets -> cross-entropy (+ patch term)
(+ regularizers); SimDINO deletes the prototypes and puts an alignment and a coding rate in their place.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prototypes_lib import scores
from prototypes_lib.assignment import Center, ProbabilityCenter
from prototypes_lib.regularizers import expansion, koleo

PLACES = ("features", "codes", "averaged codes", "prototypes", "probabilities")


@dataclass(frozen=True)
class Warmup:
    """A linear rise from `start` to `end` over the first `epochs`, then constant."""

    start: float
    end: float
    epochs: float = 0.0


@dataclass(frozen=True)
class Views:
    """How many crops of an image, and which shares of its area they show."""

    n_global: int = 2
    n_local: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)

    def __post_init__(self):
        if self.n_global < 1 or self.n_local < 0 or self.n_global + self.n_local < 2:
            raise ValueError("at least one global view and two views in all are needed to compare any")
        for low, high in (self.global_scale, self.local_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(f"a crop's share of the area lies in (0, 1], low before high, not ({low}, {high})")


@dataclass(frozen=True)
class Patch:
    """The masked-patch term of iBOT: the student predicts, at masked places, what the teacher sees there.

    Each global crop is masked with probability `probability`, by a share drawn from `ratio`. Same projector and
    prototypes as the image term, a chain of links of its own (which sees all patches, masked or not, as iBOT's
    center does). Per image the mean over its masked patches; images without any count as zero.
    """

    weight: float = 1.0
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    shape: str = "block"  # or "rand"

    def __post_init__(self):
        if not (0 <= self.probability <= 1 and 0 <= self.ratio[0] <= self.ratio[1] <= 1):
            raise ValueError(f"masks: probability {self.probability} and ratio {self.ratio} must lie in [0, 1]")
        if self.shape not in ("block", "rand"):
            raise ValueError(f'masks: shape {self.shape!r} must be "block" or "rand"')


@dataclass(frozen=True)
class Method:
    """One member of the family.

    paper: arXiv id. n_prototypes: K, or 0 for a method without. score: from `scores`. targets: links of `assignment`,
    as classes, partials or instances. ema, ema_end: the teacher's momentum at the start, rising to the end's by a
    cosine; ema=None makes the student its own teacher. student_temp, teacher_temp: temperatures of the two softmaxes.
    shared_prototypes: the teacher uses the student's prototypes instead of their average. views, patch: see there.
    regularizers: (weight, function, place); weight *
    function(what stands there) is added to the loss, with
      features         backbone features of each global crop of the student, summed over the crops (as DINOv2's code)
      codes            codes of each global crop of the student, averaged over the crops
      averaged codes   mean of the student's and the teacher's code of each global crop, averaged (as SimDINO's code)
      prototypes       the student's prototypes
      probabilities    the student's assignments of all its crops
    """

    paper: str
    n_prototypes: int = 65536
    score: Callable[..., Any] = scores.cosine
    targets: tuple[Any, ...] = (Center,)
    student_temp: float = 0.1
    teacher_temp: Warmup = Warmup(0.04, 0.07, epochs=30)
    ema: float | None = 0.996
    ema_end: float = 1.0
    shared_prototypes: bool = False
    views: Views = Views()
    patch: Patch | None = None
    regularizers: tuple[tuple[float, Callable[..., Any], str], ...] = ()

    def __post_init__(self):
        if self.n_prototypes < 0:
            raise ValueError(f"n_prototypes={self.n_prototypes} must be 0 (none) or positive")
        if not (self.student_temp > 0 and self.teacher_temp.start > 0 and self.teacher_temp.end > 0):
            raise ValueError("temperatures must be positive")
        if self.ema is not None and not (0 <= self.ema <= 1 and 0 <= self.ema_end <= 1):
            raise ValueError(
                f"ema={self.ema} to {self.ema_end} must lie in [0, 1], or be None for no teacher of its own"
            )
        for _, function, place in self.regularizers:
            if place not in PLACES:
                raise ValueError(f"regularizer {function} on {place!r}: choose one of {', '.join(PLACES)}")
            if place in ("prototypes", "probabilities") and not self.n_prototypes:
                raise ValueError(f"a regularizer on {place} needs prototypes")

    @property
    def free_norms(self) -> bool:
        """Whether prototypes have a length of their own (the official norm_last_layer=False)."""
        return self.score is not scores.cosine

    def but(self, **changes) -> "Method":
        """The same method with these fields changed. Raises TypeError for a field that does not exist."""
        return dataclasses.replace(self, **changes)

    def plus(self, weight: float, function: Callable[..., Any], on: str) -> "Method":
        """The same method with one more regularizer."""
        return self.but(regularizers=(*self.regularizers, (weight, function, on)))


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data, functions and classes by name: what a run's config records and hashes."""
    return _as_data(method)


def _as_data(value: Any) -> Any:
    if isinstance(value, partial):
        arguments = {"args": _as_data(value.args)} | {key: _as_data(v) for key, v in value.keywords.items()}
        return {"name": _as_data(value.func), **arguments}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _as_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_as_data(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__module__}.{value!r}".removeprefix("prototypes_lib.")
    if callable(value):
        return _function_name(value)
    return value


def _function_name(function: Callable[..., Any]) -> str:
    """Module and name, which tell any two functions of modules apart; a nameless one is told by what it does."""
    name = f"{function.__module__}.{function.__qualname__}".removeprefix("prototypes_lib.")
    if "<" not in name:
        return name
    cells = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    what = (function.__code__.co_code, function.__code__.co_consts, function.__code__.co_names, cells)
    return f"{name}#{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"


# DINO (Caron et al., 2021). Unit prototypes, the CLI's default and the released ViT-B/16; the released ViT-S/16 is
# .but(score=scores.dot). The released runs warm the temperature up for 30 epochs (S) and 50 (B); vMF, section 5 prints
# them swapped.
dino = Method(paper="2104.14294")
dino_vmf = dino.but(paper="2405.10939", score=scores.vmf, targets=(ProbabilityCenter,))

# iBOT (Zhou et al., 2022), shared head as in every released run.
ibot = dino.but(paper="2111.07832", n_prototypes=8192, patch=Patch())
ibot_vmf = ibot.but(paper="2405.10939", score=scores.vmf, targets=(ProbabilityCenter,))

# SimDINO (Wu et al., 2025): alignment - gamma R on averaged codes, the released code's loss plus 1. eps^2 = 0.05.
# The released run is on 8 GPUs without all-reduce: partial(expansion, eps=0.05**0.5, groups=8).
simdino = Method(paper="2502.10385", n_prototypes=0, targets=(), views=Views(2, 10, (0.4, 1.0), (0.05, 0.4))).plus(
    -1.0, partial(expansion, eps=0.05**0.5), on="averaged codes"
)

METHODS: dict[str, Method] = {"dino": dino, "dino-vmf": dino_vmf, "ibot": ibot, "ibot-vmf": ibot_vmf}
for _name, _method in list(METHODS.items()):
    # KoLeo on the data (DINOv2) and on the prototypes (PPC, section 6.1); lambda = 0.1 in both
    METHODS[f"{_name}-kd"] = _method.plus(0.1, koleo, on="features")
    METHODS[f"{_name}-kp"] = _method.plus(0.1, koleo, on="prototypes")
METHODS["simdino"] = simdino
