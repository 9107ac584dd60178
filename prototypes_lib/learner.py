"""One training step for the whole family. It asks what a method has (prototypes, patch term, teacher), never its name.

Order of a step, as in the official code: targets from the teacher with the centers of the steps before, loss, then
(in `train`) optimizer and EMA.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prototypes_lib.assignment import Chain
from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.methods import Method
from prototypes_lib.objectives import alignment, cross_entropy, entropy, over_views


class Network(nn.Module):
    """Backbone, projector and, where the method has them, prototypes."""

    def __init__(self, backbone: Backbone, projector: Projector, prototypes: Prototypes | None):
        super().__init__()
        self.backbone, self.projector, self.prototypes = backbone, projector, prototypes


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
    """Student, teacher and the chains of target links of one method.

    The teacher starts as a copy of the student, never gets a gradient, and follows it by `update_teacher`; with
    `method.ema=None` it is the student itself. Both stay in train mode, as DINO's do.
    """

    def __init__(self, method: Method, student: Network):
        super().__init__()
        self.method = method
        student.backbone.mask_token.requires_grad_(method.patch is not None)
        self.student = student
        self.teacher = student if method.ema is None else copy.deepcopy(student).requires_grad_(False)
        if method.ema is not None:
            _without_drop_path(self.teacher)
        if method.shared_prototypes:
            self.teacher.prototypes = self.student.prototypes
        self.chain = Chain(method.targets, method.n_prototypes)
        self.patch_chain = Chain(method.targets, method.n_prototypes) if method.patch else None

    def forward(self, views: list[Tensor], masks: Bool[Tensor, "crops gh gw"] | None, teacher_temp: float) -> Step:
        """Loss of one batch.

        Args:
            views: [global 1, global 2, local 1, ...], each (batch, 3, size, size).
            masks: for methods with a patch term, of all global crops in order, True where the student sees nothing.
            teacher_temp: this step's temperature of the targets.
        """
        method, n_global = self.method, self.method.views.n_global
        globals_, locals_ = torch.cat(views[:n_global]), views[n_global:]

        with torch.no_grad():
            t_features, t_patches = self.teacher.backbone(globals_)
            t_codes = self.teacher.projector(t_features)
            targets, meters = self._targets(t_codes, teacher_temp)

        features, patches = self.student.backbone(globals_, masks if method.patch else None)
        crops = [features] + ([self.student.backbone(torch.cat(locals_))[0]] if locals_ else [])
        hidden = patches[masks.flatten(1)] if method.patch else features[:0]
        # one call for crops and masked patches: BatchNorm, where there is one, sees them together
        n_crops = sum(map(len, crops))
        codes, patch_codes = self.student.projector(torch.cat([*crops, hidden])).tensor_split([n_crops])
        predictions = self._score(codes)
        objective = cross_entropy if method.n_prototypes else alignment
        image = over_views(objective, targets.unflatten(0, (n_global, -1)), list(predictions.chunk(len(views))))

        parts = {"image": image}
        if method.n_prototypes:
            meters["kl"] = image.detach() - meters["teacher_entropy"]
        if method.patch is not None:
            parts["patch"] = self._patch_term(patch_codes, t_patches, masks, teacher_temp)
        loss = image + (method.patch.weight * parts["patch"] if method.patch else 0.0)
        n = len(features)
        places = {
            "features": lambda: features.chunk(n_global),
            "codes": lambda: codes[:n].chunk(n_global),
            "averaged codes": lambda: (0.5 * (codes[:n] + t_codes)).chunk(n_global),
            "prototypes": lambda: (self.student.prototypes.w,),
            "probabilities": lambda: (torch.softmax(predictions, dim=-1),),
        }
        for weight, function, place in method.regularizers:
            values = [function(x) for x in places[place]()]
            value = sum(values) if place == "features" else sum(values) / len(values)
            name = f"{getattr(function, 'func', function).__name__} on {place}"
            parts[name] = value
            loss = loss + weight * value
        return Step(loss, {k: v.detach() for k, v in parts.items()}, meters)

    def _score(self, codes: Tensor) -> Tensor:
        """The student's prediction: log-scores, or the codes themselves where there are no prototypes."""
        if not self.method.n_prototypes:
            return codes
        return self.method.score(codes, self.student.prototypes.w, self.method.student_temp)

    def _targets(self, t_codes: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.method.n_prototypes:
            return t_codes, {}
        targets = self.chain(self.method.score(t_codes, self.teacher.prototypes.w, temperature), temperature).exp()
        meters = {"teacher_entropy": entropy(targets).mean(), "marginal_entropy": entropy(targets.mean(0))}
        return targets, meters

    def _patch_term(self, codes: Tensor, t_patches: Tensor, masks: Tensor, temperature: float) -> Tensor:
        """Same crop, masked places: per image the mean over them, images without any as zero (iBOT's code)."""
        masked = masks.flatten(1)
        prediction = self._score(codes)
        per_image = masked.sum(1, keepdim=True).clamp_min(1).to(prediction.dtype)
        weight = (masked / (per_image * len(masked)))[masked]
        with torch.no_grad():
            t_codes = self.teacher.projector(t_patches.flatten(0, 1))
            if not self.method.n_prototypes:
                return alignment(t_codes[masked.flatten()], prediction, weight)
            log_scores = self.method.score(t_codes, self.teacher.prototypes.w, temperature)
            targets = self.patch_chain(log_scores, temperature)[masked.flatten()].exp()
        return cross_entropy(targets, prediction, weight)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """theta_t <- m theta_t + (1 - m) theta_s over parameters; buffers (BatchNorm) are the teacher's own."""
        if self.method.ema is None:
            return
        teacher, student = _followed(self.teacher, self.student)
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def _followed(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t is not s]
    return [t for t, _ in pairs], [s for _, s in pairs]


def _without_drop_path(network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
