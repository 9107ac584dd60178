"""The family: every method is one sentence with a few words changed, so it is a composition and never a class.

views -> encoder -> projector -> unit code y -> score against prototypes -> targets -> cross-entropy (+ patch term)
(+ regularizers); SimDINO deletes the prototypes and puts an alignment and a coding rate in their place.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.regularizers import expansion, koleo, mean_entropy, power_law_matching

PLACES = ("features", "codes", "averaged codes", "prototypes", "probabilities", "patch probabilities")


@dataclass(frozen=True)
class Warmup:
    """A linear rise from `start` to `end` over the first `epochs`, then constant."""

    start: float
    end: float
    epochs: float = 0.0

    def __post_init__(self):
        if self.epochs < 0:
            raise ValueError(f"a warm-up of {self.epochs} epochs cannot be")


@dataclass(frozen=True)
class Cosine:
    """A coefficient that goes from `start` to `end` on half a cosine over the run.

    SimDINO's code has such schedules, constant by default; its eps is our eps squared, so a schedule of eps meets the
    official one at the ends only.
    """

    start: float
    end: float

    def at(self, progress: float) -> float:
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Views:
    """How many crops of an image, which shares of its area they show, and who sees them.

    The first `n_targets` global crops make targets (all of them by default). The student sees every crop that has
    another one's target to predict: with a single target that crop is the teacher's alone (MSN). colors: whose
    photometric augmentation, "dino" (also DINOv2's), "msn" or "swav".
    """

    n_global: int = 2
    n_local: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    n_targets: int | None = None
    colors: str = "dino"

    def __post_init__(self):
        if self.n_global < 1 or self.n_local < 0 or self.n_global + self.n_local < 2:
            raise ValueError("at least one global view and two views in all are needed to compare any")
        if self.n_targets is None:
            object.__setattr__(self, "n_targets", self.n_global)
        if not 1 <= self.n_targets <= self.n_global:
            raise ValueError(f"n_targets={self.n_targets} must lie between 1 and the {self.n_global} global views")
        if self.colors not in ("dino", "msn", "swav"):
            raise ValueError(f'colors={self.colors!r}: choose "dino", "msn" or "swav"')
        for low, high in (self.global_scale, self.local_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(f"a crop's share of the area lies in (0, 1], low before high, not ({low}, {high})")


@dataclass(frozen=True)
class Patch:
    """The masked-patch term of iBOT: the student predicts, at masked places, what the teacher sees there.

    Each global crop is masked with probability `probability`, by a share drawn from `ratio` ("block" or "rand" shape);
    `stratified` as DINOv2 draws them, with blocks from `min_area` patches on. Targets have a chain of links of their
    own, which sees "all" patches (iBOT's center) or the "masked" ones (DINOv2). `head` is what patches share with
    crops: "shared" projector and prototypes, own "prototypes" (iBOT's CLI default), or an "own" projector and
    prototypes (DINOv2's large models). Per image the mean over its masked patches; images without any count as zero.
    """

    weight: float | Cosine = 1.0
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    shape: str = "block"
    stratified: bool = False
    min_area: int | None = None
    targets_from: str = "all"
    head: str = "shared"

    def __post_init__(self):
        if not (0 <= self.probability <= 1 and 0 <= self.ratio[0] <= self.ratio[1] <= 1):
            raise ValueError(f"masks: probability {self.probability} and ratio {self.ratio} must lie in [0, 1]")
        choices = {"shape": ("block", "rand"), "targets_from": ("all", "masked")}
        for name, allowed in (choices | {"head": ("shared", "prototypes", "own")}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"masks: {name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.min_area is not None and self.min_area < 1:
            raise ValueError(f"masks: min_area={self.min_area} must be at least one patch")


@dataclass(frozen=True)
class Queue:
    """SwAV's queue: the newest `length` codes of each target view join the batch when targets are made.

    It is filled from epoch `epoch` on and used once it is full.
    """

    length: int
    epoch: float = 0.0

    def __post_init__(self):
        if not isinstance(self.length, int) or self.length < 1 or self.epoch < 0:
            raise ValueError(f"a queue of length {self.length} from epoch {self.epoch} cannot be")


@dataclass(frozen=True)
class Method:
    """One member of the family.

    paper: arXiv id. n_prototypes: K, or 0 for a method without. score: from `scores`. targets: links of `assignment`,
    as classes, partials or instances. student_temp, teacher_temp: temperatures of the softmaxes. ema, ema_end: the
    teacher's momentum at the start, rising to the end's; both 0: the teacher is the student of the step before.
    ema=None: targets are the student's own codes of this step (SwAV; of a second pass where it hides patches or its
    one target crop). shared_prototypes: the teacher uses the student's
    prototypes instead of their average. renormalize: prototypes are plain vectors set to unit length before each step
    (SwAV) instead of a direction times a length. joint_targets: all target views pass the links together, or each
    alone (SwAV; for links without a memory, which would see a step's views one after the other). joint_projector: crops
    of all sizes pass the projector together, or those of each size apart, which its BatchNorm notices (MSN). queue,
    views, patch: see there. mask_student: share of patches taken away from the student's global crops (MSN; another
    way than `patch`). image_weight: of the cross-entropy or alignment of whole crops.
    regularizers: (weight, function, place); weight * function(what stands there) is added to the loss, with
      features             backbone features of the student's global crops, one term a crop, summed (as DINOv2's code)
      codes                codes of each global crop of the student, averaged over the crops
      averaged codes       means of the student's and the teacher's code of a crop, averaged over crops (SimDINO's code)
      prototypes           the student's prototypes
      probabilities        the student's assignments of all its crops
      patch probabilities  the student's assignments of all masked patches
    A weight, or a keyword of a partial function, may be a `Cosine` over the run.
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
    renormalize: bool = False
    joint_targets: bool = True
    joint_projector: bool = True
    queue: Queue | None = None
    views: Views = Views()
    mask_student: float = 0.0
    patch: Patch | None = None
    image_weight: float | Cosine = 1.0
    regularizers: tuple[tuple[float | Cosine, Callable[..., Any], str], ...] = ()

    def __post_init__(self):
        if not isinstance(self.n_prototypes, int) or self.n_prototypes < 0:
            raise ValueError(f"n_prototypes={self.n_prototypes} must be a whole number, 0 for none")
        if self.targets and not self.n_prototypes:
            raise ValueError("targets are made of prototypes: with n_prototypes=0, leave them out by targets=()")
        if not (self.student_temp > 0 and self.teacher_temp.start > 0 and self.teacher_temp.end > 0):
            raise ValueError("temperatures must be positive")
        if self.ema is not None and not (0 <= self.ema <= 1 and 0 <= self.ema_end <= 1):
            raise ValueError(f"ema={self.ema} to {self.ema_end} must lie in [0, 1], or be None for no teacher at all")
        if not 0 <= self.mask_student < 1 or (self.mask_student and self.patch):
            raise ValueError(f"mask_student={self.mask_student} must lie in [0, 1), and be 0 with a patch term")
        if self.mask_student and self.first_view == self.views.n_global:
            raise ValueError("mask_student hides patches of global crops, and the student sees none: raise n_global")
        if self.patch and self.views.n_targets != self.views.n_global:
            raise ValueError("a patch term compares each global crop with itself: leave views.n_targets out")
        if not self.n_prototypes and self.patch and self.patch.head == "prototypes":
            raise ValueError('Patch(head="prototypes") needs prototypes; without any, take "shared" or "own"')
        if not self.n_prototypes and (self.queue or self.renormalize or self.shared_prototypes):
            raise ValueError("queue, renormalize and shared_prototypes need prototypes")
        for _, function, place in self.regularizers:
            if place not in PLACES:
                raise ValueError(f"regularizer {function} on {place!r}: choose one of {', '.join(PLACES)}")
            if place in ("prototypes", "probabilities", "patch probabilities") and not self.n_prototypes:
                raise ValueError(f"a regularizer on {place} needs prototypes")
            if place == "patch probabilities" and self.patch is None:
                raise ValueError("a regularizer on patch probabilities needs a patch term")
            if place in ("features", "codes", "averaged codes") and self.first_view == self.views.n_global:
                raise ValueError(f"a regularizer on {place} needs a global crop that the student sees")
            if place == "averaged codes" and self.views.n_targets != self.views.n_global:
                raise ValueError("averaged codes need global crops that both networks see: leave views.n_targets out")

    @property
    def free_norms(self) -> bool:
        """Whether prototypes have a length of their own (the official norm_last_layer=False)."""
        return self.score is not scores.cosine and not self.renormalize

    @property
    def first_view(self) -> int:
        """The first crop the student sees: a crop that is the only target has nothing to predict."""
        return 1 if self.views.n_targets == 1 and self.patch is None else 0

    def but(self, **changes) -> "Method":
        """The same method with these fields changed. Raises TypeError for a field that does not exist."""
        return dataclasses.replace(self, **changes)

    def plus(self, weight: float | Cosine, function: Callable[..., Any], on: str) -> "Method":
        """The same method with one more regularizer."""
        return self.but(regularizers=(*self.regularizers, (weight, function, on)))


def at(value: Any, progress: float) -> Any:
    """A coefficient, or a function with such a keyword, at this share of the run."""
    if isinstance(value, Cosine):
        return value.at(progress)
    if isinstance(value, partial) and any(isinstance(v, Cosine) for v in value.keywords.values()):
        return partial(value.func, *value.args, **{k: at(v, progress) for k, v in value.keywords.items()})
    return value


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

# iBOT (Zhou et al., 2022), shared head as in every released run (the CLI's default is Patch(head="prototypes")).
ibot = dino.but(paper="2111.07832", n_prototypes=8192, patch=Patch())
ibot_vmf = ibot.but(paper="2405.10939", score=scores.vmf, targets=(ProbabilityCenter,))

# Mean-entropy maximization in the place of centering (PPC, section 6). Neither its weight nor its code is published:
# 1 is MSN's, and patches get the same term as crops.
ibot_vmf_me = (
    ibot_vmf.but(paper="2410.14060", targets=())
    .plus(-1.0, mean_entropy, on="probabilities")
    .plus(-1.0, mean_entropy, on="patch probabilities")
)

# SwAV (Caron et al., 2020) with the queue of its runs at batch 256; the released 800-epoch run, at batch 4096, is
# .but(queue=None). Targets are the student's own codes, each crop's through Sinkhorn alone, at temperature 0.05.
swav = Method(
    paper="2006.09882", n_prototypes=3000, score=scores.dot, targets=(Sinkhorn,), teacher_temp=Warmup(0.05, 0.05),
    ema=None, shared_prototypes=True, renormalize=True, joint_targets=False, queue=Queue(3840, epoch=15),
    views=Views(2, 6, (0.14, 1.0), (0.05, 0.14), colors="swav"),
)  # fmt: skip

# MSN (Assran et al., 2022): one unmasked target crop, one large anchor with patches taken away (0.15 for ViT-S, 0.7 for
# ViT-B/4), ten small ones. Sharpening p^(1/0.25) at temperature 0.1 is the temperature 0.025. The released config runs
# Sinkhorn on the sharpened probabilities, which the paper leaves out: .but(targets=()).
msn = Method(
    paper="2204.07141", n_prototypes=1024, targets=(Normalize, Sinkhorn), teacher_temp=Warmup(0.025, 0.025),
    shared_prototypes=True, joint_projector=False, mask_student=0.15,
    views=Views(2, 10, (0.3, 1.0), (0.05, 0.3), n_targets=1, colors="msn"),
    regularizers=((-1.0, mean_entropy, "probabilities"),),
)  # fmt: skip

# PMSN (Assran et al., 2023), for which no code was released: KL(mean || power law), in the papers' direction. PPC
# weighs it by 5 on iNaturalist.
pmsn = msn.but(paper="2210.07277", regularizers=((1.0, partial(power_law_matching, exponent=0.25), "probabilities"),))

# DINOv2 (Oquab et al., 2023) as its large models were trained. The repository's default, vitl16_short, is
# .but(n_prototypes=65536, targets=(Center,), patch=replace(dinov2.patch, head="shared"), ema=0.992). Its epochs are
# 1250 steps, so warm-ups in passes over the data depend on the batch (PAPER_RUNS converts them).
dinov2 = ibot.but(
    paper="2304.07193", n_prototypes=131072, score=scores.dot, targets=(Sinkhorn,), ema=0.994,
    views=Views(2, 8, (0.32, 1.0), (0.05, 0.32)),
    patch=Patch(stratified=True, min_area=4, targets_from="masked", head="own"),
).plus(0.1, koleo, on="features")  # fmt: skip

# SimDINO (Wu et al., 2025): alignment - gamma R on averaged codes, the released code's loss plus 1. eps^2 = 0.05.
# The paper takes the student's codes alone: on="codes". The released run is on 8 GPUs without all-reduce:
# partial(expansion, eps=0.05**0.5, groups=8). Without self-distillation (Sim, Table 8): .but(ema=0.0, ema_end=0.0).
simdino = Method(paper="2502.10385", n_prototypes=0, targets=(), views=Views(2, 10, (0.4, 1.0), (0.05, 0.4))).plus(
    -1.0, partial(expansion, eps=0.05**0.5), on="averaged codes"
)
simdinov2 = simdino.but(ema=0.9, patch=Patch(stratified=True, min_area=4, targets_from="masked"))

METHODS: dict[str, Method] = {"dino": dino, "dino-vmf": dino_vmf, "ibot": ibot, "ibot-vmf": ibot_vmf}
for _name, _method in list(METHODS.items()):
    # KoLeo on the data (DINOv2) and on the prototypes (PPC, section 6.1); lambda = 0.1 in both
    METHODS[f"{_name}-kd"] = _method.plus(0.1, koleo, on="features")
    METHODS[f"{_name}-kp"] = _method.plus(0.1, koleo, on="prototypes")
METHODS |= {"ibot-vmf-me": ibot_vmf_me, "swav": swav, "msn": msn, "pmsn": pmsn}
METHODS |= {"dinov2": dinov2, "simdino": simdino, "simdinov2": simdinov2}
