"""Multinomial logistic regression on any device: scikit-learn's objective and optimum, by preconditioned L-BFGS."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.evaluate.features import Features, check
from prototypes_lib.precision import wide

MEMORY = 20  # pairs of steps and changes of the gradient that a direction is made of
COARSE = 1e-9  # relative gap at which float32 leaves the rest to float64


@dataclass(frozen=True)
class Classifier:
    """Linear classifier: logits W x + b of `classes`, the labels that its training images had.

    objective: c * sum_i CE_i + |W|^2 / 2 where it ended; gradient: largest entry of the gradient of objective / (c n);
    gap: the share of the objective that L-BFGS still expects to gain, an estimate of the distance to the optimum, from
    below: near it where classes overlap, with a huge c (1e6) thousands of times too small; converged: whether it is
    below the tolerance.
    """

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]
    classes: Int[Tensor, " classes"]
    c: float
    objective: float
    gradient: float
    gap: float
    iterations: int
    converged: bool

    def scores(self, x: Shaped[Tensor, "n dim"]) -> Float[Tensor, "n classes"]:
        """Logits of each image, one column for each of `classes`, where x is; in float32, or in float64 as x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        made = x.new_empty(len(x), len(self.classes), dtype=dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            for rows in _rows(len(x), x.shape[1] + len(bias), weight.device):
                made[rows] = torch.addmm(bias, wide(x[rows].to(weight.device)), weight.T).to(x.device)
        return made

    def predict(self, x: Shaped[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        """Label of the largest logit of each image, where x is."""
        made = torch.empty(len(x), dtype=torch.long, device=x.device)
        for rows in _rows(len(x), x.shape[1] + len(self.bias), self.weight.device):
            made[rows] = self.classes[self.scores(x[rows]).argmax(1).to(self.classes.device)].to(x.device)
        return made


def fit(
    train: Features,
    *,
    c: float = 1.0,
    intercept: bool = True,
    tol: float = 1e-9,
    max_iterations: int = 1000,
    device: str | torch.device = "cpu",
) -> Classifier:
    """The classifier that minimizes c * sum_i CE(W x_i + b, y_i) + |W|^2 / 2; the rest is as in `path`."""
    options = {"intercept": intercept, "tol": tol, "max_iterations": max_iterations, "device": device}
    return path(train, [c], **options)[0]


def path(
    train: Features,
    cs: Iterable[float],
    *,
    intercept: bool = True,
    tol: float = 1e-9,
    max_iterations: int = 1000,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> list[Classifier]:
    """Classifiers for several c, in their order; solved from strong to weak regularization, each from those before.

    L-BFGS in the eigenvectors v_j of the features' covariance, on its diagonal guess of the curvature,
    s var_j + 1/(c n): badly scaled features take as few steps as whitened ones. Sums over the images are of float32
    until rounding shows, then of float64; everything else is float64. Ends where the decrease that L-BFGS still
    expects is `tol` of the objective; `converged` is False where `max_iterations` came first, as they may with
    separable classes and a huge c.

    Differs from scikit-learn's LogisticRegression: its stopping rule (there the largest entry of the gradient and by
    default 100 iterations); two classes have a weight vector each, as the softmax of many, so that its binary solution
    for C is ours for c = C / 2; and a class without a training image is no class.

    Args:
        intercept: a bias b, not penalized.
        tol: for `gap`, an estimate: no bound on the distance to the optimum.
        device: where products are taken, in float64 too. What does not fit there goes there block by block.

    Raises:
        ValueError: features that `check` refuses, fewer than two classes, a c or tol that is not positive.
    """
    cs = [float(c) for c in cs]
    check(train, train)
    if not cs or not all(0 < c < float("inf") for c in cs):
        raise ValueError(f"c={cs} must be positive, finite and at least one")
    if not tol > 0 or max_iterations < 1:
        raise ValueError(f"tol={tol} must be positive and max_iterations={max_iterations} at least 1")
    classes, labels = train.labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all training images have label {int(classes[0])}; a classifier needs two classes")
    order = sorted(range(len(cs)), key=cs.__getitem__)
    bar = tqdm(order, "logistic regression", unit="c", file=sys.stdout, mininterval=5, disable=not progress)
    found: dict[int, Classifier] = {}
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        problem = _Problem(train.x, labels, len(classes), intercept, torch.device(device))
        u = before = torch.zeros(len(classes), problem.width, dtype=torch.float64, device=device)
        pairs: list[tuple[Tensor, Tensor]] = []
        for place in bar:
            penalty = problem.penalty(cs[place])
            # towards the next c the solution goes on as from the last one to this one
            state = _minimize(problem, penalty, 2 * u - before, pairs, tol, max_iterations)
            before, u = u, state.u
            weight, bias = problem.weight(u)
            found[place] = Classifier(
                weight,
                bias,
                classes.to(device),
                cs[place],
                objective=cs[place] * problem.n * state.f,
                gradient=float(problem.gradient(state.g).abs().max()),
                gap=state.gap,
                iterations=state.iterations,
                converged=state.gap <= tol,
            )
    return [found[place] for place in range(len(cs))]


class _Problem:
    """Mean cross-entropy and its gradient, of U = (W V, b') with the eigenvectors V of the features' covariance.

    With an intercept it is as if features had their mean taken away: b' = b + W mean. Neither changes |W|.
    """

    def __init__(self, x: Tensor, labels: Tensor, n_classes: int, intercept: bool, device: torch.device):
        self.n, self.dim = x.shape
        self.width, self.n_classes = self.dim + intercept, n_classes
        self.rows = list(_rows(self.n, self.dim + n_classes, device))
        fits = device.type == "cuda" and 2 * x.nbytes <= torch.cuda.mem_get_info(device)[0]
        self.x, self.labels = x.to(device) if fits else x, labels.to(device)
        self.mean = torch.zeros(self.dim, dtype=torch.float64, device=device)
        if intercept:
            self.mean = sum(self._block(r, torch.float64).sum(0) for r in self.rows) / self.n
        moments = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=device)
        for r in self.rows:
            block = self._block(r, torch.float32) - self.mean.float()
            moments += block.T @ block
        variance, self.vectors = torch.linalg.eigh(moments / self.n)
        self.variance = torch.cat([variance.clamp(min=0), variance.new_ones(int(intercept))])

    def _block(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.x[rows].to(self.mean.device, dtype)

    def penalty(self, c: float) -> Tensor:
        """Curvature of |W|^2 / (2 c n) along each column of U."""
        penalty = self.mean.new_full((self.width,), 1 / (c * self.n))
        penalty[self.dim :] = 0
        return penalty

    def weight(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """W and b for features as they were given."""
        w = u[:, : self.dim] @ self.vectors.T
        bias = u[:, self.dim] - w @ self.mean if self.width > self.dim else w.new_zeros(len(w))
        return w, bias

    def gradient(self, g: Tensor) -> Tensor:
        """A gradient by U as that by (W, b)."""
        by_bias = g[:, self.dim :]
        return torch.cat([g[:, : self.dim] @ self.vectors.T + by_bias.sum(1, keepdim=True) * self.mean, by_bias], 1)

    def loss(self, u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and its gradient by U. Classes are the rows of logits: faster when they are few."""
        weight, bias = (part.to(dtype) for part in self.weight(u))
        total, gradient = u.new_zeros(()), torch.zeros_like(weight)
        residue = torch.zeros_like(u[:, :1])
        for rows in self.rows:
            x, truth = self._block(rows, dtype), self.labels[None, rows]
            p = torch.addmm(bias[:, None], weight, x.T)
            p -= p.amax(0)
            total -= p.gather(0, truth).sum(dtype=torch.float64)
            mass = p.exp_().sum(0)
            total += mass.log().sum(dtype=torch.float64)
            p /= mass
            p.scatter_add_(0, truth, p.new_full((), -1.0).expand(truth.shape))
            residue += p.sum(1, keepdim=True, dtype=torch.float64)
            gradient.addmm_(p, x)
        gradient = (gradient.double() - residue * self.mean) @ self.vectors
        return total / self.n, torch.cat([gradient, residue[:, : self.width - self.dim]], 1) / self.n


@dataclass
class _State:
    """A point U: objective / (c n), its gradient, the cross-entropy's gradient, and how the solver got there."""

    u: Tensor
    f: float
    g: Tensor
    g_loss: Tensor
    iterations: int = 0
    gap: float = float("inf")


def _minimize(
    problem: _Problem, penalty: Tensor, u: Tensor, pairs: list[tuple[Tensor, Tensor]], tol: float, most: int
) -> _State:
    """L-BFGS from u. pairs: steps and changes of the loss's gradient, also those of other penalties; added to."""

    def at(u: Tensor, dtype: torch.dtype) -> _State:
        loss, g_loss = problem.loss(u, dtype)
        return _State(u, float(loss + (penalty * u * u).sum() / 2), g_loss + penalty * u, g_loss)

    dtype, iterations = torch.float32, 0
    state = at(u, dtype)
    while True:
        direction = _direction(problem, penalty, state.g, pairs)
        slope, fine = float((state.g * direction).sum()), dtype == torch.float64
        state.gap = -slope / 2 / state.f if slope < 0 < state.f else 0.0 if slope == 0 else float("inf")
        state.iterations = iterations
        done = state.gap <= (tol if fine else max(tol, COARSE)) or iterations >= most
        if done and fine:
            return state
        found = None if done else _search(at, state, direction, slope, dtype)
        if found is not None:
            step, change = found.u - state.u, found.g_loss - state.g_loss
            if float((step * change).sum()) > 0:
                pairs.append((step, change))
                del pairs[:-MEMORY]
            state, iterations = found, iterations + 1
        elif not fine:  # nothing more to gain in this precision
            dtype, state = torch.float64, at(state.u, torch.float64)
        elif pairs:
            pairs.clear()
        else:
            return state


def _direction(problem: _Problem, penalty: Tensor, g: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus L-BFGS's inverse curvature times the gradient, around the diagonal s variance + penalty."""
    known = [(step, change + penalty * step) for step, change in pairs]
    s, scale = g.new_tensor(1 / problem.n_classes), 1.0
    if pairs:  # s explains how the loss's gradient changed along the last step, scale that of both
        (step, change), (_, both) = pairs[-1], known[-1]
        s = ((step * change).sum() / (step * problem.variance * step).sum()).clamp(1e-12, 1.0)
        scale = (step * both).sum() / (both * both / (s * problem.variance + penalty)).sum()
    q, shares = g.clone(), []
    for step, change in reversed(known):
        shares.append((step * q).sum() / (step * change).sum())
        q -= shares[-1] * change
    q *= scale / (s * problem.variance + penalty)
    for (step, change), share in zip(known, reversed(shares), strict=True):
        q += (share - (change * q).sum() / (step * change).sum()) * step
    return -q


def _search(at, state: _State, direction: Tensor, slope: float, dtype: torch.dtype) -> _State | None:
    """A point along the direction where the slope is clearly smaller and the objective not higher, or None.

    The objective is convex: its slope grows along the line, so that two slopes of unlike sign enclose the minimum.
    """
    low, high, t = (0.0, slope), None, 1.0
    slack = 1e-6 if dtype == torch.float32 else 1e-14
    for _ in range(12 if dtype == torch.float32 else 30):
        found = at(state.u + t * direction, dtype)
        here = float((found.g * direction).sum())
        if here < 0.9 * slope:
            low = t, here
        elif here <= -0.9 * slope and found.f <= state.f * (1 + slack):
            return found
        else:  # too far, or no number
            high = t, here
        if high is None:
            t *= 4
        else:
            share = low[1] / (low[1] - high[1]) if low[1] < 0 < high[1] < float("inf") else 0.1
            t = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
    return None


def _rows(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Blocks of rows: on a CPU such that a block of features is read from memory once and then from the cache."""
    size = max(256, (2**20 if device.type == "cpu" else 2**28) // width)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
