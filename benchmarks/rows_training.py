"""Rows of speed.py: a training step, what is around it (clipping, optimizer, teacher), crops, a checkpoint."""

import atexit
import copy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peers import autocast, version
from timing import OURS, Goal, Row, agree
from torch import Tensor, nn

from prototypes_lib import checkpoints
from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Learner, Network
from prototypes_lib.methods import METHODS
from prototypes_lib.optimizers import clip_gradients, make_optimizer
from prototypes_lib.settings import Run

LR, MOMENTUM, CLIP, TAU_TEACHER = 1e-3, 0.996, 3.0, 0.04


class DirectHead(nn.Module):
    """The published DINO head in plain torch: an MLP, a unit code, unit prototypes."""

    def __init__(self, dim: int, hidden: int, code: int, k: int):
        super().__init__()
        layers = (nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, code))
        self.mlp = nn.Sequential(*layers)
        self.weight_v = nn.Parameter(torch.empty(k, code))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.weight_v, dim=-1))


class Direct:
    """The same step written down with timm and plain torch: a forward pass a resolution, then head and loss at once."""

    def __init__(self, ours: Learner, name: str, run: Run, low: bool, compiled: bool):
        network, k = ours.student, ours.method.n_prototypes
        self.vit = timm.create_model(name, img_size=run.image_size, dynamic_img_size=True, num_classes=0)
        self.vit.load_state_dict(network.backbone.vit.state_dict())
        self.head = DirectHead(network.backbone.dim, run.hidden, run.bottleneck, k)
        self.head.mlp.load_state_dict(network.projector.mlp.state_dict())
        self.head.weight_v.data.copy_(network.prototypes.weight_v)
        device = next(network.parameters()).device
        self.student = nn.ModuleList([self.vit, self.head]).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.center, self.low, self.device = torch.zeros(k, device=device), low, device.type
        decay = [p for p in self.student.parameters() if p.ndim > 1]
        plain = [p for p in self.student.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.04}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
        self.forward = torch.compile(self._forward) if compiled else self._forward

    def _forward(self, network: nn.ModuleList, groups: list[Tensor]) -> Tensor:
        vit, head = network
        return head(torch.cat([vit(x) for x in groups])).float()

    def step(self, views: list[Tensor]) -> Tensor:
        b = len(views[0])
        with autocast(self.device, self.low):
            with torch.no_grad():
                t = self.forward(self.teacher, [torch.cat(views[:2])])
                q = F.softmax((t - self.center) / TAU_TEACHER, dim=-1).view(2, b, -1)
            groups = [torch.cat(views[:2]), *([torch.cat(views[2:])] if len(views) > 2 else [])]
            log_p = F.log_softmax(self.forward(self.student, groups) / 0.1, dim=-1).view(len(views), b, -1)
        others = torch.stack([q[1], q[0], *[q.sum(0)] * (len(views) - 2)])  # the sum over pairs, as it is linear in q
        loss = -(others * log_p).sum() / ((2 * len(views) - 2) * b)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [(CLIP / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
        self.optimizer.step()
        with torch.no_grad():
            self.center.lerp_(t.mean(0), 0.1)
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - MOMENTUM)
        return loss.detach()


def _learner(name: str, run: Run, k: int, method: str, device: str) -> Learner:
    torch.manual_seed(0)
    method = METHODS[method].but(n_prototypes=k)
    backbone = Backbone(name, run.image_size)
    network = Network(
        backbone, Projector(backbone.dim, run.hidden, run.bottleneck), Prototypes(k, run.bottleneck, method.free_norms)
    )
    return Learner(method, network).to(device)


def _ours(learner: Learner, run: Run, low: bool) -> Callable[[list[Tensor]], Tensor]:
    optimizer = make_optimizer(learner.student, run)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = LR, 0.04 * group["decays"]

    def step(views: list[Tensor]) -> Tensor:
        with autocast(next(learner.parameters()).device.type, low):
            loss = learner(views, None, TAU_TEACHER, meters=False).loss
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(learner.student, run)
        optimizer.step()
        learner.update_teacher(MOMENTUM)
        return loss.detach()

    return step


def training_step(size: str, device: str) -> Row:
    """One DINO step on crops that are there: both networks, loss, gradients, clipping, AdamW, center, teacher."""
    name, b, (n_local, side, local), k = {
        "small": ("vit_tiny_patch16_224", 2, (2, 32, 16), 64),
        "cpu": ("vit_tiny_patch16_224", 16, (8, 96, 48), 4096),
        "gpu": ("vit_small_patch16_224", 128, (10, 224, 96), 65536),
    }[size]
    run = Run(backbone=name, image_size=side, local_size=local, clip_grad=CLIP, hidden=512 if size != "gpu" else 2048)
    low = device != "cpu"
    draw = torch.Generator().manual_seed(0)
    sides = [side] * 2 + [local] * n_local
    views = [torch.randn(b, 3, s, s, generator=draw).to(device) for s in sides]
    learner = _learner(name, run, k, "dino", device)
    direct = Direct(learner, name, run, low, compiled=False)
    ours = _ours(learner, run, low)
    peers = {f"{version('timm')}, written directly": lambda: [direct.step(views)]}
    if low:
        built = Direct(learner, name, run, low, compiled=True)
        peers[f"{version('timm')}, written directly, compiled"] = lambda: [built.step(views)]

    def check(answers: dict[str, Any]) -> None:
        agree("first loss", answers, 2e-2 if low else 1e-5)
        if not low:
            for _ in range(2):
                agree("later losses", {OURS: [ours(views)], "direct": [direct.step(views)]}, 1e-3)

    return Row(
        "training step", training_step.__doc__,
        {"backbone": name, "images": b, "crops": f"2 x {side} + {n_local} x {local}", "K": k},
        lambda: [ours(views)], peers, check, tuple(Goal(peer, 1.0, 1.0) for peer in peers),
        limit="the network is timm's on both sides and takes nearly all of the time",
    )  # fmt: skip


def around_the_step(size: str, device: str) -> Row:
    """Clipping, AdamW and the teacher's average on gradients that are there ("everything else" of a step)."""
    name = "vit_pico_patch8" if size == "small" else "vit_small_patch16_224"
    k = {"small": 64, "cpu": 8192, "gpu": 65536}[size]
    run = Run(backbone=name, image_size=32 if size == "small" else 224, clip_grad=CLIP)
    learner = _learner(name, run, k, "dino", device)
    twin = copy.deepcopy(learner)
    for network in (learner.student, twin.student):
        draw = torch.Generator().manual_seed(1)
        for p in network.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=draw).to(device)
    optimizer = make_optimizer(learner.student, run)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-6, 0.04 * group["decays"]
    trained = [(n, p) for n, p in twin.student.named_parameters() if p.requires_grad]
    decays = [p for n, p in trained if p.ndim > 1 and not n.endswith("bias")]
    others = [p for n, p in trained if not (p.ndim > 1 and not n.endswith("bias"))]
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    own = torch.optim.AdamW(groups, lr=1e-6, weight_decay=0.04, foreach=False)
    first: dict[str, list[Tensor]] = {}

    def ours() -> list[Tensor]:
        clip_gradients(learner.student, run)
        optimizer.step()
        learner.update_teacher(MOMENTUM)
        return first.setdefault("ours", [p.detach().clone() for p in learner.teacher.parameters()])

    def loops() -> list[Tensor]:
        """The released code's way: a loop over parameters each for norms, optimizer and average."""
        for p in twin.student.parameters():
            if p.grad is not None:
                factor = CLIP / (p.grad.norm(2) + 1e-6)
                if factor < 1:
                    p.grad.mul_(factor)
        own.step()
        with torch.no_grad():
            for t, s in zip(twin.teacher.parameters(), twin.student.parameters(), strict=True):
                t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)
        return first.setdefault("loops", [p.detach().clone() for p in twin.teacher.parameters()])

    return Row(
        "around the step", around_the_step.__doc__, {"backbone": name, "K": k}, ours, {"loops over parameters": loops},
        lambda a: agree("around the step", a, 1e-6), (Goal("loops over parameters", 0.2 if device != "cpu" else None),),
        limit="on a CPU each weight is read and written from memory either way; launches are what a GPU saves",
    )  # fmt: skip


def multi_crop(size: str, device: str) -> Row | None:
    """DINO's views of decoded images."""
    if not find_spec("multicrop_peers"):
        return None
    import multicrop_peers as crops

    setting, (ours, peers, same) = list(crops.cases(small=size == "small").items())[-1 if size == "small" else 0]
    atexit.register(crops.close)
    goals = {"Pillow, 2 workers": Goal("Pillow, 2 workers", 1 / 1.5)}
    if "kornia" in peers:
        peers[version("kornia")] = peers.pop("kornia")
        goals["kornia"] = Goal(version("kornia"), 1.0)
    return Row(
        "multi-crop", multi_crop.__doc__, {"views": setting}, ours, peers, lambda _: same(), tuple(goals.values()),
        memory=None, once=True, limit="two workers of Pillow have the same two cores",
    )  # fmt: skip


def checkpoint(size: str, device: str) -> Row:
    """How long a save stops the training: ours is flushed, summed, verified and renamed, torch.save is none of it."""
    name, k = ("vit_pico_patch8", 64) if size == "small" else ("vit_small_patch16_224", 8192)
    run = Run(backbone=name, image_size=32 if size == "small" else 224)
    learner = _learner(name, run, k, "dino", device)
    optimizer = make_optimizer(learner.student, run)
    for p in learner.student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    steps = iter(range(1, 10**6))

    def ours() -> list[Tensor]:
        step = next(steps)
        checkpoints.save(folder, learner, optimizer, {"step": step, "hash": "speed"})
        return [p.detach() for p in learner.parameters()]

    def plain() -> list[Tensor]:
        torch.save({"model": learner.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")
        read = torch.load(folder / "plain.pt", weights_only=True)["model"] if next(steps) < 3 else None
        return [read[n].to(device) if read else p.detach() for n, p in learner.named_parameters()]

    def check(answers: dict[str, Any]) -> None:
        agree("checkpoint", answers, 0.0)
        found = copy.deepcopy(learner)
        for p in found.parameters():
            p.data.zero_()
        checkpoints.load(folder, checkpoints.steps(folder)[-1], found)
        agree("checkpoint", {OURS: list(found.parameters()), "kept": list(learner.parameters())}, 0.0, ("kept",))

    return Row(
        "checkpoint", checkpoint.__doc__, {"backbone": name, "K": k}, ours, {"torch.save": plain}, check,
        (Goal("torch.save", 0.3),), memory=None, once=True,
        limit="the save is not in the background: it returns when the bytes are on the disk and were read back",
    )  # fmt: skip


ROWS = {
    "training-step": training_step, "around-the-step": around_the_step, "multi-crop": multi_crop,
    "checkpoint": checkpoint,
}  # fmt: skip
