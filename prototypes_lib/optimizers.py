"""The optimizer of a run over groups of parameters, and the clipping of gradients."""

import torch
from timm.optim import Lars
from torch import Tensor, nn

from prototypes_lib.settings import Run


def make_optimizer(student: nn.Module, run: Run) -> torch.optim.Optimizer:
    """The run's optimizer, still without learning rate and weight decay, which every step sets.

    A group carries what its step needs: `lr_factor` of the learning rate, `decays`, the factor of the weight decay,
    and `prototypes`, whether it holds them. Factors:

    * decay 0 for biases and one-dimensional parameters, 1 for all else (tokens, positions, prototype lengths too), as
      DINO; prototypes times `prototype_weight_decay`;
    * learning rate layer_decay ** (n_layers + 1 - layer) in the backbone, its patch embedding times `patch_embed_lr`
      (DINOv2); prototypes `prototype_lr_factor`.

    "lars" and "larc" are SGD with momentum 0.9 and the local rate 0.001 |p| / (|g| + decay |p|): "lars" leaves biases
    and one-dimensional parameters at plain SGD (DINO's ResNet-50, whose code has |g + decay p| below the line), "larc"
    adapts and decays them like all else (SwAV).
    """
    groups: dict[tuple[float, float, bool, bool], list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        prototypes = _is_prototypes(name)
        matrix = run.optimizer == "larc" or not (name.endswith(".bias") or parameter.ndim == 1)
        decays = float(matrix) * (run.prototype_weight_decay if prototypes else 1.0)
        factor = run.prototype_lr_factor if prototypes else _layer_factor(student, name, run)
        groups.setdefault((factor, decays, prototypes, matrix), []).append(parameter)
    described = [
        {"params": p, "lr_factor": factor, "decays": decays, "prototypes": prototypes, "always_adapt": matrix}
        for (factor, decays, prototypes, matrix), p in groups.items()
    ]
    if run.optimizer == "adamw":
        return torch.optim.AdamW(described, lr=0.0, weight_decay=0.0, fused=True)  # always_adapt is for Lars alone
    return Lars(described, lr=0.0, weight_decay=0.0, momentum=0.9, trust_coeff=0.001)


def clip_gradients(student: nn.Module, run: Run) -> None:
    """Shrink gradients to `run.clip_grad`, if longer: by min(1, clip_grad / (norm + 1e-6)), in place.

    The norm is of each tensor (`run.clip` "tensor": DINO), of each of backbone, head and patch head ("module":
    DINOv2), or of everything ("global": MSN). With `clip_prototypes=False` prototypes stay out of it.
    """
    if not run.clip_grad:
        return
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and (run.clip_prototypes or not _is_prototypes(name)):
            parts.setdefault(_part(name) if run.clip == "module" else "all", []).append(parameter.grad)
    for gradients in parts.values():
        norms = torch._foreach_norm(gradients)
        if run.clip != "tensor":
            norms = [torch.linalg.vector_norm(torch.stack(norms))] * len(gradients)
        scale = [(run.clip_grad / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, scale)


def _is_prototypes(name: str) -> bool:
    return name.startswith(("prototypes.", "patch_prototypes."))


def _part(name: str) -> str:
    """Backbone, head (projector and prototypes), or patch head, which has its own of both."""
    if name.startswith("backbone."):
        return "backbone"
    return "patch head" if name.startswith("patch_") else "head"


def _layer_factor(student: nn.Module, name: str, run: Run) -> float:
    if (run.layer_decay == 1 and run.patch_embed_lr == 1) or not name.startswith("backbone."):
        return 1.0
    inside = name.removeprefix("backbone.")
    factor = run.layer_decay ** (student.backbone.n_layers + 1 - student.backbone.layer_of(inside))
    return factor * run.patch_embed_lr if "patch_embed." in inside else factor
