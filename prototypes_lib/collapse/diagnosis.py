"""What is wrong with a training run: findings from the rows of its meter, with usual causes and what to try.

One row cannot tell: an untrained network with high-entropy targets starts with its loss at ln K, and scores that are
not centered yet look like one class for all. So collapse is what *stays*, and growth what goes on. Every number below
that was chosen by looking at outcomes says so; the runs looked at were those of `tests/failing_runs.py` with seeds from
100 on and records of this library's own runs on CIFAR-10. The tests use other seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from prototypes_lib.collapse.advice import ADVICE

Row = Mapping[str, float]

# A target tells about the image what its entropy falls short of the marginal's: I = H(mean target) - mean H(target).
# verdict.py calls less than 1 % of ln K none. Untrained networks may start there (a ResNet-18 with a DINO head at a
# teacher temperature of 0.07: 0.4 to 0.7 %), so a run that never had more is suspect only below 0.3 %, between such
# starts and the runs that failed; one that had twice as much has lost it, and less than 0.5 % counts. Runs on CIFAR-10
# stayed between 0.6 and 1 % for hundreds of steps: they get the benefit of the doubt. All four looked at.
_NOTHING, _LITTLE = 0.003, 0.005
_LOST = 2.0
_ROUNDING = 1e-4  # of ln K: differences of I below it are drift; runs that stayed collapsed drift so (looked at)
_PATIENCE = 60  # steps it must stay so: healthy runs whose scores were not centered yet left within 30 (looked at)
_GROWS = 1.5  # I that grows by this within the patience is a plateau being left, at a rate notebook 14 predicts
_SCALING = 10  # steps that a gradient scaler may take to find its scale: from 65536 down to 64
_FEW = 4  # targets or codes of a row: of one, marginal and mean entropy are the same
_ONE_CLASS, _UNIFORM = 0.05, 0.99  # of ln K, as in verdict.py


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `text` says it in a line with the figures, at the row of `step`.

    kind: uniform, one-hot, constant, partial, void, dead-teacher, shared-memory, diverging or non-finite.
    """

    kind: str
    text: str
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    step: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind}: {self.text} Usual: {self.causes[0]} Try: {self.remedies[0]}"


def diagnose(rows: Sequence[Row]) -> tuple[Finding, ...]:
    """What is wrong at the newest of the rows, in the light of those before it; nothing for a run that is well.

    Rows are those of `Meter` and of metrics.jsonl, oldest first. Each kind asks for its own keys and is silent without
    them: a run without prototypes or without a teacher is judged by the rest.

    * non-finite: loss, entropy, weights or scores are not numbers, or the gradient was not in two rows running.
    * diverging: loss, gradient, weights or scores grow exponentially, three rows running, far above the run's own past.
    * shared-memory: teacher and student are the same tensors. dead-teacher: the student moves away and it stays.
    * uniform, one-hot, constant: targets tell (next to) nothing about the image, and have not begun to, for 60 steps;
      without prototypes, codes of effective rank 1.
    * partial: M below half of K, or falling: in each of the last counts, by 15 % and more in all.
    * void: the void set holds a fifth of the prototypes and grows, or half of them.
    """
    if not rows:
        return ()
    if broken := _non_finite(rows):
        return (_finding("non-finite", broken, rows),)
    found = []
    for kind, look in _LOOKS:
        text = look(rows)
        if isinstance(text, tuple):
            kind, text = text
        if text:
            found.append(_finding(kind, text, rows))
    return tuple(found)


def _finding(kind: str, text: str, rows: Sequence[Row]) -> Finding:
    return Finding(kind, text, *ADVICE[kind], step=int(_steps(rows)[-1]))


def _steps(rows: Sequence[Row]) -> list[float]:
    return [row.get("step", float(i)) for i, row in enumerate(rows)]


def _series(rows: Sequence[Row], *keys: str) -> list[tuple[float, ...]]:
    """(step, values of the keys) of the rows that have them all, as numbers."""
    timed = zip(_steps(rows), rows, strict=True)
    found = [(step, *(row[key] for key in keys)) for step, row in timed if all(key in row for key in keys)]
    return [values for values in found if all(map(math.isfinite, values))]


def _non_finite(rows: Sequence[Row]) -> str:
    newest = rows[-1]
    broken = [key for key in _MUST_BE_FINITE if not math.isfinite(newest.get(key, 0.0))]
    gradients = [(step, row["grad_norm"]) for step, row in zip(_steps(rows), rows, strict=True) if "grad_norm" in row]
    sound = [i for i, (_, norm) in enumerate(gradients) if math.isfinite(norm)]
    stretch = gradients[sound[-1] + 1 if sound else 0 :]
    if len(stretch) > 1 and stretch[-1][0] - stretch[0][0] >= _SCALING:
        broken.append("grad_norm")
    if not broken:
        return ""
    last = next((row for row in reversed(rows) if all(math.isfinite(row.get(key, 0.0)) for key in broken)), None)
    since = "from the first row on" if last is None else f"finite at step {last.get('step', 0.0):.0f}"
    return f"{', '.join(f'{key} = {newest.get(key, math.nan)}' for key in broken)}: not finite numbers; {since}."


_MUST_BE_FINITE = ("loss", "image", "teacher_entropy", "weight_max", "score_max", "kappa_05", "kappa_95")


def _diverging(rows: Sequence[Row]) -> str:
    """Three rises running, not slowing down, far above the first half of the run and above what healthy runs reach.

    Gradients grow exponentially in health, too, while a plateau is left, but from tiny to usual, and jump; weights
    under AdamW grow linearly; hence the floors, which lie 5 times and more above all healthy runs looked at. Weights or
    a loss 1000 times as large are no jump.
    """
    ceiling = next((math.log(row["k"]) for row in reversed(rows) if row.get("k", 0.0) > 1), 10.0)
    for key, floor, times, at_once in (
        ("loss", 10 * ceiling, 5.0, True),  # of unit codes and unit prototypes it is at most ln K + 2 / 0.1
        ("weight_max", 1e2, 100.0, True),
        ("score_max", 1e4, 100.0, False),  # log C_p alone may be 1e3
        ("grad_norm", 1e3, 100.0, False),
    ):
        past = [(s, abs(v)) for s, v in _series(rows, key)]
        if len(past) < 2:
            continue
        step, now = past[-1]
        early = [(s, v) for s, v in past if s <= max(step / 2, past[0][0])]
        before = max(median(v for _, v in early), 1e-30)
        if now > max(floor, times * before) and (_rises(past) or (at_once and now > 1e3 * before)):
            middle, then = early[len(early) // 2]
            rate = math.log(now / (then if 0 < then < now else before)) / max(step - middle, 1.0)
            left = (math.log(3.4e38) - math.log(now)) / rate
            return (
                f"{_NAMES[key]} grew from {before:.3g} to {now:.3g}, {math.exp(rate):.3g} times a step: at this rate "
                f"float32 overflows in about {max(left, 1):.0f} steps, if nothing breaks before."
            )
    return ""


def _rises(past: Sequence[tuple[float, float]]) -> bool:
    """Up three times running, by half a percent a step and more, and not ever more slowly."""
    if len(past) < 4 or min(v for _, v in past[-4:]) <= 0:
        return False
    pairs = zip(past[-4:], past[-3:], strict=False)
    rates = [math.log(b / a) / max(t - s, 1.0) for (s, a), (t, b) in pairs]
    return min(rates) > 0.005 and rates[-1] > 0.25 * (rates[0] + rates[1])


_NAMES = {
    "loss": "The loss",
    "weight_max": "The largest weight",
    "score_max": "The largest score",
    "grad_norm": "The gradient",
}


def _shared_memory(rows: Sequence[Row]) -> str:
    if rows[-1].get("shared_memory", 0.0) < 1:
        return ""
    return "Teacher and student share parameters in memory: the teacher is the student, not an average of it."


def _dead_teacher(rows: Sequence[Row]) -> str:
    """Not moved for 3 rows while the student went on: by 0.1 % of its length, or half as far again as before.

    The second is for a teacher that once moved: at the end of DINO's momentum schedule, 1, it all but stands, but so
    does the student, whose learning rate ends at 0. A millionth of the lag is less than a momentum of 0.9999 moves it
    in one step.
    """
    past = _series(rows, "teacher_moved", "teacher_lag")
    if rows[-1].get("shared_memory", 0.0) >= 1 or len(past) < 3:
        return ""
    still = [moved <= 1e-6 * lag for _, moved, lag in past]
    if not all(still[-3:]):
        return ""
    first = len(still) - still[::-1].index(False) if False in still else 0
    lags = [lag for _, _, lag in past]
    gone = lags[-1] - lags[max(first - 1, 0)]
    if gone < 1e-3 or (first and gone < 0.5 * lags[first - 1]):
        return ""
    since = f"since step {past[first - 1][0]:.0f}" if first else "at all"
    return (
        f"The teacher has not moved {since}, while the student has: it is {lags[-1]:.2g} of its length away, "
        f"{lags[max(first - 1, 0)]:.2g} at step {past[max(first - 1, 0)][0]:.0f}."
    )


def _no_information(rows: Sequence[Row]) -> tuple[str, str] | str:
    rows = [row for row in rows if row.get("n_targets", _FEW) >= _FEW]
    past = [(s, k, h, m) for s, k, h, m in _series(rows, "k", "teacher_entropy", "marginal_entropy") if k > 1]
    if len(past) < 3:
        return ""
    steps = [s for s, *_ in past]
    told = [max(m - h, 0.0) / math.log(k) for _, k, h, m in past]  # I as a share of ln K
    one_class = [m < _ONE_CLASS * math.log(k) for _, k, _, m in past]
    had = 0.0  # the most that any row up to here had
    blank = []
    for i, alone in zip(told, one_class, strict=True):
        had = max(had, i)
        blank.append(alone or i < (_LITTLE if had > _LOST * i else _NOTHING))
    start = len(blank) - blank[::-1].index(False) if False in blank else 0
    if had < _LOST * _LITTLE and not one_class[-1]:  # it had nothing to lose yet: patience begins with the full rate
        start = max(start, sum(step < _warm_since(rows) for step in steps))
    window = [i for i in range(start, len(blank)) if steps[i] >= steps[-1] - 1.5 * _PATIENCE]
    if len(blank) - start < 3 or steps[-1] - steps[start] < _PATIENCE:
        return ""
    lowest = min(told[i] for i in window[:-1])
    if told[-1] > _GROWS * max(lowest, _ROUNDING) and not one_class[-1]:
        return ""
    _, k, h, m = past[-1]
    return _shape(rows[-1], k, h, m, steps[-1] - steps[start])


def _warm_since(rows: Sequence[Row]) -> float:
    """The step at which the learning rate had come within a tenth of its largest so far; rows need not tell it."""
    rates = _series(rows, "lr")
    return next((step for step, lr in rates if lr >= 0.9 * max(lr for _, lr in rates)), -math.inf)


def _shape(row: Row, k: float, h: float, m: float, lasting: float) -> tuple[str, str]:
    ceiling = math.log(k)
    figures = (
        f"loss {row.get('image', row.get('loss', math.nan)):.4f}, teacher entropy {h:.4f}, marginal entropy {m:.4f}, "
        f"ln K = {ceiling:.4f}, for {lasting:.0f} steps"
    )
    if m < _ONE_CLASS * ceiling:
        return "one-hot", f"Collapsed to one class, one prototype takes all images: {figures}."
    if h > _UNIFORM * ceiling:
        loss = row.get("image", row.get("loss", math.inf))
        if abs(loss - ceiling) < 0.01 * ceiling:
            return "uniform", f"Every target is 1/K and the loss stands at ln K, learning nothing: {figures}."
        return "uniform", f"Every target is 1/K: {figures}."
    return "constant", f"Every image gets the same target: {figures}."


def _one_code(rows: Sequence[Row]) -> str:
    """Without prototypes: the rank of the codes. 1.05 is one direction, and 0.5 % of the variance in 64 others."""
    if "k" in rows[-1]:
        return ""
    many = [row for row in rows if row.get("n_codes", _FEW) >= _FEW]
    past = [x for x in _series(many, "effective_rank", "code_dim") if x[2] > 2]
    flat = [rank < 1.05 for _, rank, _ in past]
    start = len(flat) - flat[::-1].index(False) if False in flat else 0
    if len(flat) - start < 3 or past[-1][0] - past[start][0] < _PATIENCE:
        return ""
    spread = [rank - 1 for _, rank, _ in past[start:]]
    if spread[-1] > _GROWS * max(min(spread[:-1]), _ROUNDING):
        return ""
    _, rank, dim = past[-1]
    lasting = past[-1][0] - past[start][0]
    return f"Every image gets the same code: effective rank {rank:.3f} of {dim:.0f}, for {lasting:.0f} steps."


def _partial(rows: Sequence[Row]) -> str:
    for key, whose in (("M", ""), ("M_student", " of the student")):
        past = _series(rows, key, "k")
        if not past:
            continue
        _, m, k = past[-1]
        if m < 0.5 * k:
            return (
                f"Partial prototype collapse{whose}: M = {m:.0f} of K = {k:.0f} prototypes are distinct, "
                f"{k / max(m, 1):.1f} copies of each."
            )
        counts = [count for _, count, _ in past]
        falling = len(counts) > 2 and counts[-3] > counts[-2] > counts[-1]
        # healthy runs lost up to 11 %, at once in the first steps at a high rate, and no more then (looked at)
        if falling and m < 0.85 * max(counts) and counts[-2] - m > 0.02 * k:
            return (
                f"Partial prototype collapse{whose} under way: M = {max(counts):.0f} fell to {m:.0f} of K = {k:.0f}, "
                f"{counts[-2] - m:.0f} in the last {past[-1][0] - past[-2][0]:.0f} steps."
            )
    return ""


def _void(rows: Sequence[Row]) -> str:
    past = _series(rows, "void")
    if len(past) < 3:
        return ""
    shares = [share for _, share in past]
    least, now = min(shares), shares[-1]
    growing = now >= 0.2 and now - least >= 0.1 and now >= 0.9 * shares[-2] >= 0.8 * shares[-3]
    if not growing and min(shares[-3:]) < 0.5:
        return ""
    return (
        f"{now:.0%} of the prototypes point away from all data (the void set), {least:.0%} at step "
        f"{past[shares.index(least)][0]:.0f}: they are never used."
    )


_LOOKS: tuple[tuple[str, Callable[[Sequence[Row]], tuple[str, str] | str]], ...] = (
    ("diverging", _diverging),
    ("shared-memory", _shared_memory),
    ("dead-teacher", _dead_teacher),
    ("uniform", _no_information),
    ("constant", _one_code),
    ("partial", _partial),
    ("void", _void),
)
