"""Numbers that are not finite, put in at every place of a step: the step is skipped and nothing of it stays.

Transient faults (a flipped bit) hold for the passes of one step; persistent ones must end the run with their names.
"""

import contextlib
import copy
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gloo import together
from resume import differ, given, method, pictures, tiny

from prototypes_lib import distributed, ranks
from prototypes_lib import train as training
from prototypes_lib.optimizers import make_optimizer
from prototypes_lib.trainer import Diverged, Trainer

METHODS = ("dino", "dino-vmf-kp", "ibot-vmf", "swav", "msn", "dinov2", "simdinov2")
WRONG = (math.nan, math.inf, -math.inf)
AT = 1  # the step that goes wrong
QUEUED = 3  # where there is a queue, which is in use by then


def made(out: Path, name: str, **changes: Any) -> Trainer:
    """A trainer of the tiny run, of this rank where there are several."""
    run = tiny(out, **({"freeze_last_layer": 0.0} | changes))
    learner = training.build(method(name), run)
    model = distributed.wrap(learner)
    optimizer = make_optimizer(learner.student, run)
    return Trainer(learner, model, optimizer, run, pictures(), out, torch.device("cpu"), {"step": 0})


# ------------------------------------------------------------------------------- places, and what they need to be there


@contextlib.contextmanager
def _held(tensor: torch.Tensor, value: float) -> Iterator[None]:
    """One number of a tensor is wrong for a while, unseen by autograd, as where memory fails."""
    flat = tensor.data.view(-1)
    before = flat[0].clone()
    flat[0] = value
    yield
    flat[0] = before


@contextlib.contextmanager
def _instead(owner: Any, name: str, function: Callable) -> Iterator[None]:
    right = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: function(right(*args, **options)))
    yield
    delattr(owner, name)  # the class's is there again


def _pixel(trainer: Trainer, value: float, view: int = 0):
    def wrong(batch: tuple) -> tuple:
        batch[0][view][0, 0, 5, 5] = value
        return batch

    return _instead(trainer.batches, "batch", wrong)


def _loss(trainer: Trainer, value: float):
    return _instead(trainer, "forward", lambda step: replace(step, loss=step.loss * value))


@contextlib.contextmanager
def _gradient(trainer: Trainer, value: float) -> Iterator[None]:
    parameter = next(p for p in reversed(list(trainer.learner.student.parameters())) if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * value)
    yield
    hook.remove()


def _center(trainer: Trainer, value: float):
    return _held(next(b for b in trainer.learner.chain.buffers() if b.is_floating_point() and b.numel() > 1), value)


PLACES: dict[str, Callable[[Trainer, float], Any]] = {
    "pixel": _pixel,
    "pixel of a local crop": lambda trainer, value: _pixel(trainer, value, -1),
    "loss": _loss,
    "gradient": _gradient,
    "student's weight": lambda t, value: _held(t.learner.student.backbone.vit.patch_embed.proj.weight, value),
    "student's projector": lambda t, value: _held(t.learner.student.projector.mlp[0].weight, value),
    "teacher's weight": lambda t, value: _held(t.learner.teacher.backbone.vit.patch_embed.proj.weight, value),
    "teacher's projector": lambda t, value: _held(t.learner.teacher.projector.mlp[0].weight, value),
    "center": _center,
    "queue": lambda trainer, value: _held(trainer.learner.queue.codes, value),
    "student's kappa": lambda trainer, value: _held(trainer.learner.student.prototypes.weight_g, value),
    "teacher's kappa": lambda trainer, value: _held(trainer.learner.teacher.prototypes.weight_g, value),
    "prototype": lambda trainer, value: _held(trainer.learner.student.prototypes.weight_v, value),
}


def possible(name: str, place: str) -> bool:
    composed = method(name)
    centers = any("Center" in getattr(link, "__name__", "") for link in composed.targets)
    needs = {
        "center": centers, "queue": composed.queue, "prototype": composed.n_prototypes,
        "student's kappa": composed.n_prototypes and composed.free_norms,
        "teacher's kappa": composed.n_prototypes and composed.free_norms and not composed.shared_prototypes,
        "teacher's weight": composed.ema is not None, "teacher's projector": composed.ema is not None,
    }  # fmt: skip
    return bool(needs.get(place, True))


def cases() -> list[tuple[str, str, float]]:
    """(method, place, value) of all that a method has."""
    return [case for case in itertools.product(METHODS, PLACES, WRONG) if possible(*case[:2])]


# ------------------------------------------------------------------------------------------------------------ judgment


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a step may change: weights, memories, statistics, moments."""
    moments = trainer.optimizer.state_dict()["state"]
    return copy.deepcopy({"learner": dict(trainer.learner.state_dict()), "moments": moments})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def skipped(trainer: Trainer, fault: Callable[[], Any]) -> str | None:
    """What is wrong about a step with a fault, and the next one; None if nothing is."""
    bad = QUEUED if trainer.learner.queue is not None else AT
    for step in range(bad):
        trainer.step(step)
    before = everything(trainer)
    with fault():
        trainer.step(bad)
    now = everything(trainer)
    if (trainer.done, trainer.bad, trainer.skipped) != (bad + 1, 1, 1):
        return f"it counts {trainer.done} steps, {trainer.bad} bad in a row, {trainer.skipped} skipped"
    if not same(before, now):
        return "something of it stayed"
    if any(p.grad is not None and not p.grad.isfinite().all() for p in trainer.learner.parameters()):
        return "a gradient stayed"
    ranks.total(torch.zeros(()))  # rank 0 has written
    record = json.loads((trainer.folder / "skipped" / f"step-{bad + 1:08d}.json").read_text())
    if record["step"] != bad + 1 or record["images"] != trainer.batches.rows(bad).tolist() or not record["not finite"]:
        return f"its record says {record}"
    trainer.step(bad + 1)
    if trainer.skipped != 1 or trainer.bad or same(before, everything(trainer)):
        return "the next step did not train"
    return None


def _alone(folder: Path, name: str, place: str, value: float) -> str | None:
    trainer = made(folder, name)
    return skipped(trainer, lambda: PLACES[place](trainer, value))


def _of_ranks(rank: int, folder: str, name: str, place: str, value: float, who: int) -> tuple[str | None, Any]:
    trainer = made(Path(folder), name)
    fault = (lambda: PLACES[place](trainer, value)) if rank == who else contextlib.nullcontext
    return skipped(trainer, fault), trainer.learner.state_dict()


def of_one_rank(chosen: list[tuple[str, str, float]], folder: Path | None = None) -> Iterator[tuple[str, str | None]]:
    """The fault is on one of two ranks; both skip the step and stay the same."""
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, place, value) in enumerate(chosen):
            out = str((folder or Path(temporary)) / f"ranks {i}")
            (wrong, state), (other, others) = together(2, _of_ranks, out, name, place, value, i % 2)
            said = wrong or other
            if not said and not _agree(state, others):
                said = "the ranks' weights differ"
            yield f"{value} in the {place} of rank {i % 2} of 2, {name}", said


def _agree(state: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[key]) for key, tensor in state.items())


def injections(chosen: list[tuple[str, str, float]], folder: Path | None = None) -> Iterator[tuple[str, str | None]]:
    """Each case's name, and what went wrong, or None."""
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, place, value) in enumerate(chosen):
            said = _alone((folder or Path(temporary)) / f"{i}", name, place, value)
            yield f"{value} in the {place}, {name}", said


def persistent(folder: Path, name: str, place: str, resumed: bool = False) -> str | None:
    """A fault that stays ends a run after `bad_steps` steps with names, twice where it is started again."""
    right = Trainer.step

    def step(self: Trainer, number: int, *args: Any) -> bool:
        if number < 2:
            return right(self, number, *args)
        with PLACES[place](self, math.nan):
            return right(self, number, *args)

    try:
        Trainer.step = step
        for _ in range(1 + resumed):
            with given(pictures()):
                try:
                    training.train(method(name), tiny(folder, bad_steps=3), "x")
                    return "it went on to the end"
                except Diverged as error:
                    text = str(error)
                    if error.step != 3 or "step 3" not in text or "(" not in text or "\n" in text:
                        return f"it says {text!r}"
    finally:
        Trainer.step = right
    return None


def transient(folder: Path, name: str, place: str) -> str | None:
    """A run with one bad step is finished, counts it, and is the same again when it was stopped after that step."""
    right = Trainer.step

    def step(self: Trainer, number: int, *args: Any) -> bool:
        with PLACES[place](self, math.nan) if number == 1 else contextlib.nullcontext():
            return right(self, number, *args)

    try:
        Trainer.step = step
        with given(pictures()):
            whole = training.train(method(name), tiny(folder / "whole"), "x")
            training.train(method(name), tiny(folder / "parts"), "x", stop_after=2)
            parts = training.train(method(name), tiny(folder / "parts"), "x")
    finally:
        Trainer.step = right
    for result in (whole, parts):
        if result.summary["skipped_steps"] != 1 or [row["step"] for row in result.metrics] != [1, 3, 4, 5]:
            return f"{result.summary['skipped_steps']} steps were skipped"
    return differ(whole.folder, parts.folder)
