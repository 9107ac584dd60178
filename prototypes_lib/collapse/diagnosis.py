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

Row = Mapping[str, float]

# A target tells about the image what its entropy falls short of the marginal's: I = H(mean target) - mean H(target).
# verdict.py calls less than 1 % of ln K none. Untrained networks may start there (a ResNet-18 with a DINO head at a
# teacher temperature of 0.07: 0.5 %), so a run that never had more is suspect only below 0.3 %, between such starts and
# the runs that failed; one that had twice as much has lost it, and 1 % counts.
_NOTHING, _LITTLE = 0.003, 0.005
_LOST = 2.0
_ROUNDING = 1e-5  # of ln K: what the difference of two entropies in float32 says of I
_PATIENCE = 60  # steps it must stay so: healthy runs whose scores were not centered yet left within 30 (looked at)
_GROWS = 1.5  # I that grows by this within the patience is a plateau being left, at a rate notebook 14 predicts
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
    return Finding(kind, text, *_ADVICE[kind], step=int(_steps(rows)[-1]))


def _steps(rows: Sequence[Row]) -> list[float]:
    return [row.get("step", float(i)) for i, row in enumerate(rows)]


def _series(rows: Sequence[Row], *keys: str) -> list[tuple[float, ...]]:
    """(step, values of the keys) of the rows that have them all, as numbers."""
    steps = _steps(rows)
    found = [(s, *(row[key] for key in keys)) for s, row in zip(steps, rows, strict=True) if all(k in row for k in keys)]
    return [values for values in found if all(map(math.isfinite, values))]


def _non_finite(rows: Sequence[Row]) -> str:
    newest = rows[-1]
    broken = [key for key in _MUST_BE_FINITE if not math.isfinite(newest.get(key, 0.0))]
    gradients = [row["grad_norm"] for row in rows if "grad_norm" in row][-2:]
    if len(gradients) == 2 and not any(map(math.isfinite, gradients)):  # once is what a gradient scaler is for
        broken.append("grad_norm")
    if not broken:
        return ""
    last = next((row for row in reversed(rows) if all(math.isfinite(row.get(key, 0.0)) for key in broken)), None)
    since = "from the first row on" if last is None else f"they were at step {last.get('step', 0.0):.0f}"
    return f"{', '.join(f'{key} = {newest.get(key, math.nan)}' for key in broken)}: not finite numbers; {since}."


_MUST_BE_FINITE = ("loss", "image", "teacher_entropy", "weight_max", "score_max")


def _diverging(rows: Sequence[Row]) -> str:
    """Three rises running, not slowing down, to far above the first half of the run and above what healthy runs reach.

    Gradients grow exponentially in health, too, while a plateau is left, but from tiny to usual; weights under AdamW
    grow linearly; hence the floors, which lie 10 times and more above all healthy runs looked at.
    """
    ceiling = next((math.log(row["k"]) for row in reversed(rows) if row.get("k", 0.0) > 1), 10.0)
    for key, floor, times in (
        ("loss", 10 * ceiling, 5.0),  # of unit codes and unit prototypes it is at most ln K + 2 / 0.1
        ("grad_norm", 1e3, 100.0),
        ("weight_max", 1e2, 100.0),
        ("score_max", 1e4, 100.0),  # log C_p alone may be 1e3
    ):
        past = _series(rows, key)
        if len(past) < 4:
            continue
        steps, values = [s for s, _ in past], [abs(v) for _, v in past]
        recent = values[-4:]
        before = median(v for s, v in zip(steps, values, strict=True) if s <= max(steps[-1] / 2, steps[0]))
        if values[-1] < floor or values[-1] < times * before or min(recent) <= 0:
            continue
        spans = [max(b - a, 1.0) for a, b in zip(steps[-4:], steps[-3:], strict=False)]
        rates = [math.log(b / a) / span for a, b, span in zip(recent, recent[1:], spans, strict=False)]
        if min(rates) > 0.005 and rates[-1] > 0.5 * (rates[0] + rates[1]) / 2:
            left = (math.log(3.4e38) - math.log(values[-1])) / rates[-1]
            return (
                f"{_NAMES[key]} grows {math.exp(rates[-1]):.3g} times a step, from {before:.3g} to {values[-1]:.3g}: "
                f"at this rate float32 overflows in about {max(left, 1):.0f} steps."
            )
    return ""


_NAMES = {"loss": "The loss", "grad_norm": "The gradient", "weight_max": "The largest weight", "score_max": "The scores"}


def _shared_memory(rows: Sequence[Row]) -> str:
    if rows[-1].get("shared_memory", 0.0) < 1:
        return ""
    return "Teacher and student share parameters in memory: the teacher is the student, not an average of it."


def _dead_teacher(rows: Sequence[Row]) -> str:
    """Not moved for 3 rows while the student went on: by 0.1 % of its length, or half as far again as before.

    The second is for a teacher that once moved: at the end of DINO's momentum schedule, 1, it all but stands, but so does
    the student, whose learning rate ends at 0. A millionth of the lag is less than a momentum of 0.9999 moves in a step.
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
    window = [i for i in range(start, len(blank)) if steps[i] >= steps[-1] - 1.5 * _PATIENCE]
    if len(blank) - start < 3 or steps[-1] - steps[start] < _PATIENCE:
        return ""
    lowest = min(told[i] for i in window[:-1])
    if told[-1] > _GROWS * max(lowest, _ROUNDING) and not one_class[-1]:
        return ""
    _, k, h, m = past[-1]
    return _shape(rows[-1], k, h, m, steps[-1] - steps[start])


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
    """Without prototypes: the rank of the codes. 1.05 is one direction and 1 % of variance elsewhere, in 64 dimensions."""
    if "k" in rows[-1]:
        return ""
    past = [x for x in _series(rows, "effective_rank", "code_dim") if x[2] > 2]
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

_ADVICE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "uniform": (
        (
            "the teacher's temperature is near or above the student's (0.1): only sharper targets leave 1/K.",
            "the learning rate is too high (weights and codes blow up to one direction), or still near 0 in its warm-up.",
            "K is large for the data or the batch: every rate of leaving the plateau carries 1/K.",
            "prototypes with free norms (norm_last_layer=False) shrank to nothing, by weight decay for instance.",
            "the prototypes became copies of each other: see M.",
            "float16 lost small gradients or the targets' digits.",
        ),
        (
            "teacher temperature 0.04, warmed up to 0.07 at most, with 0.1 for the student.",
            "a learning rate several times lower, with a longer warm-up, and gradients clipped at 3 or less.",
            "fewer prototypes (out_dim 4096 or less for small data) and larger batches; without them a center momentum of "
            "0.99 in place of 0.9, and an EMA of 0.9995 or more.",
            "norm_last_layer=True, and the last layer frozen for the first epoch or longer (freeze_last_layer).",
            "float32 or bfloat16 for the head and the loss.",
        ),
    ),
    "one-hot": (
        (
            "the scores are not centered: the center is missing, never updated, a scalar (the mean over both "
            "dimensions), or subtracted from the student, too.",
            "the teacher's temperature is too low for the length of the prototypes (free norms, vMF: kappa = |w| / tau).",
            "the center cannot follow: its momentum is too high for how fast the teacher moves.",
            "batches are too small for their mean to be one.",
        ),
        (
            "check that the center changes from step to step and has K different entries, kept in a buffer.",
            "probability centering or Sinkhorn-Knopp in place of a logit center; a mean-entropy term.",
            "a higher teacher temperature at the start, a lower learning rate, an EMA momentum nearer to 1.",
        ),
    ),
    "constant": (
        (
            "the teacher sees the same whatever the image: a blank input (integer division of pixels), wrong "
            "normalization, a dead activation.",
            "the center is never updated, and no longer fits the scores.",
            "teacher and student temperatures are so close that differences between images die out.",
            "nothing holds the codes apart (no prototypes: the coding rate's weight is 0, or its sign is wrong).",
        ),
        (
            "look at the teacher's input, then at its features, for two different images: where do they become equal?",
            "check that the center changes from step to step; put Sinkhorn-Knopp in its place.",
            "a lower teacher temperature (0.04) with 0.1 for the student; without prototypes, a larger coding-rate term.",
        ),
    ),
    "partial": (
        (
            "prototypes learn much faster than the codes, which move together to where the data are.",
            "K is far above the number of groups that the codes form and of samples in a batch.",
            "the bottleneck has few dimensions, or free norms let a few prototypes win all data.",
        ),
        (
            "KoLeo-proto, weight 0.1, which spreads the prototypes.",
            "the backbone's learning rate for the prototypes, or less; freeze them for the first epoch.",
            "fewer prototypes: copies cost memory and teach nothing.",
        ),
    ),
    "void": (
        (
            "prototypes that no image chooses are pushed away from the mean code, all to the same place.",
            "the codes lie in a cone (their mean is long): not centered, or nothing spreads them.",
            "the prototypes' learning rate is high.",
        ),
        (
            "probability centering or Sinkhorn-Knopp, which give every prototype its share of the data.",
            "KoLeo-proto, which keeps prototypes apart; a lower learning rate for the prototypes; fewer of them.",
        ),
    ),
    "dead-teacher": (
        (
            "the EMA update is never called, is called with momentum 1, or updates another copy of the model.",
            "the teacher is in float16 or bfloat16: steps of (1 - m) times the difference are rounded away.",
            "a compiled or wrapped student (DDP, torch.compile) whose parameters are not those averaged.",
        ),
        (
            "call the update after each optimizer step: teacher = m * teacher + (1 - m) * student, m = 0.996 (0.9995 for "
            "small batches), growing to 1 only at the end; keep the teacher's weights in float32.",
            "if the teacher is meant to be fixed (distillation), leave it out of the meter.",
        ),
    ),
    "shared-memory": (
        (
            "teacher = student, or teacher.head = student.head: an assignment, where a copy was meant.",
            "p_teacher.data = p_student.data, or load_state_dict(..., assign=True): both hold the same tensors.",
        ),
        (
            "teacher = copy.deepcopy(student), then requires_grad_(False), and update it in place.",
            "if the method has no EMA teacher (SwAV), leave it out of the meter.",
        ),
    ),
    "diverging": (
        (
            "the learning rate is too high, or its schedule grows where it should fall (wrong factor, wrong unit).",
            "gradients are not clipped; free norms of the prototypes (norm_last_layer=False) grow with the scores.",
            "a term of the loss without a lower bound, or with the wrong sign.",
        ),
        (
            "stop, go back to a checkpoint before the growth, a learning rate ten times lower, clip gradients at 3 or less.",
            "plot the learning rate against the step; scale it with the batch: 5e-4 * batch / 256 for AdamW.",
            "norm_last_layer=True; normalize the codes; float32 or bfloat16 in place of float16.",
        ),
    ),
    "non-finite": (
        (
            "float16 overflowed (above 65504) in the head, the loss or the attention.",
            "exp(score / temperature) without subtracting the maximum (Sinkhorn-Knopp in the exp domain), log 0, or a "
            "division by the length of a zero vector.",
            "the learning rate is too high; KoLeo met two identical vectors.",
        ),
        (
            "go back to a checkpoint before it; float32 for head and loss, or bfloat16 in place of float16.",
            "log-domain Sinkhorn-Knopp and log_softmax; an eps under every square root, logarithm and division.",
            "a lower learning rate, gradients clipped at 3 or less, steps with gradients that are not finite skipped.",
        ),
    ),
}
