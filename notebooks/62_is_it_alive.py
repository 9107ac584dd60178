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
# **Claim.** The failures of DINO that people report most are named by `collapse.Meter`, three lines in anyone's loop,
# within 200 steps: a loss that stands at ln K, one class for all images, a teacher that never moves or is the student,
# prototypes that become copies, a run about to overflow. The same run without a mistake is not accused. The loss names
# none of them: it is lowest where the collapse is complete, and falls while prototypes merge.
#
# **Papers.** None: the claim is about a tool. Why a loss stands at ln K is notebook 14, why prototypes merge notebook 16
# and (PPC, Definition 4.1). **Before this:** those two. **Cost:** about a minute on one CPU core, most of it training.
#
# **Deviations.** The loss, the head and K = 4096 are lightly's and the reports'; images (CIFAR-10 at half its size), the
# network (one convolution) and batches are tiny. Chosen by looking at outcomes, so that each failure happens in the time
# shown: the size of each mistake, the EMA momentum, the number of steps. Two mistakes got help: without its center the
# run collapses sooner when pixels are not normalized, and *partial* is a time-lapse, prototypes at 300 times the rate and
# a blunter student, which does in tens of steps what takes epochs. The meter's thresholds were chosen on other runs
# (`tests/failing_runs.py`), where it is tested on 20 seeds of each failure; three seeds here are a picture, no rate.

# %% tags=["parameters"] nbmake={"mock": {"n_prototypes": 64, "steps": 12, "n_seeds": 1, "check": false}}
n_prototypes: int = 4096  # K
steps: int = 160  # optimizer steps of a run
every: int = 10  # steps between two rows of the meter
n_seeds: int = 3  # seeds of every run; the first goes on to the end, the others until they are named
batch: int = 32  # images a step, two views of each
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/
check: bool = True  # assert what the runs show

# %%
import json
import math
import warnings
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from prototypes_lib import collapse, course, figures, heads, objectives
from prototypes_lib.data import load

# %% [markdown]
# ## 1. Three lines in lightly's loop
#
# Where lightly is installed its `DINOLoss` and `DINOProjectionHead` are what runs below (importing them calls no
# network). Elsewhere these twins run, the same equations, checked against lightly's where both are there.


# %%
class TwinHead(nn.Module):
    def __init__(self, dim, hidden, p, k):
        super().__init__()
        self.layers, self.last_layer = heads.Projector(dim, hidden, p), heads.Prototypes(k, p, free_norms=False)

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
warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")  # in lightly's head
figures.use_style(), torch.set_num_threads(1)  # the network is small: threads would wait for each other
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
original, twin, g = DINOLoss(16), TwinLoss(16), torch.Generator().manual_seed(0)
for out in torch.randn(3, 4, 8, 16, generator=g):  # three steps, as the center moves
    a, b = (f([*out[:2]], [*out[2:]]).item() for f in (original, twin))
    assert abs(a - b) < 1e-5 * a, f"{b:.6f}: the twin should be {a:.6f}, lightly's loss, its moving center included"

# %% [markdown]
# Small networks, random views, and every setting that people get wrong, right. The teacher is a network of its own that
# starts with the student's weights. (`copy.deepcopy` refuses lightly's head for its weight normalization, see
# pytorch/pytorch, issue 28594: a temptation to assign instead.)

# %%
pixels = torch.from_numpy(load(data, "train", image_size=32, progress=False).pixels)
pixels = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 2)  # 0 to 255, as files have them
normalized = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
RIGHT = {"teacher_temp": 0.04, "student_temp": 0.1, "center_momentum": 0.9, "momentum": 0.99, "lr": 1e-3,
         "gamma": 1.0, "prototypes_lr": 1.0, "ema": True, "copied": True, "images": normalized}  # fmt: skip


def view(x):
    """Shifted by up to 2 pixels, half of them mirrored, other contrast and color."""
    n, side = len(x), torch.arange(16)
    top, left = torch.randint(5, (2, n, 1, 1))
    columns = torch.where(torch.rand(n, 1, 1) < 0.5, left + side, left + side.flip(0))
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")[torch.arange(n)[:, None, None], :, top + side[:, None], columns]
    return x.permute(0, 3, 1, 2) * (0.6 + 0.8 * torch.rand(n, 1, 1, 1)) + 0.3 * torch.randn(n, 3, 1, 1)


# %%
def network():
    layers = nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(512, 128), nn.GELU()
    head = DINOProjectionHead(128, 128, 64, n_prototypes)
    return nn.Sequential(OrderedDict(backbone=nn.Sequential(*layers), head=head))


def build(seed, s):
    torch.manual_seed(seed)
    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    loss_fn = DINOLoss(n_prototypes, **{name: s[name] for name in ("teacher_temp", "student_temp", "center_momentum")})
    rest = [*student.backbone.parameters(), *student.head.layers.parameters()]
    last = {"params": student.head.last_layer.parameters(), "lr": s["lr"] * s["prototypes_lr"]}
    optimizer = torch.optim.AdamW([{"params": rest}, last], lr=s["lr"])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, s["gamma"])
    return student, teacher.requires_grad_(False) if s["copied"] else student, loss_fn, optimizer, schedule


# %% [markdown]
# The loop. The meter is given the loss, the teacher's scores as the loss has them (centered, over the temperature), its
# prototypes and codes, and both networks; what it is not given it does not judge.


# %%
def train(seed, until_named=False, watched=True, steps=steps, **mistake):
    s, losses = RIGHT | mistake, []
    student, teacher, loss_fn, optimizer, schedule = build(seed, s)
    meter = collapse.Meter(every=every, m_every=2 * every, say=None)  # <- 1; say=print, the default, speaks at once
    while len(losses) < steps and math.isfinite(sum(losses[-1:])) and not (until_named and meter.findings):
        x = s["images"][torch.randint(len(normalized), (batch,))]
        views = torch.cat([view(x), view(x)])
        with torch.no_grad():
            z, codes = teacher(views), F.normalize(teacher.head.layers(teacher.backbone(views)), dim=-1)
        scores = (z - loss_fn.center[0]) / s["teacher_temp"]  # before the loss moves its center
        loss = loss_fn(z.chunk(2), student(views).chunk(2))
        optimizer.zero_grad(), loss.backward()
        if watched:  # <- 2
            prototypes = teacher.head.last_layer
            meter.update(loss, log_scores=scores, prototypes=prototypes, codes=codes, student=student, teacher=teacher)
        optimizer.step(), schedule.step(), losses.append(loss.item())
        if s["ema"]:
            update_momentum(student, teacher, s["momentum"])
    return losses, meter


# %%
losses, meter = train(0, steps=2 * every)
print(meter)  # <- 3
assert losses == train(0, steps=2 * every, watched=False)[0], "a meter must not change what it measures"

# %% [markdown]
# ## 2. The loss that stands at ln K
#
# facebookresearch/dino, issues 43 and 246, and dinov2, issue 407, ask about a loss that stands at 8.3178 or 11.0904, ln K.
# Two mistakes that lead there: temperatures swapped, so that targets are blurred, not sharpened; a rate far too high.
# $I = H(\bar p) - \overline{H(p)}$ is what a target tells about its image (notebook 14).

# %%
MISTAKES = {  # what was typed, and the kinds of finding that name it
    "no mistake": ({}, set()),
    "temperatures swapped": ({"teacher_temp": 0.1, "student_temp": 0.04}, {"uniform"}),
    "rate 50 times too high": ({"lr": 0.05}, {"uniform", "constant"}),
    "center never moves": ({"center_momentum": 1.0, "images": pixels}, {"one-hot"}),
    "EMA forgotten": ({"ema": False}, {"dead-teacher"}),
    "teacher = student": ({"copied": False}, {"shared-memory"}),
    "prototypes 300 times faster": ({"prototypes_lr": 300.0, "student_temp": 0.2}, {"partial"}),
    "rate grows 15 % a step": ({"gamma": 1.15}, {"diverging"}),
}
CONTROL, SWAPPED, FAST, CENTER, *_, COPIES, GROWS = MISTAKES
RUNS = {(name, seed): train(seed, until_named=seed > 0, **MISTAKES[name][0])
        for name in MISTAKES for seed in range(n_seeds)}  # fmt: skip


# %%
def series(name, *keys):
    """Steps and values of the rows of the first seed's run that have all the keys."""
    found = [row for row in RUNS[name, 0][1].rows if row.keys() >= set(keys)]
    return [[row[key] for row in found] for key in ("step", *keys)]


LN_K, STEPS, told = math.log(n_prototypes), range(1, steps + 1), {}
for name in (CONTROL, SWAPPED, FAST):
    (losses, meter), (t, *both) = RUNS[name, 0], series(name, "marginal_entropy", "teacher_entropy")
    told[name] = [m - h for m, h in zip(*both, strict=True)]
    print(f"\n{name}: loss {losses[-1]:.4f}, ln K = {LN_K:.4f}, I = {told[name][-1]:.4f}. The meter:", *meter.findings)
    sick = name != CONTROL
    assert not check or (abs(losses[-1] / LN_K - 1) < 0.01) == sick, (
        f"{name}: is {losses[-1]:.3f} the reports' plateau?"
    )
    assert not check or (told[name][-1] < 0.02 if sick else told[name][-1] > 0.5), f"{name}: what do its targets tell?"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4))
looks = (figures.GREEN, "o", 0), (figures.VERMILLION, "s", 8), (figures.ORANGE, "D", -15)
for (name, heard), (color, marker, place) in zip(told.items(), looks, strict=True):
    losses, meter = RUNS[name, 0]
    left.plot(STEPS, losses, color=color, lw=1.2, label=name)
    right.plot(t, [max(i, 1e-5) for i in heard], marker=marker, color=color)
    for finding in meter.findings[:1]:
        at = finding.step, losses[finding.step - 1]
        left.plot(*at, "v", color=color, mec=figures.BLACK, ms=8, zorder=3)
        left.annotate(f"“{finding.kind}”", at, (0, place), textcoords="offset points", ha="center")
left.axhline(LN_K, color=figures.BLACK, ls="--", lw=1, label=f"ln K = {LN_K:.4f}")
left.set(xlabel="step", ylabel="loss, nats", title="The loss", ylim=(0, 1.35 * LN_K)), left.legend(loc="lower left")
right.set(xlabel="step", ylabel="$I$, nats", title="What a target tells about its image", yscale="log")
figures.show(fig, alt="Two mistakes bring the loss to ln K, from above and from below; their targets tell a hundredfold "
             "less about images than those of the run without a mistake. Triangles: named by the meter.")  # fmt: skip

# %% [markdown]
# **Reading.** Two losses end on one plateau; on its way there one of them looks like learning. Right, nothing is
# ambiguous. The meter (triangles) waits 60 steps before it speaks, because healthy runs may start at $\ln K$, too.
# *Constant* is one target for all images that is not $1/K$ yet; the center takes it there (notebook 14, section 5).
#
# ## 3. The others: what the loss shows, and what the meter says


# %%
def panel(ax, name):
    for seed in reversed(range(n_seeds)):
        y, color = [x / LN_K for x in RUNS[name, seed][0]], figures.SKY if seed else figures.BLUE
        ax.plot(STEPS[: len(y)], y, color=color, lw=1, label="_" if seed else "loss / ln K (light: other seeds)")
    (t, *both), (t_m, m) = series(name, "teacher_entropy", "marginal_entropy"), series(name, "M")
    low, high = ([x / LN_K for x in entropies] for entropies in both)
    ax.fill_between(
        t, low, high, color=figures.GREEN, alpha=0.35, lw=0, label="I / ln K, from teacher to marginal entropy"
    )
    ax.plot(t, low, color=figures.ROLE["teacher"], label="teacher entropy / ln K")
    ax.plot(t_m, [x / n_prototypes for x in m], ":", color=figures.ROLE["prototypes"], lw=2, label="M / K")
    for i, finding in enumerate(RUNS[name, 0][1].findings):
        side = "right" if finding.step > (0.5 if i == 0 else 0.7) * steps else "left"
        ax.axvline(finding.step, color=figures.BLACK, lw=1)
        ax.text(finding.step, 1.36 - 0.14 * i, f" {finding.kind} ", ha=side, weight="bold")
    ax.axhline(1, color=figures.GRAY, ls="--", lw=0.8)
    ax.set(title=name, ylim=(-0.03, 1.5), xlim=(-4, steps + 4))


# %%
fig, axes = plt.subplots(2, 4, figsize=(10.4, 5), sharex=True, sharey=True)
for ax, name in zip(axes.flat, MISTAKES, strict=True):
    panel(ax, name)
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
fig.supxlabel("step; a black line: the meter named it", fontsize=9)
figures.show(fig, alt="Eight small panels of loss, teacher entropy, I and M over steps, with a line where the meter named the "
             "failure. The losses of most failing runs fall, or stand, as a healthy one's may.")  # fmt: skip

# %%
ends = {name: RUNS[name, 0][0][-1] for name in MISTAKES if name != GROWS}
print("by the last loss:", ", ".join(f"{name} {ends[name]:.3f}" for name in sorted(ends, key=ends.get)))
m = series(COPIES, "M")[1][-1]
assert not check or min(ends, key=ends.get) == CENTER, "one class for all images is the easiest thing to predict"
assert not check or (ends[COPIES] < ends[CONTROL] and 2 * m < n_prototypes), (
    f"M = {m:.0f}: the loss must not show copies"
)

# %% [markdown]
# **Reading.** Green is what targets tell about images; it is gone in four panels, whatever the loss does. Elsewhere
# another thing is wrong: a teacher that is never updated teaches its random start; M falls while the loss falls, too; a
# growing rate is named before the first NaN. By its last loss the most collapsed run would be called the best.
#
# ## 4. How many are found, how many accused

# %%
for name, (_, kinds) in MISTAKES.items():
    print(f"\n{name:28s}", end="")
    for losses, meter in (RUNS[name, seed] for seed in range(n_seeds)):
        found = meter.findings[0] if meter.findings else None
        print(f"{f'{found.kind} at {found.step}' if found else 'nothing':22s}", end="")
        assert not check or (found.kind if found else None) in (kinds or {None}), (
            f"{name} should be {kinds}, is {found}"
        )
        assert not check or not found or math.isfinite(losses[found.step - 1]), (
            f"{name}: a word that comes after the NaN"
        )

# %% [markdown]
# ## 5. In this library, and for runs that nobody watched
#
# `train` measures the same rows: they are lines of `metrics.jsonl` in the run folder, and `prototypes watch RUN` draws them
# in the terminal or, with `--html FILE`, as a page. `collapse.diagnose` is a function of such rows, which may be old.

# %%
for _, meter in RUNS.values():
    rows = [json.loads(json.dumps(row)) for row in meter.rows]
    later = [f for i in range(len(rows)) for f in collapse.diagnose(rows[: i + 1])]
    assert later[:1] == meter.findings[:1], f"{later[:1]}: rows from a file should say what they said at the time"
print(*(text for f in RUNS[COPIES, 0][1].findings for text in (f.text, *f.causes, *f.remedies)), sep="\n")

# %%
course.finish()
