"""Our losses beside lightly's: values and gradients in float64, and where we differ on purpose.

    python benchmarks/parity.py [--configs 50] [--seed 0] [--out notebooks/results]

A comparison draws a random configuration (batch, prototypes, dimension, views, temperatures, masks) and returns the
same loss twice, as functions of the same leaves; a deviation is a statement with the two values that show it. The
tests (tests/test_parity.py, marker `parity`) and the table (parity_lightly.json) come from the same functions.

Two habits of lightly's shape the draws: it holds temperatures and the weights of patches in float32, so temperatures
are drawn in float32 and images have 0, 1, 2, 4 or 8 masked patches, of which the weights are exact.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from recording import folder, plain, save, told
from torch import Tensor

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Chain, Normalize, Sinkhorn
from prototypes_lib.objectives import alignment, cross_entropy, over_views
from prototypes_lib.regularizers import coding_rate, koleo, mean_entropy, power_law, prior_matching


class Draw:
    """Random numbers of one configuration, all from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape), dim=-1)

    def temperature(self, low: float, high: float) -> float:
        """Log-uniform, and a float32, because lightly turns it into one."""
        u = float(torch.rand((), generator=self.generator))
        return float(torch.tensor(low * (high / low) ** u, dtype=torch.float32))


@dataclass(frozen=True)
class Case:
    """One loss twice, as functions of the same leaves."""

    leaves: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    lightly: Callable[..., Tensor]

    def errors(self) -> tuple[float, float]:
        """Largest absolute differences of the values and of the gradients by all leaves."""
        (a, *grads), (b, *others) = (_value_and_gradients(f, self.leaves) for f in (self.ours, self.lightly))
        apart = torch.stack([(g - h).abs().max() for g, h in zip(grads, others, strict=True)])
        return abs(float(a) - float(b)), float(apart.max())


def _value_and_gradients(f: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    value = f(*leaves).sum()
    return value.detach(), *torch.autograd.grad(value, leaves)


@dataclass(frozen=True)
class Deviation:
    """What we do otherwise on purpose, with one number of each side that shows it."""

    text: str
    ours: float
    lightly: float


# DINO: three steps, so that the centers of both have a memory; a temperature of its own each step.


def dino(draw: Draw) -> Case:
    from lightly.loss import DINOLoss

    b, k, p = draw.integer(1, 9), draw.integer(2, 40), draw.integer(2, 16)
    n_global, views, momentum = draw.integer(1, 3), draw.integer(2, 6), 0.9
    views = max(views, n_global)
    teacher = [draw.unit(n_global, b, p) for _ in range(3)]
    temperatures = [draw.temperature(0.02, 0.2) for _ in teacher]
    tau, w_teacher = draw.temperature(0.05, 1.0), draw.normal(k, p)

    def ours(codes: Tensor, w: Tensor) -> Tensor:
        chain, loss = Chain((partial(Center, momentum=momentum),), k), 0.0
        for t, tau_t in zip(teacher, temperatures, strict=True):
            targets = chain(scores.dot(t.flatten(0, 1), w_teacher, tau_t), tau_t).exp().unflatten(0, t.shape[:2])
            loss = loss + over_views(cross_entropy, targets, [scores.dot(y, w, tau) for y in codes])
        return loss

    def lightly(codes: Tensor, w: Tensor) -> Tensor:
        loss_fn = DINOLoss(k, student_temp=tau, center_momentum=momentum).double()
        steps = zip(teacher, temperatures, strict=True)
        return sum(loss_fn(list(t @ w_teacher.T), list(codes @ w.T), teacher_temp=tau_t) for t, tau_t in steps)

    return Case((draw.unit(views, b, p), draw.normal(k, p)), ours, lightly)


def dino_deviations() -> list[Deviation]:
    from lightly.loss import DINOLoss

    z = torch.full((4, 3), 1e4 + 1e-3, dtype=torch.float64)
    chain, loss_fn = Center(3), DINOLoss(3)
    for _ in range(200):
        chain(z)
        loss_fn([z.float()], [z.float(), z.float()])
    exact = float(z[0, 0])
    return [
        Deviation(
            "The center is kept in float64, lightly's in float32. Shown: distance of the center from a constant logit "
            "of 10000.001 after 200 steps.",
            abs(float(chain.center[0]) - exact),
            abs(float(loss_fn.center.flatten()[0]) - exact),
        )
    ]


# SwAV: assignments of one crop (and its queue) at a time.


def swav(draw: Draw) -> Case:
    from lightly.loss import SwaVLoss

    b, k, p = draw.integer(1, 9), draw.integer(2, 40), draw.integer(2, 16)
    n_global, n_local, queued, steps = draw.integer(2, 3), draw.integer(0, 4), draw.integer(0, 12), draw.integer(1, 5)
    tau, eps = draw.temperature(0.05, 1.0), draw.temperature(0.03, 0.3)
    queue = draw.unit(n_global, queued, p)

    def ours(codes: Tensor, w: Tensor) -> Tensor:
        chain = Chain((Sinkhorn(steps),), k)
        seen = torch.cat([codes[:n_global].detach(), queue], dim=1)
        targets = torch.stack([chain(scores.cosine(y, w.detach(), eps), eps).exp()[:b] for y in seen])
        return over_views(cross_entropy, targets, [scores.cosine(y, w, tau) for y in codes])

    def lightly(codes: Tensor, w: Tensor) -> Tensor:
        loss_fn, unit = SwaVLoss(tau, steps, eps), F.normalize(w, dim=-1)
        high, low = list(codes[:n_global] @ unit.T), list(codes[n_global:] @ unit.T)
        return loss_fn(high, low, list(queue @ unit.T) if queued else None)

    return Case((draw.unit(n_global + n_local, b, p), draw.normal(k, p)), ours, lightly)


def swav_deviations() -> list[Deviation]:
    from lightly.loss.swav_loss import sinkhorn

    z = 5.0 * torch.eye(3)
    return [
        Deviation(
            "Sinkhorn runs in the log domain; exp(logit / 0.05) overflows float32 from a logit of 4.44 on. Shown: the "
            "largest entry of the assignment of logits 5 * identity.",
            float(Chain((Sinkhorn,), 3)(z / 0.05, 0.05).exp().max()),
            float(sinkhorn(z, epsilon=0.05).max()),
        )
    ]


# MSN and PMSN: a sharpened target is a lower temperature, Sinkhorn starts from the softmax.


def _msn(draw: Draw, weight: float, regularizer: Callable[[Tensor], Tensor], make: Callable) -> Case:
    b, k, p, views = draw.integer(1, 9), draw.integer(2, 40), draw.integer(2, 16), draw.integer(1, 5)
    tau, sharpening, steps = draw.temperature(0.05, 0.5), draw.temperature(0.25, 1.0), draw.integer(0, 4)
    targets = draw.normal(b, p)

    def ours(anchors: Tensor, w: Tensor) -> Tensor:
        chain = Chain((Normalize, Sinkhorn(steps)) if steps else (), k)
        t = chain(scores.cosine(F.normalize(targets, dim=-1), w.detach(), tau * sharpening)).exp()
        prediction = scores.cosine(F.normalize(anchors, dim=-1), w, tau)
        p = torch.softmax(prediction, dim=-1)
        return cross_entropy(t.repeat(views, 1), prediction) + weight * regularizer(p)

    def lightly(anchors: Tensor, w: Tensor) -> Tensor:
        loss_fn = make(temperature=tau, sinkhorn_iterations=steps, regularization_weight=weight)
        return loss_fn(anchors, targets, w, target_sharpen_temperature=sharpening)

    return Case((draw.normal(views * b, p), draw.normal(k, p)), ours, lightly)


def msn(draw: Draw) -> Case:
    from lightly.loss import MSNLoss

    weight = draw.temperature(0.1, 5.0)
    return _msn(draw, weight, lambda p: math.log(p.shape[-1]) - mean_entropy(p), MSNLoss)


def msn_deviations() -> list[Deviation]:
    from lightly.loss import MSNLoss

    x = torch.eye(3)
    prediction = scores.cosine(x, x, 1e-3)
    rotated = cross_entropy(x.roll(1, 0), prediction)
    return [
        Deviation(
            "The mean-entropy term leaves out its constant ln K. Shown: the term for uniform probabilities, K = 3.",
            float(-mean_entropy(torch.full((2, 3), 1 / 3))),
            float(MSNLoss().regularization_loss(torch.full((3,), 1 / 3))),
        ),
        Deviation(
            "Cross-entropy from log-softmax, not log(p^(-t)), whose power overflows where p underflows. Shown: the "
            "loss of three anchors on a prototype each, targets on another, at temperature 0.001.",
            float(rotated),
            float(MSNLoss(1e-3, sinkhorn_iterations=0, regularization_weight=0.0)(x, x.roll(1, 0), x)),
        ),
    ]


def pmsn(draw: Draw) -> Case:
    """Everything of PMSN but its regularizer, of which lightly takes the other direction (see the deviation)."""
    from lightly.loss import PMSNLoss

    return _msn(draw, 0.0, lambda p: p.new_zeros(()), PMSNLoss)


def pmsn_reversed(draw: Draw) -> Case:
    """With KL(prior || p) on our side too, written here: the direction is all that differs."""
    from lightly.loss import PMSNCustomLoss

    weight, exponent = draw.temperature(0.1, 5.0), draw.temperature(0.05, 1.0)
    prior = lambda p: power_law(p.shape[-1], exponent).to(p)
    kl = lambda p: (prior(p) * (prior(p).log() - p.mean(0).log())).sum()
    return _msn(draw, weight, kl, partial(PMSNCustomLoss, prior))


def pmsn_deviations() -> list[Deviation]:
    from lightly.loss import PMSNLoss

    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64)
    return [
        Deviation(
            "The regularizer is KL(mean p || prior), the papers' direction; lightly computes KL(prior || mean p) "
            "against its own docstring. Shown: the term for mean p = (0.6, 0.3, 0.1) and the prior of exponent 0.25.",
            float(prior_matching(p, power_law(3, 0.25))),
            float(PMSNLoss(power_law_exponent=0.25).regularization_loss(p.mean(0))),
        )
    ]


# iBOT's patch term: two steps, so that the center has a memory.


def _masks(draw: Draw, images: int) -> Tensor:
    """(images, 3, 4) masks with 0, 1, 2, 4 or 8 masked patches each, at least one in all."""
    counts = [(0, 1, 2, 4, 8)[draw.integer(0, 4)] for _ in range(images)]
    counts[0] = max(counts[0], 1)
    order = draw.normal(images, 12).argsort(-1).argsort(-1)
    return (order < torch.tensor(counts)[:, None]).unflatten(1, (3, 4))


def _patches(draw: Draw, make: Callable, seen: Callable[[Tensor, Tensor], Tensor]) -> Case:
    images, k, p = draw.integer(1, 5), draw.integer(2, 40), draw.integer(2, 16)
    masks = [_masks(draw, images) for _ in range(2)]
    teacher = [draw.unit(images * 12, p) for _ in masks]
    tau_t, tau, w_teacher = draw.temperature(0.02, 0.2), draw.temperature(0.05, 1.0), draw.normal(k, p)

    def ours(codes: Tensor, w: Tensor) -> Tensor:
        chain, loss = Chain((Center,), k), 0.0
        for t, mask in zip(teacher, masks, strict=True):
            rows, masked = mask.flatten(), mask.flatten(1)
            weight = (masked / (masked.sum(1, keepdim=True).clamp_min(1).double() * images))[masked]
            log_q = chain(scores.dot(seen(t, rows), w_teacher, tau_t), tau_t)
            targets = (log_q if len(log_q) == len(weight) else log_q[rows]).exp()
            loss = loss + cross_entropy(targets, scores.dot(codes[rows], w, tau), weight)
        return loss

    def lightly(codes: Tensor, w: Tensor) -> Tensor:
        loss_fn = make(k, tau_t, tau).double()
        steps = zip(teacher, masks, strict=True)
        return sum(
            loss_fn(seen(t, m.flatten()) @ w_teacher.T, seen(codes, m.flatten()) @ w.T, m, teacher_temp=tau_t)
            for t, m in steps
        )

    return Case((draw.unit(images * 12, p), draw.normal(k, p)), ours, lightly)


def ibot(draw: Draw) -> Case:
    """The center is the mean over all patches, as in iBOT's code."""
    from lightly.loss.ibot_loss import IBOTPlusPlusPatchLoss

    class Masked(IBOTPlusPlusPatchLoss):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, visible_loss_weight=0.0)

    return _patches(draw, Masked, lambda x, rows: x)


def ibot_masked(draw: Draw) -> Case:
    """The center is the mean over the masked patches, as in DINOv2's code: the chain is shown these alone."""
    from lightly.loss import IBOTPatchLoss

    return _patches(draw, IBOTPatchLoss, lambda x, rows: x[rows])


def ibot_deviations() -> list[Deviation]:
    from lightly.loss import IBOTPatchLoss

    mask = torch.tensor([[[True, False]]])
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    center, loss_fn = Center(2), IBOTPatchLoss(2)
    center(logits)
    loss_fn(logits[:1], logits[:1], mask)
    return [
        Deviation(
            "iBOT's center averages all patches, as its code does; IBOTPatchLoss follows DINOv2's and averages the "
            "masked ones. Shown: the first prototype's center after a step with one of two patches masked.",
            float(center.center[0]),
            float(loss_fn.center.value.flatten()[0]),
        )
    ]


# Regularizers and the loss without prototypes.


def koleo_loss(draw: Draw) -> Case:
    """With eps = 0, which the two add in different places."""
    from lightly.loss import KoLeoLoss

    n, p = draw.integer(2, 40), draw.integer(3, 32)
    return Case((draw.normal(n, p),), partial(koleo, eps=0.0), KoLeoLoss(eps=0.0))


def koleo_deviations() -> list[Deviation]:
    from lightly.loss import KoLeoLoss

    one, three = torch.ones(1, 4), torch.eye(4)[:1].expand(3, 4)
    near = torch.tensor([[1.0, 0.0], [1.0, 1e-8]], dtype=torch.float64)
    (_, ours), (_, lightly) = (_value_and_gradients(f, (three,)) for f in (koleo, KoLeoLoss()))
    return [
        Deviation(
            "eps is added to the distance alone, lightly adds it to each coordinate of the difference too. Shown: the "
            "loss of two vectors 1e-8 apart.",
            float(koleo(near)),
            float(KoLeoLoss()(near)),
        ),
        Deviation(
            "Exact copies get no gradient, for there is no direction in which they part; lightly's is one over eps. "
            "Shown: the largest entry of the gradient of three copies.",
            float(ours.abs().max()),
            float(lightly.abs().max()),
        ),
        Deviation(
            "A vector alone costs nothing; lightly takes it for its own neighbor. Shown: its loss.",
            float(koleo(one)),
            float(KoLeoLoss()(one)),
        ),
    ]


def rate(draw: Draw) -> Case:
    """Lightly's epsilon is the paper's squared; its views are averaged."""
    from lightly.loss.emp_ssl_loss import tcr_loss

    views, n, p, eps = draw.integer(1, 3), draw.integer(1, 24), draw.integer(2, 24), draw.temperature(0.01, 2.0)
    ours = lambda z: sum(coding_rate(view, math.sqrt(eps)) for view in z) / views
    return Case((draw.unit(views, n, p),), ours, partial(tcr_loss, eps=eps))


def rate_deviations() -> list[Deviation]:
    from lightly.loss import EMPSSLLoss

    z = torch.eye(4, dtype=torch.float64)
    return [
        Deviation(
            "A method subtracts the rate from its loss, since it is to be enlarged (Sim, Eq. 8); EMPSSLLoss adds it. "
            "Shown: the rate's share of the loss of four orthogonal codes, eps^2 = 0.2.",
            -float(coding_rate(z, math.sqrt(0.2))),
            float(EMPSSLLoss(tcr_eps=0.2, inv_coef=0.0)([z])),
        )
    ]


def cosine(draw: Draw) -> Case:
    """Codes of unit length, and our constant 1 taken off."""
    from lightly.loss import NegativeCosineSimilarity

    target = draw.unit(draw.integer(1, 9), draw.integer(2, 16))
    ours = lambda x: alignment(target, F.normalize(x, dim=-1)) - 1
    return Case((draw.normal(*target.shape),), ours, lambda x: NegativeCosineSimilarity()(x, target))


def cosine_deviations() -> list[Deviation]:
    from lightly.loss import NegativeCosineSimilarity

    x = torch.eye(2)
    return [
        Deviation(
            "The alignment is half the squared distance, zero at best (Sim, Eq. 7). Shown: the loss of equal codes.",
            float(alignment(x, x)),
            float(NegativeCosineSimilarity()(x, x)),
        )
    ]


@dataclass(frozen=True)
class Comparison:
    """A loss of lightly's, what it is here, and how to draw a case and show the deviations."""

    lightly: str
    ours: str
    case: Callable[[Draw], Case]
    deviations: Callable[[], list[Deviation]] = list


COMPARISONS = (
    Comparison("DINOLoss", "dot, Center, cross_entropy over_views; three steps", dino, dino_deviations),
    Comparison("SwaVLoss", "cosine, Sinkhorn, cross_entropy over_views; with a queue", swav, swav_deviations),
    Comparison("MSNLoss", "cosine, Normalize + Sinkhorn, cross_entropy - mean_entropy", msn, msn_deviations),
    Comparison("PMSNLoss without regularizer", "cosine, Normalize + Sinkhorn, cross_entropy", pmsn, pmsn_deviations),
    Comparison("PMSNCustomLoss", "the same + KL(prior || mean p), written in the comparison", pmsn_reversed),
    Comparison(
        "IBOTPlusPlusPatchLoss, visible patches off", "dot, Center of all patches, weighted cross_entropy", ibot
    ),
    Comparison("IBOTPatchLoss", "dot, Center of masked patches, weighted cross_entropy", ibot_masked, ibot_deviations),
    Comparison("KoLeoLoss", "koleo", koleo_loss, koleo_deviations),
    Comparison("EMPSSLLoss's tcr_loss", "coding_rate", rate, rate_deviations),
    Comparison("NegativeCosineSimilarity", "alignment - 1", cosine, cosine_deviations),
)


def compare(comparison: Comparison, configs: int, seed: int = 0) -> tuple[float, float]:
    """The largest errors of value and gradient over random configurations."""
    errors = [comparison.case(Draw(seed * 1_000_003 + i)).errors() for i in range(configs)]
    value, gradient = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()  # a nan stays one
    return value, gradient


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=50, help="random configurations a loss (50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="notebooks/results", help="folder of the record (notebooks/results)")
    options = parser.parse_args(arguments)
    if options.configs < 1:
        sys.exit(f"error: --configs {options.configs}: at least one is needed")
    if importlib.util.find_spec("lightly") is None:
        sys.exit("error: lightly is not installed; say pip install 'lightly>=1.6'")
    out, start, table = folder(options.out), time.monotonic(), []
    torch.set_num_threads(1)
    for comparison in told(COMPARISONS, len(COMPARISONS), "losses"):
        value, gradient = compare(comparison, options.configs, options.seed)
        deviations = [
            {"text": d.text, "ours": plain(d.ours), "lightly": plain(d.lightly)} for d in comparison.deviations()
        ]
        row = {"lightly": comparison.lightly, "ours": comparison.ours, "configs": options.configs}
        table.append(row | {"value_error": value, "gradient_error": gradient, "deviations": deviations})
    print(f"\n{'largest error of':44}{'value':>10}{'gradient':>10}")
    for row in table:
        print(f"{row['lightly']:44}{row['value_error']:10.1e}{row['gradient_error']:10.1e}")
        for d in row["deviations"]:
            print(f"    {d['text']} Ours {d['ours']:.4g}, lightly {d['lightly']}")
    versions = {"lightly": importlib.metadata.version("lightly")}
    save(
        out / "parity_lightly.json",
        "benchmarks/parity.py",
        arguments,
        {"configs": options.configs, "seed": options.seed},
        {
            "seed": options.seed,
            "seconds": time.monotonic() - start,
            "environment": versions,
            "what": [comparison.lightly for comparison in COMPARISONS],
            "table": table,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
