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
# # TITLE
#
# **Claim.** CLAIM
#
# **Papers.** Hendrycks & Dietterich, 2019 (ImageNet-C). **Before this:** notebooks 50, 52. **Cost:** half a minute beside
# the record on two CPU cores; `scale=cpu` makes it in about COST minutes.
#
# **Deviations.** DEV

# %% tags=["parameters"] nbmake={"mock": {"scale": "cpu", "methods": ["simdino"], "seeds": [0], "corruptions": ["gaussian_noise", "fog"], "severities": [1, 5], "steps": 4, "limit": 256, "workers": 1, "out": "../runs/smoke", "results": "../runs/smoke", "check": false}}
scale: 'Literal["glance", "cpu", "full"]' = "glance"  # two networks beside the record; all, new record; GPU server
methods: list[str] = ["simdino", "dino-vmf-kd", "dino-vmf"]  # trained and compared with untrained networks
seeds: list[int] = [0, 1, 2]  # repeats
corruptions: list[str] = []  # of the fifteen; none takes all (glance: one of each group)
severities: list[int] = [1, 2, 3, 4, 5]  # 1 is mild, 5 is harsh (glance: 1 and 5)
steps: int = 200  # optimizer steps (full: 100 epochs instead)
data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder with train/ and val/ (ImageNet)
limit: int = 0  # images used of each split; 0 takes all
device: str = "auto"  # auto, cpu, cuda
workers: int = 0  # runs side by side, each on one thread; 0 takes 2 on a CPU and 1 on a GPU
out: str = "../runs"  # run folders; finished runs with the same settings are reused
results: str = "results"  # folder of the JSON record
check: bool = True  # assert the claim (it is one about the small budget)

# %%
import dataclasses  # noqa: I001 - one import of the package, names and all
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from prototypes_lib import checkpoints, data as datasets, evaluate, figures, methods as family, sweeps, train
from prototypes_lib.evaluate.corruptions import CORRUPTIONS, GROUPS, SMALL, corrupt
from prototypes_lib.evaluate.robustness import ALEXNET, robustness

figures.use_style()

# %% [markdown]
# ## Fifteen ways to spoil a picture
# Noise, blur, weather and digital harm at five severities, made on the fly (`prototypes_lib/evaluate/corruptions.py`):
# each image's corruption is a function of seed, kind, severity and the image's number, whatever batch or device. The
# parameters are those published for CIFAR-10-C; images of 85 pixels and more get ImageNet-C's.

# %%
test = datasets.load(data, "test", limit=limit or None, image_size=32 if scale != "full" else 224, progress=False)
shown = torch.from_numpy(test.pixels[[0]].copy()).permute(0, 3, 1, 2)  # the first test image, not a chosen one
rows = [[corrupt(shown, name, s, torch.tensor([0]))[0] if s else shown[0] for name in CORRUPTIONS] for s in range(6)]
picture = torch.cat([torch.cat(row, 2) for row in rows], 1).permute(1, 2, 0)
fig, axis = plt.subplots(figsize=(10, 4.9))
axis.imshow(picture, interpolation="nearest")
side = shown.shape[-1]
names = [name.replace("_", "\n") for name in CORRUPTIONS]
axis.set_xticks([side * (i + 0.5) for i in range(15)], names, fontsize=7)
axis.set_yticks([side * (i + 0.5) for i in range(6)], ["clean", *map(str, range(1, 6))])
axis.set(ylabel="severity", title=f"One test image of {data} under {'CIFAR-10-C' if side < SMALL else 'ImageNet-C'} settings")
axis.grid(visible=False)
axis.tick_params(length=0)
figures.show(fig, alt="One test image, clean and under fifteen corruptions at five severities: noise, blur, weather and "
             "digital harm, each from hardly visible to strong.")  # fmt: skip

# %% [markdown]
# Is it noise of the published size? Three quick looks, on the same image many times; the tests compare every
# corruption with another computation (scipy, Pillow, plain loops).

# %%
plain = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
number = torch.arange(len(plain))
spread_of = {s: float(corrupt(plain, "gaussian_noise", s, number).double().std() / 255) for s in (1, 5)}
struck = {s: float((corrupt(plain, "impulse_noise", s, number) != 128).double().mean()) for s in (1, 5)}
print(f"gaussian noise, deviation: {spread_of[1]:.4f} and {spread_of[5]:.4f}; impulse, share: {struck[1]:.4f}, {struck[5]:.4f}")
assert abs(spread_of[1] - 0.04) < 1e-3 and abs(spread_of[5] - 0.1) < 1e-3, "noise has the published deviation"
assert abs(struck[1] - 0.01) < 1e-3 and abs(struck[5] - 0.07) < 1e-3, "impulses have the published share"
one = corrupt(plain[:5], "snow", 3, number[:5])
assert torch.equal(corrupt(plain[3:4], "snow", 3, number[3:4])[0], one[3]), "a batch should not change an image"

# %% [markdown]
# ## Networks, and what is measured
# Runs are notebook 52's, with its settings. Nothing is trained on corrupted images: kNN (20 neighbors) looks up a
# corrupted test image among clean training images. With $E_{s,c}$ the error at severity s and $B_{s,c}$ a baseline's,
#
# $$\mathrm{CE}_c = \sum_s E_{s,c} \big/ \sum_s B_{s,c}, \qquad \mathrm{mCE} = \mathrm{mean}_c\, \mathrm{CE}_c .$$
#
# The paper's baseline is AlexNet, for ImageNet; here it is *the untrained network of the same seed*, whose mCE is 100.
# The relative mCE has $E_{s,c} - E$ in the place of $E_{s,c}$: what is lost, whatever was there to lose.


# %%
def at_budget(name):
    """A recipe at notebook 52's budget; at full scale as it is."""
    method = family.METHODS[name]
    changes = {"views": family.Views(**{**vars(method.views), "n_local": 2})}
    changes |= {"n_prototypes": 512} if method.n_prototypes else {}
    changes |= {"ema": 0.97, "ema_end": 1.0} if method.ema is not None else {}
    changes |= {"teacher_temp": family.Warmup(0.04, 0.04)} if method.teacher_temp.epochs else {}
    return method if scale == "full" else method.but(**changes)


# %%
per_epoch = len(datasets.load(data, "train", limit=limit or None, image_size=32, progress=False)) // 64
base = train.Run.small(
    batch_size=64, lr=4e-3, head_batch_norm=True, bottleneck=64, prototype_lr_factor=30.0, monitor_steps=25,
    epochs=steps / per_epoch, warmup_epochs=min(20, steps // 10) / per_epoch, checkpoint_epochs=1e6,
)  # fmt: skip
base = (train.Run(batch_size=1024) if scale == "full" else base).but(
    data=data, limit=limit or None, device=device, out=out, progress=False
)
glance = scale == "glance"
used = seeds[:1] if glance else seeds
jobs = [sweeps.Job(name, at_budget(name), base.but(seed=s)) for s in used for name in (methods[:1] if glance else methods)]
kinds = corruptions or ([names[0] for names in GROUPS.values()] if glance else list(CORRUPTIONS))
harm = {"corruptions": kinds, "severities": (1, 5) if glance and not corruptions else tuple(severities)}
trained = sweeps.sweep(jobs, workers or None)

# %%
splits = [datasets.load(data, s, limit=limit or None, image_size=base.stored_size, progress=False) for s in ("train", "test")]


def measured(backbone, baseline):
    """Robustness of a network and the seconds it took."""
    start, at = time.perf_counter(), train.pick_device(device)
    bank = evaluate.extract(backbone, splits[0], size=base.image_size, device=at)
    found = robustness(backbone, bank, splits[1], size=base.image_size, baseline=baseline, device=at, progress=False, **harm)
    print(f"clean {found.accuracy:.1f} %, mCE {found.mce:.1f} [{found.interval[0]:.1f}, {found.interval[1]:.1f}]", flush=True)
    return found, time.perf_counter() - start


def kept(found, seconds):
    return {"robustness": dataclasses.asdict(found), "robustness_seconds": seconds}


# %%
before, rows = [], []
for seed in used:
    raw = train.build(jobs[0].method, base.but(seed=seed)).teacher.backbone
    found, seconds = measured(raw, None)
    before.append(sweeps.untrained(sweeps.Job("untrained", jobs[0].method, base.but(seed=seed))) | {"seed": seed} | kept(found, seconds))
    for row in (row for row in trained if row["seed"] == seed and row["diverged"] is None):
        baseline = ALEXNET if scale == "full" else found
        rows.append(row | kept(*measured(checkpoints.load_backbone(row["folder"]), baseline)))

# %%
path = Path(results) / f"86_robustness_{Path(data).name}{'_full' if scale == 'full' else ''}.json"
if not glance:
    settings = {"scale": scale, "methods": methods, "seeds": seeds, "corruptions": corruptions, "severities": severities,
                "steps": steps, "data": data, "limit": limit}  # fmt: skip
    command = "prototypes run --only 86 " + " ".join(f'-p {name} "{value}"' for name, value in settings.items())
    sweeps.write(path, rows, notebook="86_robustness", command=command, parameters=settings, untrained=before)
