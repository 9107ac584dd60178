"""One step of a run: batch, loss, gradients, a look whether they are finite, then the weights and the teacher move.

Nothing of a step stays unless all of it does: until its gradients are known to be finite on all ranks, weights stand
still, and what a forward pass writes on the way (centers, queue, BatchNorm's statistics) can be taken back.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prototypes_lib import distributed, ranks, schedules, stochastic_depth
from prototypes_lib.batches import Batches, number
from prototypes_lib.data import Images
from prototypes_lib.distributed import sharding
from prototypes_lib.files.storage import write_text
from prototypes_lib.interrupts import Signals
from prototypes_lib.learner import Learner, Step
from prototypes_lib.meters import Meters, grad_norm
from prototypes_lib.optimizers import clip_gradients
from prototypes_lib.settings import Run


class Diverged(FloatingPointError):
    """No finite loss for `run.bad_steps` steps in a row, from `step` on; `folder` holds the run until then."""

    def __init__(self, step: int, folder: Path, names: tuple[str, ...] = ()):
        what = f" ({', '.join(names[:5])})" if names else ""
        super().__init__(f"the loss became infinite or nan at step {step}{what}; lower the learning rate")
        self.step, self.folder, self.names = step, folder, names

    def __reduce__(self):
        return Diverged, (self.step, self.folder, self.names)


class OutOfMemory(MemoryError):
    """The batch does not fit: the message names the settings that make it smaller."""


class Trainer:
    """The state of a run that a step needs, and the step itself.

    model is what to call in the learner's place (`distributed.wrap`). `done` counts finished steps, skipped ones too;
    `bad` are the steps, up to the last one, that were skipped in a row.
    """

    def __init__(
        self,
        learner: Learner,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        run: Run,
        images: Images,
        folder: Path,
        device: torch.device,
        state: dict[str, Any],
    ):
        self.learner, self.model, self.optimizer = learner, model, optimizer
        self.run, self.folder, self.device = run, folder, device
        self.done, self.bad, self.skipped = state["step"], state.get("bad", 0), state.get("skipped", 0)
        self.steps_per_epoch = len(images) // run.batch_size
        self.steps = steps = max(1, round(run.epochs * self.steps_per_epoch))
        method = learner.method
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
        self.batches = Batches(images, run, method, learner.student.backbone.grid(run.image_size), device)
        self.meters = Meters(learner, run.monitor_steps, state.get("meters"))
        self._before: list[tuple[Tensor, Tensor]] | None = None
        self.precision = state.get("precision") or self._rehearse()

    def step(
        self,
        step: int,
        write: Callable[[dict[str, float] | None], None] = lambda _: None,
        signals: Signals | None = None,
    ) -> bool:
        """One optimizer step, or none where its loss or gradients are not finite on some rank.

        Args:
            step: which. write: takes its metrics, None where it is not monitored or was skipped.
            signals: to be asked whether this rank is to stop, and not to cut off what follows the gradients.

        Returns: whether any rank is to stop. Raises: Diverged.
        """
        run = self.run
        look = not (step + 1) % run.monitor_steps or step + 1 == self.steps
        self._set_rates(step)
        self._remember()
        self.optimizer.zero_grad()
        outs = []
        for part in range(run.accumulate):
            views, masks = self.batches.batch(step, part)
            with distributed.part(self.model, last=part + 1 == run.accumulate):
                out = self.forward(views, masks, step, part, meters=look)
                (out.loss / run.accumulate).backward()
            outs.append(dataclasses.replace(out, loss=out.loss.detach()))
        bad, stop = self._agree(outs, signals is not None and signals.asked is not None)
        with signals.whole() if signals else contextlib.nullcontext():
            norm = grad_norm(self.learner.student) if look and not bad else 0.0  # before it is clipped
            if bad:
                self._skip(step, outs)
            else:
                self._move(step)
                self._before, self.bad = None, 0
            self.done = step + 1
            write(self._metrics(step, outs, norm) if look and not bad else None)
        return stop

    def undo(self) -> None:
        """Take back what an unfinished step has written: centers, queue, statistics, gradients."""
        if self._before is not None:
            for tensor, before in self._before:
                tensor.copy_(before)
        self._before = None
        self.optimizer.zero_grad()

    def forward(self, views: list[Tensor], masks: Tensor | None, step: int, part: int = 0, **options) -> Step:
        """The loss of a part of a batch; options: precision, meters, epoch."""
        run = self.run
        precision = options.pop("precision", None) or self.precision
        options.setdefault("epoch", step / self.steps_per_epoch)
        seed = number(run.seed, "network", step)
        torch.manual_seed(seed)  # for what draws in a regularizer; stochastic depth has its own
        with (
            stochastic_depth.at(seed, run.batch_size, part, run.accumulate),
            torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            return self.model(views, masks, float(self.temperature[step]), progress=step / self.steps, **options)

    def _set_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            still = self._frozen_by(step) == "lr" and group["prototypes"]
            group["lr"] = 0.0 if still else self.lr[step] * group["lr_factor"]
            group["weight_decay"] = self.weight_decay[step] * group["decays"]

    def _frozen_by(self, step: int) -> str:
        return self.run.freeze_by if step < self.freeze_steps else "nothing"

    def _move(self, step: int) -> None:
        clip_gradients(self.learner.student, self.run)
        if self._frozen_by(step) == "gradient":
            for group in self.optimizer.param_groups:
                for parameter in group["params"] if group["prototypes"] else ():
                    parameter.grad = None  # after clipping, as the official code; the optimizer leaves it alone
        self.optimizer.step()
        self.learner.update_teacher(float(self.momentum[step]))

    @torch.no_grad()
    def _remember(self) -> None:
        written = list(self.learner.buffers())
        for network in (self.learner.student, self.learner.teacher):
            plain = [p for p in (network.prototypes, network.patch_prototypes) if p is not None and p.plain]
            written += [prototypes.weight_v for prototypes in plain]  # set to unit length by each forward
        self._before = [(tensor.detach(), tensor.detach().clone()) for tensor in written]

    def _agree(self, outs: list[Step], asked: bool) -> tuple[bool, bool]:
        """Whether a loss, gradient or memory is not finite, and whether to stop, on any rank: the GPU is waited for."""
        finite = torch.stack([out.loss for out in outs]).isfinite().all()
        gradients = [p.grad for p in self.learner.student.parameters() if p.grad is not None]
        memories = [b for b in self.learner.buffers() if b.is_floating_point()]  # an infinite center hides from losses
        norms = [*torch._foreach_norm(gradients), *(torch._foreach_norm(memories) if memories else ())]
        bad = ~(finite & torch.stack([sharding.whole(norm).float() for norm in norms]).isfinite().all())
        flags = ranks.largest(torch.stack([bad.float(), torch.full_like(bad, asked, dtype=torch.float32)]))
        bad, stop = (bool(flag) for flag in flags.tolist())
        return bad, stop

    def _skip(self, step: int, outs: list[Step]) -> None:
        """Take a step back and write down what was not finite and where; stop where such steps follow each other."""
        names = distributed.from_all(self._not_finite(outs))
        self.undo()
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        names = [f"rank {r}: {name}" * (len(names) > 1) or name for r, found in enumerate(names) for name in found]
        if ranks.rank() == 0:
            record = {
                "step": step + 1, "seed": self.run.seed, "not finite": names,
                "images": self.batches.rows(step).tolist(),
                "again": f"go on from the checkpoint before it up to Trainer.step({step}); its views and masks are "
                f"Trainer.batches.batch({step}, part) on each rank, whatever has come before",
            }  # fmt: skip
            (self.folder / "skipped").mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "skipped" / f"step-{step + 1:08d}.json", json.dumps(record, indent=1))
        if self.bad >= self.run.bad_steps:
            raise Diverged(step + 2 - self.bad, self.folder, tuple(names))

    def _not_finite(self, outs: list[Step]) -> list[str]:
        """Names of this rank's losses, gradients and memories that are not finite, the first few of each."""
        finite = lambda x: bool(sharding.whole(x.detach()).isfinite().all())
        losses = {name: value for out in outs for name, value in ({"loss": out.loss} | out.parts).items()}
        gradients = {n: p.grad for n, p in self.learner.student.named_parameters() if p.grad is not None}
        found = [name for name, value in losses.items() if not finite(value)]
        found += [f"gradient of {name}" for name, value in gradients.items() if not finite(value)][:5]
        return found + [name for name, value in self.learner.named_buffers() if not finite(value)][:5]

    def check_weights(self) -> None:
        """Raise Diverged where a weight is not finite; asked before anything is saved."""
        weights = [sharding.whole(norm) for norm in torch._foreach_norm(list(self.learner.student.parameters()))]
        if not bool(torch.stack(weights).isfinite().all()):
            raise Diverged(self.done, self.folder, ("weights",))

    def _metrics(self, step: int, outs: list[Step], norm: float) -> dict[str, float]:
        row = self.meters.row(step + 1, outs) | {"grad_norm": norm}
        return row | {"lr": float(self.lr[step]), "teacher_temp": float(self.temperature[step])}

    def _rehearse(self) -> str:
        """A step on the first batch that leaves no trace: what cannot work fails now; "auto" times both precisions."""
        views, masks = self.batches.batch(0)
        auto = self.run.precision == "auto"
        tries = {p: 3 for p in ("fp32", "bf16")} if auto else {self.run.precision: 1}
        self._remember()
        seconds = {p: min(self._time(views, masks, p) for _ in range(n)) for p, n in tries.items()}
        self.undo()
        if not auto:
            return self.run.precision
        return distributed.from_first("bf16" if seconds["bf16"] < 0.9 * seconds["fp32"] else "fp32")

    def _time(self, views: list[Tensor], masks: Tensor | None, precision: str) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        self.forward(views, masks, 0, precision=precision, epoch=math.inf).loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


@contextlib.contextmanager
def named_memory(run: Run, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory errors into one line with the settings that help."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not any(word in str(error) for word in ("out of memory", "allocate memory", "ALLOC_FAILED")):
            raise
        images = run.batch_size // (run.accumulate * ranks.world())
        raise OutOfMemory(
            f"out of memory on {device} with {images} images at a time; take accumulate={2 * run.accumulate} (the "
            "batch in smaller parts), recompute=True, fewer local crops or a smaller batch_size"
        ) from error
