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
# **Papers.** None: the claim is about a tool. Why a loss stands at ln K is notebook 14, why prototypes merge notebook 16,
# (PPC, section 3). **Before this:** those two. **Cost:** about a minute on one CPU core, most of it training.
#
# **Deviations.** Loss, head and K are lightly's and the reports'; images (CIFAR-10 at half its size), network and batches
# are tiny. Chosen by looking, so that each failure happens in the time shown: which mistakes and how large, batch, EMA
# momentum, steps. Without centering, runs collapse sooner on pixels that are not normalized; *partial* is a time-lapse,
# with a blunter student, too. Three seeds are a picture, no rate:
# `tests/test_diagnosis.py` has 20 of each.

# %% tags=["parameters"] nbmake={"mock": {"n_prototypes": 64, "steps": 12, "n_seeds": 1, "check": false}}
n_prototypes: int = 4096  # K
steps: int = 160  # optimizer steps of a run
every: int = 10  # steps between two rows of the meter
n_seeds: int = 3  # seeds of every run; the first goes on to the end, the others until they are named
batch: int = 32  # images a step, two views of each
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/
check: bool = True  # assert what the runs show

# %%
import copy
import math
import warnings

import matplotlib.pyplot as plt
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum

from prototypes_lib import collapse, course, figures
from prototypes_lib.data import load

nn, F = torch.nn, torch.nn.functional
warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")  # in lightly's head
figures.use_style()
torch.set_num_threads(1)  # the networks are small: threads would wait for each other

# %% [markdown]
# ## 1. Three lines in lightly's loop
#
# Loss, head and EMA are lightly's; importing them calls no network. Views, a small network, and every setting that people
# get wrong, right: the learning rate, the images, how the teacher comes to be.

# %%
pixels = torch.from_numpy(load(data, "train", image_size=32, progress=False).pixels)
pixels = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 2)  # 0 to 255, as files have them
normalized = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
RIGHT = {"teacher_temp": 0.04, "student_temp": 0.1, "center_momentum": 0.9, "momentum": 0.98, "lr": 1e-3,
         "gamma": 1.0, "prototypes_lr": 1.0, "ema": True, "copied": True, "images": normalized}  # fmt: skip


def view(x):
    """Shifted by up to 2 pixels, half of them mirrored, other contrast and color."""
    n, side = len(x), torch.arange(16)
    top, left = torch.randint(5, (2, n, 1, 1))
    columns = torch.where(torch.rand(n, 1, 1) < 0.5, left + side, left + side.flip(0))
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")[torch.arange(n)[:, None, None], :, top + side[:, None], columns]
    return x.permute(0, 3, 1, 2) * (0.6 + 0.8 * torch.rand(n, 1, 1, 1)) + 0.3 * torch.randn(n, 3, 1, 1)


# %%
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(512, 128), nn.GELU()
        self.backbone = nn.Sequential(*layers)
        self.head = DINOProjectionHead(128, 128, 64, n_prototypes)

    def forward(self, x):
        return self.head(self.backbone(x))


try:
    copy.deepcopy(Network())
except RuntimeError as error:
    print(f"copy.deepcopy(student): {str(error)[:94]}")

# %% [markdown]
# So a teacher, which has to be a network of its own with the student's weights, is not to be had by `deepcopy` here
# (weight normalization keeps a computed tensor; pytorch/pytorch, issue 28594): a temptation to assign.


# %%
def build(seed, s):
    torch.manual_seed(seed)
    student, teacher = Network(), Network()
    teacher.load_state_dict(student.state_dict())
    loss_fn = DINOLoss(n_prototypes, **{name: s[name] for name in ("teacher_temp", "student_temp", "center_momentum")})
    rest = [*student.backbone.parameters(), *student.head.layers.parameters()]
    last = {"params": student.head.last_layer.parameters(), "lr": s["lr"] * s["prototypes_lr"]}
    optimizer = torch.optim.AdamW([{"params": rest}, last], lr=s["lr"])
    teacher = teacher.requires_grad_(False) if s["copied"] else student
    return student, teacher, loss_fn, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, s["gamma"])


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
            features = teacher.backbone(views)
            z, codes = teacher.head(features), F.normalize(teacher.head.layers(features), dim=-1)
        scores = (z - loss_fn.center[0]) / s["teacher_temp"]  # before the loss moves its center
        loss = loss_fn(z.chunk(2), student(views).chunk(2))
        optimizer.zero_grad(), loss.backward()
        if watched:  # <- 2
            meter.update(loss, log_scores=scores, codes=codes, student=student, teacher=teacher,
                         prototypes=teacher.head.last_layer)  # fmt: skip
        optimizer.step(), schedule.step(), losses.append(loss.item())
        if s["ema"]:
            update_momentum(student, teacher, s["momentum"])
    return losses, meter


# %%
losses, meter = train(0, steps=2 * every)
assert losses == train(0, steps=2 * every, watched=False)[0], "a meter must not change what it measures"
print(meter)  # <- 3

# %% [markdown]
# ## 2. The loss that stands at ln K
#
# facebookresearch/dino, issues 43 and 246, and dinov2, issue 407, ask about a loss that stands at 8.3178 or 11.0904, ln K.
# Two mistakes that lead there: temperatures swapped, so that targets are blurred, not sharpened; and pixels divided as
# integers, after which all images are black. $I = H(\bar p) - \overline{H(p)}$ is what a target tells about its image.

# %%
MISTAKES = {  # what was typed, and the kinds of finding that name it
    "no mistake": ({}, set()),
    "temperatures swapped": ({"teacher_temp": 0.1, "student_temp": 0.04}, {"uniform"}),
    "pixels // 255": ({"images": pixels // 255}, {"constant", "uniform"}),
    "center never moves": ({"center_momentum": 1.0, "images": pixels}, {"one-hot"}),
    "EMA forgotten": ({"ema": False}, {"dead-teacher"}),
    "teacher = student": ({"copied": False}, {"shared-memory"}),
    "prototypes 300 times faster": ({"prototypes_lr": 300.0, "student_temp": 0.2}, {"partial"}),
    "rate grows 15 % a step": ({"gamma": 1.15}, {"diverging"}),
}
CONTROL, SWAPPED, BLACK, CENTER, *_, COPIES, GROWS = MISTAKES
RUNS = {(name, seed): train(seed, until_named=seed > 0, **MISTAKES[name][0])
        for name in MISTAKES for seed in range(n_seeds)}  # fmt: skip

# %%
LN_K, STEPS, told = math.log(n_prototypes), range(1, steps + 1), {}


def series(name, *keys):  # of the rows of the first seed's run that have them
    found = [row for row in RUNS[name, 0][1].rows if row.keys() >= set(keys)]
    return [[row[key] for row in found] for key in ("step", *keys)]


for name in (CONTROL, SWAPPED, BLACK):
    (losses, meter), both = RUNS[name, 0], series(name, "marginal_entropy", "teacher_entropy")
    told[name], sick = {t: m - h for t, m, h in zip(*both, strict=True)}, name != CONTROL
    *_, last = told[name].values()
    print(f"\n{name}: loss {losses[-1]:.4f}, ln K = {LN_K:.4f}, I = {last:.4f}.", *meter.findings, sep="\n  ")
    assert not check or (abs(losses[-1] - LN_K) < 0.02) == sick, f"{name}: is {losses[-1]:.4f} the reported plateau?"
    assert not check or (last < 0.02 if sick else last > 0.5), f"{name}: I = {last:.3f} nats"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4))
WHITE = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
looks = (figures.GREEN, "o", 0), (figures.VERMILLION, "s", 10), (figures.ORANGE, "D", -17)
for (name, heard), (color, marker, place) in zip(told.items(), looks, strict=True):
    losses, meter = RUNS[name, 0]
    left.plot(STEPS, losses, color=color, lw=1.2, label=name)
    right.plot(heard.keys(), [max(i, 1e-5) for i in heard.values()], marker=marker, color=color)
    for finding in meter.findings[:1]:
        at = finding.step, losses[finding.step - 1]
        left.plot(*at, "v", color=color, mec=figures.BLACK, ms=8, zorder=3)
        left.annotate(f"“{finding.kind}”", at, (0, place), textcoords="offset points", ha="center", bbox=WHITE)
left.axhline(LN_K, color=figures.BLACK, ls="--", lw=1, label=f"ln K = {LN_K:.4f}")
left.set(xlabel="step", ylabel="loss, nats", title="The loss; triangles: named by the meter", ylim=(0, 1.35 * LN_K))
right.set(xlabel="step", ylabel="$I$, nats", title="What a target tells about its image", yscale="log")
fig.legend(loc="outside lower center", ncols=4)
figures.show(fig, alt="Two mistakes bring the loss to ln K, from above and below, and I near zero; without, I stays.")

# %% [markdown]
# **Reading.** Two losses end on one plateau, from both sides. Right, nothing is ambiguous. The meter waits 60 steps before
# it speaks (triangles), because healthy runs may start at $\ln K$. *Constant* is one target for all images that is not
# $1/K$ yet; the center takes it there (notebook 14, section 5), and it is named with its likeliest cause, a blank input.
#
# ## 3. The others: what the loss shows, and what the meter says


# %%
def panel(ax, name):
    for seed in reversed(range(n_seeds)):
        y, color = [x / LN_K for x in RUNS[name, seed][0]], figures.SKY if seed else figures.BLUE
        ax.plot(STEPS[: len(y)], y, color=color, lw=1, label="_" if seed else "loss / ln K (light: other seeds)")
    (t, *both), (t_m, m) = series(name, "teacher_entropy", "marginal_entropy"), series(name, "M")
    low, high = ([x / LN_K for x in entropies] for entropies in both)
    ax.fill_between(t, low, high, color=figures.GREEN, alpha=0.35, lw=0, label="I / ln K")
    ax.plot(t, low, color=figures.ROLE["teacher"], label="teacher entropy / ln K")
    ax.plot(t_m, [x / n_prototypes for x in m], ":", color=figures.ROLE["prototypes"], lw=2, label="M / K")
    for i, finding in enumerate(RUNS[name, 0][1].findings):
        x, side = finding.step, "right" if finding.step > (0.7 if i else 0.42) * steps else "left"
        ax.axvline(x, color=figures.BLACK, lw=1)
        ax.text(x, 1.36 - 0.15 * i, f" {finding.kind} ", ha=side, weight="bold", bbox=WHITE, zorder=4)
    ax.plot([], [], color=figures.BLACK, lw=1, label="named by the meter")
    ax.set(title=name, ylim=(-0.03, 1.5), xlim=(-4, steps + 4))


# %%
fig, axes = plt.subplots(2, 4, figsize=(10.4, 5), sharex=True, sharey=True)
for ax, name in zip(axes.flat, MISTAKES, strict=True):
    panel(ax, name)
plt.setp(axes[1], xlabel="step")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
figures.show(fig, alt="Eight small panels of loss, teacher entropy, I and M over steps, with a line where the meter named the "
             "failure. The losses of most failing runs fall, or stand, as a healthy one's may.")  # fmt: skip

# %%
m = series(COPIES, "M")[1][-1]
ends = {name: RUNS[name, 0][0][-1] for name in MISTAKES if name != GROWS}
print("by the last loss:", ", ".join(f"{name} {ends[name]:.3f}" for name in sorted(ends, key=ends.get)))
assert not check or min(ends, key=ends.get) == CENTER, "one class for all images is the easiest thing to predict"
assert not check or (2 * m < n_prototypes and ends[COPIES] < 0.8 * RUNS[COPIES, 0][0][0]), f"M = {m:.0f}, and the loss?"

# %% [markdown]
# **Reading.** Green is what targets tell about images; it is gone in four panels, whatever the loss does, which rises in
# a healthy run, too. Elsewhere a teacher that is never updated teaches its random start, M falls while the loss falls,
# and a growing rate is named before the first NaN. By its last loss the run that collapsed most would be the best.
#
# ## 4. How many are found, how many accused

# %%
for (name, seed), (losses, meter) in RUNS.items():
    kinds, found = MISTAKES[name][1], meter.findings[0] if meter.findings else None
    said = {found.kind} if found else set()
    assert not check or (said <= kinds and bool(said) == bool(kinds)), f"{name}, seed {seed}: {kinds}, it says {found}"
    assert not said or math.isfinite(losses[found.step - 1]), f"{name}, seed {seed}: named after the first NaN"
named = [name for (name, _), (_, meter) in RUNS.items() if meter.findings]
accused = named.count(CONTROL)
print(f"named: {len(named) - accused} of {len(RUNS) - n_seeds} failing runs; accused: {accused} of {n_seeds} others")

# %%
fig, ax = plt.subplots(figsize=(8.2, 3.3))
for y, name in enumerate(MISTAKES):
    for seed in range(n_seeds):
        (losses, meter), at = RUNS[name, seed], y + 0.22 * (seed - (n_seeds - 1) / 2)
        ax.plot((1, len(losses)), (at, at), color=figures.GRAY, lw=1, alpha=0.6, label="trained")
        for finding in meter.findings[:1]:
            ax.plot(finding.step, at, "v", color=figures.BLACK, ms=6, label="named by the meter")
        if not math.isfinite(losses[-1]):
            ax.plot(len(losses), at, "X", color=figures.VERMILLION, ms=8, label="the loss is not a number")
    words = {finding.kind for seed in range(n_seeds) for finding in RUNS[name, seed][1].findings[:1]}
    ax.text(steps * 1.02, y, ", ".join(words) or "nothing to say", va="center", weight="bold")
ax.set(xlabel="step", ylim=(len(MISTAKES) - 0.5, -0.5), xlim=(-2, steps)), ax.set_yticks(range(len(MISTAKES)), MISTAKES)
legend = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
fig.legend(legend.values(), legend, loc="outside lower center", ncols=3)
figures.show(fig, alt="A line for each mistake and seed, with a triangle where the meter first named the failure: on every one "
             "but those of the runs without a mistake, and before the loss is not a number.")  # fmt: skip

# %% [markdown]
# **Reading.** Shared memory shows in the first row, a teacher that does not move in three; a collapse has to last.
#
# ## 5. In this library, and for runs that nobody watched
#
# `train` measures the same rows: they are lines of `metrics.jsonl` in the run folder, and `prototypes watch RUN` draws them
# in the terminal or, with `--html FILE`, as a page. `collapse.diagnose` is a function of such rows, new or old.

# %%
for _, meter in RUNS.values():
    later = [finding for i in range(len(meter.rows)) for finding in collapse.diagnose(meter.rows[: i + 1])]
    assert later[:1] == meter.findings[:1], f"{later[:1]}: kept rows should say what they said at the time"
for finding in RUNS[COPIES, 0][1].findings:
    print(finding.text, "Usual causes:", *finding.causes, "What to try:", *finding.remedies, sep="\n  ")

# %%
course.finish()
