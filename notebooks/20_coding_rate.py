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
# # The coding rate replaces prototypes
#
# **Claim.** SimDINO has no prototypes, centering or softmax. It asks two views for the same code, and keeps codes from
# collapsing by enlarging the coding rate $R_\varepsilon$, a size of their second moment: least where all agree, largest
# where they fill all directions evenly. Its strength depends on $\varepsilon$, $\gamma$ and the number of processes.
#
# **Papers.** (Sim, Eqs. 7 to 9, section 2.3, Appendices C, D). **Before this:** nothing. **Cost:** about 20 s on two
# CPU cores. **Deviations.** (1) Codes are rows; the paper's $Z$ is our $Z^\top$. (2) Theorem C.1 as printed does not
# hold; we use the corrected one. (3) Processes are emulated (`groups`). (4) Section 5 is a toy; its step size, its fast
# teacher (momentum 0.9) and its length were chosen by looking at when it collapses without the term.

# %% tags=["parameters"]
n_seeds: int = 3  # seeds, each a repeat of a random draw or of a training
train_steps: int = 500  # steps of the toy training, 128 pairs of views each

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard

from prototypes_lib import course, figures, objectives, regularizers

figures.use_style()
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # small matrices: threads would only wait for each other
EPS, GAMMA = math.sqrt(0.05), 1 / 256 + 1 / 512  # distortion and weight of the released recipe, 512 codes
unit = lambda n, d, seed: F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)
tangent = lambda g, Z: g - (g * Z).sum(1, keepdim=True) * Z  # the part that an L2 normalization lets through
slope = lambda f, Z, *args: torch.autograd.functional.vjp(lambda z: f(z, *args), Z)[1]
once = lambda name: [name] + [None] * (n_seeds - 1)  # one legend entry for all seeds

# %% [markdown]
# ## 1 · The coding rate counts directions
# Let $\lambda_i$ be the eigenvalues of the second moment $\Gamma = Z^\top Z/n$ of $n$ unit codes in $\mathbb R^d$ (the
# paper says covariance, but nothing is centered). Then (Sim, Eq. 8)
# $$ R_\varepsilon = \tfrac12\log\det\big(I + \tfrac d{\varepsilon^2}\Gamma\big) = \tfrac12\sum_i\log\big(1 +
#    \tfrac d{\varepsilon^2}\lambda_i\big), \qquad \textstyle\sum_i\lambda_i = \operatorname{tr}\Gamma = 1 . $$
# By Sylvester $\det(I + \alpha Z^\top Z) = \det(I + \alpha ZZ^\top)$: take the smaller. The log is concave, so rank $r$
# gives at most $\frac r2\log(1 + \frac d{r\varepsilon^2})$, attained by a *tight frame*: $r$ equal eigenvalues
# (orthonormal codes, if $r = n$). The bound grows with $r$; collapse, $r = 1$, is least.


# %%
def R(Z, eps):  # Sim, Eq. 8
    n, d = Z.shape
    return 0.5 * torch.logdet(torch.eye(d) + d / eps**2 * Z.T @ Z / n)


most = lambda r, d, eps: r / 2 * math.log1p(d / (r * eps**2))  # frame: squared singular values `power`, summing to n
frame = lambda power, n, d: F.pad(torch.tensor(hadamard(n))[:, : len(power)] * (power / n).sqrt(), (0, d - len(power)))
tight = lambda r, n, d: frame(torch.full((r,), n / r), n, d)
for n, d in ((64, 16), (16, 64)):
    Z, same, best = unit(n, d, 0), unit(1, d, 0).expand(n, d), tight(min(n, d), n, d)
    eigen = 0.5 * torch.log1p(d / EPS**2 * torch.linalg.eigvalsh(Z.T @ Z / n)).sum()
    small = 0.5 * torch.logdet(torch.eye(n) + d / EPS**2 * Z @ Z.T / n)
    gap = (torch.stack([R(Z, EPS), eigen, small]) - regularizers.coding_rate(Z, EPS)).abs().max()
    assert gap < 1e-10, f"{gap:.0e}: Eq. 8, its eigenvalues, the smaller Gram matrix and the library must agree"
    ends = R(same, EPS) - most(1, d, EPS), R(best, EPS) - most(min(n, d), d, EPS)
    assert max(map(abs, ends)) < 1e-10, "collapse must have the rate of rank 1, a tight frame the largest"
    print(f"n={n}, d={d}: collapsed {R(same, EPS):.2f}, random {R(Z, EPS):.2f}, tight frame {R(best, EPS):.2f} nats")

# %% [markdown]
# Does ascent on $R_\varepsilon$ alone undo collapse? With $\alpha = d/(n\varepsilon^2)$ its gradient is $\nabla_Z
# R_\varepsilon = \alpha Z(I+\alpha Z^\top Z)^{-1}$. Where all codes are $u$ it points along $u$, and the sphere lets
# nothing through: exact collapse is an equilibrium, an unstable one. Noise across $u$ is pushed by $\alpha$ times
# itself, less $\alpha/(1+\alpha n)$ from the sphere: a step $\eta$ grows it by $1+\eta\alpha^2n/(1+\alpha n)$.

# %%
n, d, eta, paths = 32, 8, 0.1, []
alpha, same = d / (n * EPS**2), unit(1, d, 0).repeat(n, 1)
push = lambda Z: tangent(slope(regularizers.coding_rate, Z, EPS), Z)
assert push(same).norm() < 1e-12, "at exact collapse the rate pushes nowhere along the sphere"
for seed in range(n_seeds):
    Z, path = F.normalize(same + 1e-6 * unit(n, d, seed), dim=1), []
    for _ in range(200):
        Z = F.normalize(Z + eta * push(Z), dim=1)
        path.append(torch.linalg.svdvals(Z))
    growth, gap = path[11][1] / path[10][1], abs(R(Z, EPS) - most(d, d, EPS))
    assert abs(growth / (1 + eta * alpha**2 * n / (1 + alpha * n)) - 1) < 1e-3, "noise must grow at the derived rate"
    assert gap < 1e-3 and path[-1].std() < 0.02, "ascent must end at the maximum, all singular values equal"
    print(f"seed {seed}: noise grows x{growth:.3f} a step; in the end R misses its maximum by {gap:.0e} nats")
    paths.append(torch.stack(path))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
n, d, ranks = 64, 32, range(1, 33)
bound = torch.tensor([most(r, d, EPS) for r in ranks])
rates = torch.tensor([[R(F.pad(unit(n, r, seed), (0, d - r)), EPS) for r in ranks] for seed in range(n_seeds)])
assert (rates < bound + 1e-9).all() and (rates.diff() > 0).all(), "below the bound, and growing with the rank"
left.plot(ranks, bound, ":", color=figures.ROLE["bound"], label="bound for rank r")
left.plot(ranks[3::4], [R(tight(r, n, d), EPS) for r in ranks[3::4]], "D", color=figures.BLUE, label="tight frames")
left.plot(ranks, rates.T, "o", ms=2.5, color=figures.GRAY, label=once("random codes"))
for path in paths:
    lines = right.semilogy(path[:, :1], color=figures.VERMILLION) + right.plot(path[:, 1:], color=figures.BLUE, lw=0.5)
left.set(title=f"More rank, more rate (n = {n}, d = {d})", xlabel="rank r of the codes", ylabel="R (nats)")
right.set(title="Ascent spreads a nearly collapsed batch", xlabel="step", ylabel="singular values of Z", xlim=(0, 120))
left.legend(), right.legend(lines[:2], ("largest", f"the other seven, {n_seeds} seeds"))
figures.show(fig, alt="Coding rate grows with rank up to its bound; singular values of collapsed codes grow and meet.")

# %% [markdown]
# Left: tight frames lie on the bound, random codes below it. Right: small singular values grow by a constant factor (a
# straight line) until all meet. A collapsed batch comes back, but only by what noise it has left.
#
# ## 2 · The gradient bound, with its factor put right
# With singular values $\sigma_i$, $x_i = \alpha\sigma_i^2$, $r = \min(d,n)$, and as $x/(1+x)^2\le\frac14$ (equal at 1)
# $$ \lVert\nabla_Z R_\varepsilon\rVert_F^2 = \alpha\sum_{i\le r}\frac{x_i}{(1+x_i)^2} \le \frac{\alpha r}4
#    \quad\Rightarrow\quad \lVert\nabla_Z R_\varepsilon\rVert_F \le \frac{\sqrt{d\min(d,n)/n}}{2\varepsilon} . $$
# (Sim, Theorem C.1) prints $4\varepsilon$: Eq. 28 misses the 2 in $\nabla\log\det(I+\alpha ZZ^\top) =
# 2\alpha(I+\alpha ZZ^\top)^{-1}Z$. Eq. 27 says $\sum\sigma_i^2 = d$; unit codes give $n$. So Remark C.3 (all $x_i = 1$
# but one) needs $\varepsilon^2\le\max(1, d/n)$. Remark C.2 asks if unit codes can have such a spectrum: see `frame`.

# %%
gradient = lambda Z, eps: Z @ torch.linalg.inv(len(Z) * eps**2 / Z.shape[1] * torch.eye(Z.shape[1]) + Z.T @ Z)
corrected = lambda n, d, eps: math.sqrt(d * min(d, n) / n) / (2 * eps)
for Z in (unit(64, 16, 1), unit(16, 64, 1)):
    gap = (gradient(Z, EPS) - slope(regularizers.coding_rate, Z, EPS)).abs().max()
    assert gap < 1e-11, f"{gap:.0e}: autograd and the gradient by hand must agree"
    assert abs(torch.linalg.svdvals(Z).square().sum() - len(Z)) < 1e-10, "the trace is the number of codes, n, not d"
Z, bound = tight(16, 64, 16), corrected(64, 16, 1.0)
norm = slope(regularizers.coding_rate, Z, 1.0).norm().item()
print(f"tight frame, d = 16, n = 64, eps = 1: norm {norm:.3f}; bound {bound / 2:.3f} printed, {bound:.3f} corrected")
assert norm > 1.9 * bound / 2 and abs(norm - bound) < 1e-10, "the printed bound is violated, the corrected one attained"
assert tangent(gradient(Z, 1.0), Z).norm() < 1e-12, "at the maximum the whole gradient is radial"

# %%
cases = [(d, n, 10 ** (k / 2)) for d in (4, 16, 64, 256) for n in (4, 32, 512) for k in range(-8, 5)]
found = {"random codes": [], "tight frames": [], "Remark C.3": []}  # eps^2 r / d, norm / printed bound, r
for d, n, x in cases:
    r, eps, power = min(d, n), math.sqrt(x * d / min(d, n)), torch.full((min(d, n),), x * n / min(d, n))
    power[-1] = n - power[:-1].sum()  # all x_i = 1, but the last
    codes = [("random codes", unit(n, d, seed)) for seed in range(n_seeds)] + [("tight frames", tight(r, n, d))]
    for name, Z in codes + [("Remark C.3", frame(power, n, d))] * (x <= 1):
        found[name].append((x, (gradient(Z, eps).norm() / corrected(n, d, eps) * 2).item(), r))
fig, ax = plt.subplots(figsize=(7, 2.7))
for name, look, color in zip(found, "o^D", (figures.GRAY, figures.BLUE, figures.GREEN), strict=True):
    x, ratio, r = torch.tensor(found[name]).T
    assert 1.9 < ratio.max() < 2 + 1e-9, f"{name}: well above the printed bound, never above the corrected one"
    ax.semilogx(x, ratio, look, ms=3, color=color, label=name)
    print(f"{name}: {(ratio > 1).double().mean():.0%} above the printed bound, up to {ratio.max():.3f} x")
assert (ratio**2 >= 4 * (1 - 1 / r) - 1e-9).all(), "Remark C.3: squared, (r - 1) / r of the corrected bound"
ax.hlines([1, 2], 1e-4, 100, figures.BLACK, ["dashed", "solid"], lw=1)
ax.set(title="Twice the printed bound, never more", xlabel="ε² min(d, n) / d", ylabel="gradient norm / printed bound")
ax.legend(loc=(0.82, 0.6))
figures.show(fig, alt="Gradient norms of tight frames and others exceed the printed bound, none the corrected one.")

# %% [markdown]
# Dashed: the printed bound; solid: the corrected one. Tight frames touch it once, Remark C.3's codes stay near it for
# all smaller $\varepsilon$; even random codes cross the printed one. Its order, all that $\gamma$ uses, stands. But at
# the maximum of $R_\varepsilon$ (tight frames) the whole gradient is radial, and the L2 normalization drops it.
#
# ## 3 · $\varepsilon$ or $\varepsilon^2$, and two weights with opposite trends
# With $m$ codes in each of $N$ processes the released code takes $\sum_i\log L_{ii}$, $LL^\top = I + \frac
# d{mN\,\mathtt{eps}}Z^\top Z$: Eq. 8 with $\mathtt{eps} = \varepsilon^2$. Its weight is $\gamma = \frac1d + \frac1n$,
# $n = mN$. The paper (section 2.3) divides out Theorem C.1 against a distance term of order 1: $\gamma =
# \Theta\big(\varepsilon\sqrt{n/(d\min(d,n))}\big)$. For $n > d$ one falls, one rises. Which balances? In a batch
# *mean*, as in Algorithm 1, a code's alignment gradient is $-t_i/n$, and that of all has norm $1/\sqrt n$, not 1.

# %%
d, batches, Z = 256, 2 ** torch.arange(5, 14), unit(512, 256, 0)
L = lambda Z, N, eps: torch.linalg.cholesky(torch.eye(d) + d / (len(Z) * N * eps) * Z.T @ Z)  # of one process
rates = L(Z, 1, 0.05).diagonal().log().sum(), *(regularizers.coding_rate(Z, eps) for eps in (math.sqrt(0.05), 0.05))
assert abs(rates[0] - rates[1]) < 1e-10, "eps = 0.05 of the code is sqrt(0.05) in the paper and the library"
print(f"R of 512 random codes: {rates[1]:.0f} nats; with 0.05 taken for epsilon itself it would be {rates[2]:.0f}")
gamma = {"paper": EPS * torch.sqrt(batches / (d * batches.clamp_max(d))), "code": 1 / d + 1 / batches}
assert abs(gamma["paper"][4] - 0.0198) < 5e-5 and abs(gamma["code"][4] - 0.0059) < 5e-5, "once, in float64"
assert (gamma["paper"][3:].diff() > 0).all() and (gamma["code"].diff() < 0).all(), "opposite trends from n = d on"
assert abs(slope(objectives.alignment, Z, unit(512, d, 1)).norm() * 512**0.5 - 1) < 1e-9, "alignment: 1 / sqrt(n)"
norms = torch.tensor([[gradient(unit(n, d, s), EPS).norm() for s in range(n_seeds)] for n in batches.tolist()])
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
for name, look, color in (("paper", "--s", figures.ORANGE), ("code", "-D", figures.GREEN)):
    ratio = gamma[name][:, None] * norms * batches[:, None].sqrt()  # coding rate : alignment
    change = (ratio[-1] / ratio[-4]).mean()
    assert change > 2 if name == "paper" else 0.7 < change < 1.4, f"{name}: {change:.2f} from n = 1024 to 8192"
    left.loglog(batches, gamma[name], look, color=color, label=f"{name}, {gamma[name][4]:.4f} at n = 512")
    right.loglog(batches, ratio, look, lw=0.8, color=color)
left.set(title="For n > d the two weights part", xlabel="n, codes in the batch (d = 256)", ylabel="γ"), left.legend()
right.set(title="Only the code's keeps its balance", xlabel="n", ylabel="gradient of rate / of alignment")
figures.show(fig, alt="For n > d gamma rises in the paper, falls in the code; only the code's keeps terms balanced.")

# %% [markdown]
# Right, random codes: as $n$ grows the gradients of $\gamma R_\varepsilon$ and of the alignment tend to a fixed ratio
# with the code's weight, not with the paper's. Constants are free in both: this is how to scale, not which is best.
#
# ## 4 · The released term depends on the number of processes
# By default a process takes the Gram matrix of its own $m$ codes and divides by the global $n = mN$: Eq. 8 for $m$
# codes, with $N\varepsilon^2$ for $\varepsilon^2$. `coding_rate(z, eps, groups=N)` (`prototypes_lib/regularizers.py`)
# emulates it. The ceiling is section 1's with $r = \min(m,d)$; codes in different processes need not differ.

# %%
level = {}
for N, parts in [(N, Z.chunk(N)) for N in (1, 2, 8, 64)]:
    local = sum(regularizers.coding_rate(part, EPS * math.sqrt(N)) for part in parts) / N
    code = sum(L(part, N, 0.05).diagonal().log().sum() for part in parts) / N
    gap = abs(regularizers.coding_rate(Z, EPS, N) - local) + abs(local - code)
    assert gap < 1e-9, f"{gap:.0e}: groups=N must be the local rate with N eps^2, and the released code's number"
print("  m   N   collapsed   random   ceiling   (gamma R, d = 256, eps^2 = 0.05)")
for m, N in ((512, 1), (256, 2), (64, 8), (64, 16), (24, 1), (78, 32)):
    codes = unit(1, d, 0).expand(m * N, d), unit(m * N, d, 0), torch.eye(d)[torch.arange(m * N) % m % d]
    level[m, N] = [regularizers.expansion(Z, EPS, N).item() for Z in codes]
    ceiling = (1 / d + 1 / (m * N)) * most(min(m, d), d, EPS * math.sqrt(N))
    assert abs(level[m, N][2] - ceiling) < 1e-9, "orthonormal codes in each process attain section 1's maximum"
    print(f"{m:>3}{N:>4}" + "{:>12.4f}{:>9.4f}{:>10.4f}".format(*level[m, N]))
reference = {(512, 1): 2.283, (256, 2): 1.798, (64, 8): 0.4496, (64, 16): 0.280, (24, 1): 2.935}
off = max(abs(level[key][2] - value) for key, value in reference.items())
assert off < 6e-4 and abs(level[64, 8][0] - 0.0189) < 5e-5, "computed once in float64 from the printed formulas"
assert abs(level[78, 32][0] - 0.0109) < 5e-5, "collapse: the last log line of SimDINO issue 20 (78 codes, 32 processes)"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9))
splits, ranks, used = [2**k for k in range(10)], [2**k for k in range(9)], {}
rate = lambda r, N: [regularizers.expansion(F.pad(unit(512, r, s), (0, d - r)), EPS, N) for s in range(n_seeds)]
top, low = ({N: GAMMA * most(r or min(512 // N, d), d, EPS * math.sqrt(N)) for N in splits} for r in (None, 1))
assert abs(top[512] - low[512]) < 1e-12, "one code a process: ceiling and collapse are the same"
left.loglog(splits, top.values(), "k^-", label="ceiling"), left.plot(splits, low.values(), "kv:", label="collapsed")
left.plot(splits, [rate(d, N) for N in splits], "o", color=figures.GRAY, label=once("random codes"))
for N, look, color in ((1, "-D", figures.GREEN), (8, "-^", figures.BLUE), (64, "-v", figures.PINK)):
    used[N] = (torch.tensor([rate(r, N) for r in ranks]) - low[N]) / (top[N] - low[N])
    right.plot(ranks, 100 * used[N], look, lw=0.8, color=color, label=once(f"N = {N}"))
assert used[8][-2].min() > 0.85 and used[1][-2].max() < 0.65, "8 processes: most of the gain at half the rank"
left.set(title="One batch of 512 codes, many objectives", xlabel="processes N", ylabel="γR"), left.legend()
right.set(title="Split batches saturate", xlabel="rank of random codes", ylabel="share of range (%)"), right.legend()
figures.show(fig, alt="Coding rate falls with the number of processes; split batches saturate at lower rank.")

# %% [markdown]
# Left: with the global batch fixed, more processes lower the ceiling and bring random codes closer to it; with one code
# each nothing is left to gain. Right: in 8 processes, as released, half the rank has most of it. The split matters.
#
# ## 5 · SimDINO's loss in its pieces, and what happens without the rate
# **Alignment.** $\frac12\lVert s-t\rVert^2 = 1-\langle s,t\rangle$ (Sim, Eq. 7); below Eq. 9 the 1 is lost, which
# changes no gradient. **Rate.** The paper takes the student's codes, the code averages $\frac12(s+t)$ of student and
# teacher on the same view, with gradient through $s$. At $\langle s,t\rangle = c$ an average has squared length
# $\frac{1+c}2$: a lower ceiling, and agreement is rewarded twice. **Toy.** 8 clusters in $\mathbb R^{32}$ with an
# offset, noisy views, a linear encoder to $\mathbb R^{16}$. Effective rank is $e^{-\sum\lambda_i\ln\lambda_i}$.

# %%
c, t = 0.7, unit(512, 256, 1)
s = c * t + math.sqrt(1 - c**2) * F.normalize(tangent(unit(512, 256, 2), t), dim=1)
assert abs(objectives.alignment(s, t) - (s - t).square().sum(1).mean() / 2) < 1e-12, "half a squared distance"
alone, both = (regularizers.expansion(codes, EPS, 8) for codes in (s, (s + t) / 2))
ceiling = GAMMA * most(64, 256 * (1 + c) / 2, EPS * math.sqrt(8))
assert both < min(alone, ceiling), "less length, less rate"
assert abs(ceiling - 0.422) < 5e-4, "0.422 is the level at which SimDINO's released ViT-B log sits"
print(f"gamma R, 8 x 64 random codes at cosine {c}: student {alone:.3f}, averages {both:.3f} of at most {ceiling:.3f}")
assert torch.allclose(slope(lambda s: R((s + t) / 2, EPS), t), gradient(t, EPS) / 2), "at s = t averages halve it"


# %%
def toy(seed, groups, n=128, D=32, d=16, lr=10.0):  # groups = 0: alignment alone
    own, ranks, code = torch.Generator().manual_seed(100 + seed), [], lambda x, w: F.normalize(x @ w, dim=1)
    noisy = lambda x: x + 0.3 * torch.randn(x.shape, generator=own)
    centers = F.pad(2 * unit(8, D, seed), (0, 1), value=1.0)
    images = lambda n: noisy(centers[torch.randint(8, (n,), generator=own)])
    student, test = noisy(torch.zeros(D + 1, d)).requires_grad_(), images(512)
    teacher = student.detach().clone()
    for _ in range(train_steps):
        a, b = noisy(images(n).repeat(2, 1)).chunk(2)
        rate = regularizers.expansion((code(a, student) + code(a, teacher)) / 2, EPS, groups or 1)
        loss = objectives.alignment(code(a, student), code(b, teacher)) - bool(groups) * rate
        teacher.lerp_(student.data.sub_(lr * torch.autograd.grad(loss, student)[0]), 0.1)
        lam = torch.linalg.svdvals(code(test, teacher)).square() / len(test)
        ranks.append(torch.special.entr(lam).sum().exp().item())  # effective rank
    return ranks, code(test, teacher).mean(0).norm().item()


# %%
fig, ax = plt.subplots(figsize=(7, 2.9))
looks = {1: ("-", figures.GREEN, "1 process"), 8: ("--", figures.BLUE, "8 processes")}
looks |= {0: ("-", figures.VERMILLION, "no coding rate"), 128: (":", figures.BLACK, "128 processes, one code each")}
for groups, (look, color, name) in looks.items():
    ranks, mean = zip(*(toy(seed, groups) for seed in range(n_seeds)), strict=True)
    ends, together = [r[-1] for r in ranks], groups in (0, 128)
    assert max(ends) < 1.5 and min(mean) > 0.9 if together else min(ends) > 7 and max(mean) < 0.7, f"{name}: {ends}"
    print(f"{name:<29}effective rank", *(f"{r:5.2f}" for r in ends), "  |mean code|", *(f"{m:.3f}" for m in mean))
    ax.plot(torch.tensor(ranks).T, look, color=color, lw=1, label=once(name))
ax.set(title="The rate needs codes to compare", xlabel="step", ylabel="effective rank of 16"), ax.legend(loc=(0.6, 0.2))
figures.show(fig, alt="Effective rank falls to one without the coding rate and stays high with it.")

# %% [markdown]
# Each line is a seed. Without the rate all codes become one (not shown: a slow teacher, with which it takes longer).
# With it they keep more directions in one process than in 8. With one code a process nothing is compared: collapse.

# %%
course.finish()
