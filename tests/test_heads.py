import pytest
import torch
import torch.nn.functional as F

from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.precision import directions


def test_codes_are_unit_and_float32_under_autocast():
    projector = Projector(12, 32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = projector(torch.randn(5, 12))
    assert y.dtype == torch.float32
    assert torch.allclose(y.norm(dim=-1), torch.ones(5), atol=1e-5)


def test_projector_has_dinos_layers():
    names = [type(m).__name__ for m in Projector(12, 32, 8).mlp]
    assert names == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    names = [type(m).__name__ for m in Projector(12, 32, 8, batch_norm=True).mlp]
    assert names == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]


def test_prototypes_are_a_length_times_a_direction():
    p = Prototypes(6, 4, free_norms=True)
    assert torch.allclose(p.w.norm(dim=-1), torch.ones(6), atol=1e-6)
    with torch.no_grad():
        p.weight_g.mul_(3.0)
    assert torch.allclose(p.w, 3 * F.normalize(p.weight_v, dim=-1), atol=1e-6)
    old = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 6, bias=False), dim=0)
    old.parametrizations.weight.original0.data, old.parametrizations.weight.original1.data = (
        p.weight_g.data, p.weight_v.data,
    )  # fmt: skip
    assert torch.allclose(old.weight, p.w, atol=1e-6)


def test_unit_prototypes_do_not_train_their_length():
    assert not Prototypes(6, 4, free_norms=False).weight_g.requires_grad


def test_an_impossible_projector_is_refused():
    with pytest.raises(ValueError, match="does not exist"):
        Projector(4, 8, 1)


def test_plain_prototypes_are_their_vectors_and_renormalize_makes_them_unit():
    p = Prototypes(6, 4, free_norms=True, plain=True)
    assert p.w is p.weight_v and not p.weight_g.requires_grad
    assert torch.allclose(p.w.norm(dim=-1), torch.ones(6), atol=1e-6), "unit from the start"
    with torch.no_grad():
        p.weight_v.mul_(torch.arange(1.0, 7)[:, None])
    before = p.weight_v.detach().clone()
    p.renormalize()
    assert torch.allclose(p.w, before / torch.arange(1.0, 7)[:, None], atol=1e-6)


def test_plain_prototypes_keep_the_part_of_the_gradient_along_them():
    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    along = {}
    for plain in (True, False):
        p = Prototypes(6, 4, free_norms=False, plain=plain)
        (F.linear(y, p.w) ** 2).sum().backward()
        w, g = p.weight_v.detach(), p.weight_v.grad
        along[plain] = float((w * g).sum(-1).abs().max() / g.abs().max())
    assert along[True] > 1e-2 and along[False] < 1e-5


def test_renormalizing_leaves_weight_normalized_prototypes_alone():
    p = Prototypes(6, 4, free_norms=True)
    with torch.no_grad():
        p.weight_v.mul_(3.0)
    before = p.weight_v.detach().clone()
    p.renormalize()
    assert torch.equal(p.weight_v, before)


def test_a_projector_of_two_layers_with_relu_is_swavs():
    names = [type(m).__name__ for m in Projector(12, 32, 8, layers=2, batch_norm=True, activation="relu").mlp]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def plain_directions(x):
    """x / |x| by torch's own operations, differentiable as often as one likes."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    return F.normalize(x / torch.where(largest > 0, largest, torch.inf), dim=-1)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_directions_and_their_gradients_at_any_length(scale):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(50, 7, generator=generator) * scale, torch.randn(50, 7, generator=generator)
    x[3] = 0
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = directions(ours), plain_directions(theirs)
    y.backward(grad)
    expected.backward(grad.double())
    assert torch.allclose(y.double(), expected, atol=1e-6)
    assert torch.allclose(ours.grad.double() * scale, theirs.grad * scale, rtol=1e-4, atol=1e-5)
    assert not y[3].any() and not ours.grad[3].any()


def test_directions_can_be_differentiated_twice_and_mapped():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(directions, x) and torch.autograd.gradgradcheck(directions, x)
    value = lambda x: (directions(x) * torch.arange(5)).sin().sum()
    mapped = lambda x: (torch.vmap(directions)(x) * torch.arange(5)).sin().sum()
    (expected,) = torch.autograd.grad(value(x), x)
    assert torch.allclose(torch.autograd.grad(mapped(x), x)[0], expected)
    assert torch.allclose(torch.func.grad(value)(x), expected)


def test_directions_keep_nothing_for_the_backward_pass_but_the_result():
    x, kept = torch.randn(64, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = directions(x)
    assert sorted(t.numel() for t in kept) == [64, 64 * 16]
    assert y.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in kept}
