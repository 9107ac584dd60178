"""Many runs under one budget and one evaluator: train each, score it by kNN, and write one record of all.

A run that diverges is a result too: its row says at which step, and holds what was measured until then.
"""

import functools
import json
import math
import multiprocessing
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prototypes_lib import checkpoints, evaluate
from prototypes_lib.backbones import Backbone
from prototypes_lib.data import load
from prototypes_lib.files.storage import write_text
from prototypes_lib.methods import METHODS, Method, Queue, Views, Warmup
from prototypes_lib.records import environment
from prototypes_lib.train import Diverged, Run, build, pick_device, train

NEIGHBORS = (10, 20, 100, 200)


def at_budget(name: str, k: int = 512, ema: float = 0.97) -> Method:
    """A recipe of METHODS at the sizes that comparisons on a CPU share, its words unchanged.

    K prototypes, two local crops, a momentum from `ema` to 1, the first teacher temperature throughout, a queue of 512.
    """
    method = METHODS[name]
    changes: dict[str, Any] = {"views": Views(**{**vars(method.views), "n_local": 2})}
    changes |= {"n_prototypes": k} if method.n_prototypes else {}
    changes |= {"ema": ema, "ema_end": 1.0} if method.ema is not None else {}
    changes |= {"teacher_temp": Warmup(0.04, 0.04)} if method.teacher_temp.epochs else {}
    changes |= {"queue": Queue(512, epoch=1.0)} if method.queue else {}
    return method.but(**changes)


def short_run(steps: int, data: str = "cifar10-5k", limit: int = 0, **changes) -> Run:
    """The run of those comparisons: so many steps of 64 images through a transformer of dimension 64 (notebook 52)."""
    per_epoch = len(load(data, "train", limit=limit or None, image_size=32, progress=False)) // 64
    run = Run.small(
        data=data, limit=limit or None, batch_size=64, lr=4e-3, head_batch_norm=True, bottleneck=64,
        prototype_lr_factor=30.0, monitor_steps=25, checkpoint_epochs=1e6, progress=False,
        epochs=steps / per_epoch, warmup_epochs=min(20, steps // 10) / per_epoch,
    )  # fmt: skip
    return run.but(**changes)


@dataclass(frozen=True)
class Job:
    """One run of a sweep; `about` are the words that tell it apart in the record (method, K, temperature ...)."""

    name: str
    method: Method
    run: Run
    about: dict[str, Any] = field(default_factory=dict)


def plain_run(epochs: float, **changes) -> Run:
    """The run of notebooks 80 to 84: 128 images a step, prototypes at the network's learning rate, no time-lapse."""
    run = Run.small(
        batch_size=128, lr=2e-3, head_batch_norm=True, bottleneck=64, monitor_steps=50, checkpoint_epochs=1e6,
        epochs=epochs, warmup_epochs=epochs / 10, progress=False,
    )  # fmt: skip
    return run.but(**changes)


def sweep(jobs: Sequence[Job], workers: int | None = None) -> list[dict[str, Any]]:
    """Train and score every job, `workers` at a time in processes of one thread each; rows in the order of the jobs.

    A row: name, about's words, seed, hash, folder, seconds, images_per_second, side_by_side, environment, config, last
    (the last metrics), curve (all of them), knn, knn_interval, n_test; diverged: the step by which the loss was not
    finite, or None (then without knn). Small networks use two cores better as two processes than as two threads, so
    workers is 2 on a CPU and 1 on a GPU unless given. A run that is already finished is only read.
    """
    if workers is None:
        workers = 1 if jobs and pick_device(jobs[0].run.device).type == "cuda" else 2
    workers = max(1, min(workers, len(jobs)))
    rows: list[dict[str, Any]] = [{}] * len(jobs)
    work = functools.partial(_row, side_by_side=workers)
    for done, (i, row) in enumerate(_each(work, jobs, workers), start=1):
        rows[i] = row
        print(f"{done}/{len(jobs)}  {said(row)}", flush=True)
    return rows


def untrained(job: Job) -> dict[str, Any]:
    """kNN of the job's network before its first step: what training has to beat."""
    return _scored(build(job.method, job.run).teacher.backbone, job.run)


def best(row: dict[str, Any]) -> tuple[float, float, float]:
    """kNN accuracy of a row's best k in percent and its interval; nan for a run that diverged."""
    if not row.get("knn"):
        return math.nan, math.nan, math.nan
    k = max(row["knn"], key=row["knn"].__getitem__)
    return row["knn"][k], *row["knn_interval"][k]


def by_seed(runs: Iterable[dict[str, Any]], metric: str | None = None, dataset: str | None = None) -> dict[int, float]:
    """A metric of a method's runs by seed: of their `scores` (on any data set, or this one), or kNN at its best k.

    Runs that diverged or lack the metric are left out.
    """
    found = {}
    for row in runs:
        scores = [score for score in row.get("scores", []) if dataset in (None, score["dataset"])]
        told = {score["metric"]: score["value"] for score in scores} | {None: best(row)[0]}
        if row.get("diverged") is None and metric in told:
            found[row["seed"]] = told[metric]
    return found


def command(number: int, parameters: dict[str, Any]) -> str:
    """What runs a notebook again with these parameters and no limit of time."""
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
    words = " ".join(f"-p {name} {shlex.quote(value)}" for name, value in told.items())
    return f"prototypes run --only {number} --timeout 0 --total-timeout 0 {words}"


def said(row: dict[str, Any]) -> str:
    """A row in one line."""
    text = f"{row['name']} seed {row['seed']}: "
    if row["diverged"] is not None:
        return text + f"diverged by step {row['diverged']}, {row['seconds']:.0f} s"
    accuracy, low, high = best(row)
    m = f", M {row['last']['M']}" if "M" in row["last"] else ""
    return text + f"kNN {accuracy:.1f} % [{low:.1f}, {high:.1f}]{m}, {row['seconds']:.0f} s"


def write(path: str | Path, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Write the record of a sweep: `about` (notebook, command, parameters at least) and the rows, one config a name."""
    seen, runs = set(), []
    for row in rows:
        kept = {k: v for k, v in row.items() if k != "folder"}
        if row["name"] in seen:
            kept["config"] = "as the first of this name, but for the seed"
        seen.add(row["name"])
        runs.append(kept)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), _short(about | {"runs": runs}))


def read(path: str | Path) -> dict[str, Any]:
    """A record that `write` made, its numbers of neighbors numbers again. Raises FileNotFoundError where none is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no record {path}; run the notebook with the scale that writes it")
    record = json.loads(Path(path).read_text())
    for row in [*record["runs"], *record.get("untrained", [])]:
        for name in ("knn", "knn_interval"):
            row[name] = {int(k): v for k, v in (row.get(name) or {}).items()}
    return record


def _each(work: Callable, jobs: Sequence[Job], workers: int) -> Iterable[tuple[int, dict[str, Any]]]:
    if workers == 1:
        yield from ((i, work(job)) for i, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(work, job): i for i, job in enumerate(jobs)}
        yield from ((waiting[future], future.result()) for future in as_completed(waiting))


def _row(job: Job, side_by_side: int) -> dict[str, Any]:
    start, device = time.perf_counter(), pick_device(job.run.device)
    row: dict[str, Any] = {"name": job.name, **job.about, "seed": job.run.seed}
    try:
        result = train(job.method, job.run.but(progress=False), job.name)
    except Diverged as error:
        lines = (error.folder / "metrics.jsonl").read_text().splitlines()
        folder, curve, step = error.folder, [json.loads(line) for line in lines], error.step
        summary = {"seconds": time.perf_counter() - start, "environment": environment(device)}
        scored = {"knn": {}, "knn_interval": {}}
    else:
        folder, curve, step, summary = result.folder, list(result.metrics), None, result.summary
        scored = _scored(checkpoints.load_backbone(folder), job.run)
    config = json.loads((folder / "config.json").read_text())
    config["run"].pop("out")  # a place on this machine
    return row | {
        "hash": config["hash"], "folder": str(folder), "seconds": summary["seconds"],
        "images_per_second": summary.get("images_per_second"), "side_by_side": side_by_side,
        "environment": summary["environment"], "config": {k: config[k] for k in ("method", "run", "images")},
        "diverged": step, "last": curve[-1] if curve else {}, "curve": curve, **scored,
    }  # fmt: skip


def _scored(backbone: Backbone, run: Run) -> dict[str, Any]:
    sets = [
        load(run.data, split, root=run.root, limit=run.limit, image_size=run.stored_size, progress=False)
        for split in (run.split, "test")
    ]
    device = pick_device(run.device)
    features = [evaluate.extract(backbone, images, size=run.image_size, device=device) for images in sets]
    found = evaluate.knn(*features, tuple(k for k in NEIGHBORS if k <= len(sets[0])), device=device, progress=False)
    return {"knn": found.accuracy, "knn_interval": found.interval, "n_test": found.n}


def _short(value: Any) -> str:
    """JSON with one line a row of a curve: as readable, and a fraction of the lines in a diff; nan is null."""
    rounded = json.loads(
        json.dumps(value), parse_float=lambda text: float(f"{float(text):.7g}"), parse_constant=lambda nan: None
    )
    lines = []
    for name, entry in rounded.items():
        if isinstance(entry, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in entry) + "\n ]"
        else:
            text = json.dumps(entry)
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
