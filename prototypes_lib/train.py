"""Pre-training: train(method, run) turns a method and a run's settings into a run folder.

Randomness is a function of (seed, step): batches, crops, masks and stochastic depth of a step are drawn from
generators made for it, so a run that was interrupted goes on exactly where it would have been, with nothing saved.
"""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prototypes_lib import __version__, checkpoints, schedules
from prototypes_lib.backbones import Backbone
from prototypes_lib.collapse import unique_prototypes
from prototypes_lib.data import Images, check_batch, load
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Learner, Network
from prototypes_lib.masks import block_masks, dropped
from prototypes_lib.methods import METHODS, Method, describe
from prototypes_lib.optimizers import clip_gradients, make_optimizer
from prototypes_lib.records import Log, environment, write_text
from prototypes_lib.settings import Run
from prototypes_lib.views import COLORS, MultiCrop


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its method's name, and the metrics of every monitored step."""

    folder: Path
    name: str
    metrics: tuple[dict[str, float], ...]
    summary: dict[str, Any]

    @property
    def last(self) -> dict[str, float]:
        return self.metrics[-1]


def config(method: Method, run: Run, name: str, images: Images) -> dict[str, Any]:
    """What a run is, as plain data, hashed over all that decides its record (not machine, folder or checkpoints)."""
    settings = dataclasses.asdict(run)
    decisive = {
        k: v for k, v in settings.items() if k not in ("device", "out", "progress", "root", "checkpoint_epochs")
    }
    what = {"method": describe(method), "run": decisive, "images": images.fingerprint(), "version": __version__}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    settings.pop("root")
    return {"name": name, "hash": digest, **what, "run": settings}


def build(method: Method, run: Run) -> Learner:
    """Student and teacher for a run, initialized from its seed. Raises ValueError for sizes that do not fit."""
    torch.manual_seed(run.seed)
    options = {"drop_path_rate": run.drop_path, **run.backbone_options}
    backbone = Backbone(run.backbone, run.image_size, **options)
    if method.views.n_local:
        backbone.check_size(run.local_size)
    projector, prototypes = _head(method, run, backbone.dim)
    patch_projector, patch_prototypes = None, None
    if method.patch and method.patch.head != "shared":
        patch_projector, patch_prototypes = _head(method, run, backbone.dim)
        if method.patch.head == "prototypes":
            patch_projector = None
    return Learner(method, Network(backbone, projector, prototypes, patch_projector, patch_prototypes))


def _head(method: Method, run: Run, dim: int) -> tuple[Projector, Prototypes | None]:
    layers = {"layers": run.head_layers, "activation": run.head_activation, "batch_norm": run.head_batch_norm}
    projector = Projector(dim, run.hidden, run.bottleneck, **layers)
    if not method.n_prototypes:
        return projector, None
    return projector, Prototypes(method.n_prototypes, run.bottleneck, method.free_norms, plain=method.renormalize)


def train(method: str | Method, run: Run, name: str | None = None, *, stop_after: int | None = None) -> Result:
    """Pre-train and return the finished run; one that is already finished, with the same config hash, is only read.

    The folder `out/name-hash/` gets config.json, metrics.jsonl and .csv, checkpoints, and, at the end, result.json.
    An interrupted run goes on from its newest checkpoint, bit for bit on the same machine.

    Args:
        method: a key of METHODS or a Method. run: settings. name: label of the folder; the method's key by default.
        stop_after: leave after this many steps with a checkpoint, for tests and time-limited machines.

    Raises:
        ValueError: settings or data that cannot work, before the first step.
        Diverged: the loss is not finite (a FloatingPointError).
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; choose one of {', '.join(METHODS)}")
        name, method = name or method, METHODS[method]
    name = name or "method"
    images = load(
        run.data, run.split, root=run.root, limit=run.limit, image_size=run.stored_size, progress=run.progress
    )
    check_batch(images, run.batch_size)
    what = config(method, run, name, images)
    folder = Path(run.out) / f"{name}-{what['hash']}"
    if (folder / "result.json").is_file():
        return read(folder)
    device = pick_device(run.device)
    learner = build(method, run).to(device)
    optimizer = make_optimizer(learner.student, run)
    done = checkpoints.steps(folder)
    state = checkpoints.load(folder, done[-1], learner, optimizer) if done else {"step": 0}
    trainer = _Trainer(learner, optimizer, run, images, folder, device, state.get("precision"))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(what | {"environment": environment(device)}, indent=2))
    log = Log(folder, name, trainer.steps, run.batch_size, method.n_prototypes, run.progress)
    log.rewind(state["step"])
    started, first = time.perf_counter() - state.get("seconds", 0.0), state["step"]
    every = max(1, round(run.checkpoint_epochs * trainer.steps_per_epoch))
    last = trainer.steps if stop_after is None else min(trainer.steps, stop_after)
    for step in range(first, last):
        metrics = trainer.step(step)
        if metrics is not None:
            log.write(metrics | {"seconds": time.perf_counter() - started})
        if (step + 1) % every == 0 or step + 1 == last:
            trainer.check_finite(step)
            state = {"step": step + 1, "hash": what["hash"], "precision": trainer.precision}
            checkpoints.save(folder, learner, optimizer, state | {"seconds": time.perf_counter() - started})
    if last < trainer.steps:
        return Result(folder, name, tuple(log.rows), {})
    seconds = time.perf_counter() - started
    summary = {
        "name": name, "hash": what["hash"], "steps": trainer.steps, "seconds": seconds,
        "images_per_second": trainer.steps * run.batch_size / seconds, "precision": trainer.precision,
        "last": log.rows[-1], "environment": environment(device),
    }  # fmt: skip
    log.finish(summary)
    return read(folder)


def read(folder: str | Path) -> Result:
    """A finished run from its folder. Raises FileNotFoundError where it is not finished."""
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (no result.json)")
    summary = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Result(folder, summary["name"], tuple(rows), summary)


def train_all(jobs: Sequence[tuple[str, Method, Run]], workers: int = 1) -> list[Result]:
    """Train (name, method, run) jobs, `workers` at a time in processes of one thread each.

    Small networks use two cores better as two processes than as two threads; on a GPU leave workers=1.
    """
    if workers == 1:
        return [train(method, run, name) for name, method, run in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(_train_job, jobs))


def _train_job(job: tuple[str, Method, Run]) -> Result:
    return train(job[1], job[2], job[0])


class Diverged(FloatingPointError):
    """The loss became infinite or nan: seen after `step`; `folder` holds the metrics until then."""

    def __init__(self, step: int, folder: Path):
        super().__init__(f"the loss became infinite or nan by step {step}; lower the learning rate")
        self.step, self.folder = step, folder


class _Trainer:
    """The state of a run that a step needs, and the step itself."""

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        run: Run,
        images: Images,
        folder: Path,
        device: torch.device,
        precision: str | None,
    ):
        method = learner.method
        self.learner, self.optimizer, self.run, self.folder, self.device = learner, optimizer, run, folder, device
        self.images = images
        self.steps_per_epoch = len(images) // run.batch_size
        self.steps = steps = max(1, round(run.epochs * self.steps_per_epoch))
        warmup = round(run.warmup_epochs * self.steps_per_epoch)
        if warmup >= steps and run.warmup_epochs:
            raise ValueError(f"warmup_epochs={run.warmup_epochs} leave nothing of epochs={run.epochs}")
        stretch = run.schedule_stretch
        self.lr = schedules.cosine(
            run.peak_lr, run.min_lr, steps, warmup_steps=warmup, warmup_from=run.warmup_lr, stretch=stretch
        )
        self.weight_decay = schedules.cosine(run.weight_decay, run.weight_decay_end, steps, stretch=stretch)
        rise = schedules.linear if run.momentum_schedule == "linear" else schedules.cosine
        self.momentum = rise(method.ema or 0.0, method.ema_end, steps, stretch=stretch)
        self.freeze_steps = run.freeze_last_layer * self.steps_per_epoch
        heat = method.teacher_temp
        self.temperature = schedules.linear_warmup(
            heat.start, heat.end, steps, round(heat.epochs * self.steps_per_epoch)
        )
        self.crop = MultiCrop(
            n_global=method.views.n_global, n_local=method.views.n_local,
            global_size=run.image_size, local_size=run.local_size,
            global_scale=method.views.global_scale, local_scale=method.views.local_scale,
            blur_sigma=_blur(run.image_size), **COLORS[method.views.colors],
        )  # fmt: skip
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        fits = not isinstance(images.pixels, np.memmap) and images.pixels.nbytes < 0.4 * free
        self.resident = torch.from_numpy(images.pixels).to(device) if fits else None
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.precision = precision or self._rehearse()

    def step(self, step: int) -> dict[str, float] | None:
        """One optimizer step; metrics where this step is monitored."""
        run, learner = self.run, self.learner
        views, masks = self.batch(step)
        frozen = run.freeze_by if step < self.freeze_steps else "not"
        for group in self.optimizer.param_groups:
            still = frozen == "lr" and group["prototypes"]
            group["lr"] = 0.0 if still else self.lr[step] * group["lr_factor"]
            group["weight_decay"] = self.weight_decay[step] * group["decays"]
        out = self.forward(views, masks, step)
        self.finite = self.finite & torch.isfinite(out.loss.detach())  # read later: a look now would stall a GPU
        self.optimizer.zero_grad()
        out.loss.backward()
        clip_gradients(learner.student, run)
        if frozen == "gradient":
            for group in self.optimizer.param_groups:
                for parameter in group["params"] if group["prototypes"] else ():
                    parameter.grad = None  # after clipping, as the official code; the optimizer leaves it alone
        self.optimizer.step()
        learner.update_teacher(float(self.momentum[step]))
        if (step + 1) % run.monitor_steps and step + 1 != self.steps:
            return None
        self.check_finite(step)
        metrics = {"step": step + 1, "loss": out.loss.item()}
        metrics |= {k: v.item() for k, v in (out.parts | out.meters).items()}
        if learner.method.n_prototypes:
            metrics["M"] = unique_prototypes(learner.teacher.prototypes.w).count
        if learner.teacher.patch_prototypes is not None:
            metrics["M_patches"] = unique_prototypes(learner.teacher.patch_prototypes.w).count
        return metrics | {"lr": float(self.lr[step]), "teacher_temp": float(self.temperature[step])}

    def check_finite(self, step: int) -> None:
        """Raise Diverged if any loss since the last look was not finite; called before anything is saved."""
        if not bool(self.finite):
            raise Diverged(step + 1, self.folder)

    def batch(self, step: int) -> tuple[list[Tensor], Tensor | None]:
        """Views and masks of a step, a function of (seed, step) alone."""
        run = self.run
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.images), generator=_generator(run.seed, "order", epoch))
        rows = order[place * run.batch_size : (place + 1) * run.batch_size]
        if self.resident is not None:
            pixels = self.resident[rows.to(self.device)]
        else:
            pixels = torch.from_numpy(self.images.pixels[rows.numpy()]).to(self.device)
        generator = _generator(run.seed, "views", step)
        views = self.crop.views(pixels, generator)
        torch.manual_seed(_number(run.seed, "network", step))  # stochastic depth
        return views, self._masks(len(rows), generator)

    def _masks(self, n: int, generator: torch.Generator) -> Tensor | None:
        """What the student does not see of n images: masks of every global crop, or patches dropped from all."""
        method, patch = self.learner.method, self.learner.method.patch
        grid = self.learner.student.backbone.grid(self.run.image_size)
        if method.mask_student:
            return dropped(grid, method.mask_student, generator=generator).to(self.device)
        if patch is None:
            return None
        return block_masks(
            method.views.n_global * n, grid, patch.ratio, generator=generator, masked=patch.probability,
            shape=patch.shape, stratified=patch.stratified, min_area=patch.min_area, device=self.device,
        )  # fmt: skip

    def forward(self, views: list[Tensor], masks: Tensor | None, step: int, precision: str | None = None):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=(precision or self.precision) == "bf16"):
            temperature, epoch = float(self.temperature[step]), step / self.steps_per_epoch
            return self.learner(views, masks, temperature, progress=step / self.steps, epoch=epoch)

    def _rehearse(self) -> str:
        """A step on the first batch that leaves no trace: what cannot work fails now; "auto" times both precisions."""
        views, masks = self.batch(0)
        memory = {k: v.clone() for k, v in self.learner.state_dict().items()}
        auto = self.run.precision == "auto"
        tries = {p: 3 for p in ("fp32", "bf16")} if auto else {self.run.precision: 1}
        seconds = {p: min(self._time(views, masks, p) for _ in range(n)) for p, n in tries.items()}
        self.learner.load_state_dict(memory)
        self.optimizer.zero_grad()
        if not auto:
            return self.run.precision
        return "bf16" if seconds["bf16"] < 0.9 * seconds["fp32"] else "fp32"

    def _time(self, views: list[Tensor], masks: Tensor | None, precision: str) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        self.forward(views, masks, 0, precision).loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def pick_device(name: str) -> torch.device:
    """The named device, or for "auto" a GPU where there is one. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: this machine has no GPU that torch can use; take device='cpu'")
    return device


def _blur(image_size: int) -> tuple[float, float]:
    """DINO's blur radii are pixels of a 224-px crop; smaller crops get smaller ones."""
    scale = min(1.0, image_size / 224)
    return 0.1 * scale, 2.0 * scale


def _number(*key: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def _generator(*key: Any) -> torch.Generator:
    return torch.Generator().manual_seed(_number(*key))
