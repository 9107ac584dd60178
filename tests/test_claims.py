"""The identities of the family: each is a sentence of a notebook and a test here."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from prototypes_lib import objectives, regularizers, scores, vmf
from prototypes_lib.assignment import Center, Chain, Normalize, ProbabilityCenter, Sinkhorn


def _codes(n=24, k=17, dim=8, seed=0, free=True):
    g = torch.Generator().manual_seed(seed)
    y = F.normalize(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=-1)
    w = F.normalize(torch.randn(k, dim, generator=g, dtype=torch.float64), dim=-1)
    return y, w * (0.5 + 3 * torch.rand(k, 1, generator=g, dtype=torch.float64)) if free else w


def test_probability_centering_without_memory_is_one_sinkhorn_step_from_the_softmax():
    y, w = _codes()
    scored = scores.vmf(y, w, 0.07)
    centered = Chain((partial(ProbabilityCenter, momentum=0.0),), 17)(scored, 0.07)
    step = Chain((Normalize, partial(Sinkhorn, steps=1)), 17)(scored, 0.07)
    assert torch.allclose(centered, step, atol=1e-12)


def test_sharpening_probabilities_is_lowering_the_temperature():
    y, w = _codes()
    for power in (2.0, 4.0):
        p = torch.softmax(scores.cosine(y, w, 0.1), -1) ** power
        sharpened = p / p.sum(-1, keepdim=True)
        assert torch.allclose(sharpened, torch.softmax(scores.cosine(y, w, 0.1 / power), -1), atol=1e-12)


def test_vmf_with_unit_prototypes_is_cosine_after_the_softmax():
    y, w = _codes(free=False)
    a, b = torch.softmax(scores.vmf(y, w, 0.07), -1), torch.softmax(scores.cosine(y, w, 0.07), -1)
    assert torch.allclose(a, b, atol=1e-12)


def test_prior_matching_to_a_power_law_of_exponent_zero_is_mean_entropy():
    p = torch.softmax(torch.randn(30, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3, -1)
    kl = regularizers.prior_matching(p, regularizers.power_law(50, 0).double())
    assert abs(float(kl) - (math.log(50) - float(regularizers.mean_entropy(p)))) < 1e-7


def test_logit_centering_cancels_the_normalizer_at_steady_state():
    y, w = _codes()
    plain, normalized = (Center(17, momentum=0.5) for _ in range(2))
    for _ in range(60):
        a, b = plain(scores.dot(y, w, 0.07), 0.07), normalized(scores.vmf(y, w, 0.07), 0.07)
    assert torch.allclose(torch.softmax(a, -1), torch.softmax(b, -1), atol=1e-10)


def test_probability_centering_keeps_the_normalizer():
    y, w = _codes()
    plain, normalized = (ProbabilityCenter(17, momentum=0.5) for _ in range(2))
    for _ in range(60):
        a, b = plain(scores.dot(y, w, 0.07), 0.07), normalized(scores.vmf(y, w, 0.07), 0.07)
    assert float((torch.softmax(a, -1) - torch.softmax(b, -1)).abs().max()) > 0.1


def test_cross_entropy_of_uniform_against_uniform_is_ln_k():
    for k in (1024, 4096, 65536):
        uniform = torch.full((2, k), 1 / k, dtype=torch.float64)
        assert (
            abs(float(objectives.cross_entropy(uniform, torch.zeros(2, k, dtype=torch.float64))) - math.log(k)) < 1e-9
        )


def test_coding_rate_in_groups_is_the_mean_of_processes_that_do_not_reduce():
    z = F.normalize(torch.randn(32, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    eps, n, dim = 0.3, 32, 12
    alone = [
        0.5 * torch.logdet(torch.eye(dim, dtype=z.dtype) + dim / (n * eps**2) * part.T @ part) for part in z.chunk(4)
    ]
    assert abs(float(regularizers.coding_rate(z, eps, groups=4)) - float(torch.stack(alone).mean())) < 1e-10


def test_responsibilities_of_the_mixture_are_the_softmax_of_the_vmf_score():
    y, w = _codes()
    tau = 0.1
    kappa, mu = w.norm(dim=-1) / tau, F.normalize(w, dim=-1)
    log_joint = torch.stack([vmf.log_density(y, m, k) for m, k in zip(mu, kappa, strict=True)], dim=-1)
    assert torch.allclose(torch.softmax(log_joint, -1), torch.softmax(scores.vmf(y, w, tau), -1), atol=1e-10)


def test_pmsn_with_exponent_zero_is_msn_up_to_a_constant_also_in_its_gradient():
    logits = 3 * torch.randn(30, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    terms = (
        lambda p: regularizers.power_law_matching(p, exponent=0.0),
        lambda p: math.log(50) - regularizers.mean_entropy(p),
    )
    values = [term(torch.softmax(logits, -1)) for term in terms]
    slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values]
    assert abs(float(values[0].detach() - values[1].detach())) < 1e-12
    assert float(slopes[1].abs().max()) > 1e-4 and torch.allclose(slopes[0], slopes[1], atol=1e-14)


def test_msns_targets_are_sharpened_probabilities_balanced_from_the_softmax():
    """p^(1/0.25) at temperature 0.1, then Sinkhorn in the released code's order, is (Normalize, Sinkhorn) at 0.025."""
    y, w = _codes(free=False)
    p = torch.softmax(y @ w.T / 0.1, -1) ** 4
    q = (p / p.sum(-1, keepdim=True)).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    targets = Chain((Normalize, Sinkhorn), 17)(scores.cosine(y, w, 0.025), 0.025).exp()
    assert torch.allclose(targets, (q * q.shape[1]).T, atol=1e-12)


def test_simdinos_expansion_in_groups_is_the_mean_of_processes_that_do_not_reduce():
    """Value and gradient: each process has its own rows, all divide by the batch of all (the released code)."""
    z = F.normalize(torch.randn(32, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    z.requires_grad_()
    eye, gamma = torch.eye(12, dtype=z.dtype), (12 + 32) / (12 * 32)
    for g in (1, 2, 8):
        processes = [0.5 * torch.logdet(eye + 12 / (32 * 0.05) * own.T @ own) for own in z.split(32 // g)]
        alone = gamma * sum(processes) / g
        together = regularizers.expansion(z, 0.05**0.5, groups=g)
        assert abs(float(alone.detach() - together.detach())) < 1e-12
        slopes = [torch.autograd.grad(value, z)[0] for value in (alone, together)]
        assert torch.allclose(*slopes, atol=1e-12)


def test_shifting_all_scores_of_a_sample_changes_no_target_that_starts_from_the_softmax():
    y, w = _codes()
    scored = scores.vmf(y, w, 0.07)
    shift = torch.linspace(-5, 5, len(y), dtype=torch.float64)[:, None]
    chains = [Chain((Normalize, Sinkhorn), 17) for _ in range(2)]
    assert torch.allclose(chains[0](scored, 0.07), chains[1](scored + shift, 0.07), atol=1e-10)
