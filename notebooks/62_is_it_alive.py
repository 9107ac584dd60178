# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is my DINO training alive? Ask the meter, not the loss
#
# **Claim.** The failures that people report of DINO are named by `collapse.Meter`, three lines in anyone's loop, within
# the first 200 steps: the loss that stands at ln K, one class for all images, a teacher that never moves or is the
# student, prototypes that become copies, a run about to overflow. The same run without the mistake is not accused. The
# loss alone names none of them: it is lowest where the collapse is complete, and falls while prototypes merge.
#
# **Papers.** None: the claim is about a tool. Why a loss stands at ln K is notebook 14; copies of prototypes are (PPC,
# Definition 4.1), the void set is (vMF, section 5.2). **Before this:** `14_loss_plateaus.py`,
# `16_collapse_on_the_circle.py`. **Cost:** about a minute on one CPU core, most of it real training.
#
# **Deviations.** The loss, the head and K = 4096 are lightly's and the reports'; images (CIFAR-10 at half its size), the
# network (one convolution) and batches are tiny, so that a failure which takes a night elsewhere takes seconds. Chosen
# by looking at outcomes: the size of each mistake (how high a rate, for instance), the EMA momentum and the number of
# steps, so that each failure happens in the time shown. *Partial* is a time-lapse: at 300 times the rate, prototypes do
# in 50 steps what takes them epochs. The meter's thresholds were chosen on other runs (`tests/failing_runs.py`).

# %% tags=["parameters"] nbmake={"mock": {"n_prototypes": 64, "steps": 12, "n_seeds": 1, "check": false}}
n_prototypes: int = 4096  # K
steps: int = 160  # optimizer steps of a run
every: int = 10  # steps between two rows of the meter
n_seeds: int = 3  # seeds of every run; the first is drawn
batch: int = 64  # images a step, two views of each
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/
check: bool = True  # assert what the runs show

# %%
import copy
import json
import math
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from prototypes_lib import collapse, course, figures, heads, objectives
from prototypes_lib.data import load

# %% [markdown]
# ## 1. Three lines in lightly's loop
#
# lightly's `DINOLoss` and `DINOProjectionHead` are what runs below, where lightly is installed (importing it calls no
# network). Elsewhere these twins run: the same equations, checked against lightly's where both are there.


# %%
class TwinHead(nn.Module):
    def __init__(self, dim, hidden, p, k, norm_last_layer=True):
        super().__init__()
        self.layers, self.last_layer = heads.Projector(dim, hidden, p), heads.Prototypes(k, p, not norm_last_layer)

    def forward(self, x):
        return self.layers(x) @ self.last_layer.w.T


class TwinLoss(nn.Module):
    def __init__(self, k, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.taus, self.m, self.center = (teacher_temp, student_temp), center_momentum, torch.zeros(1, 1, k)

    def forward(self, teacher_out, student_out):
        t, s = torch.stack(teacher_out), torch.stack(student_out)
        p = ((t - self.center) / self.taus[0]).softmax(-1)
        self.center = torch.lerp(t.mean((0, 1), keepdim=True), self.center, self.m)
        return objectives.cross_entropy(p, s.flip(0) / self.taus[1])


# %%
warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")  # lightly's head; harmless
figures.use_style()
torch.set_num_threads(1)  # the network is small
try:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
except ImportError:
    DINOLoss, DINOProjectionHead = TwinLoss, TwinHead

    def update_momentum(student, teacher, m):
        for ours, its in zip(student.parameters(), teacher.parameters(), strict=True):
            its.data.lerp_(ours.data, 1 - m)


print(f"what runs: {DINOLoss.__module__}.{DINOLoss.__name__}")
for loss_fn, twin in ((DINOLoss(16), TwinLoss(16)),) * 3:  # thrice the same pair, whose centers move
    out = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    a, b = loss_fn([*out[0]], [*out[1]]), twin([*out[0]], [*out[1]])
    assert abs(a - b) < 1e-5 * abs(a), f"{a:.6f}, {b:.6f}: the twin should be lightly's loss, its moving center included"

# %% [markdown]
# A small network, random views, and every setting that people get wrong, right. The teacher is a network of its own,
# which starts with the student's weights. That takes more than `copy.deepcopy`, see below: a temptation to assign.


# %%
class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        first = nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Flatten()
        self.backbone = nn.Sequential(*first, nn.Linear(512, 128), nn.GELU())
        self.head = DINOProjectionHead(128, 128, 64, n_prototypes, **options)

    def forward(self, x):
        return self.head(self.backbone(x))

    def codes(self, x):
        return F.normalize(self.head.layers(self.backbone(x)), dim=-1)


try:
    copy.deepcopy(Network())
except RuntimeError as error:
    print(f"copy.deepcopy(student): {str(error)[:97]}")

# %%
pixels = torch.from_numpy(load(data, "train", image_size=32, progress=False).pixels)
pixels = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 2)  # 0 to 255, as files have them
normalized = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
RIGHT = {"teacher_temp": 0.04, "student_temp": 0.1, "center_momentum": 0.9, "momentum": 0.99, "lr": 1e-3,
         "lr_growth": 1.0, "prototypes_lr": 1.0, "norm_last_layer": True, "ema": True, "copied": True,
         "images": normalized}  # fmt: skip


def view(x):
    """Shifted by up to 2 pixels, half of them mirrored, other contrast and color."""
    n, side = len(x), torch.arange(16)
    top, left = torch.randint(5, (2, n, 1, 1))
    columns = torch.where(torch.rand(n, 1, 1) < 0.5, left + side, left + side.flip(0))
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")[torch.arange(n)[:, None, None], :, top + side[:, None], columns]
    return x.permute(0, 3, 1, 2) * (0.6 + 0.8 * torch.rand(n, 1, 1, 1)) + 0.3 * torch.randn(n, 3, 1, 1)


# %%
def build(seed, s):
    torch.manual_seed(seed)
    student, teacher = (Network(norm_last_layer=s["norm_last_layer"]) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    loss_fn = DINOLoss(n_prototypes, **{name: s[name] for name in ("teacher_temp", "student_temp", "center_momentum")})
    last = student.head.last_layer
    rest = [*student.backbone.parameters(), *student.head.layers.parameters()]
    groups = [{"params": rest}, {"params": last.parameters(), "lr": s["lr"] * s["prototypes_lr"]}]
    optimizer = torch.optim.AdamW(groups, lr=s["lr"])
    return student, teacher.requires_grad_(False) if s["copied"] else student, loss_fn, optimizer


# %% [markdown]
# The loop. The meter is given the loss, the teacher's scores as the loss has them (centered, before the loss moves its
# center), the prototypes, the codes, and both networks. Functions are called only where a row is due.


# %%
def train(seed, until_named=False, watched=True, steps=steps, **mistake):
    s, losses = RIGHT | mistake, []
    student, teacher, loss_fn, optimizer = build(seed, s)
    meter = collapse.Meter(every=every, m_every=2 * every, say=None)  # <- 1; say=print, the default, speaks at once
    while len(losses) < steps and math.isfinite(sum(losses[-1:])) and not (until_named and meter.findings):
        x = s["images"][torch.randint(len(normalized), (batch,))]
        views, center = torch.cat([view(x), view(x)]), loss_fn.center[0].clone()
        with torch.no_grad():
            z = teacher(views)
        loss = loss_fn(z.chunk(2), student(views).chunk(2))
        optimizer.zero_grad(), loss.backward()
        if watched:  # <- 2
            meter.update(loss, log_scores=lambda: (z - center) / s["teacher_temp"], student=student, teacher=teacher,
                         prototypes=teacher.head.last_layer, codes=lambda: teacher.codes(views))  # fmt: skip
        optimizer.step(), losses.append(loss.item())
        if s["ema"]:
            update_momentum(student, teacher, s["momentum"])
        for group in optimizer.param_groups:
            group["lr"] *= s["lr_growth"]
    return losses, meter


# %%
losses, meter = train(0, steps=2 * every)
print(meter)  # <- 3
assert losses == train(0, steps=2 * every, watched=False)[0], "a meter that changes the training measures another one"

# %% [markdown]
# ## 2. The loss that stands at ln K
#
# facebookresearch/dino, issues 43 and 246, and dinov2, issue 407, ask about a loss that stands at 8.3178 or 11.0904. We
# train every mistake once to its end, and with other seeds until it is named. Two lead to that plateau: teacher and
# student temperature swapped, so that targets are blurred and not sharpened, and a rate that is far too high.

# %%
MISTAKES = {  # what was typed, and the kinds of finding that name it
    "no mistake": ({}, set()),
    "temperatures swapped": ({"teacher_temp": 0.1, "student_temp": 0.04}, {"uniform"}),
    "rate 20 times too high": ({"lr": 0.02}, {"uniform", "constant"}),
    "center never moves": ({"center_momentum": 1.0, "images": pixels}, {"one-hot"}),  # pixels as they are, too
    "EMA forgotten": ({"ema": False}, {"dead-teacher"}),
    "teacher = student": ({"copied": False}, {"shared-memory"}),
    "fast prototypes": ({"prototypes_lr": 300.0, "student_temp": 0.2}, {"partial"}),
    "rate grows each step": ({"lr_growth": 1.1, "norm_last_layer": False}, {"diverging"}),
}
RUNS = {(name, seed): train(seed, until_named=seed > 0, **wrong)
        for name, (wrong, _) in MISTAKES.items() for seed in range(n_seeds)}  # fmt: skip
CONTROL, *WRONG = MISTAKES
rows = lambda name, *keys: zip(*([r[key] for key in keys] for r in RUNS[name, 0][1].rows if set(keys) <= set(r)))
told = lambda name: [m - h for m, h in zip(*list(rows(name, "marginal_entropy", "teacher_entropy")))]
for name in WRONG[:2]:
    print(f"{name}: loss {RUNS[name, 0][0][-1]:.4f}", *RUNS[name, 0][1].findings, sep="\n  ")
    assert not check or abs(RUNS[name, 0][0][-1] - math.log(n_prototypes)) < 0.05, f"{name}: it does not stand at ln K"
    assert not check or max(told(name)[-3:]) < 0.01 < 0.5 < told(CONTROL)[-1], f"{name}: targets still tell images apart"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
looks = (figures.GREEN, "-", "o"), (figures.VERMILLION, "-", "s"), (figures.ORANGE, "--", "D")
for name, (color, style, marker) in zip((CONTROL, *WRONG[:2]), looks, strict=True):
    left.plot(range(1, steps + 1), RUNS[name, 0][0], style, color=color, lw=1.3, label=name)
    x, marginal, h = rows(name, "step", "marginal_entropy", "teacher_entropy")
    right.plot(x, [max(m - h, 1e-6) for m, h in zip(marginal, h, strict=True)], style, marker=marker, color=color)
    for finding in RUNS[name, 0][1].findings:
        left.plot(finding.step, RUNS[name, 0][0][finding.step - 1], "v", color=color, mec="k", ms=8)
        left.annotate(finding.kind, (finding.step, RUNS[name, 0][0][finding.step - 1]), (3, -14), textcoords="offset points", fontsize=8)
left.axhline(math.log(n_prototypes), color=figures.BLACK, ls="--", lw=1)
left.set(xlabel="step", ylabel="loss, nats", title="The loss: ", ylim=(0, 11))
right.set(xlabel="step", ylabel="$I$, nats", title="What a target tells about its image", yscale="log")
left.legend()
figures.show(fig, alt="x" * 30)

# %%
fig, axes = plt.subplots(2, 4, figsize=(10, 4.6), sharex=True, sharey=True)
for ax, name in zip(axes.flat, MISTAKES, strict=True):
    losses, meter = RUNS[name, 0]
    top = math.log(n_prototypes)
    ax.axhline(1, color=figures.GRAY, ls="--", lw=1)
    ax.plot(range(1, len(losses) + 1), [x / top for x in losses], color=figures.BLUE, lw=1)
    for key, color, style, scale in (("teacher_entropy", figures.ORANGE, "-", top), ("marginal_entropy", figures.GREEN, "-", top), ("M", figures.VERMILLION, ":", n_prototypes)):
        x, y = rows(name, "step", key)
        ax.plot(x, [v / scale for v in y], style, color=color, marker="o" if key == "M" else "", ms=3)
    for f in meter.findings:
        ax.axvline(f.step, color="k", lw=1)
        ax.text(f.step, 1.45, " " + f.kind, fontsize=8)
    ax.set(title=name, ylim=(-0.05, 1.5))
figures.show(fig, alt="x" * 30)
for (name, seed), (losses, meter) in RUNS.items():
    print(f"{name:25s} {seed} loss {losses[0]:.3f} {min(losses):.4f} {losses[-1]:.4f} n {len(losses)}", [(f.step, f.kind) for f in meter.findings])

# %%
course.finish()
