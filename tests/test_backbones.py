import pytest
import timm
import torch
import torch.nn.functional as F

from prototypes_lib.backbones import Backbone


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"init_values": 1e-5}, {"class_token": True, "depth": 3}])
def test_features_equal_timms_own_forward_at_any_size(options):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2} | options
    backbone = Backbone("vit_tiny_patch16_224", 64, **small).eval()
    for size in (64, 32, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            cls, patches = backbone(x)
            own = backbone.vit.forward_features(x)
        assert torch.allclose(cls, own[:, 0], atol=1e-6)
        assert torch.allclose(patches, own[:, backbone.vit.num_prefix_tokens :], atol=1e-6)


def test_weights_come_out_with_timms_names():
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, embed_dim=32, depth=2, num_heads=2)
    theirs.load_state_dict(backbone.vit.state_dict())


def test_a_masked_patch_is_not_seen():
    torch.manual_seed(0)
    backbone = Backbone("vit_pico_patch8", 32).eval()
    x = torch.randn(1, 3, 32, 32)
    # the 3 x 3 stem reaches one pixel into the neighbor, so change the inside of the masked patch only
    changed = x.clone()
    changed[:, :, 2:6, 2:6] += 10.0
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    with torch.no_grad():
        assert not torch.allclose(backbone(x)[0], backbone(changed)[0], atol=1e-3)
        backbone.vit.patch_embed.norm = torch.nn.Identity()  # a norm over the image would tell the others
        assert torch.allclose(backbone(x, mask)[0], backbone(changed, mask)[0], atol=1e-6)
        assert not torch.allclose(backbone(x, mask)[0], backbone(x)[0], atol=1e-4)


def test_official_positions_are_dinos_interpolation():
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", 224, interpolation="official", embed_dim=32, depth=1, num_heads=2)
    grid = backbone.vit.pos_embed[:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(6.1 / 14, 6.1 / 14), mode="bicubic")
    assert expected.shape[-2:] == (6, 6)
    assert torch.allclose(backbone._positions((6, 6)), expected.flatten(2).mT, atol=1e-7)
    plain = Backbone("vit_tiny_patch16_224", 224, embed_dim=32, depth=1, num_heads=2)
    plain.load_state_dict(backbone.state_dict())
    assert not torch.allclose(plain._positions((6, 6)), backbone._positions((6, 6)), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Backbone("vit_pico_patch8", 30), "multiple"),
        (lambda: Backbone("resnet50", 224), "vit_"),
        (lambda: Backbone("vit_nothing", 224), "vit_nothing"),
        (lambda: Backbone("vit_pico_patch8", 32, interpolation="bilinear"), "interpolation"),
    ],
)
def test_a_wrong_request_names_itself(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"])
def test_transformers_of_another_build_are_refused(name):
    with pytest.raises(ValueError, match="plain transformers"):
        Backbone(name, 64)


def test_the_residual_stream_stays_float32_under_autocast():
    backbone = Backbone("vit_tiny_patch16_224", 64, embed_dim=32, depth=2, num_heads=2).eval()
    seen = []
    backbone.vit.blocks[1].register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 64, 64))
    assert seen == [torch.float32]
