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
# # The loss of all pairs needs no batch-by-prototypes matrix
#
# **Claim.** With 65536 prototypes the scores of a batch are gigabytes, several times over. But all that is asked of
# them are sums over rows and columns. The loss of all pairs of views, its gradients and every rule for targets can be
# had from a few rows at a time, exactly, and the rows may lie on several machines. **Papers.** Scores (vMF, Eqs. 3, 6),
# (PPC, Eq. 1); loss (Sim, Eqs. 4, 6); centers (vMF, Eq. 8), (PPC, Eq. 3). They do not print the identities below.
# **Before this:** `10_vmf_mixture.py`, `12_probability_centering.py`. **Cost:** about 10 s on two CPU cores.
# **Deviations.** (Sim, Eq. 5) is symmetric; as the official code we take teacher to student only. Codes and prototypes
# are random; machines are played by one. Sizes and concentrations were chosen so that differences show.

# %% tags=["parameters"]
n_seeds: int = 5  # repeats; claims about random data are checked in each

# %%
import weakref

import matplotlib.pyplot as plt
import torch
from scipy.optimize import linprog
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from prototypes_lib import course, figures, objectives, scores
from prototypes_lib.assignment import Center, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.blockwise import LogScores, cross_entropy_of_views
from prototypes_lib.masks import mask_ratios

figures.use_style()
torch.set_num_threads(1)  # small matrices: threads would mostly wait for each other
randn = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
codes = lambda seed, *shape: normalize(randn(seed, *shape) + 0.5, dim=-1)
prototypes = lambda seed, k, p, length=1.0: length * normalize(randn(1000 + seed, k, p), dim=-1)
gradients = lambda loss, *at: torch.autograd.grad(loss, at, retain_graph=True)
tv = lambda a, b: (a - b).abs().sum(1).mean().item() / 2  # total variation, mean over samples

# %% [markdown]
# ## 1. A target enters by its barycentre
# All scores of the family are affine in the unit code, $L_k = \langle a_k, y\rangle + b_k$. Dot products (vMF, Eq. 3)
# have $a_k = w_k/\tau$, $b = 0$; cosines $a_k = w_k / (\tau |w_k|)$; the vMF density (vMF, Eq. 6) adds
# $b_k = \log C_p(|w_k|/\tau)$. Let $a_k$ be the rows of $A$. Since $\sum_k q_k = 1$,
# $$\mathrm{CE}(q, p) = -\sum_k q_k \Bigl(L_k - \log \sum_j e^{L_j}\Bigr)
#   = \log \sum_j e^{L_j} - \langle m, y \rangle - \langle b, q \rangle, \qquad m = A^\top q .$$
# The target's $K$ numbers meet the code only in the barycentre $m$, as long as a code. Let the pair of target $j$ and
# prediction $i$ have weight $\omega_{ji}$, with $n_i = \sum_j \omega_{ji}$, $n'_j = \sum_i \omega_{ji}$ and
# $u_j = \sum_i \omega_{ji} y_i$:
# $$\sum_{ji} \omega_{ji} \,\mathrm{CE}(q_j, p_i) = \sum_i n_i \log \sum_k e^{L_{ik}}
#   - \sum_j \langle m_j, u_j \rangle - \sum_j n'_j \langle b, q_j \rangle .$$
# "All pairs of different views of an image" is one such $\omega$. The gradient of a single pair is telling:
# $\partial\, \mathrm{CE} / \partial y = A^\top p - A^\top q$, **the student's barycentre minus the teacher's**. Two
# targets with one barycentre teach a code the same: below a target $q$ on a circle of prototypes, and the widest spread
# $q'$ with its barycentre, found by a linear program. The library's version: `prototypes_lib/blockwise.py`.


# %%
def loss_of_pairs(y, q, omega, A, b):
    n, n_t, u, m = omega.sum(0), omega.sum(1), omega @ y, q @ A
    return n @ torch.logsumexp(y @ A.T + b, dim=1) - (m * u).sum() - n_t @ (q @ b)


T, S, B, K, p = 2, 6, 8, 40, 16  # two global and four local views
omega = torch.kron(1 - torch.eye(T, S), torch.eye(B)).double() / (T * (S - 1) * B)  # rows: view 0 of all, view 1, ...
for score, seed in [(f, s) for f in (scores.dot, scores.cosine, scores.vmf) for s in range(n_seeds)]:
    Y, w = codes(seed, S, B, p).requires_grad_(), prototypes(seed, K, p, 2.0).requires_grad_()
    Q, a = torch.softmax(3 * randn(seed, T, B, K), -1), scores.affine(score, w, 0.1)
    b = torch.zeros(K).double() if a.offsets is None else a.offsets
    ours = loss_of_pairs(Y.flatten(0, 1), Q.flatten(0, 1), omega, a.scale * a.slopes, b)
    library = cross_entropy_of_views(a.scale * Y, a.slopes, a.offsets, [LogScores(Q.flatten(0, 1).log())], block=100)
    dense = objectives.over_views(objectives.cross_entropy, Q, [score(y, w, 0.1) for y in Y])
    found, *others = [(x, *gradients(x, Y, w)) for x in (ours, library, dense)]
    gap = max((x - y).abs().max().item() for other in others for x, y in zip(found, other, strict=True))
    assert gap < 1e-12, f"{score.__name__}, {gap:.1e}: barycentres give value and gradients of the matrix"

# %%
angles = torch.arange(16, dtype=torch.float64) * torch.pi / 8
A = (1 + 0.25 * torch.cos(3 * angles))[:, None] * torch.stack([angles.cos(), angles.sin()], 1) / 0.3
q = torch.softmax(A @ A[3] / 3, 0)
m, same = A.T @ q, torch.cat([A.T, torch.ones(1, 16)])  # the barycentre, and the sum
q2 = torch.from_numpy(linprog(-(A - m).square().sum(1), A_eq=same, b_eq=same @ q, bounds=(0, 1)).x)
theta = torch.linspace(-torch.pi, torch.pi, 361).double()
y = torch.stack([theta.cos(), theta.sin()], 1).requires_grad_()
p, curves = torch.softmax(y @ A.T, 1).detach(), [-(torch.log_softmax(y @ A.T, 1) @ target) for target in (q, q2)]
gap, off = (curves[0] - curves[1]).abs().max().item(), tv(q[None], q2[None])
assert gap < 1e-12 and off > 0.5, f"{gap:.1e}, {off:.2f}: very different targets, one barycentre, one loss"
gap = (gradients(curves[1].sum(), y)[0] - (p @ A - m)).abs().max()
assert gap < 1e-12, f"{gap:.1e}: a code's gradient is the difference of two barycentres"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9), width_ratios=[1.4, 1])
left.plot(*(p @ A).T, color=figures.ROLE["student"], label="student's barycentres")
left.scatter(*A.T, s=10, color=figures.ROLE["data"], label="slopes $a_k$")
left.scatter(*A.T, s=400 * q, color=figures.ROLE["teacher"], alpha=0.65, lw=0, label="target $q$")
left.scatter(*A.T, s=400 * q2, fc="none", ec=figures.ROLE["prototypes"], lw=1.5, clip_on=False, label="target $q'$")
left.plot(*m, "*", ms=11, color=figures.BLACK, label="barycentre of $q$ and $q'$")
left.set(aspect="equal", title="Two targets, one barycentre ...", xlim=(-4.5, 13), ylim=(-5, 5), xticks=[], yticks=[])
left.spines[:].set_visible(False), left.legend(loc="center right", labelspacing=0.9)
right.plot(theta, curves[0].detach(), lw=5, color=figures.ROLE["teacher"], alpha=0.65, label="toward $q$")
right.plot(theta, curves[1].detach(), "--", color=figures.ROLE["prototypes"], label="toward $q'$")
right.legend(), right.set(xlabel="angle of $y$ (rad)", ylabel="cross-entropy (nats)", title="... one loss")
figures.show(fig, alt="Left: two targets on a circle of prototypes share a barycentre. Right: their losses coincide.")

# %% [markdown]
# **Finding.** Areas are probabilities. $q$ sits on neighbors, $q'$ on three prototypes far apart; their losses are one
# curve. An image learns $p$ numbers from a target, not $K$. The slopes do get another gradient, $(p_k - q_k)\, y$.
#
# ## 2. Every rule for targets is two vectors
# In the log domain all rules only add: $\log q_{bk} = L_{bk} + f_b + g_k$. Centers change $g$ (vMF, Eq. 8; PPC, Eq. 3),
# a softmax $f$, Sinkhorn alternates. With $B + K$ numbers remembered, any row of targets can be made again. The
# textbook divides $Q = e^L$ instead, which in float32 overflows where a score passes 88.7. Two remedies are common:
# subtract the largest score first, or each sample's. The latter rescales *rows* before the first column sum, and
# Sinkhorn stopped after three steps is affected by that (`12_probability_centering.py`, section 3).


# %%
def sinkhorn(L, steps):
    f = L.new_zeros(len(L), 1)
    for _ in range(steps):
        g = -torch.logsumexp(L + f, dim=0)  # every prototype the same mass
        f = -torch.logsumexp(L + g, dim=1, keepdim=True)  # every sample mass one
    return L + f + g


B, K, p = 64, 128, 32
links = Normalize, lambda: Center(K), lambda: ProbabilityCenter(K), Sinkhorn
for make, seed in [(link, seed) for link in links for seed in range(n_seeds)]:
    a = scores.affine(scores.vmf, prototypes(seed, K, p, 2.0), 0.07)
    rows = LogScores(a.scale * codes(seed, B, p), a.slopes, a.offsets, block=500)  # three rows at a time
    (by_rows, whole), L = (make(), make()), rows.matrix()
    for _ in range(2):  # the second time with a memory
        shifted, matrix = by_rows.shift(rows, 0.07), whole(L, 0.07)
    gap = (shifted.matrix() - matrix).abs().max()
    assert shifted.slopes is rows.slopes and gap < 1e-11, f"{whole}, {gap:.1e}: a link changes f and g, by a few rows"
assert torch.allclose(sinkhorn(L, 3), matrix, rtol=0, atol=1e-11), "two vectors are prototypes_lib/assignment.py's"


# %%
def textbook(L, minus):  # exponentiate, then divide
    Q = (L - minus).exp()
    for _ in range(3):
        Q = Q / Q.sum(0)
        Q = Q / Q.sum(1, keepdim=True)
    return Q


kappas, off = torch.logspace(0.7, 3, 24).tolist(), torch.zeros(4, n_seeds, 24)
for i, seed in torch.cartesian_prod(torch.arange(24), torch.arange(n_seeds)).tolist():
    y, mu = codes(seed, B, p), prototypes(seed, K, p)
    mu[: B // 2] = normalize(y[::2] + 0.15 * randn(seed + 50, B // 2, p), dim=-1)  # half the codes have one at hand
    exact, L = Sinkhorn(3)(kappas[i] * y @ mu.T).exp(), (kappas[i] * y @ mu.T).float()
    Qs = [textbook(L, minus) for minus in (0.0, L.max(), L.amax(1, keepdim=True))] + [sinkhorn(L, 3).exp()]
    off[:, seed, i] = torch.tensor([tv(Q, exact) for Q in Qs])
assert (off[3] < 1e-5).all(), f"{off[3].max():.1e}: in the log domain targets are right at any length"
assert off[:3, :, -1].isnan().all(), "with scores in the hundreds every exponential form breaks down"
assert (off[2, :, 10] > 0.1).all(), "subtracting each sample's largest score gives finite, but other targets"

# %%
fig, ax = plt.subplots(figsize=(7, 2.9))
looks = [*zip((figures.VERMILLION, figures.ORANGE, figures.PINK, figures.BLUE), "s^Do", strict=True)]
labels = "exponentials", "largest score subtracted", "each row's largest subtracted", "log domain, two vectors"
for label, values, (color, marker) in zip(labels, off, looks, strict=True):
    label = f"{label}: {values.isfinite().float().mean():.0%} of runs finite"
    ax.loglog(kappas, values.T, marker, color=color, alpha=0.5, ms=3, mfc="none")
    ax.loglog(kappas, values.nanmean(0), "-", marker=marker, ms=3, color=color, label=label)
ax.axvline(88.7, color=figures.ROLE["bound"], lw=0.8, ls=":")
ax.set(xlabel=r"concentration $\kappa = |w|/\tau$", ylabel="total variation from exact", xlim=(4.5, 2e4))
ax.set(title="Float32: how far each form of Sinkhorn goes, and how well", xticks=(10, 100, 1000))
ax.set_xticks([], minor=True), ax.legend(loc="center right")
figures.show(fig, alt="Exponential Sinkhorn ends in NaN from kappa 89 on; with row maxima it is finite, but far off.")

# %% [markdown]
# **Finding.** A mark is a seed, lines end in NaN. Dotted: $e^\kappa$ overflows, at $\tau$ = 0.04 for $|w|$ = 3.55. Less
# the largest score, rows soon underflow to $0/0$. Rows shifted one by one last longer, far from the exact targets.
#
# ## 3. Gradients come in the same pass
# Autograd keeps every block until it is asked for gradients: again the whole matrix. But those of codes, $n_i A^\top
# p_i - \sum_j \omega_{ji} m_j$, and of slopes, $\sum_i n_i\, p_i y_i^\top - \sum_j q_j u_j^\top$, are known while the
# block is there; then it can go. (Section 1 compared them with autograd's.) The price, for $S$ views and $T$ targets of
# $B$ images: $3S + T + 2T$ times $BKp$ multiplications where the matrix takes $3S + T$; with 12 and 2, 42 for 38. The
# gain is memory: below all tensors are followed while they live.


# %%
class Held(TorchDispatchMode):  # most bytes in tensors at one time, inputs included
    live, most = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                self.live[x.untyped_storage().data_ptr()] = x.untyped_storage()
        self.most = max(self.most, sum(storage.nbytes() for storage in self.live.values()))
        return out


# %%
def megabytes(K, B, S=12, p=64):
    Y, w = codes(0, S, B, p).float().requires_grad_(), prototypes(0, K, p).float().requires_grad_()
    targets = LogScores(25 * codes(1, 2 * B, p).float(), w.detach())
    with Held() as matrix:
        q, L = targets.matrix().softmax(1).unflatten(0, (2, B)), scores.vmf(Y, w, 0.1)
        objectives.over_views(objectives.cross_entropy, q, list(L)).backward()
    Y.grad = w.grad = q = L = None
    with Held() as blocks:
        a = scores.affine(scores.vmf, w, 0.1)
        cross_entropy_of_views(a.scale * Y, a.slopes, a.offsets, [targets], block=2**18).backward()
    return matrix.most / 1e6, blocks.most / 1e6


sizes = {"K": [(K, 64) for K in (1024, 2048, 4096, 8192, 16384)], "B": [(4096, B) for B in (16, 32, 64, 128, 256)]}
held = {x: [megabytes(*size) for size in sizes[x]] for x in sizes}
more = [(a - b) * 1e6 / 4 / 8192 for a, b in zip(held["K"][-1], held["K"][-2], strict=True)]
assert more[0] > 3 * 12 * 64 and more[1] < 6 * 64, f"{more}: numbers held for one prototype more, 64 being its own"
print(f"for one prototype more, of 64 numbers, the matrix form holds {more[0]:.0f} numbers, the blocks {more[1]:.0f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), sharey=True)
for ax, x, i in zip(axes, held, (0, 1), strict=True):
    ticks = [size[i] for size in sizes[x]]
    for values, name, (color, marker) in zip(zip(*held[x], strict=True), ("matrix", "blocks"), looks[::3], strict=True):
        ax.loglog(ticks, values, marker + "-", color=color, label=f"{name}: held at most")
    ax.loglog(ticks, [K * 64 * 4e-6 for K, _ in sizes[x]], ":", color=figures.BLACK, label="prototypes themselves")
    ax.set_xticks(ticks, ticks), ax.set_xticks([], minor=True)
axes[0].set(xlabel="prototypes K (64 images)", ylabel="memory (MB)", title="Blocks: memory of the prototypes ...")
axes[1].set(xlabel="images B (4096 prototypes)", title="... not of the batch", ylim=(0.2, 2e3)), axes[0].legend()
figures.show(fig, alt="Memory of the matrix form grows with K and with B; that of blocks less with K, hardly with B.")

# %% [markdown]
# **Finding.** Inputs count, scratch inside an operation does not. The matrix form follows $S B K$; blocks need one of
# $2^{18}$ numbers, then a few tensors as large as the prototypes, whose gradient has to exist anyway.
#
# ## 4. Ranks add up sums, not averages
# A batch may lie on several processes ("ranks"). The loss is a sum over rows: each adds its own. Rules for targets look
# at columns, $\log \sum_b e^{L_{bk} + f_b}$, and these combine exactly: all-reduce the $K$ maxima, then the $K$ sums of
# $e^{\cdot - \max}$; a rank without rows has $-\infty$ (`prototypes_lib/ranks.py`). A center is a sum and a count. The
# mean of the ranks' means is another number where ranks have different numbers of masked patches. The released DINOv2
# centers patches so; it draws masks that keep counts nearly even, iBOT does not. How far off are the targets?


# %%
def sinkhorn_on_ranks(parts, steps):  # the rows of L that each rank has
    f = [L.new_zeros(len(L), 1) for L in parts]
    for _ in range(steps):
        here = torch.stack([torch.logsumexp(L + f_r, 0) for L, f_r in zip(parts, f, strict=True)])
        top = here.amax(0)
        g = -(top + (here - top).exp().sum(0).log())
        f = [-torch.logsumexp(L + g, 1, keepdim=True) for L in parts]
    return torch.cat([L + f_r + g for L, f_r in zip(parts, f, strict=True)])


# %%
ratios, far = torch.tensor([1, 1.5, 2, 4, 8, 16]), torch.zeros(4, 6, n_seeds)  # largest count of four / smallest
for i, seed in torch.cartesian_prod(torch.arange(6), torch.arange(n_seeds)).tolist():
    w, counts = prototypes(seed, 64, 32), (512 * torch.softmax(ratios[i].log() * torch.arange(4) / 3, 0)).round().int()
    for j, pull in enumerate((0.5, 0.0)):
        own = 0.5 + pull * randn(7000 + seed, 4, 32).repeat_interleave(counts, 0)  # what a rank's images have in common
        L, another = [scores.cosine(normalize(own + randn(s, *own.shape), dim=1), w, 0.07) for s in (seed, seed + 50)]
        parts, q = L.split(counts.tolist()), torch.softmax(Center(64, momentum=0.0)(L), 1)
        gap = (sinkhorn_on_ranks([*parts, L[:0]], 3) - Sinkhorn(3)(L)).abs().max()
        assert gap < 1e-11, f"{gap:.1e}: log-sums over ranks are exact, also with a rank that has no rows"
        far[j, i, seed] = tv((L - torch.stack([part.mean(0) for part in parts]).mean(0)).softmax(1), q)
    far[2, i, seed] = tv((L - another.mean(0)).softmax(1), q)
    far[3, i, seed] = tv((L - sum(part.sum(0) for part in parts) / len(L)).softmax(1), q)
assert (far[:2, 0] < 1e-6).all() and (far[:2, 1:] > 1e-3).all(), f"{far.mean(-1)}: right only if counts are even"
assert far[3].max() < 1e-12, f"{far[3].max():.1e}: a sum and a count of each rank are right always"
assert far[0, -1].min() > far[2].max() and far[2].min() > far[1, :4].max(), "ranks that differ: a bias; alike: noise"
assert torch.stack([L.mean(0), L[:0].mean(0)]).mean(0).isnan().all(), "one rank without patches: NaN for all"
masked = [mask_ratios(8 * n, generator=torch.Generator().manual_seed(0)).view(4, -1).sum(1) for n in (8, 64)]
print("iBOT's masks, 8 and 64 images a rank: largest / smallest count", *(f"{m.max() / m.min():.1f}" for m in masked))

# %%
fig, ax = plt.subplots(figsize=(7, 2.7))
names = "mean of means, ranks differ", "mean of means, ranks alike", "next batch's center", "sums and counts"
for name, values, (color, marker) in zip(names, far, (*looks[:2], (figures.GRAY, "x"), looks[3]), strict=True):
    ax.plot(ratios, values, marker, color=color, alpha=0.5, ms=3)
    ax.plot(ratios, values.mean(1), marker + "-", color=color, label=name)
ax.set(xscale="log", xlabel="patches of the largest rank / of the smallest", ylabel="total variation from exact")
ax.set(title="Uneven ranks: the mean of their means is not the center")
ax.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios]), ax.set_xticks([], minor=True), ax.legend(loc="upper left")
figures.show(fig, alt="Targets drift from the exact ones as counts become uneven, if ranks' means are averaged.")

# %% [markdown]
# **Finding.** If ranks see alike images the error is noise, smaller than that of taking the next batch's center (gray)
# until counts are very uneven; if each has its own it is a bias, and passes gray. At the unevenness printed above both
# are moderate; one rank without patches makes it NaN. Sums and counts are as cheap, and exact.

# %%
course.finish()
