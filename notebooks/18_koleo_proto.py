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
# # KoLeo-proto spreads prototypes
#
# **Claim.** Prototypes collapse because nothing keeps two of them apart. The mean log distance to the nearest neighbor
# estimates their entropy; enlarging it pushes copies apart with a force $1/d$, which beats any bounded pull. That force
# decides about $\lambda$, exact copies, clipping, and what a random partition overlooks.
#
# **Papers.** (PPC, section 4.1, Fig. 3). **Before this:** `10_vmf_mixture.py`, `16_collapse_on_the_circle.py`.
# **Cost:** about 20 s on two CPU cores. **Deviations.** (1) The paper prints the estimator without its constants and
# with the opposite sign; both are put right. (2) Neighbors are exact unless a partition is asked for; the paper
# partitions, how finely it does not say. (3) The pull of section 4 is a toy in place of the data, not iBOT's loss.
# (4) Rates and steps were chosen by looking at whether descents settled (24 on the circle would need 3 × the steps).

# %% tags=["parameters"]
n_seeds: int = 5  # seeds, each a repeat of a sampling experiment
n_runs: int = 3  # seeds of the descents, which are slower
p: int = 16  # dimension of the space that the sphere lies in
eps: float = 0.025  # cosine distance below which two prototypes are copies (PPC, Definition 4.1)

# %%
import math
import timeit

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betainc, betaincinv, gammaln, psi

from prototypes_lib import collapse, course, figures, regularizers, vmf

figures.use_style()
torch.set_num_threads(1)  # the tensors are small: threads would mostly wait for each other
rng = lambda seed: torch.Generator().manual_seed(seed)
gradient = lambda w, loss=regularizers.koleo: torch.autograd.functional.vjp(loss, w)[1]
draw = lambda dim, kappa, n, seed: vmf.sample(torch.eye(dim, dtype=torch.float64)[0], kappa, n, rng(seed))
entropy_true = lambda q, kappa: float(-vmf.log_normalizer(kappa, q) - kappa * vmf.mean_cosine(kappa, q))
unique = lambda w: collapse.unique_prototypes(w, eps).count

# %% [markdown]
# ## 1. The nearest neighbor's distance estimates an entropy
# Draw $K$ points from a density $f$ on the unit sphere in $\mathbb R^p$. Let $P_k$ be the probability of the cap around
# $\mu_k$ that reaches to its nearest neighbor. The other points fall into ever larger caps like uniform numbers into
# $[0, 1]$, so $P_k$ is the smallest of $K-1$ uniforms **whatever $f$ is**: $E \ln P_k = \psi(1) - \psi(K)$. If $f$
# hardly varies over the cap, $P_k \approx f(\mu_k) A(d_k)$ with the cap's area $A$. Solve for $-\ln f$ and average:
#
# $$\hat H = \frac1K \sum_k \ln A(d_k) + \psi(K) - \psi(1), \qquad A(d) \approx V_{p-1}\, d^{\,p-1}, \quad
# V_m = \pi^{m/2} / \Gamma(\tfrac m2 + 1).$$
#
# The sphere has dimension $p - 1$: hence the power, and the volume $V_{p-1}$ of a *flat* ball. The exact area is
# $A(d) = |S^{p-1}|\, I_{d^2/4}(\frac{p-1}2, \frac{p-1}2)$, the regularized incomplete beta function; with it $\hat H$
# has no bias on the uniform density at any $K$. With flat balls $\hat H = -(p-1)\, h_{kl} + \text{const}$, where
# $h_{kl} = -\frac1K \sum_k \ln d_k$ is what the paper prints. Known entropies to check with: the vMF density's,
# $H = -\ln C_p(\kappa) - \kappa A_p(\kappa)$ with its mean cosine $A_p$; at $\kappa = 0$ the log area.


# %%
def entropy_estimate(mu, exact=True):
    (K, p), d = mu.shape, torch.cdist(mu, mu, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(9).amin(-1)
    h = -d.log().mean()  # h_kl (PPC, section 4.1)
    gap = abs(float(h - regularizers.koleo(mu, eps=0.0)))
    assert gap < 1e-12, f"{gap:.1e}: h_kl is the library's koleo (prototypes_lib/regularizers.py)"
    log_sphere = math.log(2) + p / 2 * math.log(math.pi) - gammaln(p / 2)
    cap = log_sphere + np.log(betainc((p - 1) / 2, (p - 1) / 2, d.numpy() ** 2 / 4)).mean()
    flat = -(p - 1) * float(h) + (p - 1) / 2 * math.log(math.pi) - gammaln((p + 1) / 2)
    return (cap if exact else flat) + psi(K) - psi(1)


# %%
sizes, error = (64, 256, 1024), {}
for dim, kappa, exact in [(d, k, e) for d in (3, 16) for k in (0, 10) for e in (False, True)]:
    estimate = [[entropy_estimate(draw(dim, kappa, n, s), exact) for s in range(n_seeds)] for n in sizes]
    e = error[dim, kappa, exact] = np.array(estimate) - entropy_true(dim, torch.tensor(kappa).double())
    if dim == 3 or exact:
        assert abs(e[-1].mean()) < 0.15, f"p={dim}, kappa={kappa}: off by {e[-1].mean():.2f} nats with 1024 points"
        assert e[-1].std() < e[0].std() / 2, "the noise of the estimate must fall as points are added"
assert abs(entropy_true(3, torch.zeros(1).double()) - math.log(4 * math.pi)) < 1e-9, "uniform: entropy is the log area"
flat, cap = error[16, 0, False].mean(-1), error[16, 0, True].mean(-1)
assert flat[0] > flat[1] > flat[2] > 0.5, "flat balls are larger than caps: biased upward, and slow to converge"
assert np.abs(cap).max() < 0.25, "with the cap's true area the uniform density has no bias at any n"

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.9))
for (dim, kappa, exact), e in error.items():
    color, marker, ax = figures.ORANGE if kappa else figures.BLUE, "o" if exact else "s", axes[int(dim == 16)]
    label = f"κ = {kappa}, {'exact cap' if exact else 'flat ball'}"
    ax.plot(sizes, e.mean(-1), f"{marker}-" if exact else f"{marker}--", color=color, label=label)
    ax.plot(sizes, e, marker, color=color, alpha=0.6, mfc="none")
    ax.set(xscale="log", xlabel="points n", ylabel="estimate − entropy (nats)")
axes[0].set_title("p = 3: no bias, ever less noise")
axes[1].set(title="p = 16: flat balls overestimate", ylim=(-0.7, 2.7))
axes[1].legend(ncols=2, loc="upper right")
figures.show(fig, alt="Entropy estimate's error over n: noise falls for p=3; for p=16 only the exact cap is right.")

# %% [markdown]
# For $p = 3$ both areas are exactly $\pi d^2$, and the seeds (open marks) close in on zero. For $p = 16$ neighbors are
# far away on a curved sphere, and flat balls are off by about a nat. A regularizer does not mind: both areas grow with
# $d$, and constants have no gradient. But $\lambda h_{kl}$ weighs the *entropy* by $\lambda / (p - 1)$ only.
#
# **The sign.** The paper speaks of maximizing the entropy $h_{kl}$ and then minimizes $\mathcal L_{KP} = h_{kl}$. The
# loss is right, the name is not: $h_{kl}$ is the entropy's negative. The counter-example spreads points:

# %%
kappas = (1000, 300, 100, 30, 10, 0)
truth = [entropy_true(p, kappa) for kappa in torch.tensor(kappas).double()]
h = np.array([[regularizers.koleo(draw(p, kappa, 256, s)) for s in range(n_seeds)] for kappa in kappas])
print("  kappa   entropy (nats)   printed h, one column a seed")
for kappa, entropy, row in zip(kappas, truth, h, strict=True):
    print(f"{kappa:7d} {entropy:14.2f}    ", " ".join(f"{x:6.2f}" for x in row))
assert (np.diff(truth) > 0).all(), "less concentration is more entropy"
assert (np.diff(h, axis=0) < 0).all(), "printed h FALLS as the points spread: it estimates minus the entropy"

# %% [markdown]
# ## 2. The force is 1/d, and zero at exact copies
# Let $\nu(k)$ be the neighbor of $k$. Moving $\mu_k$ changes its own gap and that of all whose neighbor it is:
#
# $$\frac{\partial \mathcal L_{KP}}{\partial \mu_k} = -\frac1K \Big[ \frac{\mu_k - \mu_{\nu(k)}}{d_k (d_k + \epsilon)}
# + \sum_{i:\, \nu(i) = k} \frac{\mu_k - \mu_i}{d_i (d_i + \epsilon)} \Big], \qquad
# \frac{\partial}{\partial w_k} = \frac{I - \mu_k \mu_k^\top}{|w_k|} \frac{\partial}{\partial \mu_k},$$
#
# $\epsilon = 10^{-8}$ being what the code adds to $d$. Each term has length $1 / (d + \epsilon)$, and at $d = 0$ no
# direction: the library takes zero. The released loss of DINOv2 adds $\epsilon$ inside the difference too. In a mutual
# pair each feels $\frac{2}{K (d + \epsilon)}$, so $n$ of $K$ prototypes in pairs give their tensor a gradient of norm
# $\lambda \frac{2 \sqrt n}{K (d + \epsilon)}$: if it is clipped to norm 3, what is left of all other gradients in it?

# %%
w = 3 * torch.randn(100, p, generator=rng(0), dtype=torch.float64)
mu = w / w.norm(dim=-1, keepdim=True)
nu = regularizers.nearest(mu)
d = (mu - mu[nu]).norm(dim=-1, keepdim=True)
force = (mu - mu[nu]) / (d * (d + 1e-8))
g = -force.index_add(0, nu, -force) / len(w)
by_hand = (g - (g * mu).sum(-1, keepdim=True) * mu) / w.norm(dim=-1, keepdim=True)
gap = (by_hand - gradient(w)).abs().max() / by_hand.abs().max()
assert gap < 1e-12, f"{gap:.1e}: the gradient by hand and by autograd must agree"
assert gradient(w.repeat(3, 1).float()).abs().max() == 0, "exact copies feel nothing: a fixed point, if an unstable one"
released = lambda mu: -(F.pairwise_distance(mu, mu[regularizers.nearest(mu)], eps=1e-8) + 1e-8).log().mean()
pair, triplet = (gradient(mu[:1].repeat(n, 1).float(), released).norm().item() for n in (2, 3))
print(f"released form, gradient norm: {pair:.1e} at an exact pair, {triplet:.1e} at an exact triplet")
assert pair < 1e-3 * triplet, "mutual neighbors cancel; the third copy is nobody's neighbor and gets a huge kick"

# %%
K, lam, clip, ds = 1024, 0.1, 3.0, 10.0 ** np.arange(-12, 0.1, 0.5)
base = F.normalize(torch.randn(K, 64, generator=rng(1), dtype=torch.float64), dim=-1)
side = F.normalize(base.roll(1, 0) - (base.roll(1, 0) * base).sum(-1, keepdim=True) * base, dim=-1)  # a right angle
partner = lambda d: base * (1 - d**2 / 2) + side * (d * math.sqrt(1 - d**2 / 4))  # at distance d from base
paired = lambda n, d: torch.cat([base[: n // 2], partner(d)[: n // 2], base[n // 2 : K - n // 2]]).float()
vectors = {(d, s): torch.stack([base[s], partner(d)[s]]).float() for d in ds for s in range(n_seeds)}
push = np.array([float(gradient(x)[0].norm()) for x in vectors.values()]).reshape(len(ds), n_seeds)
norm = {n: np.array([lam * float(gradient(paired(n, d)).norm()) for d in ds[8:]]) for n in (2, K)}
scaled = (push * (ds[:, None] + 1e-8))[(ds > 1e-5) & (ds < 0.1)]
assert np.abs(scaled - 1).max() < 0.02, "between 1e-5 and 0.1 the force on each of a pair must be 1/d"
assert (push == 0).any(), "pairs closer than float32 resolves are exact copies: no force"
spike, encoder = lam * gradient(paired(K, 1e-6)), torch.full((64,), 1 / 8)  # gradients of two tensors
assert clip / torch.hypot(spike.norm(), encoder.norm()) < 0.01, "one norm over all tensors silences the encoder"

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.9))
axes[0].loglog(ds, 1 / (ds + 1e-8), color=figures.ROLE["bound"], label="1 / (d + ε)")
d_pairs, force = np.repeat(ds, n_seeds), push.ravel()
axes[0].loglog(d_pairs[force > 0], force[force > 0], "o", color=figures.ORANGE, mfc="none", label="float32 pairs")
axes[0].loglog(d_pairs[force == 0], 1 + force[force == 0], "v", color=figures.BLUE, label="equal in float32: exactly 0")
axes[0].set(title="A force 1/d, then all or none", xlabel="distance d", ylabel="|gradient|, K = 2")
for n, color, marker in ((2, figures.BLUE, "o"), (K, figures.ORANGE, "^")):
    axes[1].loglog(ds[8:], np.minimum(1, clip * K * (ds[8:] + 1e-8) / (2 * lam * math.sqrt(n))), color=color)
    axes[1].loglog(ds[8:], np.minimum(1, clip / norm[n]), marker, color=color, label=f"{n} of {K} in pairs")
axes[1].set(title="What clipping at 3 leaves of the rest", xlabel="distance d", ylabel="factor on other gradients")
axes[0].legend(loc="lower left", bbox_to_anchor=(0, 0.15)), axes[1].legend(loc="lower right")
figures.show(fig, alt="Left: gradient 1/d, a plateau or zero below. Right: the clip factor falls with the distance.")

# %% [markdown]
# Left: $1/d$ over decades. Where float32 can hardly tell two vectors apart, a pair feels up to $1/\epsilon$ or, if they
# round to the same, nothing (triangles). Right: near-copies make clipping shrink all else in their tensor. DINO clips
# **each tensor** by itself: only the last layer is held up. One norm over all tensors silences the encoder too (last
# assertion). And prototypes *copied* to enlarge $K$ need noise.
#
# ## 3. A random partition overlooks copies
# To save memory the paper seeks neighbors inside random batches of $b$ prototypes. Let $K$ prototypes fall on $M$
# directions at random. A prototype meets a copy among the $b - 1$ others with probability $1 - (1 - 1/M)^{b-1}$. For
# uniform prototypes section 1 has the law of $d$: $I_{d^2/4}$ is the smallest of $b - 1$ uniforms, which gives
# $E\,\mathcal L_{KP}$ as an integral. Both against a simulation, for iBOT ViT-B/16's $K$ and $M$ (PPC, Table 1):

# %%
K, M, dim, batches = 8192, 875, 256, (256, 512, 1024, 2048, 8192)
share = [1 - (1 - 1 / M) ** (b - 1) for b in batches]
quantile = (np.arange(20_000) + 0.5) / 20_000  # of the smallest of b - 1 uniforms:
u = [-np.expm1(np.log1p(-quantile) / (b - 1)) for b in batches]
value = [-np.log(2 * np.sqrt(betaincinv((dim - 1) / 2, (dim - 1) / 2, x))).mean() for x in u]
labels = [torch.randint(M, (K,), generator=rng(s)) for s in range(n_seeds)]
counts = [[(x + M * (torch.arange(K) // b)).unique(return_counts=True)[1] for x in labels] for b in batches]
seen = [np.mean([float(c[c > 1].sum()) / K for c in row]) for row in counts]
spread = F.normalize(torch.randn(K, dim, generator=rng(0)), dim=-1)
copies = spread[labels[0]] + 1e-3 * spread
loss = [[float(regularizers.koleo(x, parts=K // b, generator=rng(2))) for b in batches] for x in (spread, copies)]
print("batch   meets a copy: formula, simulated   loss, spread: formula, koleo   loss, collapsed: koleo")
for b, *x in zip(batches, share, seen, value, *loss, strict=True):
    print(f"{b:5d} {x[0]:22.1%} {x[1]:11.1%} {x[2]:22.3f} {x[3]:8.3f} {x[4]:22.2f}")
assert np.abs(np.subtract(seen, share)).max() < 0.01, "the share of copies met must follow 1 - (1 - 1/M)^(b-1)"
assert np.abs(np.subtract(value, loss[0])).max() < 2e-3, "the loss of uniform prototypes follows from the cap's area"
assert (np.diff(loss) > 0).all(), "smaller batches have farther neighbors: a loss biased low, most so in collapse"

# %% [markdown]
# With small batches most prototypes meet no copy in a step, and the loss of the collapsed set is low by about that
# share: do not compare values under different partitions. On spread prototypes the bias is small.
#
# ## 4. lambda is measured against the pull
# Let $r \le p$ prototypes be pulled to a center $c$, each with energy $-a \langle \mu, c \rangle$, and spread by
# $\lambda \mathcal L_{KP}$. They can sit on a regular simplex at angle $\theta$ around $c$, where
# $d^2 = 2 \frac{r}{r-1} \sin^2\theta$. The minimum of $-a \cos\theta - \lambda \ln \sin\theta$ is at
# $\sin^2\theta = \frac\lambda a \cos\theta$. Copies never quite coincide, but they count as unique only from
# $d^2/2 = \varepsilon$ on: $\sin^2\theta^* = \varepsilon \frac{r-1}{r}$, $\lambda^* = a \sin^2\theta^* / \cos\theta^*$.

# %%
centers = lambda K, C, q, s: F.normalize(torch.randn(C, q, generator=rng(s)), dim=-1)[torch.arange(K) % C]


def descend(center, lam, rate, pull=0.0, steps=200, parts=1, noise=1e-3):  # near-copies at first, moves below 0.3
    w = F.normalize(center + noise * torch.randn(center.shape, generator=rng(99)), dim=-1)
    for step in range(steps):
        g = gradient(w, lambda x: regularizers.koleo(x, parts=parts, generator=rng(step)))  # noqa: B023
        move = rate * (1 + math.cos(math.pi * step / steps)) / 2 * (lam * len(w) * g - pull * center)
        w = F.normalize(w - move * (0.3 / move.norm(dim=-1, keepdim=True).clamp_min(0.3)), dim=-1)
    return w


C, r, M, runs = 8, 8, {}, {1.0: (0.003, 0.01, 0.018, 0.022, 0.026, 0.04, 0.1, 0.3), 10.0: (0.01, 0.026, 0.1)}
sin2 = eps * (r - 1) / r
critical = sin2 / math.sqrt(1 - sin2)  # lambda* / a

# %%
for a, x, s in [(a, x, s) for a, ratios in runs.items() for x in ratios for s in range(n_runs)]:
    m = M[a, x, s] = unique(descend(centers(r * C, C, p, s), a * x, 0.4 / a, a))
    settled = abs(m - C * (r if x > critical else 1)) <= 1
    assert settled or abs(x / critical - 1) < 0.1, f"M = {m} at {x}: wrong side of the threshold {critical:.4f}"
for K in (16, 32, 64, 128):
    starts = (0.0, 1e3), (0.1, 1e-3)  # lambda, noise: from random directions, and from near-copies
    without, with_kp = (unique(descend(centers(K, C, p, 0), lam, 0.4, 1.0, noise=x)) for lam, x in starts)
    print(f"K = {K:3d}: M = {without} with lambda = 0, M = {with_kp} with lambda = 0.1 (a = 1)")
    assert (without, with_kp) == (C, K), "as (PPC, Fig. 3): M follows K only with the regularizer, from either end"
print(f"lambda = 0.1 separates copies for pulls below a = {0.1 / critical:.2f}")
fig, ax = plt.subplots(figsize=(6, 2.6))
for a, marker, color in ((1.0, "o", figures.BLUE), (10.0, "^", figures.ORANGE)):
    x, m = zip(*[(x * 1.03 ** (s - 1), m / (r * C)) for (b, x, s), m in M.items() if b == a], strict=True)
    ax.semilogx(x, m, marker, color=color, mfc="none", label=f"pull a = {a:g}")
ax.axvline(critical, color=figures.ROLE["bound"], ls="--", label="predicted λ* / a"), ax.legend()
ax.set(title="Copies separate at the predicted threshold", xlabel="λ / a (seeds side by side)", ylabel="M / K")
figures.show(fig, alt="M/K against lambda/a: it jumps from 1/8 to 1 at the predicted threshold, for both pulls.")

# %% [markdown]
# Both pulls jump at the same, predicted ratio. So "$\lambda = 0.1$ is sufficient" is a statement about the pull: in
# this toy it holds for $a$ below the value printed above and fails for $a = 10$ (the triangles on the left). The
# pull in iBOT-vMF, a difference of teacher and student, is **not shown here**; `50_pretraining.py` runs the real thing.
#
# ## 5. It undoes a collapse, and costs little
# Start from near-copies and let KoLeo alone act: on the circle (28 fit, evenly spread) and on the sphere.

# %%
ends, setups = {}, [(20, 4, 2, 1, 400), (20, 4, 2, 4, 400), (128, 8, p, 1, 200), (128, 8, p, 4, 200)]
for K, C, dim, parts, steps in setups:
    starts = [centers(K, C, dim, s) for s in range(n_runs)]
    ends[dim, parts] = [descend(w, 1.0, 0.02, steps=steps, parts=parts) for w in starts]
    before, after = [[unique(w) for w in ws] for ws in (starts, ends[dim, parts])]
    print(f"p = {dim:2d}, K = {K:3d}, batches of {K // parts:3d}: M = {before} at first, {after} at the end, by seed")
    assert max(before) <= C and min(after) >= (0.9 * K if parts > 1 else K), f"M = {after}: copies did not separate"
for w, by_parts in zip(ends[2, 1], ends[2, 4], strict=True):
    assert regularizers.koleo(w) < regularizers.koleo(by_parts), "on the circle small batches leave uneven gaps"
fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.7), subplot_kw={"projection": "polar"})
pictures = {"start": centers(20, 4, 2, 0), "all neighbors": ends[2, 1][0], "random batches of 5": ends[2, 4][0]}
for ax, (title, w) in zip(axes, pictures.items(), strict=True):
    ax.plot(torch.atan2(w[:, 1], w[:, 0]), torch.ones(len(w)), "o", color=figures.ROLE["prototypes"], alpha=0.6)
    ax.set(yticks=[], xticklabels=[], title=title, ylim=(0, 1.15))
figures.show(fig, alt="20 prototypes on a circle: in 4 spots, then evenly spread, less evenly if by batches.")

# %%
y, w = (torch.randn(n, 256, generator=rng(n)).requires_grad_() for n in (8192, 2048))  # iBOT's step has more tokens
seconds = lambda run: min(timeit.repeat(lambda: run().backward(), number=1, repeat=4))
scores = seconds(lambda: (y @ w.T).sum())
full, part = (seconds(lambda n=n: regularizers.koleo(w, parts=n)) / scores for n in (1, 8))
print(f"cost forward and backward, scores of {len(y)} codes = 1: koleo {full:.2f}, in 8 parts {part:.2f}")
assert full < 1, "KoLeo on prototypes must cost less than scoring a batch of codes against them"

# %% [markdown]
# With all neighbors in sight every $M$ is back to $K$; with few, on the circle, gaps stay less even (right). Scores of
# $n$ codes take $3 n K p$ multiplications with their gradient, the exact loss $K^2 p$: partition for memory, not time.

# %%
course.finish()
