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
# # DINO is a mixture of von Mises-Fisher distributions
#
# **Claim.** DINO's last layer compares a unit code $y$ with $K$ prototypes $w^{(k)}$ and takes a softmax. That is the
# E-step of a mixture model on the sphere: a prototype is a von Mises-Fisher (vMF) component, its direction the mean,
# its length the concentration. One term is missing, the log-normalizer $\log C_p$. It does not matter while all lengths
# are equal. Once they may differ, a prototype without it wins codes by growing; with it, by being close to them.
#
# **Papers.** (vMF, sections 3.2 to 3.4, Eqs. 2 to 9; A.1, A.2, A.4), and Banerjee et al. (2005) for EM.
# **Before this:** nothing. **Cost:** about 15 s on two CPU cores.
#
# **Deviations.** (1) Errors of $\log C_p$ are against mpmath from $\kappa = 0.5$ on; the paper takes scipy, from 20 on.
# (2) The paper argues A.4 in words; the experiment of section 5 and its setting (more prototypes than clusters, one
# concentration, both priors moving averages) are ours. (3) vMF Eq. 9 prints $P$ without $\log C_p$; we include it.

# %% tags=["parameters"]
n_seeds: int = 3  # seeds, each a repeat of the mixture experiments
n_samples: int = 1500  # codes drawn from the known mixture, a seed
prototype_steps: int = 300  # minibatch steps of the stochastic view, of 256 codes each
rounds: int = 30  # rounds of the "rich get poorer" experiment

# %%
import math

import matplotlib.pyplot as plt
import mpmath
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ive

from prototypes_lib import assignment, course, figures, scores, vmf

figures.use_style()
torch.set_default_dtype(torch.float64)
rng = torch.Generator().manual_seed(0)

# %% [markdown]
# ## 1 · The responsibilities of a vMF mixture are a softmax of scores
#
# A vMF component has density $f(y;\mu,\kappa) = C_p(\kappa)\,e^{\kappa\langle\mu,y\rangle}$ with normalizer
# $C_p(\kappa) = \kappa^{p/2-1} / \big((2\pi)^{p/2} I_{p/2-1}(\kappa)\big)$. By Bayes' rule (vMF, Eq. 2)
#
# $$ r^{(k)} \propto \pi^{(k)} f(y;\mu^{(k)},\kappa^{(k)}), \qquad r = \operatorname{softmax}_k
#    \big(\log\pi^{(k)} + \log C_p(\kappa^{(k)}) + \kappa^{(k)}\langle\mu^{(k)},y\rangle\big). $$
#
# Put $\kappa = \lVert w\rVert/\tau$, $\mu = w/\lVert w\rVert$, equal $\pi$: the last term is DINO's logit
# $\langle w,y\rangle/\tau$ (Eq. 3), the last two are the score of DINO-vMF (Eq. 6). Where all $\lVert w\rVert = 1$,
# $\log C_p$ is one constant and the softmax drops it.


# %%
def log_c_exact(kappa: float, p: int) -> float:  # the definition, with mpmath's Bessel function and 30 digits
    with mpmath.workdps(30):
        nu, x = mpmath.mpf(p) / 2 - 1, mpmath.mpf(kappa)
        bessel = mpmath.besseli(nu, x, maxterms=10**6)
        return float(nu * mpmath.log(x) - (nu + 1) * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel))


def responsibilities(y, w, tau):  # Eq. 2 with equal pi
    kappa, mu = w.norm(dim=1) / tau, F.normalize(w, dim=1)
    log_f = torch.tensor([log_c_exact(k, y.shape[1]) for k in kappa.tolist()]) + kappa * (y @ mu.T)
    return log_f.exp() / log_f.exp().sum(1, keepdim=True)


for p in (2, 256):
    y, w = F.normalize(torch.randn(20, p, generator=rng), dim=1), torch.randn(5, p, generator=rng)
    gap = (responsibilities(y, w, 0.1) - torch.softmax(scores.vmf(y, w, 0.1), 1)).abs().max()
    assert gap < 1e-12, f"Bayes' rule and the softmax of the vmf score differ by {gap:.1e}"
    unit = torch.softmax(scores.vmf(y, F.normalize(w, dim=1), 0.1), 1)
    assert torch.allclose(unit, torch.softmax(scores.cosine(y, w, 0.1), 1), atol=1e-12), "a constant must cancel"
    print(f"p = {p:>3}: Bayes' rule and the softmax of the vmf score differ by at most {gap:.0e}")

# %% [markdown]
# ## 2 · Without $\log C_p$ a prototype gains by growing; with it there is a threshold angle
#
# Let $\cos\theta = \langle\mu,y\rangle$. DINO's logit $\kappa\cos\theta$ grows with $\kappa$ for every $\theta < 90°$
# (vMF, A.1). The vMF score changes by
#
# $$ \frac{\partial}{\partial\kappa}\big[\kappa\cos\theta + \log C_p(\kappa)\big] = \cos\theta - A_p(\kappa), \qquad
#    A_p(\kappa) = I_{p/2}(\kappa) / I_{p/2-1}(\kappa) = \mathbb{E}\langle\mu,y\rangle, $$
#
# so growing a little pays below the threshold $\cos\hat\theta = A_p(\kappa)$: for codes closer than the component's own
# samples are on average. A step from $\kappa_1$ to $\kappa_2$ breaks even where
# $\cos\hat\theta = (\log C_p(\kappa_1) - \log C_p(\kappa_2)) / (\kappa_2 - \kappa_1)$, the mean of $A_p$ over the step.


# %%
print("break-even cosine at p = 256 for |w|:  1 -> 1.001    1 -> 2    1 -> 10")
for tau, once in {0.04: (0.143, 0.408), 0.07: (0.083, 0.272), 0.1: (0.058, 0.201)}.items():
    kappa = torch.tensor([1.001, 2.0, 10.0]) / tau
    log_c_1, log_c = vmf.log_normalizer(torch.tensor(1 / tau), 256), vmf.log_normalizer(kappa, 256)
    cosines = (log_c_1 - log_c) / (kappa - 1 / tau)
    print(f"                         tau = {tau:<4}" + "".join(f"{c:>11.3f}" for c in cosines))
    assert (cosines[1:] - torch.tensor(once)).abs().max() < 6e-4, "computed once in float64 from the printed formulas"
    path = torch.linspace(1 / tau, 10 / tau, 2001)
    a_p = vmf.mean_cosine(path, 256)
    assert abs(cosines[0] / a_p[0] - 1) < 1e-3, "for a small step the threshold is A_p(kappa)"
    assert abs(cosines[2] - torch.trapezoid(a_p, path) * tau / 9) < 1e-6, "for a long one the mean of A_p on the way"
codes, w = (F.normalize(torch.randn(n, 256, generator=rng), dim=1) for n in (4000, 64))
for g in (1, 3, 10, 100):
    winner = [score(codes, torch.cat([g * w[:1], w[1:]]), 0.1).argmax(1) for score in (scores.dot, scores.vmf)]
    won = [(x == 0)[codes @ w[0] > 0].double().mean() for x in winner]
    print(f"prototype 0 of 64 grown x{g:<3} wins of the codes within 90 degrees: dot {won[0]:6.1%}, vmf {won[1]:6.1%}")
assert won[0] > 0.95 and won[1] == 0, "growing wins almost all within 90 degrees, unless log C_p stands against it"

# %%
theta, grow = torch.linspace(0, math.pi, 361), torch.linspace(0.01, 20, 2000)
log_c = vmf.log_normalizer(torch.tensor([2.0, 8.0]), 2)  # the circle
hat = math.acos((log_c[0] - log_c[1]) / 6)
few, many = (2 * theta.cos() + log_c[0]).exp(), (8 * theta.cos() + log_c[1]).exp()
assert torch.equal(many > few, theta < hat), "the longer prototype is the denser one exactly below the threshold"
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
left.plot(theta.rad2deg(), few, "--", color=figures.VERMILLION, label="κ = 2")
left.plot(theta.rad2deg(), many, color=figures.BLUE, label="κ = 8")
left.axvline(math.degrees(hat), color=figures.ROLE["bound"], lw=1, ls=":", label=f"threshold {math.degrees(hat):.0f}°")
left.set(title="Circle: growing pays below the threshold", xlabel="angle to the prototype (degrees)", ylabel="density")
for x, color in zip((60.0, 75.0, 85.0), (figures.BLUE, figures.ORANGE, figures.GREEN), strict=True):
    cosine = torch.tensor(x).deg2rad().cos()
    gain = grow / 0.1 * cosine + vmf.log_normalizer(grow / 0.1, 256) - vmf.log_normalizer(torch.tensor(0.0), 256)
    assert abs(grow[gain.argmax()] - 0.1 * vmf.fit_concentration(cosine, 256)) < 0.02, "best: A_p(kappa) = cos theta"
    right.plot(grow, gain, color=color, label=f"{x:.0f}°, best |w| = {grow[gain.argmax()]:.1f}")
    right.plot(grow, grow / 0.1 * cosine, ":", color=color, label="without $\\log C_p$" if x == 85 else None)
right.set(title="p = 256: one best length", xlabel="length |w| (τ = 0.1)", ylabel="score gained (nats)", ylim=(-15, 95))
left.legend(), right.legend(loc="upper left")
best = "with log C_p each angle has one best length, without it the score rises forever"
figures.show(fig, alt=f"Beyond {math.degrees(hat):.0f} degrees the shorter prototype is denser; {best}.")

# %% [markdown]
# Left (vMF, Fig. 3): the longer prototype is denser near its direction and gives up what lies beyond the threshold.
# Right: without $\log C_p$ the score rises forever; with it there is one best length, the maximum-likelihood
# concentration for codes at that angle. At $p = 256$ thresholds for unit lengths lie a few degrees below 90°. That is
# much: the angles of random codes scatter around 90° by only about $1/\sqrt p$ radians.
#
# ## 3 · $\log C_p$ without Bessel functions
#
# Write $\nu = p/2-1$, $s = \sqrt{\nu^2+\kappa^2}$. The uniform expansion (vMF, Eq. 5) with $U_0 = 1$ alone says
# $\log I_\nu(\kappa) \approx s + \nu\log\frac{\kappa}{\nu+s} - \tfrac12\log 2\pi s$. In $\log C_p$ the term
# $\nu\log\kappa$ cancels:
#
# $$ \log C_p(\kappa) \approx f(\kappa) - \tfrac{p-1}{2}\log 2\pi, \qquad
#    f(\kappa) = \nu\log(\nu+s) - s + \tfrac12\log s , $$
#
# finite at $\kappa = 0$. The library's `vmf.log_normalizer` (`prototypes_lib/vmf.py`) takes eleven more $U_i$ and, for
# small $\nu$, starts at a higher order and descends by the Bessel recurrence; `terms=1` is the paper's $f$.

# %%
kappa, f, error = torch.logspace(math.log10(0.5), math.log10(500), 60).requires_grad_(), {}, {}
print("largest error for kappa in 0.5..500\n  p        U_0   U_0, U_1    library   derivative (relative)")
for p in (16, 32, 64, 128, 256, 512):
    nu = p / 2 - 1
    s = torch.sqrt(nu**2 + kappa**2)
    f[p] = (nu * torch.log(nu + s) - s + 0.5 * torch.log(s)).detach()
    paper, two, ours = (vmf.log_normalizer(kappa, p, terms=n) for n in (1, 2, None))
    assert torch.allclose(paper, f[p] - (p - 1) / 2 * math.log(2 * math.pi), atol=1e-10), "terms=1 is the paper's f"
    exact = torch.tensor([log_c_exact(k, p) for k in kappa.tolist()])
    (slope,) = torch.autograd.grad(ours.sum(), kappa)
    a_p = [float(mpmath.besseli(nu + 1, k) / mpmath.besseli(nu, k)) for k in kappa.tolist()]
    error[p] = (paper - exact).detach()
    worst = [e.abs().max().item() for e in (error[p], two - exact, ours - exact, slope / torch.tensor(a_p) + 1)]
    print(f"{p:>3}" + "".join(f"{e:>11.1e}" for e in worst))
    assert 0.9 < worst[0] * 12 * nu < 1.1, "the error of U_0 alone is about U_1 / nu, and |U_1| <= 1/12"
    assert max(worst[2:]) < 1e-11, "the library is exact to rounding and its derivative is -A_p(kappa)"

# %%
for p, k in ((256, 0.1), (512, 10.0), (1024, 25.0), (2048, 500.0)):
    ours = vmf.log_normalizer(torch.tensor(k), p).item()
    assert ive(p / 2 - 1, k) == 0 and abs(ours / log_c_exact(k, p) - 1) < 1e-12, "scipy underflows here, we do not"
assert (ive(255, np.linspace(20, 500, 99)) > 0).all(), "in the paper's range, kappa >= 20 and p <= 512, scipy serves"
fig, (values, errors, lost) = plt.subplots(1, 3, figsize=(9, 2.7))
x = kappa.detach()
for (p, e), marker, color in zip(error.items(), "os^Dvx", plt.cm.cividis(np.linspace(0, 0.9, 6)), strict=True):
    values.plot(x, f[p] - f[p][0], color=color, marker=marker, markevery=9, label=f"p = {p}")
    errors.semilogx(x, 1e3 * e, color=color, marker=marker, markevery=9)
p_grid, k_grid = 2 ** np.linspace(7.4, 12, 65), np.logspace(-2, 4, 241)
edge = [k_grid[ive(p / 2 - 1, k_grid) == 0].max() for p in p_grid]
lost.fill_between(p_grid, k_grid[0], edge, color=figures.GRAY, alpha=0.5, label="scipy's ive is 0")
lost.fill_between([16, 4096], 10, 25, color=figures.ORANGE, alpha=0.6, label="|w| = 1, τ 0.04 to 0.1")
lost.set(xscale="log", yscale="log", title="Where scipy underflows", xlabel="dimension p", ylabel="κ", ylim=(0.01, 1e5))
values.set(title="The paper's f(κ) − f(0.5)", xlabel="κ", ylabel="nats")
errors.set(title="Its error halves as p doubles", xlabel="κ", ylabel="error (10⁻³ nats)")
values.legend(), lost.legend(loc="upper left")
alt = f"The paper's f and its error: below 0.001 nat at p = 256 (at most {error[256].abs().max():.4f}); "
figures.show(fig, alt + f"scipy is 0 for small kappa (from 0.01 on) at p above about {round(p_grid[0], -1):.0f}.")

# %% [markdown]
# Left and middle (vMF, Figs. 4 and 5): at $p = 256$ the error is below a thousandth of a nat, beside differences of
# hundreds: safe. Right: scipy loses small $\kappa$ at large $p$ (at $p = 1024$ all unit prototypes); hence mpmath.
#
# ## 4 · EM and prototypes trained by gradient find the same mixture
#
# Let $\mathcal L = \frac1n\sum_i\log\sum_k\pi^{(k)} C_p(\kappa^{(k)}) e^{\langle w^{(k)},y_i\rangle}$,
# $w^{(k)} = \kappa^{(k)}\mu^{(k)}$. By section 2,
# $\nabla_{w^{(k)}}\mathcal L = \frac1n\sum_i r_i^{(k)}\big(y_i - A_p(\kappa^{(k)})\,\mu^{(k)}\big)$. It is zero where
# $A_p(\kappa^{(k)})\mu^{(k)}$ is the weighted mean of the codes, EM's M-step: the same fixed points, found in two ways.


# %%
def em_step(y, mu, kappa, pi):
    r = torch.softmax(torch.log(pi) + vmf.log_normalizer(kappa, y.shape[1]) + y @ (kappa[:, None] * mu).T, 1)
    mean = r.T @ y / r.sum(0)[:, None]
    return F.normalize(mean, dim=1), vmf.fit_concentration(mean.norm(dim=1), y.shape[1]), r.mean(0)


MU, KAPPA = F.normalize(torch.randn(3, 8, generator=rng), dim=1), torch.tensor([15.0, 30.0, 60.0])
data = []
for seed in range(n_seeds):
    own = torch.Generator().manual_seed(seed)
    parts = zip(MU, KAPPA, (0.5, 0.3, 0.2), strict=True)
    data.append(torch.cat([vmf.sample(m, k, round(n_samples * share), own) for m, k, share in parts]))
y, (a, b) = data[0], (vmf.fit_mixture(data[0], 3, steps=n) for n in (2, 3))
for mine, library in zip(em_step(y, a.mu, a.kappa, a.weights), (b.mu, b.kappa, b.weights), strict=True):
    assert torch.allclose(mine, library, rtol=1e-9), "one EM step by hand must be the library's"
w, r = (a.kappa[:, None] * a.mu).requires_grad_(), a.responsibilities(y)
torch.logsumexp(scores.vmf(y, w, 1.0) + a.weights.log(), 1).mean().backward()
by_hand = r.T @ y / len(y) - r.mean(0)[:, None] * vmf.mean_cosine(a.kappa, 8)[:, None] * a.mu
assert torch.allclose(w.grad, by_hand, atol=1e-12), "autograd and the hand-derived gradient must agree"

# %%
print("seed   log-likelihood: EM, prototypes   kappa: EM              prototypes        true", KAPPA.tolist())
fig, ax = plt.subplots(figsize=(7, 2.7))
for seed, y in enumerate(data):
    em = vmf.fit_mixture(y, 3, seed=seed)
    proto = vmf.fit_mixture(y, 3, method="prototypes", steps=prototype_steps, seed=seed)
    level = [torch.logsumexp(fit.log_joint(y), 1).mean().item() for fit in (em, proto)]
    assert min(np.diff(em.log_likelihood)) > -1e-9, "EM never loses likelihood"
    assert level[0] - 0.01 < level[1] < level[0] + 1e-6, f"prototypes should end just below EM's maximum: {level}"
    kappas = [fit.kappa[(MU @ fit.mu.T).argmax(1)] for fit in (em, proto)]
    assert all(torch.allclose(k, KAPPA, rtol=0.15) for k in kappas), f"both should recover the true kappas: {kappas}"
    print(f"{seed:>4}{level[0]:>20.4f}{level[1]:>12.4f}       ", *(f"{k:<6.1f}" for k in torch.cat(kappas)))
    ax.semilogx(1 + np.arange(len(em.log_likelihood)), em.log_likelihood, "o-", color=figures.BLUE, lw=0.8)
    ax.semilogx(1 + np.arange(prototype_steps), proto.log_likelihood, color=figures.ROLE["prototypes"], lw=0.5)
ax.legend(ax.lines[:2], ("EM, all codes in each step", "prototypes, a minibatch in each step"))
ax.set(title="EM climbs monotonically, prototypes noisily", xlabel="step", ylabel="mean log-likelihood (nats)")
figures.show(fig, alt="Mean log-likelihood of EM and of stochastic prototypes over steps; both reach the same level.")

# %% [markdown]
# Each line is a seed. EM is at its maximum after a few passes; the prototypes take many noisy steps to the same place,
# with the same concentrations. DINO does the second, while the codes themselves move.
#
# ## 5 · Centering is a prior with the sign turned: the rich get poorer
#
# Let $c = \log$ of the mean assignment. EM multiplies by the estimated prior $e^{+c}$: a cluster that has much gets
# more. Centering multiplies by $e^{-c}$ (vMF, Eqs. 7, 9 and A.4): it gives away. On frozen codes and prototypes we
# repeat each and watch the entropy of the mean assignment, between $0$ (one takes all) and $\ln K$ (equal shares).

# %%
K, runs = 24, {+1: [], -1: []}
for seed, y in enumerate(data):
    w = 20 * y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:K]]
    log_scores, center = scores.vmf(y, w, 1.0), assignment.ProbabilityCenter(K, momentum=0.9)
    for sign, histories in runs.items():
        c, shares = torch.zeros(K), []
        for _ in range(rounds):
            log_r = torch.log_softmax(log_scores + sign * c, 1)
            shares.append(log_r.exp().mean(0))
            seen = log_r if sign > 0 else torch.log_softmax(log_scores, 1)  # centering averages P before centering it
            c = 0.9 * c + 0.1 * (torch.logsumexp(seen, 0) - math.log(len(y)))
        histories.append(torch.stack(shares))
    library = torch.stack([torch.softmax(center(log_scores, 1.0), 1).mean(0) for _ in range(rounds)])
    assert torch.allclose(runs[-1][-1], library, atol=1e-12), "e^{-c} is the library's probability centering"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
start = runs[1][0][0].sort(descending=True)
right.plot(1 + np.arange(K), start.values, "o:", color=figures.ROLE["data"], label="start: equal priors")
looks = (+1, figures.VERMILLION, "v", "EM, $e^{+c}$"), (-1, figures.BLUE, "^", "centering, $e^{-c}$")
for sign, color, marker, name in looks:
    shares = torch.stack(runs[sign])
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    rich = [(x[-1] - x[0])[x[0].topk(K // 3).indices].sum() for x in shares]
    assert (sign * entropy.diff(dim=1) < 0).all(), "each round should lower the entropy with +c, raise it with -c"
    assert (sign * torch.stack(rich) > 0).all(), "the richest third should gain with +c and lose with -c"
    left.plot(entropy.T, color=color, marker=marker, markevery=5, lw=0.8, label=[name] + [None] * (n_seeds - 1))
    right.plot(1 + np.arange(K), shares[0, -1, start.indices], marker + "-", color=color, label=name)
left.axhline(math.log(K), color=figures.ROLE["bound"], ls=":", label="ln K")
left.set(xlabel="round", ylabel="entropy (nats)", title="Marginal entropy: the sign decides")
right.set(xlabel="prototype, by share at the start", ylabel="share of the codes", title="Seed 0 after the last round")
left.legend(), right.legend()
figures.show(fig, alt="Marginal entropy falls with EM's prior and rises with centering; shares before and after.")

# %% [markdown]
# With $e^{+c}$ the richest third gains, as it should in a model of fixed data; with $e^{-c}$ it gives away. Centering
# stops short of equal shares, since $c$ is measured before the correction: `12_probability_centering.py` repeats it.

# %%
course.finish()
