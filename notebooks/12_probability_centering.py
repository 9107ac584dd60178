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
# # Probability centering is one Sinkhorn step
#
# **Claim.** A teacher's targets must not all land on a few prototypes. SwAV, MSN and DINOv2 balance them by
# Sinkhorn-Knopp, DINO subtracts a center. Centering in probability space is the first step of Sinkhorn, started from
# the softmax, with a moving average in the place of the batch. We take each difference in turn: start, average, steps.
# **Papers.** (PPC, section 3, Eqs. 2, 3), (vMF, section 3.4, Eqs. 8, 9, A.4); Sinkhorn distances: Cuturi (2013).
# **Before this:** `10_vmf_mixture.py` (why scores carry $\log C_p$). **Cost:** about 15 s on two CPU cores.
#
# **Deviations.** (vMF, Eq. 9) is read with $\log C_p$ inside its softmax, as its text and (PPC, Eq. 3) mean; section 3
# shows the printed form. Sinkhorn runs in the log domain, the official codes exponentiate scores. Data are synthetic:
# random codes with a common direction, random prototypes, lengths chosen to make gaps visible.

# %% tags=["parameters"]
n_samples: int = 256  # B, samples in a batch
n_prototypes: int = 64  # K
dim: int = 32  # p, dimension of a code; a divisor of 256
tau: float = 0.07  # teacher temperature
n_seeds: int = 5  # repeats; claims about random data are checked in each

# %%
import timeit

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize

from prototypes_lib import course, figures, objectives, scores
from prototypes_lib.assignment import Center, Normalize, ProbabilityCenter, Sinkhorn

figures.use_style()
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # small matrices: threads would only wait for each other
B, K, p = n_samples, n_prototypes, dim
randn = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
codes = lambda n, seed, pull=0.5: normalize(randn(seed, n, p) + pull, dim=-1)  # the pull makes some prototypes richer
prototypes = lambda seed, length=1.0, spread=0.0, k=K: (
    length * torch.exp(spread * randn(2000 + seed, k, 1)) * normalize(randn(1000 + seed, k, p), dim=-1)
)

# %% [markdown]
# ## 1. Sinkhorn shares the samples out equally
# $L_{bk}$ is the score of prototype $k$ for sample $b$, divided by $\tau$. We look for assignments $Q$ that follow the
# scores, are not needlessly sharp, and use every prototype equally: optimal transport with an entropy term,
# $$\max_{Q \ge 0} \textstyle\sum_{bk} Q_{bk} L_{bk} + H(Q) \quad\text{with}\quad
#   \sum_k Q_{bk} = \tfrac1B, \quad \sum_b Q_{bk} = \tfrac1K .$$
# It is strictly concave; where the derivative of the Lagrangian is zero, $\log Q_{bk} = L_{bk} - a_b - c_k$: **scores
# minus one number a sample and one a prototype.** Given $a$, the constraint of prototype $k$ fixes $c_k$: divide column
# $k$ by its sum. Given $c$, the samples' constraint fixes $a$. Sinkhorn alternates; a division is a subtraction in the
# log domain. At the end rows are scaled from $\frac1B$ to one: they are targets.

# %%
for seed in range(n_seeds):
    L = scores.cosine(codes(B, seed), prototypes(seed), tau)
    Q = L.exp()  # the textbook form
    for _ in range(3):
        Q = Q / Q.sum(0, keepdim=True) / K  # every prototype: mass 1/K
        Q = Q / Q.sum(1, keepdim=True) / B  # every sample: mass 1/B
    gap = (B * Q - Sinkhorn(3)(L, tau).exp()).abs().max()
    assert gap < 1e-12, f"{gap:.1e}: subtracting log-sums is dividing by sums"
    log_q = Sinkhorn(1000)(L, tau)
    shift = log_q - L  # -a_b - c_k: nothing may be left after removing row and column means
    rest = (shift - shift.mean(0) - shift.mean(1, keepdim=True) + shift.mean()).abs().max()
    off = (K * log_q.exp().mean(0) - 1).abs().max()
    assert rest < 1e-11, f"{rest:.1e}: the correction is one number a sample and one a prototype"
    assert off < 1e-9, f"{off:.1e}: in the limit prototypes share equally, so the limit is the optimum"
print(f"log domain = textbook form; the limit solves the problem (marginal error {off:.0e}); {n_seeds} seeds")

# %%
L = scores.cosine(codes(40, 0), prototypes(0, k=10), tau)
L = L[L.argmax(1).argsort()]
links = {"softmax": Normalize(), "Sinkhorn, 1 step": Sinkhorn(1), "3 steps": Sinkhorn(3), "limit": Sinkhorn(1000)}
targets = [link(L, tau).exp() for link in links.values()]
fig, axes = plt.subplots(2, 4, figsize=(7, 4), sharex=True, sharey="row", height_ratios=[2.2, 1])
for name, q, top, bottom in zip(links, targets, *axes, strict=True):
    image = top.imshow(q, aspect="auto", vmin=0, vmax=1, interpolation="nearest", zorder=3)
    top.set(title=name)
    bottom.bar(range(10), 10 * q.mean(0), color=figures.ROLE["prototypes"])
    bottom.axhline(1, color=figures.ROLE["bound"], lw=1, ls="--")
    bottom.set(xlabel="prototype $k$")
axes[0, 0].set(ylabel="sample $b$")
axes[1, 0].set(ylabel="share of data\n(1 = 1/K)")
fig.colorbar(image, ax=axes[0], label="target")
figures.show(fig, alt="Targets of 40 samples for 10 prototypes; the marginal levels out from the softmax to the limit.")
uneven = [q.mean(0).std().item() for q in targets]
assert uneven == sorted(uneven, reverse=True), f"{uneven}: each stage shares more evenly than the one before"

# %% [markdown]
# Top: samples sorted by their best prototype. Bottom: the share of the data each prototype gets (the marginal latent
# class distribution). One step from $e^L$ removes part of the unevenness of the softmax and can overshoot (the richest
# becomes the poorest, $k = 0$); three leave little, the limit nothing.
#
# ## 2. The first step is probability centering
# Start from the softmax, $P_{bk} = e^{L_{bk}}/Z_b$. Columns first: $P_{bk} / \sum_{b'} P_{b'k}$. Then rows: what does
# not depend on $k$ ($Z_b$, and a factor $B$ we put in) cancels. With $\bar P_k = \frac1B \sum_b P_{bk}$,
# $$\tilde P_{bk} = \frac{P_{bk} / \bar P_k}{\sum_j P_{bj} / \bar P_j}
#   = \operatorname{softmax}_k\bigl(L_{bk} - \log \bar P_k\bigr) \qquad\text{(PPC, Eq. 2)}.$$
# The center $c_k = \log \bar P_k$ is the log of the share prototype $k$ has now: the rich get poorer (vMF, A.4). (PPC,
# Eq. 3) takes it as a moving average. The library (`prototypes_lib/assignment.py`) takes logs of sums; in float32 the
# line for $c$ below is a trap. Entries of $P$ below $10^{-45}$ are zero; a prototype with zero from *every* sample gets
# the center $\log 0$, and a moving average never forgets $-\infty$.

# %%
for seed in range(n_seeds):
    for length in (1.0, 2.0, 5.0):
        L = scores.vmf(codes(B, seed), prototypes(seed, length, spread=0.3), tau)
        c = torch.log(torch.softmax(L, dim=1).mean(dim=0))
        P_tilde = torch.softmax(L - c, dim=1)  # (PPC, Eq. 2)
        one_step = Sinkhorn(1)(Normalize()(L, tau), tau).exp()
        library = torch.softmax(ProbabilityCenter(K, momentum=0.0)(L, tau), dim=1)
        gap = max((P_tilde - one_step).abs().max(), (library - one_step).abs().max())
        assert gap < 1e-12, f"seed {seed}, length {length}: {gap:.1e}: Eq. 2 is one step from the softmax"
w = normalize(randn(0, 4096, 256), dim=-1).float()  # a realistic head, |w| = 6 below
y = normalize(w[:1] + 0.5 * normalize(randn(1, 64, 256), dim=-1).float(), dim=-1)  # codes near one prototype
L, link = scores.vmf(y, 6 * w, 0.04), ProbabilityCenter(4096, momentum=0.0)
link(L, 0.04)
lost = torch.softmax(L, -1).mean(0).log().isinf().sum()
error = (link.center - torch.softmax(L.double(), -1).mean(0).log()).abs().max()
assert lost > 0 and error < 1e-3, f"plain form: {lost} centers are -inf; log domain: error {error:.1e}"
print(f"plain float32: {lost} of {len(w)} centers are -inf; log domain: none, error {error:.0e} nats")

# %% [markdown]
# ## 3. What the start changes
# The official Sinkhorn starts from $e^L$, not from $P$. Rows differ by the factor $Z_b$; they are divided out *after*
# the columns, so in the first step a sample with large scores weighs more. The limit does not care: $a_b$ absorbs
# $Z_b$. In the same way a shift of all the scores of one prototype is absorbed by $c_k$, from $e^L$ at once, from $P$
# only in the limit. **And $\log C_p(\kappa_k)$ is such a shift.** Which rules are affected by it?

# %%
rules = {
    "Center(m=0)": lambda L: torch.log_softmax(Center(K, 0.0)(L, tau), 1),
    "ProbabilityCenter(m=0)": lambda L: torch.log_softmax(ProbabilityCenter(K, 0.0)(L, tau), 1),
    "Sinkhorn(3)": lambda L: Sinkhorn(3)(L, tau),
    "Normalize, Sinkhorn(3)": lambda L: Sinkhorn(3)(Normalize()(L, tau), tau),
    "Normalize, Sinkhorn limit": lambda L: Sinkhorn(500)(Normalize()(L, tau), tau),
}
tv = lambda a, b: (a.exp() - b.exp()).abs().sum(1).mean().item() / 2  # total variation, mean over samples
for seed in range(n_seeds):
    y, w, per_sample = codes(B, seed), prototypes(seed, spread=0.3), 3 * randn(seed, B, 1)
    dot, vmf = scores.dot(y, w, tau), scores.vmf(y, w, tau)
    moved = [(tv(f(vmf), f(dot)), tv(f(vmf), f(vmf + per_sample))) for f in rules.values()]
    affected = [(not a < 1e-8, not b < 1e-8) for a, b in moved]
    wanted = [(False, False), (True, False), (False, True), (True, False), (False, False)]
    assert affected == wanted, f"seed {seed}: {moved}: which shift affects the targets is a property of the rule"
print("total variation between targets   with and without log C_p   with a shift per sample")
print(*(f"{name:34}{a:24.0e}{b:26.0e}" for name, (a, b) in zip(rules, moved, strict=True)), sep="\n")

# %% [markdown]
# Logit centering cancels $\log C_p$ exactly; the paper says dampened, and leaves logit centering for it (vMF, section
# 3.4). The official Sinkhorn cancels it too, at any number of steps, and so does the limit of every start: the targets
# are those of dot products. A few steps from the softmax balance and are still affected by the normalizer.
#
# (vMF, Eq. 9) prints $P$ as the softmax of $\langle w, y\rangle/\tau$, without $\log C_p$: its center describes other
# assignments than those it is subtracted from. How even are the targets (marginal entropy, at best $\ln K$)?

# %%
n_steps, gaps, even = [1, 3, 10, 30, 100, 400], torch.zeros(3, n_seeds, 6), torch.zeros(n_seeds, 3)
for seed in range(n_seeds):
    for i, length in enumerate((1.0, 2.0, 5.0)):
        L = scores.vmf(codes(B, seed), prototypes(seed, length), tau)
        gaps[i, seed] = torch.tensor([tv(Sinkhorn(n)(L, tau), Sinkhorn(n)(Normalize()(L, tau), tau)) for n in n_steps])
    y, w = codes(B, seed), prototypes(seed, spread=0.5)
    L, printed = scores.vmf(y, w, tau), torch.softmax(scores.dot(y, w, tau), 1).mean(0).log()
    for i, x in enumerate((L, L - printed, ProbabilityCenter(K, 0.0)(L, tau))):
        even[seed, i] = objectives.entropy(torch.softmax(x, 1).mean(0))
assert (gaps[:, :, -1] < 1e-9).all(), f"{gaps[:, :, -1].max():.1e}: both starts have one limit"
assert (gaps[2, :, :2] > gaps[0, :, :2]).all(), "with long prototypes the start matters more, after 1 step and after 3"
assert (even[:, 2] > even[:, :2].amax(1)).all(), f"{even}: with log C_p the targets are the most even"
print("between starts, |w| = 1, 2, 5; after 1 step:", gaps[:, :, 0].mean(1), "after 3:", gaps[:, :, 1].mean(1))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
for i, label in enumerate(("$|w|$ = 1", "$|w|$ = 2", "$|w|$ = 5")):
    left.loglog(n_steps, gaps[i].T.clamp_min(1e-17), color=f"C{i}", lw=0.6, alpha=0.6)
    left.loglog(n_steps, gaps[i].mean(0).clamp_min(1e-17), "o^s"[i], color=f"C{i}", label=label)
left.set(xlabel="Sinkhorn steps", ylabel="total variation between starts", title="$e^L$ or softmax: one limit")
left.legend(loc="lower left")
right.plot(["no center", "as printed", "with $\\log C_p$"], even.T, "o-", color=figures.ROLE["teacher"], lw=0.6)
right.axhline(objectives.entropy(torch.full((K,), 1 / K)), color=figures.ROLE["bound"], ls="--", lw=1)
right.set(ylabel="marginal entropy (nats)", title=f"Eq. 9 needs its $\\log C_p$ (dashed: ln {K})")
figures.show(fig, alt="Two starts of Sinkhorn meet after many steps; Eq. 9 as printed is less even than no center.")

# %% [markdown]
# Left: a line is a seed, a marker the mean. Three steps nearly close the gap for unit prototypes; long ones are sharp,
# and after three still far from the limit. Right: a line is a seed. As printed, Eq. 9 can be *less* even than no
# center: it pushes long prototypes down, whose scores $\log C_p$ had already lowered.
#
# ## 4. What the moving average changes
# $c \leftarrow m\,c + (1-m)\log\bar P$, and a batch is centered by the $c$ from before it. On one repeated batch the
# distance to its own center shrinks by $m$ a step; $m = 0$ has no memory. On fresh batches three things happen. Noise:
# averaging divides the variance by about $\frac{1+m}{1-m}$. Bias: it averages *logs*, and by Jensen
# $\mathbb E \log \bar P_k - \log \mathbb E \bar P_k \approx -\operatorname{Var}(P_k) / (2 B\, (\mathbb E P_k)^2)$:
# a rare prototype's center is too low, and it is lifted too much; the log of averaged means would not do that. Lag:
# below, the codes' common direction flips. The total variation from equal shares, on fresh samples, judges a center.

# %%
m, w, n = 0.9, prototypes(0), 1500
P = torch.softmax(scores.cosine(codes(100_000, 99), w, tau), 1)
truth, jensen = P.mean(0).log(), -P.var(0) / (2 * B * P.mean(0) ** 2)
batches = [scores.cosine(codes(B, 10_000 + t), w, tau) for t in range(n)]
log_means = torch.stack([torch.softmax(L, 1).mean(0).log() for L in batches])
(link, fixed), centers, mean = (ProbabilityCenter(K, m) for _ in range(2)), torch.zeros(n, 2, K), truth.exp()
for t, L in enumerate(batches):
    assert torch.equal(L - link.center, link(L, tau)), "a batch is centered before it is averaged in"
    mean = m * mean + (1 - m) * log_means[t].exp()
    centers[t, 0], centers[t, 1], _ = link.center, mean.log(), fixed(batches[0], tau)
    gap = (fixed.center - (1 - m ** (t + 1)) * log_means[0]).abs().max()
    assert gap < 1e-12, f"step {t}: {gap:.1e}: on one repeated batch c = (1 - m^t) log-mean"
bias = centers[100:].mean(0) - truth
slope = bias @ jensen / jensen.square().sum()
noise = centers[100:, 0].var(0).mean() / log_means.var(0).mean() * (1 + m) / (1 - m)
assert 0.7 < slope[0] < 1.3 and abs(slope[1]) < 0.3, f"slopes {slope}: averaging logs costs Jensen's gap"
assert 0.6 < noise < 1.5, f"{noise:.2f}: the variance falls to (1-m)/(1+m) of a batch's"
print(f"bias / Jensen's gap: log-means {slope[0]:.2f}, means {slope[1]:.2f}; variance / prediction {noise:.2f}")

# %%
momenta, tvs = (0.0, 0.9, 0.99), torch.zeros(3, n_seeds, 100)
for i, seed in torch.cartesian_prod(torch.arange(3), torch.arange(n_seeds)).tolist():
    w, link = prototypes(seed), ProbabilityCenter(K, momenta[i])
    test = {pull: scores.cosine(codes(3000, 500 + seed, pull), w, tau) for pull in (0.5, -0.5)}
    for t in range(100):  # the data change at batch 70
        pull = 0.5 if t < 70 else -0.5
        link(scores.cosine(codes(B, 1000 * seed + t + 50_000, pull), w, tau), tau)
        tvs[i, seed, t] = (torch.softmax(test[pull] - link.center, 1).mean(0) - 1 / K).abs().sum() / 2
calm, jump, late = tvs[:2, :, 60:70].mean(-1), tvs[:2, :, 70], tvs[:2, :, 95:].mean(-1)
assert (calm[1] < calm[0]).all(), f"{calm}: on stationary data the average beats the batch"
assert (jump[1] > 2 * jump[0]).all() and (late[1] < 1.3 * late[0]).all(), f"{jump} {late}: it lags, then catches up"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
left.plot(-jensen, -bias[0], "o", color=figures.ROLE["prototypes"], label="average of logs (Eq. 3)")
left.plot(-jensen, -bias[1], "x", color=figures.ROLE["data"], label="log of the average")
left.axline((0, 0), slope=1, ls="--", color=figures.ROLE["bound"], lw=1, label="prediction")
left.set(xlabel="Jensen's gap (nats)", ylabel="center too low by (nats)", title="Rare: c too low", ylim=(-0.06, 0.26))
left.legend(loc="upper left")
for i, style in enumerate(("C0-", "C1--", "C2:")):
    right.plot(range(-30, 30), tvs[i, :, 40:].T, style, lw=0.8, label=[f"m = {momenta[i]:g}"] + ["_"] * (n_seeds - 1))
right.set(xlabel="batches since the data changed", ylabel="total variation from uniform", title="Less noise, more lag")
right.legend(loc="upper left")
figures.show(fig, alt="Left: the center's bias follows Jensen's prediction. Right: averages are calmer, and lag.")

# %% [markdown]
# Left: a point is a prototype; the bias of Eq. 3 lies along the prediction, the log of the average about zero. Right: a
# line is a seed. Before the change the batch estimate ($m=0$) pays for its noise; after it the average pays for its
# memory ($m=0.99$ had not even settled). In training the teacher moves slowly: the average is affordable.
#
# ## 5. How fast Sinkhorn converges, and what it costs
# Near the limit a step multiplies the error by $\sigma_2^2$, where $\sigma_2$ is the second singular value of
# $\sqrt{K/B}\,Q$ (the first, 1, is the balanced state). Sharp assignments are blocks that exchange little mass, so
# $\sigma_2 \to 1$ as $\tau \to 0$. Costs are relative to the product $\langle w, y\rangle$ (K = 4096, p = 256).

# %%
taus, errors, rates = (0.2, 0.1, 0.07, 0.04), torch.zeros(4, n_seeds, 100), torch.zeros(4, n_seeds)
for i, seed in torch.cartesian_prod(torch.arange(4), torch.arange(n_seeds)).tolist():
    q = scores.cosine(codes(B, seed), prototypes(seed), taus[i])
    for step in range(100):
        q = Sinkhorn(1)(q, taus[i])
        errors[i, seed, step] = (K * q.exp().mean(0) - 1).abs().max()
    rates[i, seed] = torch.linalg.svdvals(q.exp() * (K / B) ** 0.5)[1] ** 2
    e = errors[i, seed][errors[i, seed] > 1e-10]  # above rounding
    rate = (e[-1] / e[len(e) // 2]) ** (1 / (len(e) - 1 - len(e) // 2))
    assert abs(rate - rates[i, seed]) < 0.03, f"{rate:.3f}, predicted {rates[i, seed]:.3f}: geometric"
assert (errors[:-1, :, 2] < errors[1:, :, 2]).all(), "after 3 steps a lower temperature is farther from balance"
y, w = (normalize(x.float().repeat(1, 256 // p), dim=-1) for x in (codes(256, 0), prototypes(0, k=4096)))
L, links = scores.dot(y, w, tau), (Center(4096), ProbabilityCenter(4096), Sinkhorn(3))
time_of = lambda job: min(timeit.repeat(job, number=1, repeat=15))
cost = [time_of(lambda k=k: k(L, tau)) / time_of(lambda: scores.dot(y, w, tau)) for k in links]
assert cost[0] < cost[2] < 20, f"{cost}: Sinkhorn passes over the scores six times, a center once"
print("cost in matrix products:", *(f"{type(k).__name__} {c:.2f};" for k, c in zip(links, cost, strict=True)))

# %%
fig, ax = plt.subplots(figsize=(7, 3))
for i, style in enumerate(("C0-", "C1--", "C2-.", "C3:")):
    label = [f"$\\tau$ = {taus[i]:g}, $\\sigma_2^2$ = {rates[i].mean():.2f}"] + ["_"] * (n_seeds - 1)
    ax.semilogy(range(1, 101), errors[i].T, style, lw=0.9, label=label)
ax.axvline(3, color=figures.ROLE["bound"], lw=0.8)
ax.set(xlabel="steps", ylabel="max |K share - 1|", xlim=(0, 60), ylim=(1e-15, 30), title="Geometric convergence")
ax.legend(loc="upper right")
figures.show(fig, alt="Sinkhorn's marginal error falls geometrically; seeds bundle by temperature, low ones are slow.")

# %% [markdown]
# A line is a seed; the thin vertical marks the customary three steps, which leave a visible imbalance at the
# temperatures of training. On one machine every rule costs of the order of the scores, or less. Across machines
# Sinkhorn sums over all of them once a step, and waits; a center is one sum, needed by the next batch.

# %%
course.finish()
