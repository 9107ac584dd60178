import pytest
import torch
import torch.nn.functional as F

from prototypes_lib.heads import Projector, Prototypes


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
