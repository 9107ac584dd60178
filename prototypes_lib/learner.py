"""One training step for the whole family. It asks what a method has (prototypes, patch term, teacher), never its name.

Order of a step, as in the official code: targets from the teacher with the centers of the steps before, loss, then
(in `train`) optimizer and EMA.
"""

import contextlib
import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prototypes_lib import ranks
from prototypes_lib.assignment import Chain
from prototypes_lib.backbones import Backbone
from prototypes_lib.blockwise import LogScores, cross_entropy, cross_entropy_of_views, entropies, largest
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.methods import Method, at
from prototypes_lib.objectives import alignment, over_views
from prototypes_lib.precision import wide
from prototypes_lib.scores import Affine, affine


class Network(nn.Module):
    """Backbone, projector and, where the method has them, prototypes; patches may have either of their own."""

    def __init__(
        self,
        backbone: Backbone,
        projector: Projector,
        prototypes: Prototypes | None,
        patch_projector: Projector | None = None,
        patch_prototypes: Prototypes | None = None,
    ):
        super().__init__()
        self.backbone, self.projector, self.prototypes = backbone, projector, prototypes
        self.patch_projector, self.patch_prototypes = patch_projector, patch_prototypes


@dataclass(frozen=True)
class Step:
    """A step's loss (to differentiate), its parts, and meters: all 0-d tensors, read them when you can wait.

    Meters of a method with prototypes, in nats and of all ranks' rows: teacher_entropy, the mean entropy of the
    targets; kl, the image term minus it; marginal_entropy, the entropy of the mean target; score_max, the largest
    |<w, y>| / temperature of the student. Looked at together with them: codes, the teacher's of this rank's target
    crops, and target, the mean of all ranks' targets.
    """

    loss: Float[Tensor, ""]
    parts: dict[str, Tensor]
    meters: dict[str, Tensor]
    codes: Float[Tensor, "n dim"] | None = None
    target: Float[Tensor, " k"] | None = None


class Learner(nn.Module):
    """Student, teacher, the chains of target links and the queue of one method.

    The teacher starts as a copy of the student, never gets a gradient, and follows it by `update_teacher`; with
    `method.ema=None` it is the student itself. Both stay in train mode, as DINO's do (DINOv2's teacher is in eval mode,
    which differs only where a network has BatchNorm).

    Raises: ValueError where the network lacks what the method needs.
    """

    def __init__(self, method: Method, student: Network):
        super().__init__()
        self.method = method
        _check(method, student)
        if student.backbone.mask_token is not None:
            student.backbone.mask_token.requires_grad_(method.patch is not None)
        self.student = student
        self.teacher = student if method.ema is None else copy.deepcopy(student).requires_grad_(False)
        if method.ema is not None:
            _without_drop_path(self.teacher)
        if method.shared_prototypes:
            self.teacher.prototypes = self.student.prototypes
            self.teacher.patch_prototypes = self.student.patch_prototypes
        self.chain = Chain(method.targets, method.n_prototypes)
        self.patch_chain = Chain(method.targets, method.n_prototypes) if method.patch else None
        self.queue = _Past(method, student.prototypes) if method.queue else None

    def forward(
        self,
        views: list[Tensor],
        masks: Bool[Tensor, "*crops gh gw"] | None,
        teacher_temp: float,
        progress: float = 0.0,
        epoch: float = math.inf,
        meters: bool = True,
    ) -> Step:
        """Loss of one batch, or of this rank's rows of one: then the mean of the ranks' losses is the batch's.

        Args:
            views: [global 1, global 2, local 1, ...], each (batch, 3, size, size).
            masks: True where the student sees nothing: of each global crop in order (crops, gh, gw) for a patch term,
                one (gh, gw) of patches to take away from all of them for `mask_student`.
            teacher_temp: this step's temperature of the targets.
            progress: share of the run behind this step, in [0, 1]. epoch: passes over the data behind it.
            meters: whether to compute them; they look through all targets once more.
        """
        method = self.method
        n_global, n_targets, first = method.views.n_global, method.views.n_targets, method.first_view
        if masks is None and (method.patch or method.mask_student):
            raise ValueError("this method hides patches from the student: pass masks")
        for network in (self.student, self.teacher):
            for prototypes in (network.prototypes, network.patch_prototypes):
                if prototypes is not None:
                    prototypes.renormalize()
        masked = masks.flatten(1) if method.patch else None
        # without a teacher, targets are this very pass's codes where the student sees their crops whole
        own = method.ema is None and not (first or method.patch or method.mask_student)
        if not own:
            t_codes, t_patches, seen = self._teacher_codes(torch.cat(views[:n_targets]), masked)

        globals_, locals_ = torch.cat(views[first:n_global]) if first < n_global else None, views[n_global:]
        crops, patches = [], None
        if globals_ is not None:
            features, patches = self.student.backbone(globals_, **_hiding(method, masks))
            crops.append(features)
        if locals_:
            crops.append(self.student.backbone(torch.cat(locals_))[0])
        hidden = patches[masked] if method.patch else None
        codes, patch_codes = _projected(self.student, crops, hidden, method.joint_projector)
        if own:
            t_codes = codes[: n_targets * len(views[0])].detach()

        w = self.student.prototypes.w if method.n_prototypes else None
        image, measured, target = self._image_term(codes, w, t_codes, teacher_temp, epoch, meters)
        parts = {"image": image}
        loss = at(method.image_weight, progress) * image
        w_patch = w
        if method.patch is not None:
            if self.student.patch_prototypes is not None:
                w_patch = self.student.patch_prototypes.w
            parts["patch"] = self._patch_term(patch_codes, w_patch, t_patches, masked, seen, teacher_temp)
            loss = loss + at(method.patch.weight, progress) * parts["patch"]

        def probabilities(of: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:  # as a whole matrix, unlike the loss
            return (torch.softmax(method.score(of, prototypes, method.student_temp), dim=-1),)

        n_crops = n_global - first
        n = n_crops * len(views[0])
        places = {
            "features": lambda: crops[0].chunk(n_crops),
            "codes": lambda: codes[:n].chunk(n_crops),
            "averaged codes": lambda: (0.5 * (codes[:n] + t_codes)).chunk(n_crops),
            "prototypes": lambda: (w,),
            "probabilities": lambda: probabilities(codes, w),
            "patch probabilities": lambda: probabilities(patch_codes, w_patch),
        }
        for weight, function, place in method.regularizers:
            # prototypes are the same on all ranks, rows are each rank's own
            with ranks.alone() if place == "prototypes" else contextlib.nullcontext():
                term, found = at(function, progress), places[place]()
                empty = place == "patch probabilities" and not ranks.count(len(patch_codes))  # no patch is masked
                values = [] if empty else [term(x) for x in found]
            value = sum(values, start=loss.new_zeros(())) / (1 if place == "features" else max(len(values), 1))
            name = f"{getattr(function, 'func', function).__name__} on {place}"
            parts[name] = parts[name] + value if name in parts else value
            loss = loss + at(weight, progress) * value
        seen = (t_codes, target) if meters else ()
        return Step(loss, {k: v.detach() for k, v in parts.items()}, measured, *seen)

    @torch.no_grad()
    def _teacher_codes(self, crops: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The teacher's codes of the target crops, of their patches, and which patches these are."""
        features, patches = self.teacher.backbone(crops)
        seen = masked
        if masked is not None and self.method.patch.targets_from == "all":
            seen = torch.ones_like(masked)
        codes, patch_codes = _projected(self.teacher, [features], None if seen is None else patches[seen], joint=True)
        return codes, patch_codes, seen

    def _image_term(
        self, codes: Tensor, w: Tensor | None, t_codes: Tensor, temperature: float, epoch: float, meters: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Cross-entropy or alignment of all pairs of views, the meters of its targets, and their mean."""
        method, first, n_targets = self.method, self.method.first_view, self.method.views.n_targets
        batch = len(t_codes) // n_targets
        predictions, t_codes = codes.unflatten(0, (-1, batch)), t_codes.unflatten(0, (n_targets, batch))
        if w is None:
            return over_views(alignment, t_codes, list(predictions), first), {}, None
        groups = t_codes[None] if method.joint_targets else t_codes[:, None]
        image, measured, target = self._loss_of_views(predictions, w, groups, temperature, epoch, meters)
        if meters:
            measured["kl"] = ranks.total(image.detach()) / ranks.world() - measured["teacher_entropy"]
        return image, measured, target

    def _loss_of_views(
        self, predictions: Tensor, w: Tensor, groups: Tensor, temperature: float, epoch: float, meters: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The image term with prototypes; each group of targets, (views, batch, dim), passes the links by itself."""
        method = self.method
        with torch.no_grad():
            teacher = affine(method.score, self.teacher.prototypes.w.detach(), temperature)
            targets = []
            for i, group in enumerate(groups):
                rows = group.flatten(0, 1) if self.queue is None else self.queue(i, group, epoch)
                scores = _targets(self.chain, rows, teacher, temperature)
                targets.append(scores.only(slice(group.shape[0] * group.shape[1])))
        student = affine(method.score, w, method.student_temp)
        measured, target = {}, None
        if meters:
            measured["teacher_entropy"], measured["marginal_entropy"], target = entropies(targets)
            rows = wide(student.scale * predictions.detach()).flatten(0, 1)
            measured["score_max"] = largest(LogScores(rows, wide(student.slopes.detach())))
        image = cross_entropy_of_views(
            student.scale * predictions, student.slopes, student.offsets, targets, method.first_view
        )
        return image, measured, target

    def _patch_term(
        self, codes: Tensor, w: Tensor | None, t_codes: Tensor, masked: Tensor, seen: Tensor, temperature: float
    ) -> Tensor:
        """Same crop, masked places: per image the mean over them, images without any as zero (iBOT's code)."""
        per_image = masked.sum(1, keepdim=True).clamp_min(1).to(codes.dtype)
        weight = (1 / (per_image * len(masked))).expand(masked.shape)[masked]
        of_masked = masked[seen]
        if w is None:
            return alignment(t_codes[of_masked], codes, weight)
        with torch.no_grad():
            prototypes = self.teacher.patch_prototypes or self.teacher.prototypes
            teacher = affine(self.method.score, prototypes.w.detach(), temperature)
            targets = _targets(self.patch_chain, t_codes, teacher, temperature).only(of_masked)
        student = affine(self.method.score, w, self.method.student_temp)
        codes = student.scale * codes
        toward = weight[:, None] * codes
        return cross_entropy(codes, weight, toward, weight, student.slopes, student.offsets, [targets])

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """theta_t <- m theta_t + (1 - m) theta_s over parameters; buffers (BatchNorm) are the teacher's own."""
        if self.method.ema is None:
            return
        teacher, student = _followed(self.teacher, self.student)
        torch._foreach_lerp_(teacher, student, 1 - momentum)


class _Past(nn.Module):
    """The newest codes of each target view, in buffers so that a checkpoint holds them."""

    def __init__(self, method: Method, prototypes: Prototypes):
        super().__init__()
        self.epoch = method.queue.epoch
        n_queues = 1 if method.joint_targets else method.views.n_targets
        self.register_buffer("codes", torch.zeros(n_queues, method.queue.length, prototypes.weight_v.shape[1]))
        self.register_buffer("filled", torch.zeros(n_queues, dtype=torch.long))

    def forward(self, i: int, codes: Tensor, epoch: float) -> Tensor:
        """Codes (views, batch, dim) as rows, then, once the queue is full, the ones before them; remembers these.

        All ranks hold the same queue; each adds its share of it to its own rows.
        """
        rows = codes.flatten(0, 1)
        if epoch < self.epoch:
            return rows
        past, length = self.codes[i].to(codes.dtype), len(self.codes[i])
        if int(self.filled[i]) >= length:
            rows = torch.cat([rows, past.tensor_split(ranks.world())[ranks.rank()]])
        if self.training:
            new = ranks.rows(codes.transpose(0, 1)).transpose(0, 1).flatten(0, 1)
            self.codes[i] = torch.cat([new, past])[:length]
            self.filled[i] += len(new)
        return rows


def _check(method: Method, network: Network) -> None:
    head = method.patch.head if method.patch else "shared"
    lacks = {
        "prototypes": method.n_prototypes and network.prototypes is None,
        "patch_prototypes": method.n_prototypes and head != "shared" and network.patch_prototypes is None,
        "patch_projector": head == "own" and network.patch_projector is None,
    }
    for name, missing in lacks.items():
        if missing:
            raise ValueError(f"the method needs {name}, which the network does not have")
    if (method.patch or method.mask_student) and network.backbone.mask_token is None:
        raise ValueError(
            f"{network.backbone.name} cannot hide patches from the student, which this method does; "
            "take a vision transformer (vit_*), or .but(mask_student=0.0, patch=None)"
        )


def _hiding(method: Method, masks: Tensor | None) -> dict[str, Tensor]:
    """What the student's backbone is told about hidden patches: replace them (patch term) or leave them out."""
    if method.patch is not None:
        return {"mask": masks}
    if method.mask_student:
        return {"keep": torch.nonzero(~masks.flatten())[:, 0]}
    return {}


def _projected(
    network: Network, crops: list[Tensor], hidden: Tensor | None, joint: bool
) -> tuple[Tensor, Tensor | None]:
    """Codes of crops, and of patches where there are any: one call where they share the projector, because BatchNorm,
    where there is one, sees them together; not `joint`: crops of each size apart."""
    shared = joint and hidden is not None and network.patch_projector is None
    groups = [torch.cat([*crops, hidden] if shared else crops)] if joint else crops
    codes = torch.cat([network.projector(group) for group in groups])
    if hidden is None:
        return codes, None
    if shared:
        return codes.tensor_split([sum(map(len, crops))])
    return codes, (network.patch_projector or network.projector)(hidden)


def _targets(chain: Chain, codes: Tensor, teacher: Affine, temperature: float) -> LogScores:
    """Scores whose softmax is the target, through the links."""
    scores = LogScores(teacher.scale * wide(codes), teacher.slopes, teacher.offsets)
    log_normalizer = teacher.slopes.new_zeros(scores.k) if teacher.offsets is None else teacher.offsets
    return chain.shift(scores, temperature, log_normalizer)


def _followed(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t is not s]
    return [t for t, _ in pairs], [s for _, s in pairs]


def _without_drop_path(network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
