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
# # The loss that stands at ln K, and other plateaus
#
# **Claim.** A loss that stands still says little until it is split: cross-entropy is KL plus the teacher's entropy.
# Standing at $\ln K$ is the signature of uniform collapse; more prototypes raise that plateau and lengthen it. KL zero
# can mean solved, or collapsed in three ways; two entropies tell them apart. And the center, which keeps one prototype
# from taking all images, turns every constant into $1/K$: collapsed scores, and the normalizer $\log C_p$.
#
# **Papers.** (Sim, section 2.1, Eqs. 3-6; Appendix B, Eqs. 18-24), (vMF, section 3.4, Eq. 8), (PPC, Eq. 3).
# **Before this:** `10_vmf_mixture.py` ($\log C_p$), `12_probability_centering.py` (centers). **Cost:** about 20 s.
#
# **Deviations.** Section 4 is a toy: fixed codes, two views an image, only prototypes learn, by gradient descent; the
# teacher is the student's copy. Data, step size and length were chosen so that every seed leaves its plateau in the
# time shown; growth rates are predicted, not fitted. (Sim, Eq. 5) prints the loss symmetrized; DINO's official code has
# one direction, teacher to student, and so do we. Sections 3 and 4 show both.

# %% tags=["parameters"]
n_seeds: int = 5  # repeats of every experiment that draws random numbers
n_steps: int = 500  # gradient steps of the toy runs, section 4
n_batches: int = 300  # batches seen by the centers, section 5; at least 30 / (1 - momentum)
momentum: float = 0.9  # m of the centers, section 5

# %%
import math
from collections import Counter

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize, one_hot

from prototypes_lib import assignment, collapse, course, figures, objectives, scores, vmf

figures.use_style()
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # small matrices: threads would only wait for each other
H = objectives.entropy

# %% [markdown]
# ## 1. Cross-entropy is KL plus entropy
#
# The teacher's target is $p$, the student's answer $q = \mathrm{softmax}(z)$. In the definition write
# $\log q_k = \log p_k - \log(p_k/q_k)$ (Sim, Eqs. 18-20):
#
# $$\mathrm{CE}(p, q) = -\sum_k p_k \log q_k = \sum_k p_k \log(p_k/q_k) - \sum_k p_k \log p_k
# = \mathrm{KL}(p \| q) + H(p).$$
#
# The student can lower the first term only. A uniform **student** pays $\ln K$ whatever the teacher says; a uniform
# **teacher** lets nobody pay less than $\ln K$. When both are uniform there is nothing to lower. $K$ identical
# prototypes do that: see facebookresearch/dino, issues 43 and 246, where people ask why their loss stands at it.

# %%
CE = lambda p, z: -(p * (z - z.exp().sum(-1, keepdim=True).log())).sum(-1).mean()
kl = lambda p, q: torch.special.xlogy(p, p / q).sum(-1)
g = torch.Generator().manual_seed(0)
p, z = (4 * torch.randn(64, 100, generator=g)).softmax(-1), 4 * torch.randn(64, 100, generator=g)
assert abs(CE(p, z) - objectives.cross_entropy(p, z)) < 1e-12, "the library's, prototypes_lib/objectives.py, is a mean"
assert abs(CE(p, z) - (kl(p, z.softmax(-1)) + H(p)).mean()) < 1e-12, "CE = KL + H is an identity"
assert abs(CE(p, 0 * z) - math.log(100)) < 1e-12, "a uniform student pays ln K against any teacher"

# %%
reports = {4096: 8.317765, 65536: 11.090352}  # facebookresearch/dino, issues 43 and 246
print("     K       ln K   loss with K identical prototypes   reported")
for k in (1024, 4096, 8192, 65536):
    y = normalize(torch.randn(2, 4, 16, generator=g), dim=-1)  # codes of 4 images: the teacher's, the student's
    w = torch.randn(1, 16, generator=g).expand(k, -1)
    loss = objectives.cross_entropy(scores.vmf(y[0], w, 0.04).softmax(-1), scores.vmf(y[1], w, 0.1)).item()
    print(f"{k:6d}  {math.log(k):9.6f}  {loss:9.6f}   {reports.get(k, ''):>34}")
    assert abs(loss - math.log(k)) < 1e-9, f"{loss}: equal scores make equal shares, whatever codes and temperatures"
    assert k not in reports or abs(reports[k] - loss) < 1e-4, f"{reports[k]}: another plateau than {loss:.6f}"

# %% [markdown]
# ## 2. A KL of zero can be a collapse
#
# Zero KL: the student predicts the teacher. One that says the same for every image is easily predicted. So ask how much
# the target tells about the image. With the marginal $\bar p = \frac1N\sum_n p_n$ this is
#
# $$I = H(\bar p) - \tfrac1N \sum_n H(p_n) = \tfrac1N \sum_n \mathrm{KL}(p_n \| \bar p) \ge 0,$$
#
# the mutual information of image and prototype, zero exactly when all targets are equal: two entropies, beside the
# loss. We build four teachers which the student follows perfectly, and one which it does not follow yet.

# %%
N, K, points = 512, 64, {}
zero, blend = torch.zeros(N, K), (2 * torch.randn(1, K, generator=g)).expand(N, K)
same, own = 12.0 * one_hot(torch.zeros(N, dtype=torch.long), K), 12.0 * one_hot(torch.arange(N) % K, K)
situations = {  # name: scores of teacher and student, the word for it, places of the name in the figure (points)
    "uniform": (zero, zero, "uniform", (-42, 9), (-42, 9)),
    "one class for all": (same, same, "one-hot", (8, -13), (8, -13)),
    "same blend for all": (blend, blend, "constant", (8, -9), (8, -9)),
    "solved": (own, own, "healthy", (-8, 15), (8, -14)),
    "student still uniform": (own, zero, "healthy", (8, 8), (8, 8)),
}
for name, (teacher, student, word, *_) in situations.items():
    p = teacher.softmax(-1)
    loss, h, marginal = objectives.cross_entropy(p, student).item(), H(p).mean().item(), H(p.mean(0)).item()
    verdict = collapse.verdict(loss=loss, k=K, teacher_entropy=h, marginal_entropy=marginal)
    points[name] = h, (loss, marginal)
    print(f"{name}: I = {abs(marginal - h):.3f}, {verdict.kind}\n    {verdict}")
    assert verdict.kind == word, f"{name}: {verdict.kind}, expected {word}"
    assert (loss - h < 1e-9) == (student is teacher), f"{name}: KL = {loss - h:.1e}"
    assert abs(marginal - h - kl(p, p.mean(0)).mean()) < 1e-9, "I is the mean KL from target to mean target"

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.5))
x, top = torch.linspace(0, math.log(K), 2), math.log(K)
for i, gap, label in ((0, "KL", "loss"), (1, "I", "marginal entropy")):
    axes[i].plot(x, x, color=figures.ROLE["bound"], lw=1)
    axes[i].axhline(top, color=figures.GRAY, ls="--", lw=1)
    axes[i].fill_between(x, 0 * x, x, color=figures.GRAY, alpha=0.15, lw=0)
    axes[i].annotate("", (1.55, top), (1.55, 1.55), arrowprops={"arrowstyle": "<->", "lw": 1})
    axes[i].text(1.63, 3.1, f"{gap} is the\nvertical gap", fontsize=8)
    axes[i].text(2.6, 0.7, f"impossible:\n{gap} < 0", fontsize=8, color="0.35")
    for (name, (h, values)), marker, size in zip(points.items(), "soDP^", (45, 130, 45, 35, 130), strict=True):
        axes[i].scatter(h, values[i], size, marker=marker, zorder=200 - size)
        axes[i].annotate(name, (h, values[i]), situations[name][3 + i], textcoords="offset points", fontsize=8)
    axes[i].set(xlabel="teacher entropy, nats", ylabel=f"{label}, nats", xlim=(-0.2, 4.5), ylim=(-0.5, 4.8))
axes[0].set_title("KL = 0 on the whole diagonal"), axes[1].set_title("Collapsed means I = 0")
figures.show(fig, "Loss and marginal entropy over teacher entropy: only the second tells solved from collapsed.")

# %% [markdown]
# **Reading.** Left: four of five lie on the diagonal, *solved* upon *one class for all*: neither loss nor KL separates
# them. Right: three collapses lie on the diagonal, *solved* far above. Nothing lies in the gray. A loss on the dashed
# line, $\ln K$, is a collapse at its right end only; at the left end the student has not begun.

# %% [markdown]
# ## 3. Half-Jeffreys, not Jensen-Shannon; one direction, not two
#
# (Sim, Eq. 21) averages the identity with its mirror image, $d_{\mathrm{CE}} = \frac12[\mathrm{KL}(p\|q) +
# \mathrm{KL}(q\|p)] + \frac12[H(p) + H(q)]$, and calls the first part Jensen-Shannon. It is half the Jeffreys
# divergence, $\ell\tanh\frac\ell2$ for two mirrored answers of log-odds $\pm\ell$: no bound. Jensen-Shannon compares
# both with their mean, stays below $\ln 2$, and lets go of a student that is sure and wrong.
#
# The appendix: entropies keep DINO from uniform answers. In one direction they cannot, as $p$ has no gradient and
# *cross-entropy has the gradient of KL*, zero at $q = p$. Symmetrized, the student moves on to a sharper answer.

# %%
js = lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
odds = torch.tensor([0.01, 1.0, 2.0, 4.0, 8.0, 16.0])
p = torch.stack([odds, 0 * odds], -1).softmax(-1)
z = torch.stack([-odds / 2, odds / 2], -1).requires_grad_()  # the student is as sure, of the other class
q = z.softmax(-1)
pulls = [torch.autograd.grad(d(p, q).sum(), z, retain_graph=True)[0].norm(dim=-1) for d in (kl, js)]
table = torch.stack([odds, (kl(p, q) + kl(q, p)) / 2, js(p, q), *pulls], -1).detach()
print("columns: log-odds, half-Jeffreys, Jensen-Shannon, norm of the gradient in z of KL(p|q), of Jensen-Shannon")
print(*(" ".join(f"{x:9.5f}" for x in row) for row in table.tolist()), sep="\n")
assert (table[:, 1] - odds * torch.tanh(odds / 2)).abs().max() < 1e-9, "half-Jeffreys is l tanh(l / 2) here"
assert table[-1, 1] > 15 and table[:, 2].max() < math.log(2), "one grows without bound, the other stays below ln 2"
assert table[-1, 3] > 1.4 and table[-1, 4] < 1e-3, "sure and wrong: KL pulls with sqrt 2, Jensen-Shannon not at all"
for seed in range(n_seeds):
    z = torch.randn(5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    p, q = z.detach().softmax(-1), z.softmax(-1)  # start from q = p
    one_way, back = (torch.autograd.grad(d, z, retain_graph=True)[0] for d in (CE(p, z), CE(q, p.log())))
    assert one_way.norm() < 1e-14, "one direction: q = p is at rest"
    assert H((z - (one_way + back) / 2).softmax(-1)) < H(p) - 1e-3, "symmetrized: from q = p a step sharpens the answer"

# %% [markdown]
# ## 4. Why a run stays at ln K, and what makes it leave
#
# From $\partial \log q_j / \partial z_k = [j = k] - q_k$ follows $\partial\,\mathrm{CE} / \partial z_k = q_k - p_k$. At
# equal prototypes $p = q = \frac1K$: zero **for every image, whatever the backbone does**. Is it stable? Let $\delta_k$
# be the small deviation of $w_k$ from the mean prototype, $a$ the student's code, $b$ the teacher's of another view,
# $c$ its mean (the center). To first order $q_k = \frac1K(1 + \delta_k^\top a/\tau_s)$ and $p_k = \frac1K(1 +
# \delta_k^\top(b - c)/\tau_t)$, so
#
# $$\dot\delta_k = \tfrac{1}{K\tau_s} M \delta_k, \qquad
# M = \tfrac{1}{\tau_t} \mathbb{E}[a(b - c)^\top] - \tfrac{1}{\tau_s} \mathbb{E}[aa^\top].$$
#
# At equal temperatures $M = -\frac1\tau(\frac12\mathbb{E}[(a-b)(a-b)^\top] + cc^\top)$: nothing grows. Sharper teachers
# make it a saddle. Without center the mean code grows fastest, the same for all images. Symmetrized, the second term
# is halved. And every rate carries $1/K$: **more prototypes wait longer.**

# %%
p, z = torch.randn(9, 12, generator=g).softmax(-1), torch.randn(9, 12, generator=g).requires_grad_()
gap = torch.autograd.grad(objectives.cross_entropy(p, z), z)[0] - (z.softmax(-1) - p) / len(p)
assert gap.abs().max() < 1e-15, f"{gap.abs().max():.1e}: by hand the gradient is q - p (averaged over samples)"


def views(seed, n=64, dim=16, classes=8, noise=0.3):  # codes of two views; a direction common to all images
    g = torch.Generator().manual_seed(seed)
    means = normalize(torch.randn(classes + 1, dim, generator=g), dim=-1)
    x = means[-1] + means[torch.arange(n) % classes] + noise * torch.randn(n, dim, generator=g) / dim**0.5
    a, b = (normalize(x + noise * torch.randn(n, dim, generator=g) / dim**0.5, dim=-1) for _ in "ab")
    return torch.cat([a, b]), torch.cat([b, a])  # each view is once the student's, once the teacher's


# %%
def run(seed, k=32, lr=0.1, tau_t=0.04, tau_s=0.1, center=True, two_way=False):
    (a, b), g = views(seed), torch.Generator().manual_seed(100 + seed)
    w = torch.randn(1, 16, generator=g) / 4 + 1e-4 * torch.randn(k, 16, generator=g)  # almost identical
    M = a.T @ (b - b.mean(0) * center) / len(a) / tau_t - a.T @ a / len(a) / tau_s / (1 + two_way)
    (rates, directions), curve, size = torch.linalg.eigh(M), [], []
    for _ in range(n_steps):
        L, z = scores.dot(b, w, tau_t), scores.dot(a, w.requires_grad_(), tau_s)
        log_p = (assignment.Center(k, momentum=0)(L, tau_t) if center else L.detach()).log_softmax(-1)
        loss = objectives.cross_entropy(log_p.exp(), z)
        curve.append(loss.item())
        size.append(((w - w.mean(0)) @ directions[:, -1]).norm().item())
        if two_way:
            loss = (loss + objectives.cross_entropy(z.softmax(-1), log_p)) / 2
        w = (w - lr * torch.autograd.grad(loss, w)[0]).detach()
    entropies = {"teacher_entropy": H(log_p.exp()).mean().item(), "marginal_entropy": H(log_p.exp().mean(0)).item()}
    verdict = collapse.verdict(loss=curve[-1], k=k, unique=collapse.unique_prototypes(w), **entropies)
    return curve, verdict.kind, lr * rates[-1].item() / (k * tau_s), (size[5] / size[0]) ** 0.2 - 1


# %%
sharp, equal, greedy, both = "sharper teacher", "equal temperatures", "sharper, no center", "equal, symmetrized"
changes = {sharp: {}, equal: {"tau_t": 0.1}, greedy: {"center": False}, both: {"tau_t": 0.1, "two_way": True}}
changes |= {"K = 64": {"k": 64}, "K = 128": {"k": 128}}
expected, curves, wait = {equal: {"uniform"}, greedy: {"one-hot"}}, {}, {}  # the others: not a full collapse
print(f"setting; growth a step, predicted, measured (means); first and last seed to leave ({n_steps}: never); verdicts")
for name, change in changes.items():
    curve, kinds, *growth = zip(*(run(seed, **change) for seed in range(n_seeds)), strict=True)
    curves[name], growth = torch.tensor(curve), torch.tensor(growth)
    left = (curves[name] > 0.9 * curves[name][:, :1]).sum(1)
    predicted, measured, wait[name] = *growth.mean(1), left.double().mean()
    print(f"{name:18s} {predicted:9.5f} {measured:9.5f} {left.min():5d} {left.max():5d}  {dict(Counter(kinds))}")
    off = ((growth[0] - growth[1]).abs() - 0.01 * growth[0].abs()).max()
    assert off < 1e-5, f"{name}: growth is off by {off:.1e} beyond 1 %: the linear theory has failed"
    assert (left < n_steps).all() if name != equal else (left == n_steps).all(), f"{name}: left the plateau at {left}"
    assert set(kinds) <= expected.get(name, {"partial", "healthy"}), f"{name} ends {kinds}"
ratios = wait["K = 64"] / wait[sharp], wait["K = 128"] / wait["K = 64"]
assert all(1.7 < r < 2.3 for r in ratios), f"waits grow by {ratios}: twice the prototypes, twice the wait"

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.2), sharey=True)
looks = (figures.BLUE, "-"), (figures.ORANGE, "--"), (figures.VERMILLION, "-."), (figures.GREEN, ":")
for ax, group in zip(axes, ((sharp, equal, greedy, both), (sharp, "K = 64", "K = 128")), strict=True):
    for name, (color, style) in zip(group, looks, strict=False):
        lines = ax.plot(curves[name].T, color=color, ls=style, lw=1, alpha=0.8)
        lines[0].set_label(name if ax is axes[0] or name != sharp else "K = 32")
    ax.set(xlabel="gradient step", ylim=(-0.1, 6.6))
    ax.legend(loc="upper right", ncols=2)
axes[0].set(title="Sharpening leaves ln K; the center decides where to", ylabel="loss, nats")
axes[1].set(title="More prototypes: a higher and a longer plateau")
figures.show(fig, "Loss over steps: at ln K for equal temperatures; a sharper teacher leaves it, later at large K.")

# %% [markdown]
# **Reading.** A line is a seed. Equal temperatures stay at $\ln K$; a sharper teacher leaves at the predicted rate: to
# one class without the center, else to targets that tell images apart (by copies of few prototypes: *partial*, see
# `16_collapse_on_the_circle.py`). Symmetrized, even equal temperatures leave: Appendix B is right about the loss it
# prints. Right: twice $K$, twice the wait. Not shown here: this time scale for a trained backbone under Adam.

# %% [markdown]
# ## 5. The center cancels every constant, log C_p too
#
# Logit centering (vMF, Eq. 8) keeps $c \leftarrow mc + (1-m)\,\tau\overline{L}$; scores become $L - c/\tau$. Add any
# $a_k$ to $L$ for all images: from $c = 0$, after $t$ batches, $c_k$ has moved by $(1 - m^t)\tau a_k$, and $m^t a_k$ is
# left, **whatever the data**. The paper says $\log C_p$ is dampened; for slow prototypes it is gone. Probability
# centering (PPC, Eq. 3) averages $\log\overline P$, which does not move by $a_k$. And if collapsed images all have the
# scores $a_k$, either center leaves $1/K$: **a centered run collapses to $\ln K$, not to zero.**

# %%
tau, dim, gaps = 0.04, 256, {assignment.Center: [], assignment.ProbabilityCenter: []}
for seed in range(n_seeds):
    g = torch.Generator().manual_seed(seed)
    w = normalize(torch.randn(K, dim, generator=g), dim=-1) * torch.exp(0.5 * torch.randn(K, 1, generator=g))
    a = vmf.log_normalizer(w.norm(dim=-1) / tau, dim)
    for kind in gaps:
        (plain, full, collapsed), gap = (kind(K, momentum) for _ in range(3)), []
        for t in range(n_batches):
            L = scores.dot(normalize(torch.randn(64, dim, generator=g) + w[0], dim=-1), w, tau)
            without, with_c, equal_scores = plain(L, tau), full(L + a, tau), collapsed(a.expand(64, -1), tau)
            gap.append((without.softmax(-1) - with_c.softmax(-1)).abs().sum(-1).mean().item() / 2)
            rest = (with_c - without - momentum**t * a).abs().max()
            assert kind is not assignment.Center or rest < 1e-9, f"batch {t}: {rest:.1e} beside m^t log C_p"
        off = (H(equal_scores.softmax(-1)) - math.log(K)).abs().max()
        assert off < 1e-9, f"{off:.1e}: the same scores for all images must end at 1/K"
        gaps[kind].append(gap)

# %%
logit, prob = (torch.tensor(gap) for gap in gaps.values())
assert logit[:, -1].max() < 1e-10, f"{logit[:, -1].max():.1e}: at steady state logit centering has cancelled log C_p"
assert prob[:, -50:].min() > 1e-2, f"{prob[:, -50:].min():.1e}: probability centering must keep log C_p"
fig, ax = plt.subplots(figsize=(6.4, 2.8))
for gap, name, color, style in ((logit, "logit", figures.VERMILLION, "--"), (prob, "probability", figures.BLUE, "-")):
    ax.semilogy(gap.T, color=color, ls=style, lw=0.9, label=[f"{name} centering"] + ["_"] * (n_seeds - 1))
ax.set(xlabel="batches seen by the center", ylabel="total variation of targets", ylim=(1e-17, 30))
ax.set_title("With or without $\\log C_p$: one center forgets the difference"), ax.legend(loc="center right")
figures.show(fig, "The effect of log C_p decays to rounding under logit centering, stays under probability centering.")

# %% [markdown]
# **Reading.** A line is a seed. Under logit centering what $\log C_p$ changes in the targets falls by $m$ a batch, down
# to rounding; under probability centering it stays. So DINO-vMF needs both its changes, not the first alone.

# %%
course.finish()
