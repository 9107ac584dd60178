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
# **Claim.** With 65536 prototypes the scores of a batch are gigabytes, several times over. But all that is asked of them
# are sums over rows and columns. The loss of all pairs of views, its gradients and every rule for targets can be had
# from a few rows at a time, exactly, and the rows may lie on several machines. **Papers.** Scores (vMF, Eqs. 3, 6), (PPC,
# Eq. 1); loss (Sim, Eqs. 4, 6); centers (vMF, Eq. 8), (PPC, Eq. 3). They do not print the identities below. **Before
# this:** `10_vmf_mixture.py`, `12_probability_centering.py`. **Cost:** about 20 s on two CPU cores.
#
# **Deviations.** (Sim, Eq. 5) is symmetric; as the official code we take teacher to student only. Codes and prototypes
# are random; machines are played by one. Sizes and concentrations were chosen so that differences show in seconds.

# %% tags=["parameters"]
n_seeds: int = 5  # repeats; claims about random data are checked in each
most_prototypes: int = 65536  # largest K at which digits are counted

# %%
import weakref

import matplotlib.pyplot as plt
import torch
from scipy.optimize import linprog
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from prototypes_lib import course, figures, objectives, scores
from prototypes_lib.assignment import Center, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.blockwise import LogScores, cross_entropy, cross_entropy_of_views

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
# No product of two views' $K$ numbers is left. "All pairs of different views of an image" is one such $\omega$.


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
    for other in (library, dense):
        gaps = [ours - other] + [x - y for x, y in zip(gradients(ours, Y, w), gradients(other, Y, w), strict=True)]
        gap = max(x.abs().max().item() for x in gaps)
        assert gap < 1e-12, f"{score.__name__}, {gap:.1e}: barycentres give value and gradients of the matrix"

# %% [markdown]
# The formula is the library's (`prototypes_lib/blockwise.py`) and the dense loss of one pair after the other. Its
# gradient is telling: $\partial\, \mathrm{CE} / \partial y = A^\top p - A^\top q$, **the student's barycentre minus the
# teacher's**. Two targets with one barycentre teach a code the same. On a circle of prototypes we take a target $q$, and
# a linear program finds the widest spread $q'$ with the same barycentre.

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
fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9), width_ratios=[1.2, 1])
left.plot(*(p @ A).T, color=figures.ROLE["student"], label="student's barycentres")
left.scatter(*A.T, s=10, color=figures.ROLE["data"], label="slopes $a_k$")
left.scatter(*A.T, s=400 * q, color=figures.ROLE["teacher"], alpha=0.65, lw=0, label="target $q$")
left.scatter(*A.T, s=400 * q2, fc="none", ec=figures.ROLE["prototypes"], lw=1.5, clip_on=False, label="target $q'$")
left.plot(*m, "*", ms=11, color=figures.BLACK, label="barycentre of $q$ and $q'$")
left.set(aspect="equal", title="Two targets, one barycentre ...", xlim=(-4.5, 11), ylim=(-5, 5), xticks=[], yticks=[])
left.spines[:].set_visible(False), left.legend(loc="center right", labelspacing=0.9)
right.plot(theta, curves[0].detach(), lw=5, color=figures.ROLE["teacher"], alpha=0.65, label="toward $q$")
right.plot(theta, curves[1].detach(), "--", color=figures.ROLE["prototypes"], label="toward $q'$")
right.set(xlabel="angle of the code $y$ (rad)", ylabel="cross-entropy (nats)", title="... one loss for every code")
right.legend(loc="upper right")
figures.show(fig, alt="Left: two targets on a circle of prototypes share a barycentre. Right: their losses coincide.")

# %% [markdown]
# **Finding.** Left: areas are probabilities. $q$ sits on neighbors, $q'$ on three prototypes far apart. Right: their losses
# are one curve. An image learns $p$ numbers from a target, not $K$. The *prototypes* do tell the two apart:
# $\partial / \partial a_k = (p_k - q_k)\, y$.
#
# ## 2. Every rule for targets is two vectors
# A center is a number for each prototype, a softmax divides each row by its sum, Sinkhorn alternates columns and rows.
# In the log domain all of them only add: $\log q_{bk} = L_{bk} + f_b + g_k$. Centers change $g$ (vMF, Eq. 8; PPC,
# Eq. 3), a softmax $f$, Sinkhorn both (below). With $B + K$ numbers remembered, any row of targets can be made again.


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
gap = (sinkhorn(L, 3) - matrix).abs().max()
assert gap < 1e-11, f"{gap:.1e}: two vectors are the library's Sinkhorn (prototypes_lib/assignment.py)"

# %% [markdown]
# The textbook keeps $Q = e^L$ and divides; in float32 that overflows where a score passes 88.7. Two remedies are common:
# subtract the largest score of all first, or each sample's largest. The second rescales *rows* before the first column
# sum, and Sinkhorn stopped after three steps is affected by that (`12_probability_centering.py`, section 3).


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
    share = f"{values.isfinite().float().mean():.0%} finite"
    ax.loglog(kappas, values.T, marker, color=color, alpha=0.5, ms=3, mfc="none")
    ax.loglog(kappas, values.nanmean(0), "-", marker=marker, ms=3, color=color, label=f"{label}: {share}")
ax.axvline(88.7, color=figures.ROLE["bound"], lw=0.8, ls=":")
ax.set(xlabel=r"concentration $\kappa = |w|/\tau$", ylabel="distance from exact targets", xlim=(4.5, 2e4))
ax.set(title="Float32: how far each form of Sinkhorn goes, and how well", xticks=(10, 100, 1000))
ax.set_xticks([], minor=True)
ax.legend(loc="center right")
figures.show(fig, alt="Exponential Sinkhorn ends in NaN from kappa 89 on; with row maxima it is finite, but far off.")

# %% [markdown]
# **Finding.** A mark is a seed; lines end where targets are NaN. Dotted: $e^\kappa$ overflows, at $\tau$ = 0.04 for
# $|w|$ = 3.55. Subtracting the largest score buys little, then rows underflow to $0/0$. Rows shifted one by one last
# longer, at targets far from those asked for. Log-sums keep float32's digits at every length.
#
# ## 3. One pass: the memory of the prototypes, the digits of their rows
# Autograd keeps every block until it is asked for gradients: again the whole matrix. But the gradients
# $n_i A^\top p_i - \sum_j \omega_{ji} m_j$ of codes and $\sum_i n_i\, p_i y_i^\top - \sum_j q_j u_j^\top$ of slopes are
# known while the block is there, and then it can go (section 1 compared them with autograd's). With $S$ views and $T$
# targets of $B$ images the matrix takes $(3S + T) B K p$ multiplications, $m$ and $q u^\top$ add $2T$: with 12 and 2,
# 42 instead of 38. That is the price. For the gain we follow all tensors while they live. And digits: in float32 a loss
# of ten nats is made of terms in the hundreds ($\log C_p$), so the order in which they are added should matter.


# %%
class Held(TorchDispatchMode):  # most bytes in tensors at one time, inputs included
    def __init__(self):
        super().__init__()
        self.live, self.most = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                self.live[x.untyped_storage().data_ptr()] = x.untyped_storage()
        self.most = max(self.most, sum(storage.nbytes() for storage in self.live.values()))
        return out


def inputs(seed, K, S, B, p):
    w = prototypes(seed, K, p, 2 * torch.exp(0.2 * randn(seed, K, 1))).float()
    return codes(seed, S, B, p).float().requires_grad_(), codes(seed + 500, 2, B, p).float(), w


# %%
forms = "matrix, all pairs at once", "matrix, view by view", "matrix, barycentres", "blocks, one pass"


def loss(form, Y, t, w):
    targets, a, (S, B, _) = LogScores(20 * t.flatten(0, 1), w.detach()), scores.affine(scores.vmf, w, 0.1), Y.shape
    if form == "blocks, one pass":
        return cross_entropy_of_views(a.scale * Y, a.slopes, a.offsets, [targets], block=2**18)
    q, omega = torch.softmax(targets.matrix(), -1), torch.kron(1 - torch.eye(2, S), torch.eye(B)) / (2 * (S - 1) * B)
    if form == "matrix, barycentres":
        return loss_of_pairs(a.scale * Y.flatten(0, 1), q, omega.to(Y), a.slopes, a.offsets)
    L, q = a.scale * Y @ a.slopes.T + a.offsets, q.unflatten(0, (2, B))
    if form == "matrix, view by view":
        return objectives.over_views(objectives.cross_entropy, q, list(L))
    pairs = torch.einsum("tbk,sbk->ts", q, torch.log_softmax(L, -1))
    return (pairs.trace() - pairs.sum()) / (2 * (S - 1) * B)


# %%
ks = [K for K in (1024, 4096, 16384, 65536) if K <= most_prototypes]
held, lost, wrong = torch.zeros(3, 4, len(ks), n_seeds).double()  # MB; errors of the loss and of the codes' gradient
for i, seed in torch.cartesian_prod(torch.arange(len(ks)), torch.arange(n_seeds)).tolist():
    Y, t, w = inputs(seed, ks[i], 4, 2, 256)
    exact = loss(forms[1], Y.double(), t.double(), w.double())
    truth = gradients(exact, Y)[0]
    for j, form in enumerate(forms):
        value = loss(form, Y, t, w)
        lost[j, i, seed] = abs(value.item() / exact.item() - 1)
        wrong[j, i, seed] = (gradients(value, Y)[0] - truth).norm() / truth.norm()
        if not seed:
            with Held() as inside:
                loss(form, *inputs(0, ks[i], 12, 16, 32)).backward()
            held[j, i] = inside.most / 1e6
print(held[...,0], lost.mean(-1), wrong.mean(-1))
