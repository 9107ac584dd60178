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
# # The number of prototypes is what KoLeo-proto makes it
#
# **Claim.** K is meant to say how fine the clusters are. Where prototypes collapse, it does not: the number M of unique
# ones stays far below K, with or without KoLeo on the data; with KoLeo on the prototypes M is K (PPC, Fig. 3, Table 1).
# We vary K, the weight of KoLeo-proto and what balances the targets, and look at who uses the copies (PPC, Fig. 2).
# **Papers.** PPC sections 3 to 6.1. **Before this:** notebooks 12, 18 and `50_pretraining.py`. **Cost:** half a minute
# on two CPU cores, which begins two runs and reads the others from the record; `scale=cpu` makes them all, in about
# a quarter of an hour.
#
# **Deviations.** The runs are notebook 50's *time-lapse*: prototypes learn at 300 times the backbone's rate under a high
# weight decay, in a bottleneck of 16, because at ordinary settings M does not fall within minutes. Those settings were
# chosen there by looking at M, none was chosen here; "10 copies and more" was set after a look at one run. PPC's
# Fig. 3 is iBOT-vMF on ImageNet, this is DINO-vMF on CIFAR-10: shapes can be compared, levels not. The weight of mean
# entropy is MSN's, as PPC prints none; the grid of λ is ours. The best k of kNN is chosen on test images, as in PPC.

# %% tags=["parameters"] nbmake={"mock": {"scale": "cpu", "n_prototypes": [32], "k": 32, "seeds": [0], "few_seeds": [0], "weights": [1.0], "steps": 4, "limit": 128, "out": "../runs/smoke", "results": "../runs/smoke", "workers": 1, "check": false}}
scale: 'Literal["glance", "cpu", "full"]' = "glance"  # begin two runs and read the record; all runs; all on a GPU
recipe: 'Literal["dino-vmf", "ibot-vmf"]' = "dino-vmf"  # the method everything is added to
n_prototypes: list[int] = [128, 512, 2048]  # K
k: int = 512  # one of n_prototypes: the K of everything after the first section
seeds: list[int] = [0, 1, 2]  # repeats
few_seeds: list[int] = [0, 1]  # repeats of the weights of KoLeo-proto that are no recipe's
weights: list[float] = [0.001, 0.01, 1.0]  # λ, beside 0 and 0.1
steps: int = 0  # optimizer steps; 0 takes the scale's
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/ (ImageNet)
limit: int = 0  # images used of each split; 0 takes all
device: str = "auto"  # auto, cpu, cuda
workers: int = 0  # runs side by side; 0 takes 2 on a CPU and 1 on a GPU
out: str = "../runs"  # run folders; finished runs with the same settings are reused
results: str = "results"  # folder of the JSON record
check: bool = True  # assert the claims (they are about the record of `scale=cpu`)

# %%
import csv
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr, t

from prototypes_lib import assignment, checkpoints, collapse, course, evaluate, figures, regularizers, sweeps, train
from prototypes_lib.data import load
from prototypes_lib.methods import METHODS, Views, Warmup

figures.use_style()
torch.set_num_threads(1)  # runs are functions of their seed on one thread

# %% [markdown]
# ## M against K
# All runs of this notebook are a recipe with a word changed: `-kd` and `-kp` add 0.1 · KoLeo on features or prototypes.

# %%
SCALES = {  # change of the method, run, steps: notebook 50's, so that its finished runs are these
    "cpu": (
        {"views": Views(2, 2), "teacher_temp": Warmup(0.04, 0.04), "ema": 0.97, "ema_end": 0.97},
        train.Run.small(batch_size=64, lr=4e-3, warmup_epochs=0.5, prototype_lr_factor=300.0, weight_decay=0.2,
                        weight_decay_end=1.0, head_batch_norm=True, monitor_steps=25, checkpoint_epochs=1e6),
        450,
    ),
    "full": ({}, train.Run(batch_size=1024, precision="auto"), 125_100),
}  # fmt: skip
changes, run, default_steps = SCALES["full" if scale == "full" else "cpu"]
pictures = load(data, "train", limit=limit or None, image_size=run.stored_size)
run = run.but(data=data, limit=limit or None, device=device, out=out)
run = run.but(epochs=(steps or default_steps) / (len(pictures) // run.batch_size))
run = run.but(warmup_epochs=min(run.warmup_epochs, run.epochs / 10))


def job(kind, method, n, seed):
    name, about = f"{recipe}{'' if kind == 'base' else '-' + kind}-k{n}", {"kind": kind, "n_prototypes": n}
    return sweeps.Job(name, method.but(n_prototypes=n, **changes), run.but(seed=seed), about)


# %%
plain = METHODS[recipe]
sinkhorn = plain.but(targets=(assignment.Sinkhorn,))
bare = plain.but(targets=()).plus(-1.0, regularizers.mean_entropy, on="probabilities")
jobs = []
for seed in seeds:
    for n in n_prototypes:
        jobs += [job("base", plain, n, seed)]
        jobs += [job(kind, METHODS[f"{recipe}-{kind}"], n, seed) for kind in ("kd", "kp")]
    jobs += [job("sinkhorn", sinkhorn, k, seed), job("me", METHODS.get(f"{recipe}-me", bare), k, seed)]
for seed in few_seeds:
    jobs += [job(f"kp{w:g}", plain.plus(w, regularizers.koleo, on="prototypes"), k, seed) for w in weights]


# %%
@torch.no_grad()
def usage(row, method):
    """Copies of each unique prototype, and its share of the training images when only unique ones compete."""
    learner, folder = train.build(method, run).eval(), Path(row["folder"])
    checkpoints.load(folder, checkpoints.steps(folder)[-1], learner)
    w, tau = learner.teacher.prototypes.w, method.teacher_temp.end
    unique, device = collapse.unique_prototypes(w), train.pick_device(run.device)
    features = evaluate.extract(learner.teacher.backbone, pictures, size=run.image_size, device=device).x
    scores = method.score(learner.teacher.projector(features[:: 1 + len(features) // 10_000]), w, tau)
    p, targets = (collapse.marginal(x, unique) for x in (scores, learner.chain(scores, tau)))
    votes = torch.bincount(scores[:, unique.representatives].argmax(1), minlength=unique.count) / len(scores)
    r, shares = unique.redundancy, (p.unique_p, targets.unique_p, votes)
    sizes = r.unique().tolist()
    ranks = [float(spearmanr(r, share).statistic) for share in shares] if len(sizes) > 1 else None
    groups = [[n, int((r == n).sum()), *(float(s[r == n].mean()) * unique.count for s in shares)] for n in sizes]
    even = [p.entropy / math.log(len(w)), p.unique_entropy / math.log(max(unique.count, 2))]
    return {"groups": groups, "ranks": ranks, "even": even, "short": float((w.norm(dim=-1) < 0.02).float().mean())}


# %%
place = Path(results, f"56_{Path(data).name}_{'full' if scale == 'full' else 'time-lapse'}_{recipe}.json")
names = ("recipe", "n_prototypes", "k", "seeds", "few_seeds", "weights", "data", "limit")
settings = {name: globals()[name] for name in names} | {"steps": steps or default_steps}
if scale != "glance":
    trained = sweeps.sweep(jobs, workers or None)
    for row, made in zip(trained, jobs, strict=True):
        row["usage"] = None if row["diverged"] else usage(row, made.method)
    command = f"prototypes run --only 56 -p scale {scale} " + " ".join(f"-p {n} '{v}'" for n, v in settings.items())
    sweeps.write(place, trained, notebook="56_number_of_prototypes", command=command, parameters=settings,
                 untrained=[sweeps.untrained(jobs[0])])  # fmt: skip
rows = [row for row in sweeps.read(place)["runs"] if row["diverged"] is None]
find = lambda kind, n=k: [row for row in rows if (row["kind"], row["n_prototypes"]) == (kind, n)]
meter = lambda name, *which: [sweeps.best(r)[0] if name == "knn" else r["last"][name] for r in find(*which)]
print(
    f"{len(rows)} of {len(jobs)} runs are in the record and did not diverge, {sum(r['seconds'] for r in rows) / 60:.0f} minutes of one core"
)

# %%
for kind, stop in (("base", 175), ("kp", 125)) if scale == "glance" else ():  # two runs again, under their schedule
    made = next(j for j in jobs if j.about == {"kind": kind, "n_prototypes": min(n_prototypes)})
    curve = next(row for row in find(kind, min(n_prototypes)) if row["seed"] == made.run.seed)["curve"]
    now = train.train(made.method, made.run.but(progress=False), made.name, stop_after=stop).last
    then = next(row for row in curve if row["step"] == now["step"])
    print(
        f"{made.name}, step {now['step']}: loss {now['loss']:.3f}, M {now['M']}; record {then['loss']:.3f}, {then['M']}"
    )
    gap = max(abs(now["loss"] - then["loss"]) / math.log(min(n_prototypes)), abs(now["M"] / then["M"] - 1))
    assert gap < 0.1, f"{made.name} is {gap:.0%} away from the record at step {now['step']}"


# %%
def interval(values):
    """Mean, and half width of the 95 % t-interval over seeds from three seeds on: two say nothing about a spread."""
    v, n = torch.tensor(values, dtype=torch.float64), len(values)
    return float(v.mean()), float(t.ppf(0.975, n - 1) * v.std() / n**0.5) if n > 2 else math.nan


def points(axis, x, values, kind, beside, label=None):
    """Every seed as a pale point; beside it their mean with its interval."""
    look = {"color": figures.METHOD.get(kind, figures.PINK), "marker": figures.MARKER.get(kind, "v")}
    axis.plot([x] * len(values), values, ls="", alpha=0.45, **look)
    axis.errorbar(beside, *interval(values), capsize=2, ls="", label=label, **look)


# %%
TITLE = {"base": recipe, "kd": "+ KoLeo on data (kd)", "kp": "+ KoLeo on prototypes (kp)"}
fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.3))
for axis, name in zip(axes, ("M", "knn"), strict=True):
    axis.set_xscale("log", base=2)
    for i, (kind, title) in enumerate(TITLE.items()):
        for n in n_prototypes:
            x, label = n * 2 ** (0.4 * (i - 1)), title if n == n_prototypes[0] else None
            points(axis, x, meter(name, kind, n), kind, 1.08 * x, label)
    axis.set(xticks=n_prototypes, xticklabels=n_prototypes, xlabel="initialized prototypes K")
    axis.minorticks_off()
edges = [[n * scaled for n in n_prototypes] for scaled in (0.7, 1.5)]
axes[0].hlines(n_prototypes, *edges, color=figures.ROLE["bound"], ls=":", label="M = K")
axes[0].set_yscale("log", base=2)
axes[0].set(ylabel="unique prototypes M", title="With kp, K is the number of prototypes")
axes[1].set(ylabel="kNN accuracy, %", title="kNN; dashed: the untrained network")
axes[1].axhline(sweeps.best(sweeps.read(place)["untrained"][0])[0], color=figures.METHOD["random"], ls="--")
axes[0].legend()
figures.show(fig, alt="M against K: kp on M = K, base and kd far below. kNN against K: intervals overlap.")

# %%
printed = {}
for row in csv.DictReader((Path(course.__file__).parents[2] / "data" / "paper_tables.csv").open()):
    if (row["paper"], row["table"]) == ("PPC", "Table 1"):
        printed.setdefault(f"{row['method']} {row['backbone']}", []).append(float(row["value"]))
for name, (initialized, unique) in printed.items():
    print(f"{name:38s}{initialized:6.0f}{unique:6.0f}   M / K = {unique / initialized:.3f}   (PPC, Table 1)")
for n, kind in ((n, kind) for n in n_prototypes for kind in TITLE):
    m = meter("M", kind, n)
    mean, half = interval([value / n for value in m])
    print(f"{recipe} {kind:29s}{n:6d}{mean * n:6.0f}   M / K = {mean:.3f} +- {half:.3f}, M = {m}")
    if check and scale != "full":
        kept = min(m) >= 0.97 * n if kind == "kp" else max(m) < 0.5 * n
        assert kept, f"K = {n}, {kind}: M = {m}; KoLeo-proto, and it alone, should keep prototypes apart"

# %% [markdown]
# **Reading.** With KoLeo-proto M is K at every K (PPC, Fig. 3, left). Base and kd lie together far below it: M is not
# independent of K, but 16 times the prototypes make only four times the unique ones. *Not shown here:* kNN that rises
# with K under kp, and kp as the best (Fig. 3, right). All lie within two points or so of the untrained network and of
# each other, which neither three seeds nor 1,000 test images (± 2.8 points) can tell apart.
#
# ## The weight of KoLeo-proto, and what balances the targets
# Left of the line λ · KoLeo on the prototypes at K = k, with λ = 0 and 0.1 the runs above. Right of it, without KoLeo,
# two other ways to balance the targets; PPC found probability centering, which is base, consistently better than both
# (section 6, without numbers). Sinkhorn first gives every prototype the same mass, so a number added to all scores of
# a prototype cancels: $\log C_p$ is without effect on its targets, but not on the student's answers.

# %%
torch.manual_seed(0)
L, shift = 5 * torch.randn(64, k, dtype=torch.float64), 3 * torch.randn(k, dtype=torch.float64)
moved = lambda link: float((link(L + shift).softmax(-1) - link(L).softmax(-1)).abs().max())
gaps = moved(assignment.Sinkhorn()), moved(assignment.ProbabilityCenter(k, momentum=0.0))
print("largest change of a target by a number added to each prototype: Sinkhorn {:.0e}, centering {:.2f}".format(*gaps))
assert gaps[0] < 1e-12, f"{gaps[0]:.1e}: what a prototype's scores have in common cancels in Sinkhorn's first half-step"
assert gaps[1] > 0.01, f"{gaps[1]:.1e}: the center is the mean of P, which has log C_p in it; it is no column sum of L"

# %%
grid = dict(sorted({0.0: "base", 0.1: "kp", **{w: f"kp{w:g}" for w in weights}}.items()))
places = {f"{w:g}": kind for w, kind in grid.items()} | {"Sinkhorn": "sinkhorn", "mean entropy": "me"}
METERS = {"M": "unique prototypes M", "marginal_entropy": "entropy of the mean target, nats", "knn": "kNN accuracy, %"}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.1))
for axis, (name, text) in zip(axes, METERS.items(), strict=True):
    for i, kind in enumerate(places.values()):
        points(axis, i, meter(name, kind), "kp" if "kp" in kind else kind, i + 0.25)
    axis.axvline(len(grid) - 0.4, color=figures.ROLE["bound"], lw=0.8)
    axis.set_xticks(range(len(places)), places, rotation=40, ha="right")
    axis.set(xlabel="λ of KoLeo-proto | balance", title=text, xlim=(-0.5, len(places) - 0.3))
figures.show(fig, alt="M jumps to K at a small weight; the marginal is at ln K but for mean entropy; kNN scatters.")

# %%
for title, kind in places.items():
    short, (mean, half) = [round(r["usage"]["short"], 2) for r in find(kind)], interval(meter("knn", kind))
    loss, target, marginal = (interval(meter(m, kind))[0] for m in ("image", "teacher_entropy", "marginal_entropy"))
    m, meters = meter("M", kind), {"loss": loss, "teacher_entropy": target, "marginal_entropy": marginal}
    said = collapse.verdict(k=k, unique=int(min(m)), **meters).kind
    print(f"{title:12s} M {m!s:15s} shorter than 0.02: {short!s:18s} entropy of a target {target:.2f}, of the mean "
          f"{marginal:.2f} of {math.log(k):.2f}, kNN {mean:.1f} +- {half:.1f} %: {said}")  # fmt: skip
if check and scale != "full":
    enough = [min(meter("M", kind)) for w, kind in grid.items() if w >= 0.01]
    assert min(enough) >= 0.97 * k, f"{enough}: from λ = 0.01 on M should be K"
    assert max(meter("M", "sinkhorn")) < 0.5 * k, "Sinkhorn balances masses, not directions: M should fall"
    assert max(meter("marginal_entropy", "me")) < 0.5 * math.log(k), "mean entropy should not hold the targets here"

# %% [markdown]
# **Reading.** The weight is no fine choice: M jumps most of the way at the smallest and is K from 0.01 on. What grows
# with it is the share of prototypes so short that they say nothing: kept apart is not yet in use. Sinkhorn leaves as few
# unique prototypes as centering, with the same marginal. Mean entropy at weight 1, without a center, does not hold the
# targets here: few prototypes take all, as its marginal shows. That centering is best for kNN is *not shown here*.
#
# ## Who uses the copies?
# PPC (Fig. 2): re-assigned to the unique prototypes alone, more data go where there were more copies, because a large
# cluster's mass had been shared out among them. A mark is the mean over the unique prototypes of one redundancy, and 1
# an even share; by P, the softmax of the scores, by the targets (P centered), or by votes (each image its best one).

# %%
RULES = ("P", "targets", "votes")
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True)
for rule, (axis, name) in enumerate(zip(axes, RULES, strict=True)):
    for row in find("base") + find("kd"):
        copies, _, *shares = zip(*row["usage"]["groups"], strict=True)
        look = {"color": figures.METHOD[row["kind"]], "marker": figures.MARKER[row["kind"]], "alpha": 0.5, "ls": ""}
        axis.plot(copies, shares[rule], label=row["kind"] if row["seed"] == seeds[0] else None, **look)
    axis.axhline(1, color=figures.ROLE["bound"], lw=0.8)
    axis.set(xscale="log", xlabel="copies of a prototype", title=f"Shares by {name}, K = {k}")
axes[0].set_ylabel("share of the data × M")
axes[0].legend()
figures.show(fig, alt="Share of the data against copies: most near one, a few of the largest groups far above.")

# %%
ranks = {}
print(
    "rank correlation of copies and share [over seeds]; share of 10 copies and more by votes; entropy of P / ln K, / ln M"
)
for kind, n in ((kind, n) for n in n_prototypes for kind in ("base", "kd")):
    used = [row["usage"] for row in find(kind, n)]
    ranks[kind, n] = dict(zip(RULES, zip(*(u["ranks"] or [math.nan] * 3 for u in used), strict=True), strict=True))
    text = (f"{rule} {interval(v)[0]:+.2f} [{min(v):+.2f}, {max(v):+.2f}]" for rule, v in ranks[kind, n].items())
    even = [interval(v)[0] for v in zip(*(u["even"] for u in used), strict=True)]
    many = [[(g[1], g[-1]) for g in u["groups"] if g[0] >= 10] for u in used]
    many = [round(sum(m * share for m, share in gs) / max(sum(m for m, _ in gs), 1), 1) for gs in many]
    print(f"{kind:5s}K = {n:<5d}{', '.join(text)}; 10+ {many}; entropy {even[0]:.3f}, {even[1]:.3f}")
    if check and scale != "full":
        assert even[0] > even[1], f"{kind}, K = {n}: P over the unique prototypes should be less even, as in PPC"
        assert interval(many)[0] > 1, f"{kind}, K = {n}: ten copies and more should get above an even share: {many}"

# %% [markdown]
# **Reading.** Most unique prototypes have few copies and an even share, so ranks correlate weakly. But groups of ten
# copies and more get above their share when they stand alone, and over the unique prototypes P is less even than over
# all K: small here, in the direction of (PPC, Fig. 2). The teacher's targets, whose center was made for all
# copies, show less of it; notebook 50, which looked at ranks of targets alone, saw nothing.

# %%
course.finish()
