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
# # K is not how many prototypes a checkpoint has: the doctor counts them
#
# **Claim.** From a checkpoint file alone, ours or a published one, the doctor counts the prototypes that are different:
# exactly, where the truth is known. Where the truth depends on a definition, it says so and gives every reading. What
# nearness means it reads off random points on the sphere, and what copies do to the data off the data.
#
# **Papers.** (PPC, Definition 4.1, Table 1, section 3 and Fig. 2), (vMF, Table 4 and section 5.2).
# **Before this:** notebooks 16 and 50. **Cost:** about half a minute on two CPU cores. The same as a command:
# `prototypes doctor CHECKPOINT --data FOLDER --out report`.
#
# **Deviations.** Sections 1 to 3 look at prototypes that were planted, so that M is beyond doubt; real ones are not so
# tidy. The network of section 4 is trained for seconds. So that its prototypes merge at all in that time they learn at
# a rate far above the backbone's, as in notebook 50, with a faster teacher; **rate, teacher and steps were chosen by
# looking at M**. No official checkpoint is read here: section 5 says which ones can be, and how.

# %% tags=["parameters"] nbmake={"mock": {"steps": 6, "limit": 256, "trained_k": 64, "out": "../runs/smoke", "check": false}}
n_prototypes: int = 4096  # K of the planted file
groups: int = 600  # M, planted: the void set and so many others less one
void: int = 1200  # copies in the void set
dim: int = 64  # of the planted prototypes
trained_k: int = 256  # K of the network that is trained here
steps: int = 100  # its optimizer steps
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/
limit: int = 2000  # images it is trained on and examined with
official: str = ""  # a checkpoint of docs/checkpoints.md, where one has been fetched: it is examined in section 5
seed: int = 0  # of everything drawn
out: str = "../runs"  # folder of the planted file, the run and the report
check: bool = True  # assert what the training shows

# %%
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize

from prototypes_lib import checkpoints, collapse, course, doctor, figures
from prototypes_lib.doctor import data_panels, panels, subject, words
from prototypes_lib.methods import METHODS, Views, Warmup
from prototypes_lib.scoreboard.paper import TABLES, printed, split
from prototypes_lib.train import Run, train

figures.use_style()

# %% [markdown]
# ## 1. A planted truth
# M directions, far from each other, get copies: one of them very many, the *void set*, the others a number that falls
# like a power of its rank. A copy is its direction plus noise of length $s$, so two copies of a group are at most an
# angle of about $2s$ apart. The rows are shuffled, get lengths that mean nothing, and go into a file with the names of
# DINO's full checkpoints, where length and direction lie apart: $w_k = g_k\, v_k / \lVert v_k \rVert$.

# %%
g = torch.Generator().manual_seed(seed)
centers = normalize(torch.randn(groups, dim, generator=g), dim=1)
share = torch.arange(1, groups) ** -0.9
size = torch.cat([torch.tensor([void]), 1 + (share / share.sum() * (n_prototypes - void - groups + 1)).long()])
size[1] += n_prototypes - size.sum()  # what rounding left
group = torch.repeat_interleave(torch.arange(groups), size)[torch.randperm(n_prototypes, generator=g)]
noise = normalize(torch.randn(n_prototypes, dim, generator=g), dim=1)
planted, drifted = (normalize(centers[group] + s * noise, dim=1) for s in (0.03, 0.16))
length = torch.empty(n_prototypes, 1).uniform_(0.5, 4, generator=g)


def network(w, prefix):
    return {f"{prefix}head.last_layer.weight_g": length, f"{prefix}head.last_layer.weight_v": 3 * w}


file = Path(out, "64_planted.pth")
file.parent.mkdir(parents=True, exist_ok=True)
torch.save({"student": network(drifted, "module."), "teacher": network(planted, ""), "epoch": 100}, file)

# %% [markdown]
# `checkpoints.all_prototypes` reads run folders, exports and the files of DINO, iBOT, DINOv2, MSN and SwAV. Nothing that
# a file says is run: a pickle can name any function to be called, and only tensors and plain values are accepted.

# %%
teacher, student = checkpoints.all_prototypes(file)
for found in (teacher, student):
    print(f"{found.network}: {found.layout}; {found.tensor}, {found.dtype}, {tuple(found.w.shape)}")
seen = doctor.examine(teacher, other=student, seed=seed, progress=False)
print(words.verdict(seen))
order = torch.tensor(list(dict.fromkeys(group.tolist())))  # groups by the first of their rows
assert torch.allclose(teacher.w, length * planted, atol=1e-6), "the prototypes should come out as they were put in"
assert seen.unique.count == groups, f"{groups} are planted, {seen.unique.count} counted"
assert torch.equal(order[seen.unique.assignment], group), "every prototype should be in the group it was put into"
assert torch.equal(seen.unique.redundancy, size[order]), "so every group has its size"
assert seen.largest == size.max() and group[seen.largest_of] == size.argmax(), "and the largest one is known"

# %%
pairs = normalize(0.5 * torch.randn(500, dim, generator=g), dim=1)
pairs = torch.cat([pairs, 2 * (pairs @ centers[0])[:, None] * centers[0] - pairs])  # their mean lies along centers[0]
codes = normalize(pairs - 3 * centers[0], dim=1)  # data that look away from the void set
found = collapse.void_set(teacher.w, codes)
assert torch.equal(found.mask, group == 0), f"{found.count} lie opposite to the data, {void} were put there"
print(f"void set: {found.count:,} of {len(group):,}, no other")
fig, alt = panels.copies(seen.unique)
figures.show(fig, alt)

# %% [markdown]
# **Reading.** Left each group counts once, right with all its members: most groups have few copies, most prototypes
# have many. That the largest group is a void set is nothing the file can tell: it takes data to be away from.
#
# ## 2. One number needs a definition
# The papers call two prototypes copies at different distances, $1 - \cos < 0.025$ (PPC) and $\cos > 0.9$ (vMF), and do
# not say in which order one counts, nor whether copies of copies are copies. So beside M in index order the doctor
# gives the whole curve over the threshold, the range of M over random orders, and connected components. The student of
# our file has the same groups, but its copies have drifted further apart.

# %%
EPS = (0.0003, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4)
counted = {}
for found in (teacher, student):
    near = collapse.neighbors(found.w, EPS)  # all pairs are compared once
    for eps in EPS:
        counted[found.network, eps] = near.unique(eps).count, near.range(eps, orders=5, seed=seed), near.components(eps)
PPC, VMF = 0.025, 0.1
for found in (teacher, student):
    for eps in (PPC, VMF):
        m, (low, high), components = counted[found.network, eps]
        print(f"{found.network:8s} 1 - cos < {eps:<6g} M = {m}, other orders {low} to {high}, {components} components")
        assert components <= low <= high, "a component has at least one representative in every order"
assert counted["teacher", PPC] == counted["teacher", VMF] == (groups, (groups, groups), groups), "tight: no doubt"
m, (low, high), components = counted["student", PPC]
assert components < low < high, f"components {components}, orders {low}-{high}: here the definition should matter"
assert counted["student", VMF][0] == groups < m, "all copies are within vMF's threshold, not within PPC's"

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
for axis, name, title in zip(axes, ("teacher", "student"), ("tight copies", "copies that drifted apart"), strict=True):
    m, around, components = zip(*(counted[name, eps] for eps in EPS), strict=True)
    axis.fill_between(EPS, *zip(*around, strict=True), color=figures.ORANGE, alpha=0.5, lw=4, label="five other orders")
    axis.plot(EPS, m, "o-", color=figures.VERMILLION, ms=4, label="M, in index order")
    axis.plot(EPS, components, "x--", color=figures.BLUE, ms=5, label="connected components")
    axis.axhline(groups, color=figures.BLACK, lw=0.8, ls=":")
    for eps, whose in ((PPC, "PPC"), (VMF, "vMF")):
        axis.axvline(eps, color=figures.GRAY, lw=0.8)
        axis.text(eps, 1, whose, ha="center", va="bottom", transform=axis.get_xaxis_transform(), fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="eps: copies are closer than this, 1 − cos", ylim=(250, 6000))
    axis.set_title(title, pad=14)
    panels.plain_log(axis.xaxis), panels.plain_log(axis.yaxis, whole=True)
axes[0].set_ylabel("unique prototypes")
axes[0].text(EPS[-1], 1.05 * groups, "planted", ha="right", va="bottom", fontsize=8)
axes[1].legend(loc="upper right")
figures.show(fig, alt="Unique prototypes over the threshold. Tight copies: flat at the planted number over a wide range, "
             "all definitions agree. Drifted ones: both papers' thresholds give different numbers.")  # fmt: skip

# %% [markdown]
# **Reading.** A plateau is the evidence: between the width of the groups and their distance any threshold, order or rule
# gives one number. Where the curve falls through a threshold, M is a statement about the threshold, and only numbers by
# the same one can be compared. That is so for the student at PPC's, and may be for a real checkpoint.
#
# ## 3. Near, compared with what?
# In $p$ dimensions a random point is nearer than a cosine $t \ge 0$ with the chance
# $q(t) = \frac12 I_{1-t^2}(\frac{p-1}2, \frac12)$, so the nearest of $K - 1$ others has $P(\cos \le t) = (1 - q(t))^{K-1}$
# (`prototypes_lib/collapse/sphere.py`). What lies right of this law has been pulled together. Another disease it shows as
# well: prototypes without any copy that use few of their dimensions. The *effective rank*, exp of the entropy of the
# eigenvalues of their second moment, names it.

# %%
even = torch.randn(n_prototypes, dim, generator=g)
flat = torch.randn(n_prototypes, dim // 4, generator=g) @ torch.randn(dim // 4, dim, generator=g)
KINDS = {"random points": (even, figures.GRAY), "a quarter of the dimensions": (flat, figures.BLUE),
         "tight copies": (planted, figures.VERMILLION)}  # fmt: skip
nearest = {name: collapse.nearest_cosine(w).sort().values for name, (w, _) in KINDS.items()}
rank = {name: collapse.effective_rank(normalize(w, dim=1), squared=True) for name, (w, _) in KINDS.items()}
steps_up = (torch.arange(n_prototypes) + 0.5) / n_prototypes
law = collapse.uniform_nearest_cdf(nearest["random points"].double().numpy(), n_prototypes, dim)
gap = float((torch.from_numpy(law) - steps_up).abs().max())
single, alone = int((size == 1).sum()), int((1 - nearest["tight copies"] > PPC).sum())
print(f"largest distance of random points from the law: {gap:.3f}")
print(*(f"{name}: effective rank {r:.1f} of {dim}" for name, r in rank.items()), sep="\n")
assert gap < 0.05, f"random points should follow the law, not be {gap:.3f} away from it"
assert alone == single, f"{single} are planted without a copy, {alone} have none near"
assert rank["random points"] > 0.95 * dim, f"{rank}: random points should use all dimensions"
assert rank["a quarter of the dimensions"] <= dim / 4 + 1e-3, f"{rank}: the dimensions are what was planted"
assert collapse.unique_prototypes(flat).count > 0.99 * n_prototypes, "few dimensions, and still no copies"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(3, 2))
for name, (w, color) in KINDS.items():
    left.plot(nearest[name], steps_up, color=color, lw=4 if name == "random points" else 2, label=name)
    values = torch.linalg.svdvals(normalize(w, dim=1)) ** 2 / n_prototypes
    right.plot(range(1, dim + 1), 100 * values, color=color, lw=2, label=f"{name}: {rank[name]:.1f}")
left.plot(nearest["random points"], law, "--", color=figures.BLACK, lw=1, label="the law")
left.axvspan(1 - PPC, 1, color=figures.ORANGE, alpha=0.25, lw=0)
left.set(xlabel="cosine to the nearest other prototype", ylabel="share of prototypes below", xlim=(0.3, 1.005))
left.set_title("Nearest neighbors (shaded: copies, PPC)"), left.legend(loc=(0.31, 0.6))
right.set(xlabel="eigenvalue", ylabel="share, %", yscale="log", ylim=(0.1, 100), title="Spectrum and effective rank")
panels.plain_log(right.yaxis)
right.legend()
figures.show(fig, alt="Left: nearest cosines of random points lie on the law, those of planted copies at one, those of "
             "points in few dimensions between. Right: spectra, with the effective rank of each.")  # fmt: skip

# %% [markdown]
# **Reading.** Random points lie on the law, the black line within the gray one; the copies are at a cosine of 1. Points in
# a quarter of the dimensions are nearer to each other than chance in all of them, with hardly a copy among them. Their
# spectrum ends where their dimensions do. The void set is the copies' first eigenvalue: one direction, counted often.
#
# ## 4. A checkpoint trained here
# A run's folder is a checkpoint too, with images to look at beside it. The doctor takes its score from its config.

# %%
method = METHODS["dino-vmf"].but(n_prototypes=trained_k, views=Views(2, 2), teacher_temp=Warmup(0.04, 0.04),
                                 ema=0.9, ema_end=0.9)  # fmt: skip
each = 32 / limit  # a step, in epochs
run = Run.small(data=data, limit=limit, batch_size=32, lr=2e-3, prototype_lr_factor=3000.0, epochs=steps * each,
                warmup_epochs=steps // 10 * each, weight_decay=0.2, weight_decay_end=1.0, head_batch_norm=True, monitor_steps=10,
                checkpoint_epochs=1e6, device="cpu", seed=seed, out=out, progress=False)  # fmt: skip
result = train(method, run, "64-doctor")
patient = doctor.opened(result.folder)
sets = doctor.chosen(patient.sets, None, "crops")  # the teacher's first
options = {"seed": seed, "progress": False}
mine = [doctor.examine(found, tau=subject.temperature(patient, found.network), **options) for found in sets]
first, *_ = mine = doctor.compared(mine, patient.sets)
images = doctor.images_of(data, run.image_size, limit=limit, progress=False)
score, name, tau = subject.score(patient, sets[0], None)
beside = doctor.with_data(first, images, doctor.coder(patient, sets[0]), score, name=name, tau=tau,
                          side=run.image_size, **options)  # fmt: skip
print(words.verdict(first), *words.remarks(first, beside), sep="\n* ")

# %%
uniform = [float(torch.tensor(float(n)).log()) for n in (first.k, first.unique.count)]
entropies = (beside.marginal.entropy, beside.marginal.unique_entropy)
for what, h, most in zip(("all", "unique"), entropies, uniform, strict=True):
    print(f"marginal over {what} prototypes: entropy {h:.2f} of at most {most:.2f} nats")
    assert 0 <= h <= most + 1e-4, f"{h}: an entropy over that many is at most {most}"
assert first.unique.count == result.last["M"], "the doctor should count what the run's meter wrote down"
assert beside.held.sum() == beside.n and beside.redundancy.n == beside.n, "every image has one prototype"
inside = 0 if beside.void is None else int(beside.held[beside.void.mask].sum())
if check:
    assert first.unique.share < 0.6, f"{first.unique.share:.0%} unique: this time-lapse should have lost most"
    assert beside.void and beside.void.count > 0.25 * first.k, "a good part should be in the void set"
    assert first.nearest.median() < first.uniform.median(), "its prototypes should be nearer than random points"
    assert inside == 0, f"{inside} images in the void set: the score should never prefer the opposite of the data"
figures.show(*data_panels.marginal(first, beside))

# %%
centered = result.last["marginal_entropy"]
print(f"with the center of training, over the images of its last step: {centered:.2f} nats")
assert not check or centered > 1.5 * entropies[0], f"{centered:.2f}: centering should make the marginal more even"
if beside.void is not None:
    figures.show(*data_panels.void(first, beside))
figures.show(*data_panels.grid("most used", beside.grids["most used"], images))

# %%
report = doctor.Report(patient, tuple(mine), beside, images, command="notebook 64, section 4")
page = doctor.write(report, Path(out, "64_report"))
text = page.read_text()
print(f"{page.parent.name}/{page.name}: {text.count('<figure')} figures, {len(text) / 1e6:.1f} MB")
assert words.verdict(first) in text, "the page should begin with the verdict"
assert 'src="http' not in text and "<script src" not in text, "and need nothing from elsewhere"

# %% [markdown]
# **Reading.** Dashed is an even use. In seconds of hurried training the largest group of copies has come to lie opposite
# to the mean of the data, where no image chooses it: vMF's void set. A handful of the others takes all images; nearest
# ones share color more than kind. The targets of training are more even, as they are centered: the doctor's marginal is
# what images prefer by themselves. *Not shown here:* copies that share a large cluster's data; notebook 16 has them.
#
# ## 5. Official checkpoints
# The files below are the published ones of models in the papers' tables, with what the papers print for them: what the
# doctor should find. They were **not run here**: they lie on the internet, which this notebook does not use. `python
# tools/official_checkpoints.py` fetches and examines them; `docs/checkpoints.md` lists more, without a paper's row.

# %%
with TABLES.with_name("official_checkpoints.csv").open(newline="") as table:
    published = list(csv.DictReader(table))
KEYS = ("paper", "table", "method", "backbone")
for row in published:
    told = [one for one in printed() if row["paper"] and all(getattr(one, key) == row[key] for key in KEYS)]
    told = [
        (*split(one.metric), int(float(one.value)))
        for one in told
        if "unique" in one.metric or "duplicate" in one.metric
    ]
    assert bool(row["paper"]) == bool(told), f"{row['name']}: its row should be in the papers' tables"
    print(f"{row['name']}: {row['layout']}; {row['paper']}, {row['table']}\n" * bool(told), end="")
    for metric, asked, value in told:
        print(f"    {metric:36s}{', '.join(f'{k} {v}' for k, v in asked.items()):13s}{value:8,d} printed, not run here")
print(f"and {sum(not row['paper'] for row in published)} more that no table counts")
if official:
    for found in checkpoints.all_prototypes(official):
        print(f"{found.network}, {found.of}:", words.verdict(doctor.examine(found)))

# %%
course.finish()
