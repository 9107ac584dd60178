"""Rows of speed.py: logistic regression, of one strength and of the 45 that transfer tries."""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from peers import version
from timing import OURS, Goal, Row
from torch import Tensor

from prototypes_lib.evaluate import Features, logistic
from prototypes_lib.evaluate.transfer import LAMBDAS

Answer = list[tuple[Tensor, Tensor]]  # weight and bias for each c


def _features(n: int, dim: int, seed: int) -> Features:
    """Ten wide clusters whose spectrum falls by a power law, far from the origin: like features of a network."""
    draw = torch.Generator().manual_seed(99)
    centers, offset = torch.randn(10, dim, generator=draw), torch.randn(dim, generator=draw)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=draw)
    x = centers[labels] + 8 * torch.randn(n, dim, generator=draw)
    return Features((x * torch.arange(1, dim + 1) ** -0.75) @ turn + offset, labels)


def _objective(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, c: float) -> float:
    logits = x @ weight.double().to(x.device).T + bias.double().to(x.device)
    return c * float(F.cross_entropy(logits, labels, reduction="sum")) + float(weight.double().square().sum()) / 2


def _row(name: str, what: str, cs: list[float], size: str, device: str, **options: Any) -> Row | None:
    """Ours against scikit-learn's L-BFGS, warm-started from strong to weak regularization as ours is."""
    if not find_spec("sklearn"):
        return None
    from sklearn.linear_model import LogisticRegression

    n, dim = (600, 24) if size == "small" else (50_000, 64)
    train = _features(n, dim, 0)
    bilateral = "tol" in options
    x = train.x.double().numpy() if bilateral else train.x.numpy()
    labels, cs = train.labels.numpy(), sorted(cs)

    def ours() -> Answer:
        return [(found.weight, found.bias) for found in logistic.path(train, cs, device=device)]

    def sklearn() -> Answer:
        model, found = LogisticRegression(warm_start=True, **options), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that 100 iterations are not enough, which the protocol accepts
            for c in cs:
                model.set_params(C=c).fit(x, labels)
                found.append((torch.from_numpy(model.coef_.copy()), torch.from_numpy(model.intercept_.copy())))
        return found

    peer = f"{version('scikit-learn')}, {'to the optimum' if bilateral else '100 iterations each'}"

    def gaps(answers: dict[str, Answer]) -> list[float]:
        """By how much of itself our objective is above the peer's, for each c."""
        wide, truth = train.x.to(device).double(), train.labels.to(device)
        mine, theirs = ([_objective(wide, truth, *a, c) for a, c in zip(answers[side], cs, strict=True)]
                        for side in (OURS, peer))  # fmt: skip
        return [a / b - 1 for a, b in zip(mine, theirs, strict=True)]

    def check(answers: dict[str, Answer]) -> None:
        found = gaps(answers)
        assert max(found) <= 1e-8, f"our objective is {max(found):.1e} of itself above that of {peer}"
        assert not bilateral or min(found) >= -1e-8, f"{peer} is {-min(found):.1e} above the optimum: not comparable"

    return Row(
        name, what, {"images": n, "dim": dim, "classes": 10, "values of C": len(cs)}, ours, {peer: sklearn}, check,
        (Goal(peer, 1 / 1.5 if bilateral else 1.0),), memory=None, turns=2 if size != "small" else None,
        notes=lambda answers: {"objective, ours above the peer's": {"least": min(g := gaps(answers)), "most": max(g)}},
    )  # fmt: skip


def logistic_fit(size: str, device: str) -> Row | None:
    """Multinomial logistic regression, C = 1: both to the same optimum, to 1e-8 of the objective."""
    return _row("logistic regression", logistic_fit.__doc__, [1.0], size, device, tol=1e-6, max_iter=10_000)


def logistic_path(size: str, device: str) -> Row | None:
    """The 45 values of C of transfer: the peer as the protocol has it, ours with an objective that is not higher."""
    return _row("45 values of C", logistic_path.__doc__, [1 / lam for lam in LAMBDAS], size, device)


ROWS = {"logistic": logistic_fit, "logistic-45": logistic_path}
