"""Pre-training: train(method, run) turns a method and a run's settings into a run folder.

Randomness is a function of (seed, step, place in the batch): a run that was interrupted goes on exactly where it would
have been, with nothing saved, and any number of processes see the same batches.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prototypes_lib import __version__, checkpoints, distributed, event_files
from prototypes_lib import ranks as among
from prototypes_lib.backbones import Backbone
from prototypes_lib.data import Images, check_batch, load
from prototypes_lib.distributed import sharding
from prototypes_lib.distributed.watch import Watch
from prototypes_lib.files.locks import only_one
from prototypes_lib.files.storage import write_text
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.interrupts import Interrupted, Signals
from prototypes_lib.learner import Learner, Network
from prototypes_lib.methods import METHODS, Method, describe
from prototypes_lib.optimizers import make_optimizer
from prototypes_lib.records import Log, environment
from prototypes_lib.settings import MACHINE, Run
from prototypes_lib.trainer import Diverged, OutOfMemory, Trainer, named_memory

__all__ = [
    "Diverged",
    "Interrupted",
    "OutOfMemory",
    "Result",
    "Run",
    "build",
    "config",
    "pick_device",
    "read",
    "train",
    "train_all",
]


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
    decisive = {k: v for k, v in settings.items() if k not in MACHINE}
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


def train(
    method: str | Method, run: Run, name: str | None = None, *, stop_after: int | None = None, ranks: int = 1
) -> Result:
    """Pre-train and return the finished run; one that is already finished, with the same config hash, is only read.

    The folder `out/name-hash/` gets config.json, metrics.jsonl and .csv, checkpoints, and, at the end, result.json.
    An interrupted run goes on from its newest checkpoint that verifies, bit for bit on the same CPU, and on a GPU as
    far as torch's kernels are deterministic there. Under torchrun every process calls this and rank 0 writes; the
    folder must be one that all of them see.

    Args:
        method: a key of METHODS or a Method. run: settings. name: label of the folder; the method's key by default.
        stop_after: leave after this many steps with a checkpoint, for tests and time-limited machines.
        ranks: start so many processes on this machine and train in them, one a GPU (a notebook's torchrun).

    Raises:
        ValueError: settings or data that cannot work, before the first step; a folder that another process writes.
        Diverged: the loss is not finite for `run.bad_steps` steps in a row (a FloatingPointError).
        OutOfMemory: the batch does not fit (a MemoryError). OSError: the disk is full or cannot be written.
        Interrupted: asked to stop by SIGTERM, SIGINT or SIGUSR1; the last finished step is saved (a KeyboardInterrupt).
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; choose one of {', '.join(METHODS)}")
        name, method = name or method, METHODS[method]
    if ranks > 1:
        try:
            with Signals():  # passed on to all ranks, of which the first tells what is saved
                return distributed.spawn(_train_rank, (method, run, name, stop_after), ranks)
        except RuntimeError as error:  # with the failed rank's own error as its cause, where it has one
            if isinstance(error.__cause__, (ValueError, FloatingPointError, MemoryError, OSError, Interrupted)):
                raise error.__cause__ from None
            raise
    with (
        distributed.group(pick_device(run.device)) as (device, watch),
        Signals(raise_now=among.world() == 1) as signals,
        named_memory(run, device),
    ):
        return _train(method, run, name or "method", stop_after, device, watch, signals)


def _train_rank(method: Method, run: Run, name: str | None, stop_after: int | None) -> Result:
    return train(method, run, name, stop_after=stop_after)


def _train(
    method: Method, run: Run, name: str, stop_after: int | None, device: torch.device, watch: Watch, signals: Signals
) -> Result:
    first = among.rank() == 0
    if run.tensorboard:
        event_files.check()
    images = _images(run, first)
    check_batch(images, run.batch_size)
    what = config(method, run, name, images)
    folder = Path(run.out) / f"{name}-{what['hash']}"
    if distributed.from_first((folder / "result.json").is_file()):
        return read(folder)
    learner = build(method, run).to(device)
    if run.compile:
        learner.student.backbone.compile_blocks()
        if learner.teacher is not learner.student:
            learner.teacher.backbone.compile_blocks()
    learner.student.backbone.recompute = run.recompute
    with only_one(folder) if first else contextlib.nullcontext():
        done = distributed.from_first(checkpoints.newest(folder, what["hash"]) if first else None)
        model = distributed.wrap(learner, run.shard)
        optimizer = make_optimizer(learner.student, run)
        state = {"step": 0, "seconds": 0.0}
        if done is not None:
            state = checkpoints.load(folder, done, *sharding.to_load(learner, optimizer), what["hash"])
        trainer = Trainer(learner, model, optimizer, run, images, folder, device, state)
        log = Log(
            folder, name, trainer.steps, run.batch_size, method.n_prototypes, run.progress and first, first,
            run.tensorboard,
        )  # fmt: skip
        if first:
            write_text(folder / "config.json", json.dumps(what | {"environment": environment(device)}, indent=2))
        log.rewind(trainer.done)
        clock = _Clock(state["seconds"])
        last = trainer.steps if stop_after is None else min(trainer.steps, stop_after)

        def save(hurry: bool = False) -> None:
            trainer.check_weights()
            state = {"step": trainer.done, "hash": what["hash"], "precision": trainer.precision, "bad": trainer.bad}
            state |= {"skipped": trainer.skipped, "seconds": clock.seconds(), "meters": trainer.meters.state()}
            whole = sharding.to_save(learner, optimizer)
            with watch.busy():
                if first:
                    log.sync()
                    checkpoints.save(folder, *whole, state, config=what, prune=not hurry)

        try:
            _loop(trainer, log, clock, last, save, watch, signals)
        finally:
            trainer.batches.close()
            log.close()
        if last < trainer.steps:
            return Result(folder, name, tuple(log.rows), {})
        if not log.rows:
            raise Diverged(trainer.done, folder, ("no finite loss in the whole run",))
        seconds = clock.seconds()
        summary = {
            "name": name, "hash": what["hash"], "steps": trainer.steps, "seconds": seconds,
            "images_per_second": trainer.steps * run.batch_size / seconds, "precision": trainer.precision,
            "processes": among.world(), "skipped_steps": trainer.skipped, "last": log.rows[-1],
            "findings": log.findings,
            "environment": environment(device),
        }  # fmt: skip
        log.finish(summary)
        distributed.barrier()  # the others read what rank 0 has written
        return read(folder)


def _loop(
    trainer: Trainer, log: Log, clock: "_Clock", last: int, save: Callable[..., None], watch: Watch, signals: Signals
) -> None:
    """Steps until `last`, with checkpoints; a signal ends them with the last finished step saved."""
    every = max(1, round(trainer.run.checkpoint_epochs * trainer.steps_per_epoch))
    saved = trainer.done

    def keep(hurry: bool = False) -> None:
        nonlocal saved
        save(hurry)
        saved = trainer.done

    def write(metrics: dict[str, float] | None) -> None:
        if metrics is not None:
            log.write(metrics | {"data_wait": clock.share(trainer.batches.waited()), "seconds": clock.seconds()})

    try:
        if distributed.agree(signals.asked is not None):  # noted while images were read and the first step rehearsed
            raise Interrupted(signals.asked or "a signal to another rank")
        for step in range(trainer.done, last):
            stop = trainer.step(step, write, signals)
            watch.alive(trainer.done)
            if trainer.done % every == 0 or trainer.done == last:
                with signals.whole():
                    keep()
            if stop:
                raise Interrupted(signals.asked or "a signal to another rank")
    except Interrupted as stopped:
        with signals.whole(last=True):
            trainer.undo()
            if trainer.done > saved:
                keep(hurry=True)
            distributed.barrier()  # who leaves first would look like the one that failed
        stopped.step, stopped.folder = trainer.done, trainer.folder
        raise


def _images(run: Run, first: bool) -> Images:
    """The run's images; of several processes the first decodes them to a file, and the others map it."""

    def read() -> Images:
        cache = True if among.world() > 1 else None
        return load(
            run.data, run.split, root=run.root, limit=run.limit, image_size=run.stored_size,
            progress=run.progress and first, cache=cache,
        )  # fmt: skip

    if first:
        images = read()
    distributed.barrier()
    return images if first else read()


class _Clock:
    """Seconds of a run over all its sittings."""

    def __init__(self, before: float):
        self._started = self._asked = time.perf_counter()
        self._before = before

    def seconds(self) -> float:
        return time.perf_counter() - self._started + self._before

    def share(self, seconds: float) -> float:
        """What part of the time since it was last asked."""
        asked, self._asked = self._asked, time.perf_counter()
        return seconds / max(self._asked - asked, 1e-9)


def read(folder: str | Path) -> Result:
    """A finished run from its folder. Raises FileNotFoundError where it is not finished."""
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (no result.json)")
    summary = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Result(folder, summary["name"], tuple(rows), summary)


def train_all(jobs: Sequence[tuple[str, Method, Run]], workers: int = 1, ranks: int = 1) -> list[Result]:
    """Train (name, method, run) jobs, `workers` at a time in processes of one thread each, or each job on many `ranks`.

    Small networks use two cores better as two processes than as two threads; on GPUs leave workers=1, and ranks is how
    many of them one job uses. Raises ValueError for both at once.
    """
    if workers > 1 and ranks > 1:
        raise ValueError(f"workers={workers} jobs side by side and ranks={ranks} processes a job: choose one of them")
    if workers == 1:
        return [train(method, run, name, ranks=ranks) for name, method, run in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(_train_job, jobs))


def _train_job(job: tuple[str, Method, Run]) -> Result:
    return train(job[1], job[2], job[0])


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
