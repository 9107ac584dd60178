"""Rows of speed.py: KoLeo, unique prototypes and the coding rate."""

import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import version
from timing import OURS, Goal, Row, agree, gradients
from torch import Tensor

from prototypes_lib import regularizers
from prototypes_lib.collapse import unique_prototypes as ours_unique


def _draw(n: int, dim: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(device)


def _full_nearest(x: Tensor) -> Tensor:
    """The nearest neighbor from the whole matrix of products, as released code finds it."""
    products = x @ x.T
    products.fill_diagonal_(-1)
    return products.max(dim=1).indices


def _full_koleo(w: Tensor) -> Tensor:
    x = F.normalize(w, dim=-1)
    with torch.no_grad():
        neighbor = _full_nearest(x)
    return -torch.log(F.pairwise_distance(x, x[neighbor], eps=1e-8) + 1e-8).mean()


def koleo_proto(size: str, device: str) -> Row:
    """KoLeo on prototypes with its gradient, neighbors among all of them."""
    k, dim = {"small": (300, 16), "cpu": (8192, 256), "gpu": (65536, 256)}[size]
    w = _draw(k, dim, device)

    def check(answers: dict[str, Any]) -> None:
        agree("KoLeo-proto", answers, 1e-5)
        x = F.normalize(w.detach(), dim=-1)
        mine, full = regularizers.nearest(x), _full_nearest(x)
        apart = ((x * x[mine]).sum(1) - (x * x[full]).sum(1)).abs().max()
        assert bool((mine == full).all()) or apart < 1e-6, "other neighbors than the full matrix"

    # at K = 8192 a few copies of the prototypes are more than a twentieth of the matrix
    goals = (Goal("full matrix", 0.5, 0.05 if size == "gpu" else None),)
    return Row(
        "KoLeo-proto", koleo_proto.__doc__, {"K": k, "dim": dim},
        lambda: gradients(regularizers.koleo, w.requires_grad_()),
        {"full matrix": lambda: gradients(_full_koleo, w.requires_grad_())}, check, goals,
        work=1.0 * k * k * dim,
        limit="half of the products remain; a float32 copy of the prototypes or two is what memory has left",
    )  # fmt: skip


def koleo_data(size: str, device: str) -> Row:
    """KoLeo on a batch of features with its gradient; and on what share of degenerate batches it is finite."""
    n, dim = {"small": (64, 16), "cpu": (1024, 384), "gpu": (1024, 384)}[size]
    x = _draw(n, dim, device)
    peers = {"full matrix": lambda: gradients(_full_koleo, x.requires_grad_())}
    losses = {OURS: regularizers.koleo, "full matrix": _full_koleo}
    if find_spec("lightly"):
        from lightly.loss import KoLeoLoss

        losses[version("lightly")] = loss_fn = KoLeoLoss()
        peers[version("lightly")] = lambda: gradients(loss_fn, x.requires_grad_())

    def finite(_: dict[str, Any]) -> dict[str, Any]:
        shares = {}
        for name, loss in losses.items():
            good = 0
            for seed in range(50):
                z = _draw(8, 16, device, seed) * 10.0 ** (seed % 5 * 8 - 16)
                z[: seed % 3] = z[3]
                z[4 + seed % 2] *= seed % 4 > 0
                good += all(bool(torch.isfinite(t).all()) for t in gradients(loss, z.requires_grad_()))
            shares[name] = good / 50
        return {"finite, value and gradient, on": shares}

    return Row(
        "KoLeo-data", koleo_data.__doc__, {"images": n, "dim": dim},
        lambda: gradients(regularizers.koleo, x.requires_grad_()), peers, lambda a: agree("KoLeo-data", a, 1e-5),
        tuple(Goal(name, 1.0) for name in peers if "lightly" in name), notes=finite, work=1.0 * n * n * dim,
        limit="at this size each small operation counts, and lengths from 1e-30 to 1e30 take a few more",
    )  # fmt: skip


def unique(size: str, device: str) -> Row:
    """M, the number of unique prototypes, half of the prototypes being copies."""
    k, dim = {"small": (300, 16), "cpu": (16384, 256), "gpu": (65536, 256)}[size]
    w = _draw(k // 2, dim, "cpu").repeat(2, 1) + 1e-3 * _draw(k // 2 * 2, dim, "cpu", 1)
    w = w[torch.randperm(len(w), generator=torch.Generator().manual_seed(2))].to(device)

    def first_fit(neighbors: Any, n: int) -> int:
        taken, count = np.zeros(n, dtype=bool), 0
        for i in range(n):
            if not taken[i]:
                taken[neighbors(i)] = True
                count += 1
        return count

    def full() -> int:
        x = F.normalize(w, dim=-1)
        near = (1 - x @ x.T < 0.025).cpu().numpy()
        return first_fit(lambda i: near[i], len(near))

    peers = {"full matrix": full}
    if find_spec("faiss") and device == "cpu":
        import faiss

        def flat() -> int:
            x = F.normalize(w, dim=-1).numpy()
            index = faiss.IndexFlatIP(dim)
            index.add(x)
            ends, _, found = index.range_search(x, 0.975)
            return first_fit(lambda i: found[ends[i] : ends[i + 1]], len(x))

        peers[f"{version('faiss-cpu')} IndexFlat"] = flat

    def check(answers: dict[str, Any]) -> None:
        assert len(set(answers.values())) == 1, f"counts differ: {answers}"

    return Row(
        "unique prototypes", unique.__doc__, {"K": k, "dim": dim}, lambda: ours_unique(w).count, peers, check,
        tuple(Goal(name, 0.5, 0.05 if name == "full matrix" else None) for name in peers), work=0.75 * k * k * dim,
        limit="the first of the matches, not the nearest, is wanted, so each pair of representatives is looked at once",
    )  # fmt: skip


def coding_rate(size: str, device: str) -> Row:
    """R of two crops' codes with its gradient; and on what share of other codes it is finite."""
    n, dim = {"small": (24, 8), "cpu": (512, 256), "gpu": (1024, 256)}[size]
    z = F.normalize(_draw(2 * n, dim, device), dim=-1)
    eps2 = 0.05

    def ours(z: Tensor) -> Tensor:
        return sum(regularizers.coding_rate(part, math.sqrt(eps2)) for part in z.chunk(2)) / 2

    def formula(z: Tensor, factorize: bool = True) -> Tensor:
        total = 0.0
        for part in z.chunk(2):
            inner = torch.eye(part.shape[1], device=z.device) + part.shape[1] / (len(part) * eps2) * part.T @ part
            if factorize:
                total = total + torch.linalg.cholesky_ex(inner)[0].diagonal().log().sum() / 2
            else:
                total = total + torch.logdet(inner) / 4
        return total

    logdet = lambda z: formula(z, factorize=False)
    losses = {OURS: ours, "Cholesky in float32 (SimDINO's form)": formula, "logdet in float32 (MCR²'s form)": logdet}

    def finite(_: dict[str, Any]) -> dict[str, Any]:
        shares = {}
        for name, loss in losses.items():
            good = 0
            for seed in range(50):
                x = _draw(16, 8, device, seed) * 10.0 ** (seed % 5 * 3 - 6)
                x = x[:, :1] * x[:1] if seed % 2 else x
                value, slope = gradients(loss, x.requires_grad_())
                exact = regularizers.coding_rate(x[:8].detach().double(), math.sqrt(eps2))
                exact = (exact + regularizers.coding_rate(x[8:].detach().double(), math.sqrt(eps2))) / 2
                good += bool(torch.isfinite(slope).all() and abs(float(value - exact)) <= 1e-3 * abs(float(exact)))
            shares[name] = good / 50
        return {"finite and right to 1e-3 on": shares}

    functions = {name: (lambda loss=loss: gradients(loss, z.requires_grad_())) for name, loss in losses.items()}
    return Row(
        "coding rate", coding_rate.__doc__, {"codes": n, "dim": dim, "crops": 2}, functions.pop(OURS), functions,
        lambda a: agree("coding rate", a, 1e-4), tuple(Goal(name, 0.7) for name in functions), notes=finite,
        limit="it is in float64, which takes a CPU twice as long, because float32 loses the small eigenvalues; two "
        "milliseconds a step in all",
    )  # fmt: skip


ROWS = {"koleo-proto": koleo_proto, "koleo-data": koleo_data, "unique": unique, "coding-rate": coding_rate}
