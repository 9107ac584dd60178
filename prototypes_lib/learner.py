"""One training step for the whole family. It asks what a method has (prototypes, patch term, teacher), never its name.

Order of a step, as in the official code: targets from the teacher with the centers of the steps before, loss, then
(in `train`) optimizer and EMA.
"""

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prototypes_lib.assignment import Chain
from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.methods import Method, at
from prototypes_lib.objectives import alignment, cross_entropy, entropy, over_views


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

    Meters of a method with prototypes, in nats: teacher_entropy, the mean entropy of the targets; kl, the image term
    minus it; marginal_entropy, the entropy of the mean target.
    """

    loss: Float[Tensor, ""]
    parts: dict[str, Tensor]
    meters: dict[str, Tensor]


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
    ) -> Step:
        """Loss of one batch.

        Args:
            views: [global 1, global 2, local 1, ...], each (batch, 3, size, size).
            masks: True where the student sees nothing: of each global crop in order (crops, gh, gw) for a patch term,
                one (gh, gw) of patches to take away from all of them for `mask_student`.
            teacher_temp: this step's temperature of the targets.
            progress: share of the run behind this step, in [0, 1]. epoch: passes over the data behind it.
        """
        method = self.method
        n_global, n_targets, first = method.views.n_global, method.views.n_targets, method.first_view
        if masks is None and (method.patch or method.mask_student):
            raise ValueError("this method hides patches from the student: pass masks")
        for network in (self.student, self.teacher):
            for prototypes in (network.prototypes, network.patch_prototypes):
                if prototypes is not None:
                    prototypes.renormalize()
        # without a teacher, targets are this very pass's codes where the student sees their crops whole
        own = method.ema is None and not (first or method.patch or method.mask_student)
        if not own:
            t_codes, t_patches = self._teacher_codes(torch.cat(views[:n_targets]))

        globals_, locals_ = torch.cat(views[first:n_global]) if first < n_global else None, views[n_global:]
        crops, patches = [], None
        if globals_ is not None:
            features, patches = self.student.backbone(globals_, **_hiding(method, masks))
            crops.append(features)
        if locals_:
            crops.append(self.student.backbone(torch.cat(locals_))[0])
        hidden = patches[masks.flatten(1)] if method.patch else crops[0][:0]
        codes, patch_codes = self._student_codes(crops, hidden)
        if own:
            t_codes, t_patches = codes[: n_targets * len(views[0])].detach(), None
        targets, meters = self._targets(t_codes.unflatten(0, (n_targets, -1)), teacher_temp, epoch)
        predictions = self._score(codes, self.student.prototypes)
        objective = cross_entropy if method.n_prototypes else alignment
        image = over_views(objective, targets, list(predictions.chunk(len(views) - first)), first)

        parts, patch_predictions = {"image": image}, None
        if method.n_prototypes:
            meters["kl"] = image.detach() - meters["teacher_entropy"]
        loss = at(method.image_weight, progress) * image
        if method.patch is not None:
            patch_predictions = self._score(patch_codes, self.student.patch_prototypes or self.student.prototypes)
            parts["patch"] = self._patch_term(patch_predictions, t_patches, masks, teacher_temp)
            loss = loss + at(method.patch.weight, progress) * parts["patch"]
        n_crops = n_global - first
        n = n_crops * len(views[0])
        places = {
            "features": lambda: crops[0].chunk(n_crops),
            "codes": lambda: codes[:n].chunk(n_crops),
            "averaged codes": lambda: (0.5 * (codes[:n] + t_codes)).chunk(n_crops),
            "prototypes": lambda: (self.student.prototypes.w,),
            "probabilities": lambda: (torch.softmax(predictions, dim=-1),),
            "patch probabilities": lambda: (torch.softmax(patch_predictions, dim=-1),),
        }
        for weight, function, place in method.regularizers:
            values = [at(function, progress)(x) for x in places[place]() if len(x)]
            value = sum(values, start=loss.new_zeros(())) / (1 if place == "features" else max(len(values), 1))
            name = f"{getattr(function, 'func', function).__name__} on {place}"
            parts[name] = parts[name] + value if name in parts else value
            loss = loss + at(weight, progress) * value
        return Step(loss, {k: v.detach() for k, v in parts.items()}, meters)

    @torch.no_grad()
    def _teacher_codes(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        features, patches = self.teacher.backbone(crops)
        return self.teacher.projector(features), patches

    def _student_codes(self, crops: list[Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of crops and of masked patches: one call where they share the projector, because BatchNorm, where
        there is one, sees them together (it needs two rows: an own patch head with one masked patch has not)."""
        own, projector = self.student.patch_projector, self.student.projector
        if own is not None or not self.method.joint_projector:
            groups = [torch.cat(crops)] if self.method.joint_projector else crops
            patch_codes = (own or projector)(hidden) if self.method.patch else hidden
            return torch.cat([projector(group) for group in groups]), patch_codes
        n_crops = sum(map(len, crops))
        codes, patch_codes = self.student.projector(torch.cat([*crops, hidden])).tensor_split([n_crops])
        return codes, patch_codes

    def _score(self, codes: Tensor, prototypes: Prototypes | None) -> Tensor:
        """The student's prediction: log-scores, or the codes themselves where there are no prototypes."""
        if prototypes is None:
            return codes
        return self.method.score(codes, prototypes.w, self.method.student_temp)

    @torch.no_grad()
    def _targets(self, t_codes: Tensor, temperature: float, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Targets (views, batch, K), through the links together or a view at a time."""
        if not self.method.n_prototypes:
            return t_codes, {}
        groups = t_codes.flatten(0, 1)[None] if self.method.joint_targets else t_codes
        found = []
        for i, group in enumerate(groups):
            rows = group if self.queue is None else self.queue(i, group, epoch)
            found.append(self._assign(self.chain, rows, self.teacher.prototypes, temperature)[: len(group)])
        targets = torch.cat(found)
        meters = {"teacher_entropy": entropy(targets).mean(), "marginal_entropy": entropy(targets.mean(0))}
        return targets.unflatten(0, t_codes.shape[:2]), meters

    def _assign(self, chain: Chain, codes: Tensor, prototypes: Prototypes, temperature: float) -> Tensor:
        w, origin = prototypes.w, None
        if any(getattr(link, "literal", False) for link in chain.links):
            origin = self.method.score(torch.zeros_like(w[:1]), w, temperature)[0]  # <w, 0> = 0 leaves log C_p
        return chain(self.method.score(codes, w, temperature), temperature, origin).exp()

    def _patch_term(self, prediction: Tensor, t_patches: Tensor, masks: Tensor, temperature: float) -> Tensor:
        """Same crop, masked places: per image the mean over them, images without any as zero (iBOT's code)."""
        masked, method = masks.flatten(1), self.method
        per_image = masked.sum(1, keepdim=True).clamp_min(1).to(prediction.dtype)
        weight = (masked / (per_image * len(masked)))[masked]
        with torch.no_grad():
            seen = torch.ones_like(masked) if method.patch.targets_from == "all" else masked
            targets = (self.teacher.patch_projector or self.teacher.projector)(t_patches[seen])
            if method.n_prototypes:
                prototypes = self.teacher.patch_prototypes or self.teacher.prototypes
                targets = self._assign(self.patch_chain, targets, prototypes, temperature)
        objective = cross_entropy if method.n_prototypes else alignment
        return objective(targets[masked[seen]], prediction, weight)

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
        """These codes, then, once the queue is full, the ones before them; remembers these."""
        if epoch < self.epoch:
            return codes
        past, length = self.codes[i].to(codes.dtype), len(self.codes[i])
        rows = torch.cat([codes, past]) if int(self.filled[i]) >= length else codes
        if self.training:
            self.codes[i] = torch.cat([codes, past])[:length]
            self.filled[i] += len(codes)
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


def _followed(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t is not s]
    return [t for t, _ in pairs], [s for _, s in pairs]


def _without_drop_path(network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
