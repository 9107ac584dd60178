"""Rows of speed.py: losses against many prototypes, from codes to gradients, and Sinkhorn."""

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from peers import autocast, version
from timing import OURS, Goal, Row, agree, gradients
from torch import Tensor

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Chain, Sinkhorn
from prototypes_lib.blockwise import LogScores, cross_entropy, cross_entropy_of_views

TAU, TAU_TEACHER = 0.1, 0.04


def unit(*shape: int, seed: int, device: str) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(device)


def _targets(chain: Chain, codes: Tensor, w: Tensor) -> LogScores:
    """DINO's targets; in the first step, whose answers are compared, the center is still zero."""
    teacher = scores.affine(scores.cosine, w, TAU_TEACHER)
    return chain.shift(LogScores(teacher.scale * codes, teacher.slopes, teacher.offsets), TAU_TEACHER)


def _last_layer(k: int, dim: int, w: Tensor) -> torch.nn.Module:
    """lightly's weight-normed last layer, with these directions."""
    from lightly.models.modules import DINOProjectionHead

    layer = DINOProjectionHead(dim, 8, dim, k).last_layer.to(w.device)
    layer.weight_v.data.copy_(w)
    return layer


def _precisions(function: Callable, device: str, *modules: torch.nn.Module) -> dict[str, Callable]:
    """lightly's settings: float32, and on a GPU bfloat16 autocast, its own recommendation."""
    modules, name = [m.to(device) for m in modules], version("lightly")
    found = {name: partial(function, False, *modules)}
    return found | ({f"{name}, bf16": partial(function, True, *modules)} if device != "cpu" else {})


def _check(name: str, answers: dict[str, Any]) -> None:
    """Gradients of all to 1e-4 of the largest (bfloat16: 5 %), values to 1 %: lightly sums millions in float32."""
    for other in answers:
        (value, *mine), (theirs, *grads) = answers[OURS], answers[other]
        low = "bf16" in other
        agree(f"{name}, gradients", {OURS: mine, other: grads}, 0.05 if low else 1e-4)
        exact = other in (OURS, "loop over pairs", "plain formula")
        agree(f"{name}, value", {OURS: [value], other: [theirs]}, 1e-5 if exact else 0.01)


def _values(answers: dict[str, Any]) -> dict[str, Any]:
    loss = float(answers[OURS][0])
    return {"value differs from ours by": {n: abs(float(a[0]) / loss - 1) for n, a in answers.items() if n != OURS}}


def prototype_loss(size: str, device: str) -> Row:
    """DINO's loss of 2 global and 10 local crops, from codes to the gradients of codes and prototypes."""
    b, k, dim, views = {"small": (4, 500, 32, 4), "cpu": (256, 65536, 256, 12), "gpu": (1024, 65536, 256, 12)}[size]
    student, teacher = (unit(n, b, dim, seed=s, device=device) for s, n in enumerate((views, 2)))
    w, w_teacher = (unit(k, dim, seed=s, device=device) for s in (2, 3))
    chain = Chain((Center,), k).to(device)

    def ours() -> list[Tensor]:
        with torch.no_grad():
            targets = _targets(chain, teacher.flatten(0, 1), w_teacher)

        def loss(y: Tensor, v: Tensor) -> Tensor:
            score = scores.affine(scores.cosine, v, TAU)
            return cross_entropy_of_views(score.scale * y, score.slopes, score.offsets, [targets])

        return gradients(loss, student.requires_grad_(), w.requires_grad_())

    def loop() -> list[Tensor]:
        """The published algorithm as a loop over pairs of views: each forms a product of K numbers a sample."""
        with torch.no_grad():
            q = F.softmax(F.linear(teacher, w_teacher) / TAU_TEACHER, dim=-1)

        def loss(y: Tensor, v: Tensor) -> Tensor:
            logits, total, pairs = F.linear(y, F.normalize(v, dim=-1)) / TAU, 0.0, 0
            for i, target in enumerate(q):
                for j, prediction in enumerate(logits):
                    if i != j:
                        total = total - (target * F.log_softmax(prediction, dim=-1)).sum(-1).mean()
                        pairs += 1
            return total / pairs

        return gradients(loss, student.requires_grad_(), w.requires_grad_())

    def lightly(low: bool, layer: torch.nn.Module, fixed: torch.nn.Module, loss_fn: torch.nn.Module) -> list[Tensor]:
        y = student.detach().requires_grad_()
        with autocast(device, low):
            with torch.no_grad():
                t = fixed(teacher)
            value = loss_fn(list(t), list(layer(y)), teacher_temp=TAU_TEACHER)
        return [value.detach(), *torch.autograd.grad(value, (y, layer.weight_v))]

    def chunked() -> list[Tensor]:
        """torch's own: targets of all pairs summed, logits in pieces."""
        with torch.no_grad():
            q = F.softmax(F.linear(teacher, w_teacher) / TAU_TEACHER, dim=-1)
            target = torch.stack([q[1], q[0], *[q.sum(0)] * (views - 2)]).flatten(0, 1)

        def loss(y: Tensor, v: Tensor) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            inputs, slopes = y.flatten(0, 1) / TAU, F.normalize(v, dim=-1)
            value = F.linear_cross_entropy(inputs, slopes, target, reduction="sum", options=options)
            return value / ((2 * views - 2) * b)

        return gradients(loss, student.requires_grad_(), w.requires_grad_())

    peers = {"loop over pairs": loop}
    if find_spec("lightly"):
        from lightly.loss import DINOLoss

        peers |= _precisions(lightly, device, _last_layer(k, dim, w), _last_layer(k, dim, w_teacher), DINOLoss(k))
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers["F.linear_cross_entropy"] = chunked
    rows = views * b
    return Row(
        "prototype loss", prototype_loss.__doc__, {"images": b, "crops": views, "K": k, "dim": dim}, ours, peers,
        partial(_check, "prototype loss"),
        tuple(Goal(name, 0.35, 0.1) for name in peers if name.startswith("lightly")),
        work=2.0 * k * dim * (3 * rows + 3 * 2 * b), notes=_values,
        limit="three products of the size of the logits are needed by all; what can be saved is traffic and exponents",
    )  # fmt: skip


def patch_loss(size: str, device: str) -> Row:
    """iBOT's loss of masked patches, from codes to the gradients of codes and prototypes."""
    b, grid, k, dim = {"small": (3, 4, 300, 32), "cpu": (64, 14, 8192, 256), "gpu": (1024, 14, 8192, 256)}[size]
    masks = torch.rand(b, grid, grid, generator=torch.Generator().manual_seed(0)).to(device) < 0.3
    n = int(masks.sum())
    student, teacher = (unit(n, dim, seed=s, device=device) for s in (1, 2))
    w, w_teacher = (unit(k, dim, seed=s, device=device) for s in (3, 4))
    chain = Chain((Center,), k).to(device)
    weight = (1 / masks.sum((1, 2), keepdim=True).clamp_min(1) / b).expand(masks.shape)[masks]

    def ours() -> list[Tensor]:
        with torch.no_grad():
            targets = _targets(chain, teacher, w_teacher)

        def loss(y: Tensor, v: Tensor) -> Tensor:
            score = scores.affine(scores.cosine, v, TAU)
            y = score.scale * y
            return cross_entropy(y, weight, weight[:, None] * y, weight, score.slopes, score.offsets, [targets])

        return gradients(loss, student.requires_grad_(), w.requires_grad_())

    def plain() -> list[Tensor]:
        def loss(y: Tensor, v: Tensor) -> Tensor:
            with torch.no_grad():
                q = F.softmax(F.linear(teacher, w_teacher) / TAU_TEACHER, dim=-1)
            log_p = F.log_softmax(F.linear(y, F.normalize(v, dim=-1)) / TAU, dim=-1)
            return -(weight * (q * log_p).sum(-1)).sum()

        return gradients(loss, student.requires_grad_(), w.requires_grad_())

    def lightly(low: bool, layer: torch.nn.Module, fixed: torch.nn.Module, loss_fn: torch.nn.Module) -> list[Tensor]:
        y = student.detach().requires_grad_()
        with autocast(device, low):
            with torch.no_grad():
                t = fixed(teacher)
            value = loss_fn(t, layer(y), masks, teacher_temp=TAU_TEACHER)
        return [value.detach(), *torch.autograd.grad(value, (y, layer.weight_v))]

    peers = {"plain formula": plain}
    if find_spec("lightly"):
        from lightly.loss import IBOTPatchLoss

        peers |= _precisions(lightly, device, _last_layer(k, dim, w), _last_layer(k, dim, w_teacher), IBOTPatchLoss(k))
    return Row(
        "patch loss", patch_loss.__doc__, {"images": b, "masked patches": n, "K": k, "dim": dim}, ours, peers,
        partial(_check, "patch loss"),
        tuple(Goal(name, 0.4, 0.1) for name in peers if name.startswith("lightly")),
        work=2.0 * k * dim * 6 * n, notes=_values,
        limit="a patch has one target, so the target's barycentre and its gradient are two products lightly's form has "
        "not: on a CPU products are what it costs; memory has a floor in the gradient of the prototypes",
    )  # fmt: skip


def sinkhorn(size: str, device: str) -> Row:
    """Three Sinkhorn steps from scores to targets; and on what share of other inputs the targets are finite."""
    b, k = {"small": (16, 50), "cpu": (512, 16384), "gpu": (2048, 65536)}[size]
    draw = torch.Generator().manual_seed(0)
    codes, w = torch.randn(b, 64, generator=draw), torch.randn(k, 64, generator=draw)
    cosines = F.linear(F.normalize(codes, dim=-1), F.normalize(w, dim=-1)).to(device)

    def ours(x: Tensor = cosines, tau: float = 0.05) -> list[Tensor]:
        return [Sinkhorn(3)(x / tau).exp()]

    def loop(x: Tensor = cosines, tau: float = 0.05) -> list[Tensor]:
        """SwAV's published steps, typed as they are printed: exp, then rows and columns in turn."""
        q = torch.exp(x / tau).T
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / len(q)
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        return [(q * q.shape[1]).T]

    peers = {"published steps": loop}
    if find_spec("lightly"):
        from lightly.loss import capi_loss, swav_loss

        def swav(x: Tensor = cosines, tau: float = 0.05) -> list[Tensor]:
            return [swav_loss.sinkhorn(x, 3, tau)]

        def capi(x: Tensor = cosines, tau: float = 0.05) -> list[Tensor]:
            return [capi_loss.sinkhorn_knopp((x / tau)[:, None], 3)[:, 0]]

        peers |= {f"{version('lightly')} (SwAV)": swav, f"{version('lightly')} (CAPI)": capi}

    def finite(_: dict[str, Any]) -> dict[str, Any]:
        """Scores of all temperatures and lengths of prototypes, duplicates, a sample alone."""
        shares = {}
        for name, function in {OURS: ours, **peers}.items():
            good = 0
            for seed in range(50):
                g = torch.Generator().manual_seed(seed)
                x = torch.randn(1 + seed % 7, 40, generator=g) * 10 ** (seed % 5 - 2)
                q = function(x.to(device), 10 ** -(seed % 4))[0]
                good += bool(torch.isfinite(q).all() and ((q.sum(1) - 1).abs() < 1e-3).all())
            shares[name] = good / 50
        return {"finite and of mass one on": shares}

    return Row(
        "Sinkhorn", sinkhorn.__doc__, {"samples": b, "K": k}, ours, peers,
        lambda a: agree("Sinkhorn", a, 1e-3, tuple(n for n in peers if "CAPI" not in n)),
        tuple(Goal(name, 0.35) for name in peers if "SwAV" in name), notes=finite,
        limit="the log domain, which makes it finite on every input, takes an exponential a step and entry; the peers "
        "take one in all",
    )  # fmt: skip


def log_normalizer(size: str, device: str) -> Row:
    """log C_p of each of K concentrations with its derivative, in float64."""
    import numpy as np
    from scipy.special import ive

    from prototypes_lib.vmf import log_normalizer as ours_log_c

    k, dim = {"small": (100, 64), "cpu": (65536, 256), "gpu": (65536, 256)}[size]
    kappa = torch.logspace(0, 3, k, dtype=torch.float64, device=device)
    nu, at = dim / 2 - 1, kappa.cpu().numpy()

    def ours() -> list[Tensor]:
        return gradients(lambda x: ours_log_c(x, dim).sum(), kappa.requires_grad_())

    def scipy() -> list[Tensor]:
        i = ive(nu, at)
        value = nu * np.log(at) - (np.log(i) + at) - dim / 2 * math.log(2 * math.pi)
        return [torch.tensor(value.sum()), torch.from_numpy(-ive(nu + 1, at) / i)]

    def check(answers: dict[str, Any]) -> None:
        import mpmath

        agree("log C_p", {name: [x.detach().cpu() for x in a] for name, a in answers.items()}, 1e-12)
        with mpmath.workdps(40):
            for x in (1.0, 37.5, 1000.0):
                log_i = mpmath.log(mpmath.besseli(nu, x))
                exact = float(nu * mpmath.log(x) - log_i - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi))
                got = float(ours_log_c(torch.tensor([x], dtype=torch.float64, device=device), dim)[0].cpu())
                assert abs(got - exact) <= 1e-12 * abs(exact), f"log C_{dim}({x}): {got} is not {exact}"

    name = version("scipy")
    return Row(
        "log C_p", log_normalizer.__doc__, {"K": k, "p": dim}, ours, {f"{name} ive": scipy}, check,
        (Goal(f"{name} ive", 0.01 if device != "cpu" else 0.2),), memory=None,
        limit="one thread of scipy stands against many small operations of torch, each of which a busy machine delays",
    )  # fmt: skip


ROWS = {
    "prototype-loss": prototype_loss, "patch-loss": patch_loss, "sinkhorn": sinkhorn, "log-normalizer": log_normalizer,
}  # fmt: skip
