"""Groups, factors, updates and clipping, each against a loop over parameters."""

import pytest
import torch
from torch import nn

from prototypes_lib.backbones import Backbone
from prototypes_lib.methods import METHODS
from prototypes_lib.optimizers import clip_gradients, make_optimizer
from prototypes_lib.settings import Run
from prototypes_lib.train import build


class Student(nn.Module):
    """A network's names with two heads, and nothing behind them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.projector, self.prototypes = nn.Linear(4, 3), nn.Linear(3, 7, bias=False)
        self.patch_projector, self.patch_prototypes = nn.Linear(4, 3), nn.Linear(3, 6, bias=False)


def student(scale: float = 1.0) -> Student:
    """One with random parameters and gradients, the larger ones beyond a norm of 3 for scale 1."""
    generator = torch.Generator().manual_seed(0)
    made = Student()
    for i, parameter in enumerate(made.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.grad = scale * (0.2 + i % 3) * torch.randn(parameter.shape, generator=generator)
    return made


def by_name(network: nn.Module, run: Run, *keys: str) -> dict[str, tuple]:
    names = {p: n for n, p in network.named_parameters()}
    groups = make_optimizer(network, run).param_groups
    return {names[p]: tuple(group[key] for key in keys) for group in groups for p in group["params"]}


def test_groups_are_dinos():
    settings = Run.small(prototype_lr_factor=7.0)
    groups = by_name(build(METHODS["dino-vmf"], settings).student, settings, "lr_factor", "decays", "prototypes")
    assert groups["backbone.vit.cls_token"] == (1, 1, False) and groups["backbone.vit.pos_embed"] == (1, 1, False)
    assert groups["backbone.vit.norm.weight"] == (1, 0, False) and groups["projector.mlp.0.bias"] == (1, 0, False)
    assert groups["prototypes.weight_g"] == (7, 1, True) and groups["prototypes.weight_v"] == (7, 1, True)


def test_every_trained_parameter_is_in_one_group_and_no_other():
    settings = Run.small(layer_decay=0.9, patch_embed_lr=0.2, prototype_weight_decay=0.0)
    for name in ("dino", "dino-vmf", "ibot", "simdino"):
        network = build(METHODS[name], settings).student
        grouped = [p for group in make_optimizer(network, settings).param_groups for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def test_prototypes_of_both_heads_have_a_decay_and_a_rate_of_their_own():
    groups = by_name(student(), Run(prototype_weight_decay=0.0, prototype_lr_factor=3.0), "lr_factor", "decays")
    assert groups["prototypes.weight"] == groups["patch_prototypes.weight"] == (3, 0)
    assert groups["projector.weight"] == groups["patch_projector.weight"] == groups["backbone.0.weight"] == (1, 1)
    assert groups["backbone.1.weight"] == groups["projector.bias"] == (1, 0)


def test_layer_decay_falls_from_the_heads_to_the_patch_embedding():
    network = Student()
    network.backbone = Backbone("vit_pico_patch8", 32)  # two blocks: layers 0 to 3
    found = {name: factor for name, (factor,) in by_name(
        network, Run(layer_decay=0.5, patch_embed_lr=0.2), "lr_factor"
    ).items()}  # fmt: skip
    expected = {
        "backbone.vit.patch_embed.proj.weight": 0.025, "backbone.vit.patch_embed.conv.bias": 0.025,
        "backbone.vit.cls_token": 0.125, "backbone.vit.pos_embed": 0.125, "backbone.mask_token": 0.125,
        "backbone.vit.blocks.0.attn.qkv.weight": 0.25, "backbone.vit.blocks.1.mlp.fc1.bias": 0.5,
        "backbone.vit.norm.weight": 1.0, "projector.weight": 1.0, "prototypes.weight": 1.0,
        "patch_projector.bias": 1.0, "patch_prototypes.weight": 1.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_larc_is_sgd_with_momentum_at_a_rate_of_its_own_for_every_tensor():
    network, lr, decay = student(), 0.7, 0.05
    optimizer = make_optimizer(network, Run(optimizer="larc"))
    p = {n: x.detach().clone().double() for n, x in network.named_parameters()}
    velocity = {n: torch.zeros_like(x) for n, x in p.items()}
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay * group["decays"]
        optimizer.step()
        for n, x in network.named_parameters():
            g = x.grad.double()
            local = 0.001 * p[n].norm() / (g.norm() + decay * p[n].norm() + 1e-8)
            velocity[n] = 0.9 * velocity[n] + local * (g + decay * p[n])
            p[n] -= lr * velocity[n]
            assert torch.allclose(x.double(), p[n], rtol=1e-6, atol=1e-7), n


def test_lars_leaves_vectors_to_plain_sgd_and_adapts_the_rest_with_or_without_decay():
    network, lr = student(), 0.7
    start = {n: x.detach().clone() for n, x in network.named_parameters()}
    optimizer = make_optimizer(network, Run(optimizer="lars", prototype_weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, 0.05 * group["decays"]
    optimizer.step()
    for n, x in network.named_parameters():
        update = x.grad
        if x.ndim > 1:
            decay = 0.0 if "prototypes" in n else 0.05
            local = 0.001 * start[n].norm() / (x.grad.norm() + decay * start[n].norm())
            update = local * (x.grad + decay * start[n])
        assert torch.allclose(x, start[n] - lr * update, rtol=1e-5, atol=1e-6), n


def norm(tensors) -> float:
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def test_tensors_are_clipped_one_by_one_and_short_ones_left_alone():
    network, before = student(), student()
    clip_gradients(network, Run(clip_grad=3.0))
    pairs = [(x.grad, y.grad) for x, y in zip(network.parameters(), before.parameters(), strict=True)]
    assert 0 < sum(norm([y]) > 3 for _, y in pairs) < len(pairs)
    for x, y in pairs:
        assert torch.allclose(x, y * min(1.0, 3 / (norm([y]) + 1e-6)), rtol=1e-6)
        assert norm([y]) > 3 or torch.equal(x, y)


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("clip", ["module", "global"])
def test_modules_and_networks_are_clipped_as_pytorch_does(clip, scale):
    network, other = student(scale), student(scale)
    clip_gradients(network, Run(clip=clip, clip_grad=0.5))
    parts = [[other]] if clip == "global" else [
        [other.backbone], [other.projector, other.prototypes], [other.patch_projector, other.patch_prototypes],
    ]  # fmt: skip
    for part in parts:
        nn.utils.clip_grad_norm_([p for module in part for p in module.parameters()], 0.5)
    for x, y in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(x.grad, y.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", ["tensor", "module", "global"])
def test_prototypes_left_out_of_clipping_keep_their_gradient_and_count_in_no_norm(clip):
    network, before, without = student(), student(), student()
    without.prototypes.weight.grad = without.patch_prototypes.weight.grad = None
    run = Run(clip=clip, clip_grad=0.5)
    clip_gradients(network, run.but(clip_prototypes=False))
    clip_gradients(without, run)
    assert torch.equal(network.prototypes.weight.grad, before.prototypes.weight.grad)
    assert torch.equal(network.patch_prototypes.weight.grad, before.patch_prototypes.weight.grad)
    for x, y in zip(network.parameters(), without.parameters(), strict=True):
        assert y.grad is None or torch.equal(x.grad, y.grad)


def test_no_norm_means_no_clipping():
    network, before = student(1e6), student(1e6)
    clip_gradients(network, Run(clip_grad=0.0))
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(network.parameters(), before.parameters(), strict=True))
