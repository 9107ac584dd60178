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
# # Speed is measured beside peers, and a run that is interrupted is the same run
#
# **Claim.** On the same tensors, with right answers first, most of what this library computes takes less time than with
# others; where a goal is missed the record says so, and why. A stop is no part of the experiment, nor is the number of
# processes: weights are the same bit for bit after a stop, losses are the same to rounding over processes.
#
# **Papers.** None: the claims are about the program that the other notebooks run. **Before this:** notebooks 22 and 50.
# **Cost:** under a minute on two CPU cores. It shows what two commands measured, `python benchmarks/speed.py` and `make
# soak` (ten to twenty minutes each), and trains for some seventy steps of its own.
#
# **Deviations.** Sections 3 and 4 train DINOv2's recipe, whose Sinkhorn targets, masked patches and KoLeo look at whole
# batches; the network is tiny, K = 64, and BatchNorm in the projector, which looks at the batch too, is ours.

# %% tags=["parameters"] nbmake={"mock": {"steps": 6, "limit": 64, "shared_steps": 2, "out": "../runs/smoke"}}
size: 'Literal["cpu", "gpu"]' = "cpu"  # the record of speed.py: sizes of a CPU, or of a GPU (`--gpu`)
results: str = "results"  # folder of the records
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/
limit: int = 256  # images trained on
steps: int = 18  # optimizer steps of the run that is interrupted
shared_steps: int = 6  # optimizer steps of the run that processes share
ranks: int = 2  # processes that share it
seed: int = 0  # of weights, order and views
out: str = "../runs"  # where a folder for the runs is made, and removed at the end
check: bool = True  # assert what the records show

# %%
import json
import signal
import tempfile
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt

from prototypes_lib import checkpoints, course, figures
from prototypes_lib.methods import METHODS, Views
from prototypes_lib.train import Interrupted, Run, train
from prototypes_lib.trainer import Trainer

figures.use_style()

# %% [markdown]
# ## 1. Beside its peers
# Seconds are of one machine and its mood; a ratio ours / peer is less so, if both sides work on the same tensors in one
# process and take turns, so that a drift meets both. Each has to give the right answer before it is timed. A *goal* is a
# ratio that we want to stay below. Memory is the peak of what a call has alive beyond its inputs.


# %%
def read(name, command):
    """The one run of a record, told of; or which command writes it."""
    path = Path(results, name)
    if not path.is_file():
        raise FileNotFoundError(f"no record {path}: `{command}` writes it")
    record = json.loads(path.read_text())
    run = record["runs"][0]
    print(f"`{record['command']}`:", ", ".join(f"{name} {what}" for name, what in run["environment"].items()))
    return run


def judged(row, peer, ratio, what):
    """The goal of a comparison, in time or memory, and what became of it."""
    goal = next((g[what] for g in row["goals"] if g["peer"] == peer and ratio[what] is not None), None)
    return goal, "no goal" if goal is None else "goal met" if ratio[what] <= goal else "short of it"


speed = read(f"speed_{size}.json", "python benchmarks/speed.py" + " --gpu" * (size == "gpu"))
PAIRS = [(row, peer, ratio) for row in speed["table"] for peer, ratio in row["ours / peer"].items()]

# %%
STYLE = {"goal met": (figures.GREEN, "o"), "short of it": (figures.VERMILLION, "s"), "no goal": (figures.GRAY, "D")}
heads = [i for i, (row, *_) in enumerate(PAIRS) if i == 0 or row is not PAIRS[i - 1][0]]
places = [i + 0.6 * sum(head <= i for head in heads) for i in range(len(PAIRS))]


def draw(axis, what, title):
    """A mark a comparison, its quartiles, and the goal as a black dot."""
    for y, (row, peer, ratio) in zip(places, PAIRS, strict=True):
        goal, verdict = judged(row, peer, ratio, what)
        if ratio[what] is not None:
            axis.plot(ratio[what], y, STYLE[verdict][1], color=STYLE[verdict][0], ms=5.5)
            axis.plot([goal or 1], y, "o", color=figures.BLACK, ms=3 * bool(goal), zorder=4)
            if what == "time":
                axis.plot(ratio["quartiles"], [y, y], color=STYLE[verdict][0], lw=2)
    axis.axvline(1, color=figures.ROLE["bound"], lw=0.8)
    axis.set(xscale="log", title=title, xlabel=f"{what}, ours / peer", ylim=(places[-1] + 0.8, places[0] - 0.8))
    axis.xaxis.set_major_formatter("{x:g}")


# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.8, 1 + 0.2 * places[-1]), sharey=True, width_ratios=(5, 4))
draw(left, "time", "Time: left of the line we are faster")
draw(right, "memory", "Peak memory: left of it we take less")
left.set_yticks(places, [peer for _, peer, _ in PAIRS])
left.tick_params("y", length=0), right.tick_params("y", length=0)
for i in heads:
    at = (0, places[i]), (-250, 0), ("axes fraction", "data"), "offset points"
    left.annotate(PAIRS[i][0]["name"], *at, va="center", weight="bold")
    for axis in (left, right) if i else ():
        axis.axhline(places[i] - 0.8, color=figures.GRAY, lw=0.5, alpha=0.5)
for verdict, (color, marker) in {"goal": (figures.BLACK, "."), **STYLE}.items():
    left.plot([], [], marker, color=color, ms=5.5, label=verdict)
fig.legend(loc="outside lower center", ncols=4)
figures.show(fig, alt=f"{len(PAIRS)} comparisons by operation: ratios of time with quartiles and of peak memory on log "
             "axes, colored by whether the goal, a black dot, is met; what is right of 1 is slower here.")  # fmt: skip

# %%
for row in speed["table"]:
    mine = [judged(*pair, what)[1] for pair in PAIRS if pair[0] is row for what in ("time", "memory")]
    sizes, missed = ", ".join(f"{name} {value}" for name, value in row["sizes"].items()), "short of it" in mine
    print(f"{row['name']:19s}{row['outcome']}" + f"  ({sizes})" * bool(sizes))
    print(f"{'':19s}why: {row['why']}\n" * missed, end="")
    assert not row["outcome"].startswith("void"), f"{row['name']}: a wrong answer has no speed"
    assert row["outcome"].startswith("short of") == missed, f"{row['name']}: the record's outcome is not its ratios'"
    assert row["why"] or not missed, f"{row['name']}: a goal that is missed has to say why"
verdicts = [judged(*pair, what)[1] for pair in PAIRS for what in ("time", "memory")]
slower = [f"{row['name']} ({peer})" for row, peer, ratio in PAIRS if ratio["quartiles"][0] > 1]
print(f"\ngoals: {verdicts.count('goal met')} met, {verdicts.count('short of it')} not")
faster = sum(ratio["quartiles"][1] < 1 for *_, ratio in PAIRS)
print(f"faster than the peer: {faster} of {len(PAIRS)} comparisons\nwe lose here: {', '.join(slower) or 'nowhere'}")
assert not check or faster > len(PAIRS) / 2, f"faster than {faster} of {len(PAIRS)} only: the claim is wrong here"

# %% [markdown]
# **Reading.** Bars are quartiles over the turns. Squares are goals we did not reach, with the reason printed; "we lose
# here" lists every peer that is faster, with a goal or without. The losses keep no matrix of scores (notebook 22), which
# shows in their memory. A training step is mostly the backbone, the same network on both sides.
#
# ## 2. What it survives
# Each kind of misfortune was made on purpose, many times, and every outcome compared with what it should be: a killed
# run with the one that nobody killed, in every bit; a damaged file with one clear line that names it. *Survived* is
# that outcome and no other. The same image files and notebooks went through others too.

# %%
rows, US = read("soak.json", "make soak")["table"], "prototypes_lib"
heights = [i + 0.5 * sum(row["by"] == US for row in rows[: i + 1]) for i in range(len(rows))]
fig, axis = plt.subplots(figsize=(8.5, 0.7 + 0.2 * len(rows)))
for y, row in zip(heights, rows, strict=True):
    share = row["survived"] / row["tried"]
    axis.barh(y, 1, color=figures.GRAY, alpha=0.2, height=0.75)
    axis.barh(y, share, color=figures.BLUE if row["by"] == US else figures.ORANGE, height=0.75)
    axis.text(1.01, y, f"{row['survived']} of {row['tried']}", va="center")
axis.set_yticks(heights, [row["what"] if row["by"] == US else f"with {row['by']}" for row in rows])
axis.tick_params("y", length=0)
axis.set(xlim=(0, 1), ylim=(heights[-1] + 0.7, heights[0] - 0.7), title="Share survived (orange: with others)")
axis.xaxis.set_major_formatter("{x:.0%}")
figures.show(fig, alt="Shares of misfortunes survived, a bar a kind, with counts; others' bars are named.")

# %%
for row in rows:
    for fault in row["faults"][:3]:
        print(f"not survived: {row['what']}, {row['by']}: {fault.splitlines()[0][:100]}")
ours = [row for row in rows if row["by"] == US]
survived, tried = (sum(row[name] for row in ours) for name in ("survived", "tried"))
print(f"{US}: {survived} of {tried} in {sum(row['seconds'] for row in ours) / 60:.0f} min")
lost = [row["what"] for row in ours if row["survived"] < row["tried"]]
assert tried and not (check and lost), f"not all survived: {', '.join(lost)}; the first faults are printed above"

# %% [markdown]
# **Reading.** A full bar is no proof: after $n$ tries without a loss its chance is below $3/n$, with 95 % confidence.
# Others were not made for this: to show half a picture without a word is a choice, counted as not survived here.
#
# ## 3. A run that is interrupted is the same run
# Let $\theta_t$ be all that training changes: weights of student and teacher, centers, BatchNorm's statistics, the
# optimizer's moments. A step is $\theta_{t+1} = F(\theta_t, t, \mathrm{seed})$ if everything random in it (which images,
# their views and masks, which layers are dropped) is drawn from a generator made of (seed, $t$, place in the batch), and
# not from one that remembers. Then $\theta_t$ and $t$ are a whole checkpoint, and going on from it gives the same bits. A
# signal in the middle of a step must leave $\theta_t$, not half of $\theta_{t+1}$. Below one run is
# left after a third of its steps (`stop_after`, for machines with a time limit), and gets a real SIGTERM inside the step
# after the second third. A control forgets its optimizer at the first stop.

# %%
Path(out).mkdir(parents=True, exist_ok=True)
folder = tempfile.TemporaryDirectory(dir=out, prefix="60-")
method, each = METHODS["dinov2"].but(n_prototypes=64, views=Views(2, 2)), 32 / limit  # and a step in epochs
run = Run.small(data=data, limit=limit, batch_size=32, lr=2e-3, epochs=steps * each, warmup_epochs=each, drop_path=0.1,
                head_batch_norm=True, monitor_steps=1, checkpoint_epochs=1e6, seed=seed, progress=False)  # fmt: skip
go = lambda where, run=run, **options: train(method, run.but(out=Path(folder.name, where)), "dinov2", **options)
losses = lambda result: [row["loss"] for row in result.metrics]


def bits(result):
    """The last checkpoint: student, teacher and statistics of targets in one file, the optimizer's moments in another."""
    place = result.folder / "checkpoints" / f"step-{checkpoints.steps(result.folder)[-1]:08d}"
    return {path.name: path.read_bytes() for path in sorted(place.glob("*.safetensors"))}


# %%
def forward_then_sigterm(at):
    right = Trainer.forward

    def forward(self, views, masks, step, *part, **options):
        found = right(self, views, masks, step, *part, **options)
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return found

    return mock.patch.object(Trainer, "forward", forward)


# %%
third, load = steps // 3, checkpoints.load
whole, cut = go("whole"), None
go("stopped", stop_after=third)
try:
    with forward_then_sigterm(2 * third):
        go("stopped")
except Interrupted as error:
    cut = error
assert cut and cut.step == 2 * third, f"{cut}: the step that the signal cut should not count, the one before it should"
print(f"{cut.signal} in step {2 * third + 1}; step {cut.step} is saved")
stopped = go("stopped")

# %%
go("forgets", stop_after=third)
with mock.patch.object(checkpoints, "load", lambda where, step, model, _, *rest: load(where, step, model, None, *rest)):
    forgets = go("forgets")
kept, again = bits(whole), bits(stopped)
assert kept.keys() == again.keys() and len(kept) > 1, f"{list(kept)}, {list(again)}: model and optimizer are files"
for name in kept:
    assert kept[name] == again[name], f"{name}: a run that was stopped twice should be the same in every bit"
    print(f"{name}: {len(kept[name]) / 1e6:.1f} MB, the same in every bit")
assert losses(whole) == losses(stopped), "so should every loss it wrote down"
assert bits(forgets) != kept, "without the optimizer's moments it should be another run, or this check sees nothing"

# %%
t = range(1, steps + 1)
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(3, 2))
left.plot(t, losses(whole), color=figures.SKY, lw=6, alpha=0.6, label="never stopped")
for i, color in enumerate((figures.BLUE, figures.BLACK, figures.GREEN)):
    piece = slice(i * third, (i + 1) * third if i < 2 else None)
    left.plot(t[piece], losses(stopped)[piece], "o-", color=color, label=f"stopped twice, sitting {i + 1}")
left.plot(t[third:], losses(forgets)[third:], "x--", color=figures.VERMILLION, lw=1, label="optimizer forgotten")
for other, look, color in ((forgets, "x--", figures.VERMILLION), (stopped, "o-", figures.BLUE)):
    right.plot(t, [abs(a - b) for a, b in zip(losses(other), losses(whole), strict=True)], look, color=color)
for axis in (left, right):
    for i, text in ((1, " stop_after"), (2, " SIGTERM")):
        axis.axvline(i * third + 0.5, color=figures.BLACK, ls=":", lw=1)
        axis.text(i * third + 0.5, 1, text, va="bottom", ha="center", fontsize=8, transform=axis.get_xaxis_transform())
    axis.set(xlabel="step", ylabel="loss, nats", xticks=range(0, steps + 1, max(1, third // 2)))
right.set_yscale("symlog", linthresh=1e-6)
right.set(ylabel="difference from never stopped, nats", ylim=(-5e-7, 1))
fig.legend(loc="outside lower center", ncols=5)
figures.show(fig, alt="A run stopped twice has the losses of one never stopped; without its optimizer, others.")

# %% [markdown]
# **Reading.** Blue is zero, not small. A run that loses only its optimizer's moments goes on too, looks as healthy, and
# is another experiment. Its curve alone would not tell; so bits are compared.
#
# ## 4. Two processes are one
# The gradient of a mean over $B$ images is the mean of the gradients of its equal parts, so processes could average
# theirs, if the loss were a sum over images. It is not: Sinkhorn's columns, KoLeo's neighbors, BatchNorm's mean and the
# number of masked patches are the whole batch's, to be had from all processes and differentiated through (notebook 22,
# section 4). With that only the order of additions differs: in float32, by some $2^{-23}$ of the loss.

# %%
short = run.but(epochs=shared_steps * each)
one, shared, other_seed = go("one", short), go("shared", short, ranks=ranks), go("one", short.but(seed=seed + 1))
folder.cleanup()
apart, far = ([abs(a - b) for a, b in zip(losses(x), losses(one), strict=True)] for x in (shared, other_seed))
unit = [loss * 2**-23 for loss in losses(one)]
units = [gap / u for gap, u in zip(apart, unit, strict=True)]
print(f"{ranks} processes and one, in units of rounding, each step:", *(f"{x:.1f}" for x in units))
assert shared.summary["processes"] == ranks, "as many processes as asked for should have trained"
assert max(units) < 100, f"{max(units):.0f} units of rounding: more than the order of additions differs"
assert max(apart) < 1e-3 * max(far), f"{max(apart):.1e} against {max(far):.1e} for another seed: that is not one run"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3), width_ratios=(2, 3))
t = range(1, shared_steps + 1)
left.plot(t, losses(one), color=figures.SKY, lw=6, alpha=0.6, label="one process")
left.plot(t, losses(shared), "o-", color=figures.BLUE, label=f"{ranks} processes")
left.plot(t, losses(other_seed), "D-", color=figures.GRAY, lw=1, label="one process, another seed")
right.plot(t, far, "D-", color=figures.GRAY, lw=1, label="another seed")
right.plot(t, unit, ":", color=figures.BLACK, label="$2^{-23}$ of the loss")
right.plot(t, apart, "o-", color=figures.BLUE, label=f"{ranks} processes")
right.set_yscale("symlog", linthresh=1e-7)
right.set(xlabel="step", ylabel="nats", title="Difference from one process"), right.legend(loc="center right")
left.set(xlabel="step", ylabel="loss, nats", title="Loss"), left.legend()
figures.show(fig, alt="Losses on several processes and on one differ by rounding, those of another seed by far more.")

# %% [markdown]
# **Reading.** Rounding, often none: same weights, same crops, and what could differ is taken from the whole batch. The
# tests hold every method to it, on two and four processes, in float64.

# %%
course.finish()
