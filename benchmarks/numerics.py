"""How often a loss or its gradient is not finite: ours, lightly's and plain formulas on the same extreme inputs.

    python benchmarks/numerics.py [--n 2000] [--seed 0] [--out notebooks/results]

Each input is drawn from one seed and one kind, the name of what is extreme about it. A "plain formula" is the paper's
equation as one would type it, so that the table has something to compare with where lightly is not installed; Sinkhorn
of exponentials, log(p^-t) and a Cholesky whose failure is ignored are how official codes compute it, too.
tests/test_numerics.py draws the same inputs.
"""

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from recording import folder, save, told
from scipy.special import ive
from torch import Tensor

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Chain, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.objectives import cross_entropy
from prototypes_lib.precision import directions
from prototypes_lib.regularizers import coding_rate, koleo, mean_entropy, power_law, prior_matching

EPS = 0.05  # SimDINO's, which is the paper's squared
EXPONENT = 0.25  # PMSN's prior
SHARPENING = 0.25  # MSN's


@dataclass(frozen=True)
class Given:
    """One input, of which every loss takes what it needs: codes (B, p) with prototypes (K, p), or scores (B, K).

    Scores stand before the temperature; masks (images, h, w) say which of the B rows are masked patches.
    """

    codes: Tensor
    teacher_codes: Tensor
    prototypes: Tensor
    student: Tensor
    teacher: Tensor
    mask: Tensor
    tau: float = 0.1
    teacher_tau: float = 0.04

    @property
    def k(self) -> int:
        return len(self.prototypes)

    @property
    def rows(self) -> Tensor:
        return self.mask.flatten()


# The kinds. Each changes an ordinary input's codes and prototypes, or its scores.


def ordinary(rng: np.random.Generator, b: int = 16, k: int = 24) -> Given:
    """Unit codes that lean one way, unit prototypes, a third of the patches masked."""
    p = int(rng.choice([8, 64, 256]))
    lean = rng.normal(size=p)
    codes, teacher_codes = (F.normalize(_tensor(rng.normal(size=(b, p)) + lean), dim=-1) for _ in range(2))
    prototypes = F.normalize(_tensor(rng.normal(size=(k, p))), dim=-1)
    mask = torch.from_numpy(rng.random((b // 4, 2, 2) if b % 4 == 0 else (b, 1, 1)) < 1 / 3)
    return scored(Given(codes, teacher_codes, prototypes, codes, codes, mask))


def scored(x: Given) -> Given:
    """With the scores of its codes and prototypes."""
    return replace(x, student=x.codes @ x.prototypes.T, teacher=x.teacher_codes @ x.prototypes.T)


def scores_of_1e4(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    student, teacher = (_tensor(rng.uniform(-1e4, 1e4, (len(x.codes), x.k))) for _ in range(2))
    return replace(x, student=student, teacher=teacher)


def temperatures(rng: np.random.Generator) -> Given:
    tau, teacher_tau = 10 ** rng.uniform(-3, 0, 2)
    return replace(ordinary(rng), tau=float(tau), teacher_tau=float(teacher_tau))


def long_prototypes(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    return scored(replace(x, prototypes=x.prototypes * _tensor(10 ** rng.uniform(0, 2, (x.k, 1)))))


def short_prototypes(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    return scored(replace(x, prototypes=x.prototypes * _tensor(10 ** rng.uniform(-8, 0, (x.k, 1)))))


def duplicate_samples(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    few = torch.from_numpy(rng.integers(0, rng.integers(1, 5), len(x.codes)))
    return scored(replace(x, codes=x.codes[few], teacher_codes=x.teacher_codes[few]))


def duplicate_prototypes(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    few = torch.from_numpy(rng.integers(0, rng.integers(1, 5), x.k))
    return scored(replace(x, prototypes=x.prototypes[few]))


def near_copies(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    away = lambda v: _tensor(10 ** rng.uniform(-9, -3) * rng.normal(size=v.shape))
    codes, teacher_codes = (v[:1] + away(v) for v in (x.codes, x.teacher_codes))
    return scored(replace(x, codes=codes, teacher_codes=teacher_codes))


def one_sample(rng: np.random.Generator) -> Given:
    return ordinary(rng, b=1)


def many_prototypes(rng: np.random.Generator) -> Given:
    return ordinary(rng, b=3, k=512)


def one_takes_all(rng: np.random.Generator) -> Given:
    """A collapsed head: codes around one of 128 prototypes of length 6, at which the others' softmax underflows."""
    x = ordinary(rng, k=128)
    around = lambda: F.normalize(x.prototypes[:1] + 0.02 * _tensor(rng.normal(size=x.codes.shape)), dim=-1)
    return scored(replace(x, codes=around(), teacher_codes=around(), prototypes=6 * x.prototypes))


def zero_vectors(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    codes, teacher_codes, prototypes = x.codes.clone(), x.teacher_codes.clone(), x.prototypes.clone()
    for v in (codes, teacher_codes, prototypes):
        v[: rng.integers(1, 3)] = 0
    return scored(replace(x, codes=codes, teacher_codes=teacher_codes, prototypes=prototypes))


def any_length(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    codes, teacher_codes = (v * float(10 ** rng.uniform(-8, 8)) for v in (x.codes, x.teacher_codes))
    return replace(x, codes=codes, teacher_codes=teacher_codes)


def no_patch_masked(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    return replace(x, mask=torch.zeros_like(x.mask))


def every_patch_masked(rng: np.random.Generator) -> Given:
    x = ordinary(rng)
    return replace(x, mask=torch.ones_like(x.mask))


def out_of_reach(rng: np.random.Generator) -> Given:
    """A prototype that no sample of the teacher can take: its scores are -inf."""
    x = ordinary(rng)
    teacher = x.teacher.clone()
    teacher[:, rng.integers(0, x.k)] = -torch.inf
    return replace(x, teacher=teacher)


def bfloat16(rng: np.random.Generator) -> Given:
    return _low(ordinary(rng))


def everything(rng: np.random.Generator) -> Given:
    """Scores up to 1e4, any temperature, duplicates, zeros, any length, few samples; half of them in bfloat16."""
    x = ordinary(rng, b=int(rng.choice([1, 3, 16])), k=int(rng.choice([2, 24, 512])))
    few = torch.from_numpy(rng.integers(0, rng.integers(1, 5), len(x.codes))).clamp_max(len(x.codes) - 1)
    codes = x.codes[few] * float(10 ** rng.uniform(-8, 4))
    prototypes = x.prototypes * _tensor(10 ** rng.uniform(-6, 2, (x.k, 1)))
    prototypes[: rng.integers(0, 2)] = 0
    student, teacher = (_tensor(rng.uniform(-1e4, 1e4, (len(few), x.k)))[few] for _ in range(2))
    tau, teacher_tau = map(float, 10 ** rng.uniform(-3, 0, 2))
    x = replace(x, codes=codes, teacher_codes=x.teacher_codes[few], prototypes=prototypes)
    x = replace(x, student=student, teacher=teacher, tau=tau, teacher_tau=teacher_tau)
    return _low(x) if rng.random() < 0.5 else x


KINDS: dict[str, Callable[[np.random.Generator], Given]] = {
    "ordinary": ordinary,
    "scores of ±1e4": scores_of_1e4,
    "temperatures 1e-3 to 1": temperatures,
    "prototypes of length 1 to 100": long_prototypes,
    "prototypes of length 1e-8 to 1": short_prototypes,
    "duplicate samples": duplicate_samples,
    "duplicate prototypes": duplicate_prototypes,
    "samples 1e-9 to 1e-3 apart": near_copies,
    "one sample": one_sample,
    "more prototypes than samples": many_prototypes,
    "one prototype takes all": one_takes_all,
    "zero vectors": zero_vectors,
    "codes of length 1e-8 to 1e8": any_length,
    "no patch masked": no_patch_masked,
    "every patch masked": every_patch_masked,
    "a score of -inf": out_of_reach,
    "bfloat16": bfloat16,
    "everything at once": everything,
}


def draw(kind: str, seed: int) -> Given:
    """The input of a kind and a seed."""
    return KINDS[kind](np.random.default_rng([list(KINDS).index(kind), seed]))


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def _low(x: Given) -> Given:
    names = ("codes", "teacher_codes", "prototypes", "student", "teacher")
    return replace(x, **{name: getattr(x, name).bfloat16() for name in names})


# Ours.


def twice(chain: Chain, x: Given) -> Tensor:
    """Targets of the second of two equal batches: by then a memory holds what the first left there."""
    chain(x.teacher / x.teacher_tau, x.teacher_tau)
    return chain(x.teacher / x.teacher_tau, x.teacher_tau).exp()


def our_cross_entropy(links: tuple, x: Given) -> Tensor:
    return cross_entropy(twice(Chain(links, x.k), x), x.student / x.tau)


def our_patch_term(x: Given) -> Tensor:
    masked = x.mask.flatten(1)
    weight = (masked / (masked.sum(1, keepdim=True).clamp_min(1) * len(masked)))[masked]
    return cross_entropy(twice(Chain((Center,), x.k), x)[x.rows], (x.student / x.tau)[x.rows], weight)


def our_msn(x: Given, regularizer: Callable[[Tensor], Tensor] = lambda p: -mean_entropy(p)) -> Tensor:
    code, target = (directions(v) for v in (x.codes, x.teacher_codes))
    t = Chain((Normalize, Sinkhorn), x.k)(scores.cosine(target, x.prototypes.detach(), x.tau * SHARPENING)).exp()
    prediction = scores.cosine(code, x.prototypes, x.tau)
    return cross_entropy(t, prediction) + regularizer(torch.softmax(prediction, -1))


def our_vmf(x: Given) -> Tensor:
    target = torch.softmax(scores.vmf(x.teacher_codes, x.prototypes.detach(), x.teacher_tau), -1)
    return cross_entropy(target, scores.vmf(x.codes, x.prototypes, x.tau))


# Plain formulas.


def plain_sinkhorn(x: Given, shifted: bool = False) -> Tensor:
    """SwAV's algorithm in float32; `shifted` first subtracts each sample's largest score, which changes the result."""
    z = x.teacher.float() / x.teacher_tau
    q = torch.exp(z - z.amax(1, keepdim=True) if shifted else z)
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / x.k
        q = q / q.sum(1, keepdim=True) / len(q)
    return -(q * len(q) * torch.log_softmax(x.student.float() / x.tau, -1)).sum(-1).mean()


def plain_log_of_softmax(x: Given) -> Tensor:
    center, z = torch.zeros(x.k), x.teacher.float()
    for _ in range(2):
        target = torch.softmax((z - center) / x.teacher_tau, -1)
        center = 0.9 * center + 0.1 * z.mean(0)
    return -(target * torch.log(torch.softmax(x.student.float() / x.tau, -1))).sum(-1).mean()


def plain_probability_center(x: Given) -> Tensor:
    center, z = torch.zeros(x.k), x.teacher.float() / x.teacher_tau
    for _ in range(2):
        target = torch.softmax(z - center, -1)
        center = 0.9 * center + 0.1 * torch.log(torch.softmax(z, -1).mean(0))
    return -(target * torch.log_softmax(x.student.float() / x.tau, -1)).sum(-1).mean()


def plain_msn(x: Given) -> Tensor:
    unit = F.normalize(x.prototypes.float(), dim=-1)
    p, t = (torch.softmax(F.normalize(v.float(), dim=-1) @ unit.T / x.tau, -1) for v in (x.codes, x.teacher_codes))
    q = t.detach() ** (1 / SHARPENING)
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / x.k
        q = q / q.sum(1, keepdim=True) / len(q)
    mean = p.mean(0)
    return torch.log(p ** (-q * len(q))).sum(-1).mean() - torch.log(mean ** (-mean)).sum()


def plain_patch_term(x: Given) -> Tensor:
    z, log_p = x.teacher.float(), torch.log_softmax(x.student.float() / x.tau, -1)
    target = torch.softmax((z - 0.1 * z.mean(0)) / x.teacher_tau, -1)
    return -(target * log_p).sum(-1)[x.rows].mean()


def plain_koleo(x: Given) -> Tensor:
    y = F.normalize(x.codes.float(), dim=-1)
    cosines = y @ y.T - 3 * torch.eye(len(y))
    return -torch.log(torch.sqrt(2 - 2 * cosines.amax(-1)) + 1e-8).mean()


def plain_coding_rate(x: Given) -> Tensor:
    n, p = x.codes.shape
    gram = (x.codes.T @ x.codes).float()
    factor, _ = torch.linalg.cholesky_ex(torch.eye(p) + p / (n * EPS) * gram)
    return -torch.log(factor.diagonal()).sum()


class _LogNormalizer(torch.autograd.Function):
    """nu log kappa - log I_nu(kappa) and its derivative, -I_{nu+1} / I_nu, by scipy's scaled Bessel function."""

    @staticmethod
    def forward(ctx, kappa: Tensor, p: int) -> Tensor:
        nu, k = p / 2 - 1, kappa.detach().double().numpy()
        with np.errstate(all="ignore"):
            bessel = ive(nu, k)
            ctx.save_for_backward(torch.from_numpy(-ive(nu + 1, k) / bessel))
            return torch.from_numpy(nu * np.log(k) - np.log(bessel) - k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.saved_tensors[0]).float(), None


def plain_vmf(x: Given) -> Tensor:
    def logits(y: Tensor, w: Tensor, tau: float) -> Tensor:
        w = w.float()
        return y.float() @ w.T / tau + _LogNormalizer.apply(w.norm(dim=-1) / tau, w.shape[-1])

    target = torch.softmax(logits(x.teacher_codes, x.prototypes.detach(), x.teacher_tau), -1)
    return -(target * torch.log_softmax(logits(x.codes, x.prototypes, x.tau), -1)).sum(-1).mean()


# Lightly's.


def lightly_swav(x: Given) -> Tensor:
    from lightly.loss.swav_loss import SwaVLoss, sinkhorn

    return SwaVLoss(x.tau).subloss(x.student, sinkhorn(x.teacher, epsilon=x.teacher_tau))


def lightly_dino(x: Given) -> Tensor:
    from lightly.loss import DINOLoss

    loss_fn = DINOLoss(x.k, teacher_temp=x.teacher_tau, student_temp=x.tau)
    loss_fn([x.teacher], [x.student.detach(), x.student.detach()])
    return loss_fn([x.teacher], [x.student.detach(), x.student])


def lightly_msn(x: Given) -> Tensor:
    from lightly.loss import MSNLoss

    return MSNLoss(x.tau)(x.codes, x.teacher_codes, x.prototypes, SHARPENING)


def lightly_pmsn(x: Given) -> Tensor:
    from lightly.loss import PMSNCustomLoss

    loss_fn = PMSNCustomLoss(lambda p: power_law(len(p), EXPONENT).to(p), x.tau)
    return loss_fn(x.codes, x.teacher_codes, x.prototypes, SHARPENING)


def lightly_patch_term(x: Given) -> Tensor:
    from lightly.loss import IBOTPatchLoss

    loss_fn = IBOTPatchLoss(x.k, x.teacher_tau, x.tau)
    loss_fn(x.teacher[x.rows], x.student.detach()[x.rows], x.mask)
    return loss_fn(x.teacher[x.rows], x.student[x.rows], x.mask)


def lightly_koleo(x: Given) -> Tensor:
    from lightly.loss import KoLeoLoss

    return KoLeoLoss()(x.codes)


def lightly_coding_rate(x: Given) -> Tensor:
    from lightly.loss.emp_ssl_loss import tcr_loss

    return -tcr_loss(x.codes[None], EPS)


Loss = Callable[[Given], Tensor]
OURS, LIGHTLY = "prototypes_lib", "lightly"
COUNTS = ("n", "value", "gradient", "either")  # inputs seen, and those of which this is not finite

# what: {whose: how}
LOSSES: dict[str, dict[str, Loss]] = {
    "Sinkhorn targets (SwAV, DINOv2)": {
        OURS: partial(our_cross_entropy, (Sinkhorn,)),
        LIGHTLY: lightly_swav,
        "plain formula (exp-space Sinkhorn, float32)": plain_sinkhorn,
        "plain formula (exp-space Sinkhorn, each sample's maximum subtracted)": partial(plain_sinkhorn, shifted=True),
    },
    "logit centering (DINO)": {
        OURS: partial(our_cross_entropy, (Center,)),
        LIGHTLY: lightly_dino,
        "plain formula (log of the softmax)": plain_log_of_softmax,
    },
    "probability centering (DINO-vMF)": {
        OURS: partial(our_cross_entropy, (ProbabilityCenter,)),
        "plain formula (log of the mean softmax)": plain_probability_center,
    },
    "vMF score": {OURS: our_vmf, "plain formula (scipy's ive, float64)": plain_vmf},
    "MSN": {OURS: our_msn, LIGHTLY: lightly_msn, "plain formula (log(p^-t))": plain_msn},
    "PMSN": {
        OURS: lambda x: our_msn(x, lambda p: prior_matching(p, power_law(x.k, EXPONENT))),
        LIGHTLY: lightly_pmsn,
    },
    "patch term (iBOT)": {
        OURS: our_patch_term,
        LIGHTLY: lightly_patch_term,
        "plain formula (mean over masked patches)": plain_patch_term,
    },
    "KoLeo": {OURS: lambda x: koleo(x.codes), LIGHTLY: lightly_koleo, "plain formula (2 - 2 cos)": plain_koleo},
    "coding rate": {
        OURS: lambda x: -coding_rate(x.codes, EPS**0.5),
        LIGHTLY: lightly_coding_rate,
        "plain formula (float32 Cholesky, failure ignored)": plain_coding_rate,
    },
}


def finite(loss: Loss, given: Given) -> tuple[bool, bool]:
    """Whether the loss is finite, and its gradients by student scores, codes and prototypes are.

    Inputs in bfloat16 are seen under autocast, as in training.
    """
    leaves = {name: getattr(given, name).clone().requires_grad_() for name in ("student", "codes", "prototypes")}
    with torch.autocast("cpu", torch.bfloat16, enabled=given.codes.dtype == torch.bfloat16):
        value = loss(replace(given, **leaves)).sum()
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return bool(value.isfinite()), all(bool(g.isfinite().all()) for g in gradients if g is not None)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="inputs in all, shared out over the kinds (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="notebooks/results", help="folder of the record (notebooks/results)")
    options = parser.parse_args(arguments)
    if options.n < len(KINDS):
        sys.exit(f"error: --n {options.n}: at least {len(KINDS)} inputs are needed, one a kind")
    if options.seed < 0:
        sys.exit(f"error: --seed {options.seed}: a seed is not negative")
    out, start = folder(options.out), time.monotonic()
    torch.set_num_threads(1)
    has_lightly = importlib.util.find_spec("lightly") is not None
    table = [
        {"loss": what, "implementation": whose, "kinds": {kind: dict.fromkeys(COUNTS, 0) for kind in KINDS}}
        for what, implementations in LOSSES.items()
        for whose in implementations
        if has_lightly or whose != LIGHTLY
    ]
    for i in told(range(options.n), options.n, "inputs"):
        kind = list(KINDS)[i % len(KINDS)]
        given = draw(kind, options.seed * 1_000_003 + i)
        for row in table:
            value, gradient = finite(LOSSES[row["loss"]][row["implementation"]], given)
            seen = (True, not value, not gradient, not (value and gradient))
            for name, yes in zip(COUNTS, seen, strict=True):
                row["kinds"][kind][name] += int(yes)
    for row in table:
        row |= {name: sum(count[name] for count in row["kinds"].values()) for name in COUNTS}
    show(table)
    versions = {"lightly": importlib.metadata.version("lightly")} if has_lightly else {}
    save(
        out / "numerics_peers.json",
        "benchmarks/numerics.py",
        arguments,
        {"n": options.n, "seed": options.seed},
        {
            "seed": options.seed,
            "seconds": time.monotonic() - start,
            "environment": versions,
            "what": [list(KINDS), [[row["loss"], row["implementation"]] for row in table]],
            "table": table,
        },
    )


def show(table: list[dict]) -> None:
    """The counts, and for each implementation the kinds on which it fails."""
    print(f"\n{'how many are not finite':94}{'inputs':>7}{'value':>7}{'gradient':>9}{'either':>7}")
    for row in table:
        title = f"{row['loss']}: {row['implementation']}"
        print(f"{title:94}{row['n']:7}{row['value']:7}{row['gradient']:9}{row['either']:7}")
        failing = [f"{kind} {c['either']}/{c['n']}" for kind, c in row["kinds"].items() if c["either"]]
        if failing:
            print(f"    {'; '.join(failing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
