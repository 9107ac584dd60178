"""The von Mises-Fisher distribution on the sphere: normalizer, density, sampler, mixtures.

f(y; mu, kappa) = C_p(kappa) exp(kappa <mu, y>),
C_p(kappa) = kappa^nu / ((2 pi)^{p/2} I_nu(kappa)),  nu = p/2 - 1        (vMF, section 3.2)

Everything hangs on log I_nu, which torch does not have and scipy's `ive` loses to underflow at small kappa (at p = 256
below about 0.3) or large p. We write s = sqrt(nu^2 + kappa^2) and work with

F_nu(kappa) = log(I_nu(kappa) / kappa^nu) = s - nu log(nu + s) - log(2 pi s)/2 + log sum_i U_i(nu/s)/nu^i,

the uniform expansion (vMF, Eq. 5; DLMF 10.41.3) with the logarithm of kappa cancelled by hand, so that kappa = 0
needs no special case. The series is used at an order of at least `_ORDER` and walked down to nu by the recurrence
of Bessel functions, in which every term is positive and nothing cancels.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from prototypes_lib.precision import wide

_ORDER = 30.0  # with 12 terms the series is at rounding error of float64 from this order on
_TERMS = 12


@cache
def _coefficients(order: float, terms: int) -> list[float]:
    """sum_{i < terms} U_i(t) / order^i as one polynomial in t, lowest power first (DLMF 10.41.9)."""
    m = torch.arange(3 * terms, dtype=torch.float64)
    u = torch.zeros(3 * terms, dtype=torch.float64)
    u[0], total = 1.0, torch.zeros_like(u)
    for i in range(terms):
        total += u / order**i
        # U_{i+1} = t^2 (1 - t^2) U_i' / 2 + (1/8) int_0^t (1 - 5 x^2) U_i dx, coefficient by coefficient
        low, high = u * (m / 2 + 1 / (8 * (m + 1))), u * (m / 2 + 5 / (8 * (m + 3)))
        u = torch.zeros_like(u)
        u[1:] += low[:-1]
        u[3:] -= high[:-3]
    return total.tolist()


def _expansion(t: Tensor, order: float, terms: int) -> tuple[Tensor, Tensor]:
    """U(t) = sum_{i < terms} U_i(t) / order^i and its derivative, by Horner's scheme."""
    u, slope = torch.zeros_like(t), torch.zeros_like(t)
    for c in reversed(_coefficients(order, terms)):
        slope = slope * t + u
        u = u * t + c
    return u, slope


def _bessel(kappa: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """F_nu(kappa) = log(I_nu / kappa^nu) and q_nu(kappa) = kappa I_nu / I_{nu+1}, in float64."""
    steps = max(0, round(_ORDER - order))
    top = order + steps
    s = torch.hypot(kappa, torch.full_like(kappa, top))
    t = top / s
    u, slope = _expansion(t, top, _TERMS)
    f = s - top * torch.log(top + s) - 0.5 * torch.log(2 * torch.pi * s) + torch.log(u)
    q = 1 / (1 / (s + top) - (0.5 + t * slope / u) / s / s)  # from F' = I_{nu+1} / I_nu = kappa / q
    for j in range(steps, 0, -1):  # I_{m-1} = I_{m+1} + (2 m / kappa) I_m, as q_{m-1} = 2 m + kappa^2 / q_m
        q = 2 * (order + j) + kappa * (kappa / q)
        f = f + torch.log(q)
    return f, q


class _LogNormalizer(torch.autograd.Function):
    """log C_p, with derivative -A_p(kappa) = -kappa h_p(kappa)."""

    @staticmethod
    def forward(ctx, kappa, dim):
        f, q = _bessel(kappa, dim / 2 - 1)
        ctx.save_for_backward(kappa, q)
        ctx.dim = dim
        return -0.5 * dim * math.log(2 * math.pi) - f

    @staticmethod
    def backward(ctx, grad):
        kappa, q = ctx.saved_tensors
        slope = _Slope.apply(kappa, ctx.dim) if torch.is_grad_enabled() else 1 / q  # to be differentiated again or not
        return -grad * kappa * slope, None


class _Slope(torch.autograd.Function):
    """h_p(kappa) = A_p(kappa) / kappa = 1 / q_nu, with derivative kappa h_p (h_{p+2} - h_p); smooth at 0."""

    @staticmethod
    def forward(ctx, kappa, dim):
        ctx.save_for_backward(kappa)
        ctx.dim = dim
        return 1 / _bessel(kappa, dim / 2 - 1)[1]

    @staticmethod
    def backward(ctx, grad):
        (kappa,) = ctx.saved_tensors
        h = _Slope.apply(kappa, ctx.dim)
        return grad * kappa * h * (_Slope.apply(kappa, ctx.dim + 2) - h), None


def log_normalizer(kappa: Float[Tensor, "*shape"], dim: int, *, terms: int | None = None) -> Float[Tensor, "*shape"]:
    """log C_p(kappa) of the von Mises-Fisher density, elementwise and differentiable (vMF, section 3.3).

    log C_p(kappa) = -(p/2) log 2 pi - F_nu(kappa), nu = p/2 - 1; its derivative is -A_p(kappa) (`mean_cosine`).

    Args:
        kappa: concentrations, finite and >= 0 (1e8 is fine); any shape.
        dim: p >= 2, the dimension of the space the sphere lies in.
        terms: None evaluates to rounding error. `terms=1` is the paper's approximation (U_0 = 1 in Eq. 5),
            `terms=n` keeps U_0 .. U_{n-1}, n <= 6, at the order nu itself; these need dim >= 3.

    Returns:
        float32 for float32 and lower precision, float64 for float64. The computation is in float64: K values cost
        nothing beside the logits, and float32 alone would lose 1e-4.

    Raises:
        ValueError: dim < 2, or an order of expansion that does not exist.
    """
    if dim < 2:
        raise ValueError(f"dim={dim}: the von Mises-Fisher density needs at least 2 dimensions")
    if terms is None:
        value = _LogNormalizer.apply(kappa.double(), dim)
    else:
        if dim < 3 or not 1 <= terms <= 6:  # more make the sum negative where nu < 1: the series is asymptotic
            raise ValueError(f"terms={terms}, dim={dim}: the expansion needs dim >= 3 and 1 to 6 terms")
        nu = dim / 2 - 1
        s = torch.hypot(kappa.double(), torch.full_like(kappa, nu, dtype=torch.float64))
        tail = torch.log(_expansion(nu / s, nu, terms)[0])
        value = nu * torch.log(nu + s) - s + 0.5 * torch.log(2 * torch.pi * s) - tail
        value = value - 0.5 * dim * math.log(2 * math.pi)
    return value.to(wide(kappa).dtype)


def mean_cosine(kappa: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """A_p(kappa) = I_{p/2}(kappa) / I_{p/2-1}(kappa) = E<mu, y>, from 0 (uniform) to 1 (a point); differentiable."""
    kappa64 = kappa.double()
    return (kappa64 * _Slope.apply(kappa64, dim)).to(wide(kappa).dtype)


def log_density(
    y: Float[Tensor, "*#batch dim"], mu: Float[Tensor, "*#batch dim"], kappa: float | Float[Tensor, "*#batch"]
) -> Float[Tensor, "..."]:
    """log f(y; mu, kappa) = log C_p(kappa) + kappa <mu, y> for unit y and mu that broadcast (vMF, section 3.2).

    It is written as (log C_p + kappa) - kappa |y - mu|^2 / 2, which keeps its digits at large kappa.
    """
    kappa = torch.as_tensor(kappa, device=y.device, dtype=torch.float64)
    peak = log_normalizer(kappa, y.shape[-1]) + kappa
    return (peak - 0.5 * kappa * (y.double() - mu.double()).square().sum(-1)).to(wide(y).dtype)


def sample(
    mu: Float[Tensor, " dim"],
    kappa: float | Float[Tensor, ""],
    n: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n dim"]:
    """n exact draws of vMF(mu, kappa) by Wood's (1994) rejection scheme, vectorized over the draws.

    y = w mu + sqrt(1 - w^2) v with v uniform on the sphere orthogonal to mu and w from Wood's envelope, written
    in 1 - w so that kappa up to 1e8 keeps its digits. kappa = 0 gives the uniform distribution.

    Raises:
        ValueError: mu has fewer than two entries or no direction, or kappa is negative or not finite.
    """
    kappa, dim = float(kappa), mu.shape[-1]
    if dim < 2 or not torch.isfinite(mu).all() or mu.norm() == 0:
        raise ValueError("mu must be a finite non-zero vector with at least 2 entries")
    if not 0 <= kappa < math.inf:
        raise ValueError(f"kappa={kappa} must be finite and >= 0")
    m = dim - 1
    b = m / (2 * kappa + (4 * kappa**2 + m**2) ** 0.5)
    x0 = (1 - b) / (1 + b)
    # log of the envelope's constant, with 1 - x0^2 = 4 b / (1 + b)^2
    c = kappa * x0 + m * math.log(4 * b / (1 + b) ** 2)
    gap = torch.empty(0, dtype=torch.float64)  # 1 - w of the accepted draws
    while len(gap) < n:
        size = 2 * (n - len(gap)) + 16
        chi2 = torch.randn(2, size, m, generator=generator, dtype=torch.float64).square().sum(-1)
        z = chi2[0] / chi2.sum(0)  # Beta(m/2, m/2)
        denominator = 1 - (1 - b) * z
        one_minus_w = 2 * b * z / denominator
        w = 1 - one_minus_w
        log_u = torch.log(torch.rand(size, generator=generator, dtype=torch.float64))
        accept = kappa * w + m * torch.log(2 * b / ((1 + b) * denominator)) - c >= log_u
        gap = torch.cat([gap, one_minus_w[accept]])
    gap = gap[:n, None]
    mean = mu.double().cpu() / mu.double().norm().cpu()
    v = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    v = v - (v @ mean)[:, None] * mean
    v = v / v.norm(dim=-1, keepdim=True)
    y = (1 - gap) * mean + torch.sqrt(gap * (2 - gap)) * v
    return (y / y.norm(dim=-1, keepdim=True)).to(dtype=mu.dtype, device=mu.device)


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture of von Mises-Fisher components and the mean log-likelihood after each step."""

    mu: Float[Tensor, "k dim"]
    kappa: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]
    log_likelihood: tuple[float, ...]

    def log_joint(self, y: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
        """log pi_k + log f(y; mu_k, kappa_k); its softmax are the responsibilities (vMF, Eq. 2)."""
        log_c = log_normalizer(self.kappa, y.shape[-1])
        return torch.log(self.weights) + log_c + y.to(self.mu.dtype) @ (self.kappa[:, None] * self.mu).T

    def responsibilities(self, y: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
        """r_ik, the posterior of component k for sample i (vMF, Eq. 2)."""
        return torch.softmax(self.log_joint(y), dim=-1)


def fit_concentration(r: Float[Tensor, "*shape"], dim: int, largest: float = 1e6) -> Float[Tensor, "*shape"]:
    """The maximum-likelihood kappa, the solution of A_p(kappa) = r, by Newton's method from Banerjee's (2005) start.

    r in [0, 1] is the length of the mean of the samples; kappa is capped at `largest`, where r -> 1 would diverge.
    """
    r = r.double().clamp(0.0, 1 - 1e-12)
    kappa = (r * (dim - r**2) / (1 - r**2)).clamp_max(largest)
    for _ in range(12):
        q = _bessel(kappa, dim / 2 - 1)[1]
        a = kappa / q
        slope = (1 - a**2 - (dim - 1) / q).clamp_min(1e-300)
        kappa = torch.maximum(kappa - (a - r) / slope, kappa / 10).clamp_max(largest)
    return kappa


def fit_mixture(
    y: Float[Tensor, "n dim"],
    k: int,
    *,
    method: str = "em",
    steps: int = 100,
    uniform_weights: bool = False,
    tolerance: float = 1e-8,
    batch_size: int = 256,
    lr: float = 0.1,
    seed: int = 0,
) -> Mixture:
    """Fit a mixture of k von Mises-Fisher components to unit vectors, by EM or as DINO would.

    method="em": movMF (Banerjee et al., 2005), E-step vMF Eq. 2, M-step pi_k = mean_i r_ik, mu_k the direction and
    A_p(kappa_k) the length of the weighted mean; the log-likelihood never falls.
    method="prototypes": the stochastic view, vectors w_k = kappa_k mu_k learned by Adam on minibatches of
    -log sum_k pi_k C_p(|w_k|) exp(<w_k, y>): the score function of DINO-vMF (vMF, Eq. 6 with tau = 1) on fixed codes.

    Args:
        y: unit vectors. k: components. steps: EM iterations or gradient steps. uniform_weights: pi_k = 1/k, as the
        DINO family assumes. tolerance: EM stops when the mean log-likelihood gains less. seed: start and minibatches.

    Raises:
        ValueError: k outside 1..n, an unknown method, or vectors that are not of unit length.
    """
    n, dim = y.shape
    if not 1 <= k <= n:
        raise ValueError(f"k={k} components need 1 <= k <= n={n} samples")
    if method not in ("em", "prototypes"):
        raise ValueError(f"method={method!r}: choose 'em' or 'prototypes'")
    if not torch.allclose(y.norm(dim=-1), torch.ones((), dtype=y.dtype, device=y.device), atol=1e-3):
        raise ValueError("y must hold unit vectors; normalize it with torch.nn.functional.normalize")
    y = y.double()
    generator = torch.Generator().manual_seed(seed)
    mu = _spread_start(y, k, generator)
    start = fit_concentration((y @ mu.T).amax(-1).mean().clamp_min(0), dim, largest=1e3).clamp_min(1.0)
    if method == "prototypes":
        return _fit_prototypes(y, mu * start, steps, batch_size, lr, uniform_weights, generator)
    fit = Mixture(mu, start.expand(k), y.new_full((k,), 1 / k), ())
    history: list[float] = []
    for _ in range(steps):
        joint = fit.log_joint(y)
        history.append(torch.logsumexp(joint, -1).mean().item())
        if len(history) > 1 and history[-1] - history[-2] < tolerance:
            break
        r = torch.softmax(joint, -1)
        mass, total = r.sum(0).clamp_min(1e-300), r.T @ y
        length = total.norm(dim=-1)
        mu = torch.where((length > 0)[:, None], total / length.clamp_min(1e-300)[:, None], fit.mu)
        weights = fit.weights if uniform_weights else mass / n
        fit = Mixture(mu, fit_concentration(length / mass, dim), weights, ())
    return Mixture(fit.mu, fit.kappa, fit.weights, tuple(history))


def _spread_start(y: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k samples, each drawn with probability proportional to its distance from those before (k-means++)."""
    chosen = [int(torch.randint(len(y), (1,), generator=generator))]
    gap = 1 - y @ y[chosen[0]]
    for _ in range(k - 1):
        p = gap.clamp_min(0).cpu() + 1e-12
        chosen.append(int(torch.multinomial(p, 1, generator=generator)))
        gap = torch.minimum(gap, 1 - y @ y[chosen[-1]])
    return y[chosen]


def _fit_prototypes(
    y: Tensor, w: Tensor, steps: int, batch: int, lr: float, uniform: bool, generator: torch.Generator
) -> Mixture:
    scale = w.norm(dim=-1).mean()  # Adam moves every entry by lr: measured in units of the first kappa
    v = (w / scale).requires_grad_()
    logits = torch.zeros(len(w), dtype=y.dtype, device=y.device, requires_grad=not uniform)
    optimizer = torch.optim.Adam([v] if uniform else [v, logits], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for _ in range(steps):
        rows = torch.randint(len(y), (min(batch, len(y)),), generator=generator).to(y.device)
        w = scale * v
        joint = torch.log_softmax(logits, 0) + log_normalizer(w.norm(dim=-1), y.shape[-1]) + y[rows] @ w.T
        loss = -torch.logsumexp(joint, -1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(-loss.item())
    w = (scale * v).detach()
    kappa = w.norm(dim=-1)
    return Mixture(w / kappa[:, None], kappa, torch.softmax(logits.detach(), 0), tuple(history))
