"""The meter of collapse for anyone's training loop: when to measure, what was found, and the words for it."""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from prototypes_lib.collapse.diagnosis import Finding, diagnose
from prototypes_lib.collapse.measures import (
    Movement,
    Prototypes,
    measures_of_codes,
    measures_of_prototypes,
    measures_of_student,
    measures_of_targets,
    void_share,
    weights_of,
)
from prototypes_lib.objectives import entropy

# what a step may be spared from computing where it is not measured
Lazy = Tensor | list[Tensor] | tuple[Tensor, ...] | Callable[[], Tensor | list[Tensor] | tuple[Tensor, ...]]

_HISTORY = 500  # rows that a diagnosis looks back
_M_SHARE = 20  # counting M takes at most one part in so many of a loop's time, where `m_every` does not say


class Meter:
    """Watches a training loop, anyone's, and says what goes wrong: three lines.

        meter = collapse.Meter(every=20)
        meter.update(loss, log_scores=(teacher_out - center) / teacher_temp, prototypes=teacher.head.last_layer,
                     codes=teacher_codes, student=student, teacher=teacher)  # each step, after the backward pass
        print(meter)

    `rows` are plain dicts of floats under the names of metrics.jsonl, absent where there was nothing to measure them
    on; `findings` all that was found so far, each kind once. Nothing of the training is changed or kept alive.

    Args:
        every: steps from row to row. A run that diverges does so in between: there is a row, too, where the loss is 1.5
            times the largest before it or not finite (on an accelerator a step or more later, because nobody waits for
            it), and ten times as many while the largest weight doubles within `every` steps.
        eps: cosine distance of near-copies and of the void set. momentum: of the running marginal, row to row.
        m_every: steps between two counts of M, a multiple of `every`; by default in as many rows as fit in a twentieth
            of the loop's time (seconds for K = 65,536 on a CPU).
        coding_eps: eps of the coding rate. say: is given each finding once, when it appears; None for silence.
    """

    def __init__(
        self,
        every: int = 20,
        eps: float = 0.025,
        momentum: float = 0.9,
        say: Callable[[str], object] | None = print,
        *,
        m_every: int | None = None,
        coding_eps: float = 0.05**0.5,
    ):
        if every < 1 or (m_every is not None and m_every < 1) or not 0 <= momentum < 1 or not 0 < eps <= 2:
            raise ValueError(
                f"every={every}, m_every={m_every}, momentum={momentum}, eps={eps}: need steps of at least 1, "
                "a momentum in [0, 1) and a cosine distance in (0, 2]"
            )
        self.every, self.eps, self.momentum, self.say = every, eps, momentum, say
        self.m_every, self.coding_eps = m_every, coding_eps
        self.rows: list[dict[str, float]] = []
        self.findings: list[Finding] = []
        self._updates, self._step = 0, 0
        self._movement, self._running, self._losses = Movement(), None, _Losses()
        self._m_due, self._m_step, self._look_again = -math.inf, -math.inf, math.inf

    def update(
        self,
        loss: float | Tensor,
        targets: Lazy | None = None,
        *,
        log_scores: Lazy | None = None,
        prototypes: Prototypes | None = None,
        student_prototypes: Prototypes | None = None,
        codes: Lazy | None = None,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        image: float | Tensor | None = None,
        lr: float | None = None,
        step: int | None = None,
    ) -> tuple[Finding, ...]:
        """Look at one step; returns what is newly found. Microseconds where there is no row due.

        Call it each step after the backward pass, before clipping; with a GradScaler after its `unscale_`.

        Args:
            loss: of the step. image: its cross-entropy alone where it has other terms: kl is that minus the entropy.
            targets: (.., k) probabilities; or log_scores: (.., k), whose softmax they are, centered and divided by the
                temperature. Rows of all views, or a list with a tensor each; a function of no arguments is called only
                where a row is due.
            prototypes, student_prototypes: the teacher's and the student's, see `weights_of`; the layer itself where
                both share it by design.
            codes: (.., p) the teacher's, tensor or function.
            student, teacher: modules with parameters in the same order; no teacher where there is no EMA of one.
            lr: the learning rate: while it warms up, a plateau that was never left is not called a collapse.
            step: of the run, where it is not the number of the update.

        Raises:
            ValueError: targets not summing to one, or not as many as prototypes; nothing to measure.
        """
        given = (targets, log_scores, prototypes, student_prototypes, codes, student, teacher)
        if all(x is None for x in given):
            raise ValueError("nothing to measure: pass targets or log_scores, prototypes, codes, student and teacher")
        if targets is not None and log_scores is not None:
            raise ValueError("targets or log_scores, not both: they are the same thing before and after the softmax")
        self._updates += 1
        self._step = self._updates if step is None else int(step)
        alarm = self._losses.alarming(loss) or self._updates >= self._look_again
        if not (alarm or self._updates == 1 or self._updates % self.every == 0):
            return ()
        row = {"step": float(self._step), "loss": _number(loss)}
        row |= {name: _number(x) for name, x in (("image", image), ("lr", lr)) if x is not None}
        if targets is not None or log_scores is not None:
            row |= self._of_targets(_now(targets if log_scores is None else log_scores), log_scores is not None, row)
        row |= self._of_prototypes(prototypes, student_prototypes, _now(codes), row)
        if student is not None:
            row |= measures_of_student(student)
        if teacher is not None:
            by_design = [p for x in (prototypes, student_prototypes) if x is not None for p in _parameters(x)]
            row |= self._movement(teacher, student, by_design)
        return self._add(row)

    def __getstate__(self) -> dict[str, object]:
        """What a copy or a pickle takes along: not the clock of this machine, nor what is on its way from a GPU."""
        return self.__dict__ | {"_m_due": -math.inf, "_losses": _Losses()}

    def _of_targets(self, targets: Tensor, scores: bool, row: Mapping[str, float]) -> dict[str, float]:
        measured, mean = measures_of_targets(targets.detach(), log_scores=scores)
        measured["n_targets"] = float(targets.numel() // targets.shape[-1])
        if self._running is None or self._running.shape != mean.shape or not bool(self._running.isfinite().all()):
            self._running = mean
        elif bool(torch.isfinite(mean).all()):
            self._running = torch.lerp(mean, self._running.to(mean), self.momentum)
        measured["running_marginal_entropy"] = float(entropy(self._running))
        measured["kl"] = row.get("image", row["loss"]) - measured["teacher_entropy"]
        return measured

    def _of_prototypes(
        self, teacher: Prototypes | None, student: Prototypes | None, codes: Tensor | None, row: Mapping[str, float]
    ) -> dict[str, float]:
        measured = {}
        if codes is not None:
            measured = measures_of_codes(codes.detach(), self.coding_eps)
            measured["n_codes"] = float(codes.numel() // codes.shape[-1])
        count = self._m_is_due() and (teacher is not None or student is not None)
        start = time.monotonic()
        if teacher is not None:
            w = weights_of(teacher)
            if row.get("k", len(w)) != len(w):
                raise ValueError(f"targets over {row['k']:.0f} prototypes, but {len(w)} prototypes were passed")
            measured |= measures_of_prototypes(w, self.eps, count)
            if codes is not None:
                if codes.shape[-1] != w.shape[1]:
                    raise ValueError(f"codes of {codes.shape[-1]} dimensions, but prototypes of {w.shape[1]}")
                share = void_share(w, codes.detach(), self.eps)
                measured |= {} if share is None else {"void": share}
        if student is not None and count:
            counted = measures_of_prototypes(weights_of(student), self.eps)
            measured |= {"M_student": counted["M"]} if "M" in counted else {}
        if count:
            now = time.monotonic()
            self._m_due, self._m_step = now + _M_SHARE * (now - start), self._updates
        return measured

    def _m_is_due(self) -> bool:
        if self.m_every is not None:
            return self._updates - self._m_step >= self.m_every
        return time.monotonic() >= self._m_due

    def _add(self, row: dict[str, float]) -> tuple[Finding, ...]:
        self.rows.append(row)
        self._look_again = self._updates + max(1, self.every // 10) if self._swelling() else math.inf
        known = {finding.kind for finding in self.findings}
        new = tuple(finding for finding in diagnose(self.rows[-_HISTORY:]) if finding.kind not in known)
        self.findings += new
        if self.say is not None:
            for finding in new:
                self.say(str(finding))
        return new

    def _swelling(self) -> bool:
        """Whether the largest weight, at the rate since the row before, doubles until the next: look closer then."""
        if len(self.rows) < 2 or "weight_max" not in self.rows[-1] or "weight_max" not in self.rows[-2]:
            return False
        before, now = self.rows[-2], self.rows[-1]
        steps = max(now["step"] - before["step"], 1.0)
        return now["weight_max"] > before["weight_max"] * 2 ** (steps / self.every)

    def verdict(self) -> str:
        """The newest state in words: a line for each finding that holds now, or that there is none."""
        if not self.rows:
            return "Nothing is measured yet."
        return "\n".join(map(str, diagnose(self.rows[-_HISTORY:]))) or "Nothing wrong to be seen."

    def __str__(self) -> str:
        return f"{line(self.rows)}\n{self.verdict()}" if self.rows else self.verdict()


def line(rows: list[dict[str, float]]) -> str:
    """The newest row as a person reads it; M is that of the newest row that has one."""
    row = rows[-1]
    text = f"step {row['step']:.0f}  loss {row['loss']:.3f}"
    if "k" in row:
        text += f" (ln K {math.log(row['k']):.3f})"
    for key, name in (("teacher_entropy", "teacher entropy"), ("kl", "KL"), ("marginal_entropy", "marginal entropy")):
        if key in row:
            text += f"  {name} {row[key]:z.3f}"
    counts = [r for r in rows if "M" in r]
    if counts:
        text += f"  M {counts[-1]['M']:.0f}/{counts[-1]['k']:.0f}"
    if "effective_rank" in row:
        text += f"  effective rank {row['effective_rank']:.1f}/{row['code_dim']:.0f}"
    if "grad_norm" in row:
        text += f"  gradient {row['grad_norm']:.3g}"
    return text


class _Losses:
    """The loss of every step, without waiting for an accelerator: is it far above all before it?"""

    def __init__(self) -> None:
        self._largest: float | None = None
        self._sound, self._copy, self._event = True, None, None

    def alarming(self, loss: float | Tensor) -> bool:
        value = self._read(loss)
        if value is None:
            return False
        sound, self._sound = self._sound, math.isfinite(value)
        if not self._sound:
            return sound  # once
        alarm = self._largest is not None and abs(value) > 1.5 * self._largest  # raises the bar: there cannot be many
        self._largest = max(self._largest or 0.0, abs(value))
        return alarm

    def _read(self, loss: float | Tensor) -> float | None:
        """This step's loss or, from a GPU, the newest one that has arrived, once."""
        if not isinstance(loss, Tensor) or loss.device.type == "cpu":
            return _number(loss)
        if loss.device.type != "cuda":
            return None
        arrived = None
        if self._event is None:
            self._event = torch.cuda.Event()
        elif self._copy is not None and self._event.query():
            arrived, self._copy = float(self._copy), None
        if self._copy is None:
            self._copy = loss.detach().to("cpu", non_blocking=True)
            self._event.record(torch.cuda.current_stream(loss.device))
        return arrived


def _number(x: float | Tensor) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def _now(x: Lazy | None) -> Tensor | None:
    """The tensor that is meant: of a function its value, of a list of views their rows one after another."""
    x = x() if callable(x) and not isinstance(x, Tensor) else x
    if isinstance(x, list | tuple):
        x = torch.cat([view.detach().reshape(-1, view.shape[-1]) for view in x])
    return x


def _parameters(prototypes: Prototypes) -> list[Tensor]:
    return [prototypes] if isinstance(prototypes, Tensor) else list(prototypes.parameters())
