"""One step of every recipe: finite loss, gradients where they belong, and the terms the papers write down."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prototypes_lib import regularizers, scores
from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Learner, Network
from prototypes_lib.methods import METHODS, Method, Patch, Views


def make(method: Method, seed: int = 0, dtype=torch.float32, **head) -> Learner:
    torch.manual_seed(seed)
    backbone = Backbone("vit_pico_patch8", 32)
    prototypes = Prototypes(method.n_prototypes, 8, method.free_norms) if method.n_prototypes else None
    learner = Learner(method, Network(backbone, Projector(backbone.dim, 32, 8, **head), prototypes)).to(dtype)
    with torch.no_grad():  # a teacher apart from its student, and mask tokens that matter
        for p in learner.student.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return learner


def small(name: str, **changes) -> Method:
    method = METHODS[name]
    return method.but(n_prototypes=24 if method.n_prototypes else 0, views=Views(2, 3), **changes)


def batch(n=6, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    views = [torch.randn(n, 3, s, s, generator=g, dtype=dtype) for s in (32, 32, 16, 16, 16)]
    masks = torch.rand(2 * n, 4, 4, generator=g) < 0.4
    masks[1] = False  # an image without any masked patch
    return views, masks


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_finite_and_every_trainable_parameter_learns(name):
    learner = make(small(name))
    step = learner(*batch(), 0.04)
    step.loss.backward()
    assert torch.isfinite(step.loss)
    for where, p in learner.student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all() and float(p.grad.abs().max()) > 0, where
    assert all(p.grad is None and not p.requires_grad for p in learner.teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_loss_equals_a_rederivation_from_the_papers(name):
    """In float64, pair by pair and patch by patch, with nothing of the library but the networks."""
    method = small(name)
    learner = make(method, dtype=torch.float64)
    views, masks = batch(dtype=torch.float64)
    tau_t, tau_s = 0.05, 0.1
    center = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for chain in (learner.chain, learner.patch_chain):
        if chain is not None and method.n_prototypes:
            chain.links[0].center.copy_(center)
    reference = copy.deepcopy(learner)
    step = learner(views, masks, tau_t)
    step.loss.backward()
    loss = _reference(reference, method, views, masks, tau_t, tau_s, center)
    loss.backward()
    assert abs(float(step.loss.detach() - loss.detach())) < 1e-10
    for (where, p), q in zip(learner.student.named_parameters(), reference.student.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, atol=1e-9, rtol=1e-7), where


def _reference(learner, method, views, masks, tau_t, tau_s, center):
    student, teacher = learner.student, learner.teacher
    n, use_mask = len(views[0]), method.patch is not None
    s_out = [
        student.backbone(v, masks[i * n : (i + 1) * n] if use_mask and i < 2 else None) for i, v in enumerate(views)
    ]
    t_out = [teacher.backbone(v) for v in views[:2]]
    code = lambda net, x: F.normalize(net.projector.mlp(x), dim=-1)
    ys, yt = [code(student, f) for f, _ in s_out], [code(teacher, f) for f, _ in t_out]
    loss, pairs = 0.0, 0
    logits = lambda net, y, tau: _logits(method, net, y, tau)
    target = lambda y: torch.softmax(_minus_center(method, logits(teacher, y, tau_t), center, tau_t), -1)
    for q in range(2):
        for v in range(len(views)):
            if v == q:
                continue
            pairs += 1
            if method.n_prototypes:
                log_p = torch.log_softmax(logits(student, ys[v], tau_s), -1)
                loss = loss - (target(yt[q]).detach() * log_p).sum(-1).mean()
            else:
                loss = loss + (1 - (ys[v] * yt[q].detach()).sum(-1)).mean()
    loss = loss / pairs
    if use_mask:
        patch = 0.0
        for g in range(2):
            for i in range(n):
                hidden = masks[g * n + i].flatten()
                if hidden.any():
                    p = torch.log_softmax(logits(student, code(student, s_out[g][1][i][hidden]), tau_s), -1)
                    t = target(code(teacher, t_out[g][1][i][hidden])).detach()
                    patch = patch - (t * p).sum(-1).mean() / n / 2
        loss = loss + method.patch.weight * patch
    if name_has(method, "features"):
        for f, _ in s_out[:2]:
            loss = loss + 0.1 * _naive_koleo(f)
    if name_has(method, "prototypes"):
        loss = loss + 0.1 * _naive_koleo(student.prototypes.weight_v)
    if name_has(method, "averaged codes"):
        for g in range(2):
            z = 0.5 * (ys[g] + yt[g].detach())
            gram = z.T @ z
            scalar = z.shape[1] / (n * 0.05)  # the official eps is the paper's squared
            gamma = (z.shape[1] + n) / (z.shape[1] * n)
            loss = loss - gamma * 0.5 * torch.logdet(torch.eye(z.shape[1], dtype=z.dtype) + scalar * gram) / 2
    return loss


def name_has(method, place):
    return any(on == place for _, _, on in method.regularizers)


def _logits(method, net, y, tau):
    w = net.prototypes.weight_g * F.normalize(net.prototypes.weight_v, dim=-1)
    z = y @ w.T / tau
    if method.score is scores.vmf:
        nu, kappa = 3.0, w.norm(dim=-1) / tau  # dim 8; order 3 by numerical integration of the vMF density
        z = z + _log_c(kappa, nu)
    return z


_NODES = [torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(400)]


def _log_c(kappa, nu):
    """log C_8 up to a constant, from I_3 by its integral (DLMF 10.32.2), differentiable."""
    x, weight = _NODES
    theta = (x + 1) * torch.pi / 2
    grow = kappa[:, None] * (torch.cos(theta) - 1)
    integral = (torch.exp(grow) * torch.sin(theta) ** (2 * nu) * weight).sum(-1)
    return -torch.log(integral) - kappa


def _minus_center(method, z, center, tau):
    return z - (center / tau if method.targets[0].__name__ == "Center" else center)


def _naive_koleo(x):
    x = F.normalize(x, dim=-1)
    distance = torch.cdist(x, x) + 10 * torch.eye(len(x), dtype=x.dtype)
    return -torch.log((x - x[distance.argmin(-1)]).norm(dim=-1) + 1e-8).mean()


def test_the_teacher_follows_by_ema_and_keeps_its_buffers():
    learner = make(small("dino-vmf"), batch_norm=True)
    before = copy.deepcopy(learner.teacher.state_dict())
    learner.update_teacher(0.9)
    student = learner.student.state_dict()
    for name, tensor in learner.teacher.named_parameters():
        assert torch.allclose(tensor, 0.9 * before[name] + 0.1 * student[name], atol=1e-6), name
    assert all(torch.equal(b, before[n]) for n, b in learner.teacher.named_buffers())


def test_without_ema_the_student_is_its_own_teacher():
    learner = make(small("simdino", ema=None))
    assert learner.teacher is learner.student
    step = learner(*batch(), 0.04)
    step.loss.backward()
    assert torch.isfinite(step.loss)


def test_the_teacher_has_no_stochastic_depth():
    method = small("dino")
    backbone = Backbone("vit_pico_patch8", 32, drop_path_rate=0.5)
    learner = Learner(method, Network(backbone, Projector(64, 32, 8), Prototypes(24, 8, False)))
    drops = lambda net: [m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")]
    assert max(drops(learner.student)) == 0.5 and max(drops(learner.teacher)) == 0.0


def test_masked_places_alone_carry_the_patch_term():
    method = small("ibot", patch=Patch(weight=1.0))
    learner = make(method)
    views, masks = batch()
    full = learner(views, masks, 0.04).parts["patch"]
    none = learner(views, torch.zeros_like(masks), 0.04).parts["patch"]
    assert float(none) == 0.0 and float(full) > 0


def test_a_new_method_is_a_recipe_and_nothing_else():
    """A toy nobody wrote: dot scores, no centering, entropy of the student's marginal enlarged."""
    toy = (
        METHODS["dino"]
        .but(n_prototypes=24, views=Views(2, 0), score=scores.dot, targets=(), regularizers=())
        .plus(-1.0, regularizers.mean_entropy, on="probabilities")
    )
    learner = make(toy)
    views, _ = batch()
    step = learner(views[:2], None, 0.05)
    step.loss.backward()
    assert torch.isfinite(step.loss) and "mean_entropy on probabilities" in step.parts
    assert dataclasses.replace(toy) == toy


def test_targets_use_the_center_of_the_steps_before():
    learner = make(small("dino"))
    views, _ = batch()
    first = learner(views, None, 0.04)
    second = learner(views, None, 0.04)
    assert first.loss.item() != second.loss.item()
    learner.eval()
    third, fourth = learner(views, None, 0.04), learner(views, None, 0.04)
    assert third.loss.item() == fourth.loss.item()


def test_batch_norm_in_the_projector_takes_one_masked_patch():
    learner = make(small("ibot"), batch_norm=True)
    views, masks = batch()
    masks = torch.zeros_like(masks)
    masks[0, 0, 0] = True
    assert torch.isfinite(learner(views, masks, 0.04).loss)
