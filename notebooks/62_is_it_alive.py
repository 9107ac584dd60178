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
batch: int = 32  # images a step, two views of each
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/
check: bool = True  # assert what the runs show

# %%
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
    assert abs(a - b) < 1e-5 * abs(a), (
        f"{a:.6f}, {b:.6f}: the twin should be lightly's loss, its moving center included"
    )

# %% [markdown]
# A small network, random views, and every setting that people get wrong, right. The teacher is a network of its own,
# which starts with the student's weights. (`copy.deepcopy` refuses lightly's head, because of its weight normalization,
# see pytorch/pytorch, issue 28594; an assignment is the way out that tempts.)


# %%
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Flatten()
        self.backbone = nn.Sequential(*first, nn.Linear(512, 128), nn.GELU())
        self.head = DINOProjectionHead(128, 128, 64, n_prototypes)

    def forward(self, x):
        return self.head(self.backbone(x))

    def codes(self, x):
        return F.normalize(self.head.layers(self.backbone(x)), dim=-1)


# %%
pixels = torch.from_numpy(load(data, "train", image_size=32, progress=False).pixels)
pixels = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 2)  # 0 to 255, as files have them
normalized = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
RIGHT = {"teacher_temp": 0.04, "student_temp": 0.1, "center_momentum": 0.9, "momentum": 0.99, "lr": 1e-3,
         "lr_growth": 1.0, "prototypes_lr": 1.0, "ema": True, "copied": True, "images": normalized}  # fmt: skip


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
    student, teacher = Network(), Network()
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
assert losses == train(0, steps=2 * every, watched=False)[0], "a meter must not change what it measures"

# %% [markdown]
# ## 2. The loss that stands at ln K
#
# facebookresearch/dino, issues 43 and 246, and dinov2, issue 407, ask about a loss that stands at 8.3178 or 11.0904. Two
# mistakes that lead there: temperatures swapped, so that targets are blurred, not sharpened; and a rate far too high. We
# train each mistake once to its end, and with other seeds until it is named. $I = H(\bar p) - \overline{H(p)}$ is what a
# target tells about its image (notebook 14).

# %%
MISTAKES = {  # what was typed, and the kinds of finding that name it
    "no mistake": ({}, set()),
    "temperatures swapped": ({"teacher_temp": 0.1, "student_temp": 0.04}, {"uniform"}),
    "rate 50 times too high": ({"lr": 0.05}, {"uniform", "constant"}),
    "center never moves": ({"center_momentum": 1.0, "images": pixels}, {"one-hot"}),  # and pixels are not normalized
    "EMA forgotten": ({"ema": False}, {"dead-teacher"}),
    "teacher = student": ({"copied": False}, {"shared-memory"}),
    "prototypes 300 times faster": ({"prototypes_lr": 300.0, "student_temp": 0.2}, {"partial"}),
    "rate grows 15 % a step": ({"lr_growth": 1.15}, {"diverging"}),
}
RUNS = {(name, seed): train(seed, until_named=seed > 0, **wrong)
        for name, (wrong, _) in MISTAKES.items() for seed in range(n_seeds)}  # fmt: skip
CONTROL, SWAPPED, FAST, CENTER, *_, COPIES, GROWS = MISTAKES
LN_K, STEPS = math.log(n_prototypes), range(1, steps + 1)


# %%
def series(name, *keys):
    """Steps and values of the first seed's rows that have all the keys."""
    found = [row for row in RUNS[name, 0][1].rows if row.keys() >= set(keys)]
    return [[row[key] for row in found] for key in ("step", *keys)]


told = {}  # name: steps, I
for name in MISTAKES:
    t, *entropies = series(name, "marginal_entropy", "teacher_entropy")
    told[name] = t, [marginal - single for marginal, single in zip(*entropies, strict=True)]
for name in (SWAPPED, FAST):
    losses, meter = RUNS[name, 0]
    print(f"\n{name}: the loss ends at {losses[-1]:.4f}, ln K = {LN_K:.4f}. The meter:", *meter.findings, sep="\n")
    assert not check or abs(losses[-1] / LN_K - 1) < 0.01, f"{name}: {losses[-1]:.3f} is not the plateau of the reports"
    assert not check or told[name][1][-1] < 0.02 < 0.5 < told[CONTROL][1][-1], (
        f"{name}: targets still tell images apart"
    )

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4))
looks = (figures.GREEN, "o", 0), (figures.VERMILLION, "s", 8), (figures.ORANGE, "D", -15)
for name, (color, marker, place) in zip((CONTROL, SWAPPED, FAST), looks, strict=True):
    losses, meter = RUNS[name, 0]
    left.plot(STEPS, losses, color=color, lw=1.2, label=name)
    right.plot(told[name][0], [max(i, 1e-5) for i in told[name][1]], marker=marker, color=color)
    for finding in meter.findings[:1]:
        at = finding.step, losses[finding.step - 1]
        left.plot(*at, "v", color=color, mec=figures.BLACK, ms=8, zorder=3)
        left.annotate(f"“{finding.kind}”", at, (0, place), textcoords="offset points", ha="center")
left.axhline(LN_K, color=figures.BLACK, ls="--", lw=1, label=f"ln K = {LN_K:.4f}")
left.set(xlabel="step", ylabel="loss, nats", title="The loss", ylim=(0, 1.35 * LN_K)), left.legend(loc="lower left")
right.set(xlabel="step", ylabel="$I$, nats", title="What a target tells about its image", yscale="log")
figures.show(fig, alt="Two mistakes bring the loss to ln K, from above and from below; what targets tell about images falls "
             "a hundredfold and more, without the mistake it does not. Triangles: named by the meter.")  # fmt: skip

# %% [markdown]
# **Reading.** Two losses end on one plateau, from above and from below; on the way the second looks like learning. Right,
# nothing is ambiguous: their targets say ever less about the image. The meter (triangles) waits 60 steps before it says
# so, because healthy runs can start at $\ln K$, too. *Constant* is one target for all images which is not $1/K$ yet: the
# center takes it there (notebook 14, section 5).
#
# ## 3. The others: what the loss shows, and what the meter says

# %%
fig, axes = plt.subplots(2, 4, figsize=(10.4, 4.9), sharex=True, sharey=True)
for ax, name in zip(axes.flat, MISTAKES, strict=True):
    for seed in reversed(range(n_seeds)):
        color = figures.SKY if seed else figures.BLUE
        ax.plot(STEPS[: len(RUNS[name, seed][0])], [x / LN_K for x in RUNS[name, seed][0]], color=color, lw=1)
    t, high, low = series(name, "marginal_entropy", "teacher_entropy")
    ax.fill_between(t, [x / LN_K for x in low], [x / LN_K for x in high], color=figures.GREEN, alpha=0.35, lw=0)
    ax.plot(t, [x / LN_K for x in low], color=figures.ROLE["teacher"])
    t, m = series(name, "M")
    ax.plot(t, [x / n_prototypes for x in m], ":", color=figures.ROLE["prototypes"], lw=2)
    for i, finding in enumerate(RUNS[name, 0][1].findings):
        late = finding.step > steps / 2
        ax.axvline(finding.step, color=figures.BLACK, lw=1)
        ax.text(finding.step, 1.36 - 0.14 * i, f" {finding.kind} ", ha="right" if late else "left", weight="bold")
    ax.axhline(1, color=figures.GRAY, ls="--", lw=0.8)
    ax.set(title=name, ylim=(-0.03, 1.5), xlim=(-4, steps + 4))

# %%
for (what, color, style), ax in zip(
    (
        ("loss / ln K, other seeds in light blue", "student", "-"),
        ("teacher entropy / ln K", "teacher", "-"),
        ("M / K", "prototypes", ":"),
    ),
    axes.flat,
    strict=False,
):
    ax.plot([], [], style, color=figures.ROLE[color], label=what)
axes[0, 0].fill_between([], [], color=figures.GREEN, alpha=0.35, label="I / ln K, up to the marginal entropy")
axes[0, 0].text(steps, 1.36, "nothing to say", ha="right", weight="bold")
fig.legend(loc="outside lower center", ncols=4), fig.supxlabel("step", fontsize=9)
figures.show(fig, alt="Eight small panels of loss, teacher entropy, I and M over steps, a black line where the meter named the "
             "failure; the loss of most failing runs falls or stands like a healthy one's.")  # fmt: skip

# %% [markdown]
# **Reading.** Green is what targets tell about images, and it is gone in four panels, whatever the loss does. Where it is
# not, something else is: the teacher that was never updated teaches its random start; M falls while the loss falls, too;
# and the growing rate is named some steps before the first NaN. The lowest loss of all is the worst collapse.

# %%
ends = {name: RUNS[name, 0][0][-1] for name in MISTAKES if math.isfinite(RUNS[name, 0][0][-1])}
print(
    "by their last loss, best first:",
    *(f"{name} {end:.3f}" for name, end in sorted(ends.items(), key=lambda x: x[1])),
    sep="\n  ",
)
m = series(COPIES, "M")[1][-1]
assert not check or min(ends, key=ends.get) == CENTER, "one class for all images is the easiest thing to predict"
assert not check or ends[COPIES] < ends[CONTROL] and m < n_prototypes / 2, (
    f"M = {m:.0f}: copies should not show in the loss"
)

# %% [markdown]
# ## 4. How many are found, how many accused

# %%
print(f"{'':28s}named (step), for each seed")
for name, (_, kinds) in MISTAKES.items():
    first = [next(iter(RUNS[name, seed][1].findings), None) for seed in range(n_seeds)]
    print(f"{name:28s}", *(f"{f.kind} ({f.step})" if f else "nothing" for f in first))
    for finding in first if check else ():
        assert finding or not kinds, f"{name}: no word of it in {steps} steps"
        assert not finding or finding.kind in kinds, (
            f"{name} is called {finding}: a wrong word sends people looking elsewhere"
        )

# %% [markdown]
# ## 5. In this library, and for runs that nobody watched
#
# `train` measures the same rows for every method: they are the lines of `metrics.jsonl`, findings those of
# `findings.jsonl` in the run folder, and `prototypes watch RUN` draws them in the terminal or, with `--html FILE`, as a
# page that refreshes itself. Rows are plain numbers and `collapse.diagnose` a function of them, so it may be asked later.

# %%
for name in MISTAKES:
    meter = RUNS[name, 0][1]
    rows = [json.loads(line) for line in "\n".join(map(json.dumps, meter.rows)).splitlines()]
    later = next(filter(None, (collapse.diagnose(rows[: i + 1]) for i in range(len(rows)))), ())
    assert [f.kind for f in later] == [f.kind for f in meter.findings[: len(later)]]
print(*(f"{x}" for x in [later[0].text, *later[0].causes, *later[0].remedies] if later), sep="\n")

# %%
course.finish()
