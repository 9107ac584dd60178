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
# # Spreading the data over the prototypes does not keep the prototypes apart
#
# **Claim.** Without a regularizer of the marginal latent class distribution (MLCD) the DINO objective maps all data to
# one spot. With one, the data spread but the prototypes merge: of K only M stay different (*partial prototype
# collapse*). KoLeo on the data moves neighboring data apart and leaves the prototypes merged; KoLeo on the prototypes
# keeps them apart. And merging can pay: a large cluster with many copies of its prototype *looks* evenly assigned.
# **Papers.** The pictures of (PPC, Fig. 1 a–d), made by training; (PPC, sections 3 and 4, Definition 4.1, Fig. 2).
# **Before this:** `12_probability_centering.py`, `14_loss_plateaus.py`. **Cost:** about 40 s on two CPU cores.
#
# **Deviations.** A toy: 100 points of four unequal clusters in the plane, one hidden layer, unit prototypes, noise for
# augmentation, Adam; the encoder starts, like a fresh network, with nearly one code for all data. Chosen by looking at
# the outcome: noise, start, steps, the weights of the mean entropy (at half of it the shortcut of section 4 shows in
# fewer seeds) and of KoLeo-proto (at the paper's 0.1 M stays clearly below K), and the seed drawn.
# PPC's runs use probability centering; its shortcut shows here with the mean entropy and **not** with centering.

# %% tags=["parameters"]
n_seeds: int = 8  # repeats of every run, trained side by side in one tensor
n_prototypes: int = 12  # K
steps: int = 600  # optimizer steps a run
noise: float = 0.3  # standard deviation of a view around its point; neighboring clusters are 2.8 apart
tau_s: float = 0.1  # student temperature
tau_t: float = 0.05  # teacher temperature, below tau_s: sharpening
me_weight: float = 2.0  # weight of the mean entropy
kd_weight: float = 0.1  # weight of KoLeo-data
kp_weight: float = 0.5  # weight of KoLeo-proto
seed: int = 0  # of every generator
shown: int = 4  # which of the seeds is drawn; in some of the others sharpening alone leaves two spots

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from prototypes_lib import assignment, collapse, course, figures, objectives, regularizers, scores

figures.use_style()
torch.manual_seed(seed)
torch.set_num_threads(1)  # the tensors are small: more threads only wait for one another
CLUSTER = ((figures.BLUE, "o"), (figures.ORANGE, "s"), (figures.GREEN, "^"), (figures.PINK, "D"))
PROTO = figures.ROLE["prototypes"]

# %% [markdown]
# ## 1. Counting: what is a unique prototype?
# (PPC, Definition 4.1) asks for a partition of the unit prototypes $\mu_1 \dots \mu_K$ into $M$ sets $V_m$, each with a
# representative $v_m \in V_m$ such that $1 - v_m^\top \mu_j < \varepsilon$ for all $\mu_j \in V_m$; the *redundancy
# factor* is $r_m = |V_m|$. Which partition is left open ($M = K$ always qualifies). Our rule (for any K in
# `prototypes_lib/collapse/unique.py`): in index order, join the first representative that is near enough, or become one.


# %%
def first_fit(mu, eps):
    v, part = [], []  # the representatives; for each prototype the number of its own
    for k in range(len(mu)):
        m = next((m for m, i in enumerate(v) if 1 - mu[i] @ mu[k] < eps), len(v))
        if m == len(v):
            v.append(k)
        part.append(m)
    return v, part


w = torch.randn(300, 2, dtype=torch.float64)
u = collapse.unique_prototypes(w, eps=0.001)
same = first_fit(F.normalize(w, dim=-1), 0.001) == (u.representatives.tolist(), u.assignment.tolist())
assert same, "the inline rule and the library's should give the same partition"

# %% [markdown]
# Where copies are tight, every rule gives the same M. In chains (neighbors within $\varepsilon$, ends not) the order
# decides, and "copies of copies are copies" (connected components) gives yet another number.

# %%
on_circle = lambda degrees: torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], dim=-1)
starts = torch.tensor([[10.0], [130], [250]])
chains, tight = (on_circle((starts + step * torch.arange(7)).flatten()) for step in (6, 1))
luckiest = min((torch.randperm(21) for _ in range(300)), key=lambda i: collapse.unique_prototypes(chains[i]).count)
(low, high), components = collapse.unique_range(chains, orders=300), collapse.connected_components(chains)
assert components < low < high, f"components {components}, orders {low}-{high}: here the rule should matter"
assert collapse.unique_range(tight) == (3, 3) and collapse.connected_components(tight) == 3, "tight copies: no doubt"
fig, axes = plt.subplots(1, 2, figsize=(5.8, 2.9))
for ax, order, name in zip(axes, (torch.arange(21), luckiest), ("index", "luckiest"), strict=True):
    u = collapse.unique_prototypes(chains[order])
    for k, m in zip(order, u.assignment % 4, strict=True):
        ax.plot(*chains[k], CLUSTER[m][1], color=CLUSTER[m][0], ms=6)
    for x, y in 0.93 * chains[order[u.representatives]]:
        ax.plot([0, x], [0, y], color="0.3", lw=1)
    ax.set(title=f"{name} order: M = {u.count}", aspect="equal", xticks=[], yticks=[], frame_on=False)
figures.show(fig, alt=f"21 prototypes in three chains: {high} parts in index order, {low} in the luckiest order.")

# %% [markdown]
# Color and shape tell the parts, spokes the representatives. So a report of M states its rule and its order.
# ## 2. The toy
# The teacher (a moving average of the student) assigns one noisy view of a point, the student predicts that assignment
# from the other view: $P_k(y) \propto \exp(\mu_k^\top y / \tau)$, a vMF mixture with equal $\kappa = 1/\tau$ (PPC,
# Eq. 1). Two ways to regularize the MLCD $\bar p_k = \mathbb{E}_x[P_k(y)]$: the **mean entropy** $H(\bar p)$ of the
# student, which it enlarges, and **probability centering** of the teacher's targets (PPC, Eq. 3).

# %%
sizes = (40, 30, 20, 10)  # points of the four clusters
cluster = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))


def fresh(generator, hidden=16):
    randn = lambda *shape: torch.randn(n_seeds, *shape, generator=generator)
    x = 2 * on_circle(90.0 * cluster) + 0.25 * randn(len(cluster), 2)
    net = {"W1": 0.7 * randn(2, hidden), "b1": 0.5 * randn(1, hidden), "W2": randn(hidden, 2) / 16}
    return x, net | {"b2": 2 * F.normalize(randn(1, 2), dim=-1), "w": F.normalize(randn(n_prototypes, 2), dim=-1)}


def encode(net, x):
    return F.normalize(torch.tanh(x @ net["W1"] + net["b1"]) @ net["W2"] + net["b2"], dim=-1)


# %%
ME, PC = "mean entropy", "probability centering"
score = torch.vmap(scores.cosine, in_dims=(0, 0, None))  # the leading dimension is the seed
koleo = lambda batch: torch.stack([regularizers.koleo(x) for x in batch])  # it looks for copies: not for vmap


def loss_of(student, views, targets, mlcd, kd, kp):
    y = encode(student, views)
    log_s = score(y, student["w"], tau_s)
    loss = n_seeds * objectives.cross_entropy(targets.softmax(-1), log_s)  # summed over seeds, as the terms below
    if mlcd == ME:
        loss = loss - me_weight * torch.vmap(regularizers.mean_entropy)(log_s.softmax(-1)).sum()
    return loss + (kd * koleo(y[:, : len(cluster)]).sum() if kd else 0) + (kp * koleo(student["w"]).sum() if kp else 0)


# %%
def train(mlcd=None, tau_t=tau_t, kd=0.0, kp=0.0):
    generator = torch.Generator().manual_seed(seed)
    x, teacher = fresh(generator)
    student = {name: value.clone().requires_grad_() for name, value in teacher.items()}
    centers = [assignment.ProbabilityCenter(n_prototypes) for _ in range(n_seeds)]
    optimizer = torch.optim.Adam(student.values(), lr=0.01)
    for _ in range(steps):
        views = x.repeat(1, 2, 1) + noise * torch.randn(n_seeds, 2 * len(cluster), 2, generator=generator)
        with torch.no_grad():
            targets = score(encode(teacher, views.roll(len(cluster), dims=1)), teacher["w"], tau_t)
            if mlcd == PC:
                targets = torch.stack([link(t, tau_t) for link, t in zip(centers, targets, strict=True)])
        optimizer.zero_grad()
        loss_of(student, views, targets, mlcd, kd, kp).backward()
        optimizer.step()
        for name, value in teacher.items():
            value.lerp_(student[name].detach(), 1 - 0.97)
    return {"y": encode(teacher, x), "w": F.normalize(teacher["w"], dim=-1)}


# %% [markdown]
# ## 3. The four pictures
# Without their MLCD term the two objectives are the same, so column (a) shows two other things: nothing at all, not
# even sharpening ($\tau_t = \tau_s$), and sharpening alone.

# %%
runs = {("a", ME): train(tau_t=tau_s), ("a", PC): train()}
for mlcd in (ME, PC):
    for setting, weights in (("b", {}), ("c", {"kd": kd_weight}), ("d", {"kp": kp_weight})):
        runs[setting, mlcd] = train(mlcd, **weights)
evenness = lambda p: float(objectives.entropy(p)) / math.log(len(p)) if len(p) > 1 else 0.0
for run in runs.values():
    run["unique"] = [collapse.unique_prototypes(w) for w in run["w"]]
    log_p = score(run["y"], run["w"], tau_s)
    run["marginal"] = [collapse.marginal(row, u) for row, u in zip(log_p, run["unique"], strict=True)]
M = {key: np.array([u.count for u in run["unique"]]) for key, run in runs.items()}


# %%
def draw_bars(ax, u, m):  # the MLCD over all K and over the unique prototypes, in units of the uniform one
    groups = (("all", 0, m.p[u.assignment.argsort(stable=True)], 0.45), ("unique", n_prototypes + 1.5, m.unique_p, 1))
    for name, start, p, alpha in groups:
        ax.bar(start + np.arange(len(p)), (len(p) * p).clamp(max=3), color=PROTO, alpha=alpha, width=0.8)
        ax.plot([start - 0.6, start + len(p) - 0.4], [1, 1], "--", color=figures.ROLE["bound"], lw=0.8)
        ax.text(start + (len(p) - 1) / 2, -0.25, f"{name} {len(p)}\n{evenness(p):.2f}", ha="center", va="top")
    ax.set(xlim=(-1, 2 * n_prototypes + 1.5), ylim=(0, 3), yticks=[0, 1, 2, 3], xticks=[])


# %%
def draw_circle(ax, y, w, u):  # data stacked inwards from the circle, prototypes outwards
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.6", lw=1))
    place = (torch.atan2(y[:, 1], y[:, 0]) / 0.07).round()
    stacked = (0.95 - 0.0085 * (place[:, None] == place).tril(-1).sum(1))[:, None] * y
    for c, (color, marker) in enumerate(CLUSTER):
        ax.plot(*stacked[cluster == c].T, marker, color=color, ms=3.4, mew=0, alpha=0.8)
    for v, r in zip(w[u.representatives], u.redundancy, strict=True):
        x, z = torch.outer(v, 1.1 + 0.095 * torch.arange(r))
        ax.plot(x, z, "o", color="white", mec=PROTO, mew=1.2, ms=4.8, clip_on=False)
        ax.plot(x[0], z[0], "o", color=PROTO, ms=5.5)
    ax.set(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5)), ax.axis("off")


# %%
TITLE = {"a": "(a) no MLCD term", "b": "(b) MLCD regularized", "c": "(c) + KoLeo-data", "d": "(d) + KoLeo-proto"}
word = {key: key[1] for key in runs} | {("a", ME): "no sharpening either", ("a", PC): "sharpening alone"}
fig, axes = plt.subplots(4, 4, figsize=(10, 7.9), height_ratios=(3, 0.7, 3, 0.7))
for (setting, mlcd), run in runs.items():
    row, column = 2 * (mlcd == PC), "abcd".index(setting)
    draw_circle(axes[row, column], run["y"][shown], run["w"][shown], run["unique"][shown])
    draw_bars(axes[row + 1, column], run["unique"][shown], run["marginal"][shown])
    axes[row, column].set_title(f"{TITLE[setting]}, M = {M[setting, mlcd][shown]}", weight="bold", pad=17)
    axes[row, column].text(-1.5, 1.55, word[setting, mlcd])
    axes[row + 1, 0].set_ylabel("times\nuniform")
entries = [("unique prototype", PROTO, "o", PROTO), ("its copies", "white", "o", PROTO)]
entries += [(f"cluster, {size} points", color, m, color) for size, (color, m) in zip(sizes, CLUSTER, strict=True)]
handles = [plt.Line2D([], [], ls="", marker=m, mfc=c, mec=e, ms=5, label=name) for name, c, m, e in entries]
fig.legend(handles=handles, loc="outside lower center", ncols=6)
middle = "(b) clusters apart, prototypes in stacks of copies; (c) data spread along arcs, stacks stay"
figures.show(fig, alt=f"(a) Data on one spot; {middle}; (d) no copies.")

# %% [markdown]
# One seed. Bars: the MLCD, light over all K prototypes, dark when only the unique ones compete; below them the
# *evenness* $H / \ln(\text{count})$. (a) All codes at one spot, and with sharpening one prototype that takes it. (b)
# Clusters come apart, prototypes merge into a few, near the clusters. (c) Codes that coincided spread along arcs; the
# stacks of copies stay. (d) All prototypes stand alone. *Not shown here:* (PPC, Fig. 1c) draws KoLeo-data spreading the
# data over more of the circle. Here all codes together do not (`resultant` in section 4's table, 1 for equal codes).

# %%
resultant = {key: run["y"].mean(1).norm(dim=-1) for key, run in runs.items()}
used = np.array([m.perplexity for m in runs["a", PC]["marginal"]])
assert resultant["a", ME].min() > 0.95, "without centering and sharpening all codes should coincide"
assert used.mean() < 2 and used.max() < 3, f"sharpening alone: {used} prototypes in use, one should be"
for mlcd in (ME, PC):
    b, c, d = (M[setting, mlcd] for setting in "bcd")
    closer = float((koleo(runs["b", mlcd]["y"]) - koleo(runs["c", mlcd]["y"])).mean())  # in log distance
    assert resultant["b", mlcd].max() < 0.8, "the regularized MLCD should keep the data apart"
    assert b.mean() < 0.5 * n_prototypes, f"(b) M = {b}: partial prototype collapse should leave less than half"
    assert closer > 0.2, f"KoLeo-data should move codes away from their neighbors: log ratio {closer:.2f}"
    assert c.mean() < b.mean() + 1, f"(c) M = {c} against {b}: KoLeo-data should not undo the merging"
    assert resultant["c", mlcd].mean() > resultant["b", mlcd].mean(), "the text says: all codes together do not spread"
    assert d.mean() > 0.9 * n_prototypes, f"(d) M = {d}: KoLeo-proto should keep nearly all K unique"
    print(f"{mlcd:22s} M: (b) {b}  (c) {c}  (d) {d}; (c) puts neighbors {math.exp(closer):.1f} times as far apart")

# %% [markdown]
# ## 4. The shortcut, and where it does not show
# A cluster with 40 % of the data cannot give one prototype its $1/K$, but $r$ copies share it. With $r_m$ in proportion
# to the cluster the MLCD is uniform over all K, and over the unique ones as uneven as the data: a shortcut (PPC,
# section 4). So over the unique prototypes it should be less even, and prototypes with more copies should hold more
# data (PPC, Fig. 2, where the data are assigned to the unique prototypes).

# %%
even = {key: np.array([(evenness(m.p), evenness(m.unique_p)) for m in run["marginal"]]) for key, run in runs.items()}
print("means over seeds               M  evenness over all K, unique   seeds less even  resultant")
for (setting, mlcd), e in even.items():
    numbers = (M[setting, mlcd].mean(), *e.mean(0), (e[:, 1] < e[:, 0]).sum(), resultant[setting, mlcd].mean())
    print(f"({setting}) {word[setting, mlcd]:22s}", "{:5.1f} {:13.3f} {:12.3f} {:13d} {:14.2f}".format(*numbers))
gap = {mlcd: even["b", mlcd][:, 1] - even["b", mlcd][:, 0] for mlcd in (ME, PC)}
error = {mlcd: g.std(ddof=1) / math.sqrt(n_seeds) for mlcd, g in gap.items()}
print("(b), unique - all, with standard error:", {m: f"{g.mean():+.3f} ± {error[m]:.3f}" for m, g in gap.items()})
assert gap[ME].mean() + 2 * error[ME] < 0, "mean entropy: over the unique prototypes the MLCD should be less even"
assert gap[PC].mean() + 2 * error[PC] > 0 and (gap[PC] > 0).any(), "centering: the text says that no effect is clear"
copies = {mlcd: torch.cat([u.redundancy for u in runs["b", mlcd]["unique"]]).numpy() for mlcd in (ME, PC)}
held = {mlcd: torch.cat([m.unique_p for m in runs["b", mlcd]["marginal"]]).numpy() for mlcd in (ME, PC)}
rank = {mlcd: float(spearmanr(copies[mlcd], held[mlcd]).statistic) for mlcd in (ME, PC)}
assert rank[ME] > 0.5, f"rank correlation {rank[ME]:.2f}: more copies should go with more data"
assert rank[ME] > rank[PC] + 0.1, f"{rank[ME]:.2f} against {rank[PC]:.2f}: centering should tie copies to data less"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), width_ratios=(1, 1.3))
for i, (mlcd, color, marker) in enumerate(((ME, figures.GREEN, "o"), (PC, figures.PINK, "s"))):
    left.plot([2 * i, 2 * i + 1], even["b", mlcd].T, marker + "-", color=color, lw=0.8, alpha=0.6)
    left.plot([2 * i, 2 * i + 1], even["b", mlcd].mean(0), "-", color=color, lw=3)
    right.plot(copies[mlcd] + 0.16 * i - 0.08, held[mlcd], marker, color=color, ms=4, alpha=0.4)
    r = np.unique(copies[mlcd])
    mean, label = [held[mlcd][copies[mlcd] == v].mean() for v in r], f"{mlcd}, rank correlation {rank[mlcd]:.2f}"
    right.plot(r, mean, marker + "-", color=color, ms=7, label=label)
right.plot([0, 6], [0, 6 / n_prototypes], "--", color=figures.ROLE["bound"], lw=1, label="r / K: each copy holds 1 / K")
left.set(title="(b) Even, until copies are removed?", ylabel="evenness of the MLCD, H / ln(count)")
right.set(title="(b) More data, more copies?", xlabel="redundancy factor r", ylabel="share of the data")
left.set_xticks(range(4), 2 * ["all K", "unique"]), right.legend(loc="upper left")
alt = f"Mean entropy: less even over unique prototypes, more data have more copies (rank correlation {rank[ME]:.2f}); "
figures.show(fig, alt=alt + f"probability centering: no clear difference, copies tied to data less ({rank[PC]:.2f}).")

# %% [markdown]
# Thin lines and small points are seeds. With the **mean entropy** the MLCD looks nearly uniform over all K and is less
# even over the unique prototypes (left); data and copies follow the line on which every copy holds $1/K$ (right). With
# **probability centering** the prototypes merge as much, but *the shortcut is not shown here*: the difference is within
# two standard errors of zero, of either sign by seed, and copies follow the data at most loosely. A plausible reading:
# the mean entropy's gradient moves prototypes to where they even out the MLCD; centering only shifts the targets.
#
# **To take along.** A uniform MLCD proves neither different prototypes nor even clusters: report M with its rule, and
# the MLCD over the unique prototypes. Why KoLeo-proto works, and what $\lambda$ does: `18_koleo_proto.py`.

# %%
course.finish()
