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
# # Start here: prototypes, their collapse, and how to see it
#
# **Claim.** The methods of the DINO family are one sentence with a few words changed, and that sentence has a blind
# spot: its loss does not notice when most of its prototypes become copies of each other.
#
# **Papers.** *On Partial Prototype Collapse in the DINO Family* (PPC), *DINO as a von Mises-Fisher mixture model* (vMF),
# *Simplifying DINO via Coding Rate Regularization* (Sim). **Before this:** linear algebra, a little PyTorch, DINO by
# name. **Cost:** seconds. **Deviations:** none; the picture below is read from the recorded run of notebook 50, a
# time-lapse on a CPU whose settings were chosen so that collapse happens within minutes.

# %% tags=["parameters"]
record: str = "results/50_cifar10-5k_time-lapse_dino-vmf_k512-2048.json"  # the recorded run to look at

# %%
import inspect
import json
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from prototypes_lib import collapse, course, figures
from prototypes_lib.methods import METHODS

figures.use_style()

# %% [markdown]
# ## The picture
# A network and K prototypes are trained together. Every image is assigned to prototypes, and a rule sees to it that
# all prototypes get the same share of images. There are two ways to obey the rule: learn K different clusters, or
# learn few and let many prototypes be copies that share one cluster between them. **KoLeo** is a penalty that pushes each
# vector away from its nearest neighbor, on the data (kd) or on the prototypes (kp); *base* is without it. **kNN** is the
# accuracy, in percent, of a vote among the nearest training images in feature space.

# %%
run = json.loads(Path(record).read_text())
ks = run["parameters"]["n_prototypes"]
fig, axes = plt.subplots(1, len(ks), figsize=(8, 3), squeeze=False, sharey=True)
for axis, k in zip(axes[0], ks, strict=True):
    for one in (r for r in run["runs"] if r["n_prototypes"] == k):
        steps, m = zip(*one["M"], strict=True)
        look = {"color": figures.METHOD[one["kind"]], "marker": figures.MARKER[one["kind"]], "markevery": 4}
        label = {"base": run["parameters"]["recipe"], "kd": "+ KoLeo on data", "kp": "+ KoLeo on prototypes"}[
            one["kind"]
        ]
        axis.plot(
            steps, [v / k for v in m], label=label if one["seed"] == run["parameters"]["seeds"][0] else None, **look
        )
    axis.set(title=f"K = {k}", xlabel="step", ylim=(0, 1.05))
axes[0, 0].set_ylabel("unique prototypes M / K")
axes[0, 0].legend(loc="lower left")
figures.show(fig, alt="Share of unique prototypes over training steps: without a prototype regularizer most become "
             "copies, with KoLeo on the prototypes all stay unique.")  # fmt: skip

# %%
lines = ["| K | method | unique prototypes M (one a seed) | kNN, % (one a seed) |", "|---|---|---|---|"]
for k in [*ks, 0]:
    for kind in dict.fromkeys(r["kind"] for r in run["runs"] if r["n_prototypes"] == k):
        group = [r for r in run["runs"] if r["n_prototypes"] == k and r["kind"] == kind]
        m = ", ".join(str(r["last"].get("M", "none")) for r in group)
        knn = ", ".join(f"{max(r['knn'].values()):.1f}" for r in group)
        lines.append(f"| {k or 'none'} | {kind} | {m} | {knn} |")
lines.append(f"| none | untrained | none | {max(run['untrained_knn'].values()):.1f} |")
display(Markdown("\n".join(lines)))

# %%
for k in ks:
    best = [r["knn_interval"][max(r["knn"], key=r["knn"].get)] for r in run["runs"] if r["n_prototypes"] == k]
    assert max(low for low, _ in best) < min(high for _, high in best), f"K = {k}: two runs differ in kNN"
    base, kp = (
        [r["last"]["M"] for r in run["runs"] if (r["n_prototypes"], r["kind"]) == (k, kind)] for kind in ("base", "kp")
    )
    assert max(base) < min(kp), (
        f"K = {k}: KoLeo-proto ({kp}) should keep more prototypes apart than the baseline ({base})"
    )

# %% [markdown]
# The last column is the other half of the message: kNN (best of four k, chosen on the test images) does not tell base,
# kd and kp apart at this scale; their intervals overlap.
#
# ## The sentence
# *views → encoder → projector → unit code y → score against prototypes → target assignment → cross-entropy
# (+ patch term) (+ regularizers).* SimDINO deletes the prototypes and puts an alignment and a coding rate in their place.
# So a method here is a composition, a frozen dataclass; `but` states a difference, `plus` adds a term.

# %%
print(inspect.getsource(type(METHODS["dino"])).split('"""')[2].split("def __post_init__")[0])
lines = ["| method | score | targets | K | added |", "|---|---|---|---|---|"]
for name, method in METHODS.items():
    added = ", ".join(f"{w:+g} · {getattr(f, 'func', f).__name__} on {on}" for w, f, on in method.regularizers)
    links = ", ".join(link.__name__ for link in method.targets)
    score = method.score.__name__ if method.n_prototypes else "none"
    lines.append(
        f"| {name} | {score} | {links} | {method.n_prototypes} | {added}{' + patches' if method.patch else ''} |"
    )
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Reading the meters
# A loss that stands still at ln K, one that falls to zero, one that looks healthy while M is small: `collapse.verdict`
# puts the meters of a run into words.

# %%
for k in ks:
    one = next(r for r in run["runs"] if (r["n_prototypes"], r["kind"]) == (k, "base"))["last"]
    said = collapse.verdict(loss=one["image"], k=k, teacher_entropy=one["teacher_entropy"], unique=int(one["M"]))
    print(said)
    assert said.kind == "partial", f"the meters of the collapsed run at K = {k} should say so: {said}"

# %% [markdown]
# ## The way through
# | notebook | its claim |
# |---|---|
# | `10_vmf_mixture` | DINO is a von Mises-Fisher mixture, and the normalizer is what keeps long prototypes honest |
# | `12_probability_centering` | probability centering is one Sinkhorn step |
# | `14_loss_plateaus` | loss = KL + entropy: why it stands at ln K, and why a KL of zero can be collapse |
# | `16_collapse_on_the_circle` | full and partial collapse, KoLeo-data and KoLeo-proto, small enough to see |
# | `18_koleo_proto` | KoLeo spreads prototypes: estimator, sign, gradient, partition |
# | `20_coding_rate` | a coding rate can replace prototypes: Eq. 8, the corrected bound, what processes change |
# | `22_loss_without_the_matrix` | the loss of all pairs needs no batch-by-prototypes matrix |
# | `40_errata` | where the three papers' print and their meaning part |
# | `50_pretraining` | the same on real images |
# | `52_methods` | fifteen methods under one budget |
# | `54_vmf_ablation` | score × centering, and who uses the prototypes |
# | `56_number_of_prototypes` | K, the weight of KoLeo, and what balances the targets |
# | `58_stability` | who collapses, at which step, seen how |
# | `60_speed_and_survival` | how fast beside others, and what a run survives |
# | `62_is_it_alive` | what the loss does not say, and a meter does, in anyone's training loop |
# | `64_doctor` | how many prototypes a checkpoint really has |
# | `80_classification` | kNN, linear, few labels: who leads depends on the protocol |
# | `82_transfer` | frozen features and fine-tuning on other data |
# | `84_long_tail` | head and tail, and priors for prototypes |
# | `86_robustness` | fifteen corruptions, five severities |
# | `90_scoreboard` | every number and claim of the papers beside what was measured |
#
# ## Bigger
# The notebooks are the programs: on a GPU `prototypes data cifar10`, then `prototypes run --only 50 --timeout 0
# --total-timeout 0 -p scale small -p data cifar10`; `-p scale full -p data PATH` takes a folder with `train/` and
# `val/`. `prototypes run --list` shows every parameter; `prototypes train dino-vmf-kp --help` trains one method
# without a notebook, `prototypes data` lists data sets.

# %%
course.finish()
