"""Checkpoint files in the layouts of DINO, iBOT, DINOv2, MSN, SwAV and timm: their features, or one clear line."""

import argparse

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prototypes_lib import checkpoints, official
from prototypes_lib.backbones import Backbone
from prototypes_lib.files import storage


def small(**options):
    """A transformer of 128 dimensions, 4 blocks and 2 heads, none of whose weights is as it was initialized."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2, "num_classes": 0}
    vit = VisionTransformer(**(shape | options)).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else 0.05)
    return vit


def prefixed(weights, prefix):
    return {prefix + name: x.clone() for name, x in weights.items()}


def head(prefix="head."):
    return {prefix + "mlp.0.weight": torch.ones(3, 3), prefix + "last_layer.weight_v": torch.ones(5, 3)}


def resnet():
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=0).eval()
    for name, x in net.state_dict().items():
        x.copy_(torch.rand_like(x) + 0.5 if "running_var" in name else x) if x.is_floating_point() else None
    return net


@torch.no_grad()
def same(backbone, reference, size=32):
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = backbone(x)[0]
    return not backbone.training and torch.allclose(found, reference(x), atol=1e-5, rtol=1e-5) and found.std() > 0.1


VIT = small()
PLAIN = VIT.state_dict()
OTHER = {name: x + 1 for name, x in PLAIN.items()}
SETTINGS = argparse.Namespace(arch="vit_small", lr=0.1)
CHUNKED = {
    (f"blocks.{int(n.split('.')[1]) // 2}.{n.removeprefix('blocks.')}" if n.startswith("blocks.") else n): x
    for n, x in PLAIN.items()
}
FILES = {
    "DINO, backbone alone": ("dino_pretrain.pth", PLAIN),
    "DINO, full": (
        "checkpoint.pth",
        {
            "student": prefixed(OTHER, "module.backbone.") | head("module.head."),
            "teacher": prefixed(PLAIN, "backbone.") | head(),
            "optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "args": SETTINGS,
            "dino_loss": {"center": torch.zeros(1, 5)},
        },
    ),
    "DINO, compiled, teacher with module.": (
        "x.pth", {"teacher": prefixed(PLAIN, "module._orig_mod.backbone.") | head("module._orig_mod.head.")},
    ),
    "iBOT, teacher alone": ("checkpoint_teacher.pth", {"state_dict": PLAIN}),
    "iBOT, full": (
        "checkpoint.pth",
        {
            "student": prefixed(OTHER | {"masked_embed": torch.ones(1, 128)}, "module.backbone.")
            | head("module.head.") | {"module.head.last_layer2.weight_v": torch.ones(5, 3)},
            "teacher": prefixed(PLAIN, "backbone.") | head() | {"head.last_layer2.weight_v": torch.ones(5, 3)},
            "args": SETTINGS,
        },
    ),
    "MSN": (
        "vits16_800ep.pth.tar",
        {
            "target_encoder": prefixed(PLAIN, "module.") | {"module.fc.fc1.weight": torch.ones(2, 2)},
            "encoder": prefixed(OTHER, "module."), "prototypes": torch.ones(10, 4),
        },
    ),
    "DINOv2, in chunks": (
        "teacher_checkpoint.pth",
        {
            "teacher": prefixed(CHUNKED | {"mask_token": torch.full((1, 128), 2.0)}, "backbone.")
            | head("dino_head.") | head("ibot_head.")
        },
    ),
    "timm, bin": ("pytorch_model.bin", PLAIN | {"head.weight": torch.ones(3, 128), "head.bias": torch.ones(3)}),
    "half precision": ("x.pth", {name: x.double() for name, x in PLAIN.items()}),
}  # fmt: skip


@pytest.mark.parametrize("layout", FILES)
def test_a_transformer_of_every_layout_has_the_features_of_timms(layout, tmp_path):
    name, content = FILES[layout]
    torch.save(content, tmp_path / name)
    backbone = checkpoints.load_backbone(tmp_path / name)
    assert same(backbone, VIT)
    assert backbone.interpolation == ("antialias" if layout == "timm, bin" else "official")
    assert (backbone.patch_size, backbone.dim, backbone.n_layers) == (8, 128, 4)
    assert torch.equal(backbone.mask_token, torch.full((1, 128), 2.0 if "DINOv2" in layout else 0.0))


@pytest.mark.parametrize("layout", ["DINO, full", "iBOT, full", "MSN"])
def test_the_student_is_loaded_where_it_is_asked_for(layout, tmp_path):
    name, content = FILES[layout]
    torch.save(content, tmp_path / name)
    student = official.load(tmp_path / name, "student")
    assert all(torch.equal(x, OTHER[name]) for name, x in student.vit.state_dict().items())
    assert bool(student.mask_token.any()) == ("iBOT" in layout)


def test_timms_safetensors_are_loaded_and_smoothed_as_timm_does_it(tmp_path):
    vit = small(dynamic_img_size=True, reg_tokens=2, no_embed_class=True, init_values=0.1)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    assert same(official.load(tmp_path / "model.safetensors"), vit, 48)
    vit = small(dynamic_img_size=True, reg_tokens=4, img_size=64)  # positions of registers, too
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    assert same(official.load(tmp_path / "model.safetensors"), vit, 48)


@torch.no_grad()
def dinov2s(plain, registers):
    """What DINOv2 does: positions are added to class token and patches, then registers go between the two."""

    def forward(x):
        side = plain.pos_embed.shape[1] - 1
        patches = F.conv2d(x, plain.patch_embed.proj.weight, plain.patch_embed.proj.bias, stride=8).flatten(2).mT
        assert patches.shape[1] == side
        tokens = torch.cat([plain.cls_token.expand(len(x), -1, -1), patches], 1) + plain.pos_embed
        tokens = torch.cat([tokens[:, :1], registers.expand(len(x), -1, -1), tokens[:, 1:]], 1)
        return plain.norm(plain.blocks(tokens))[:, 0]

    return forward


@pytest.mark.parametrize("chunks", [False, True])
def test_registers_of_dinov2_have_no_position(chunks, tmp_path):
    plain = small(init_values=0.5)
    registers = torch.randn(1, 4, 128)
    weights = plain.state_dict() | {"register_tokens": registers, "mask_token": torch.zeros(1, 128)}
    if chunks:
        weights = {n.replace("blocks.", f"blocks.{int(n.split('.')[1]) // 2}.") if "blocks." in n else n: x
                   for n, x in weights.items()}  # fmt: skip
    torch.save(weights, tmp_path / "dinov2_reg4_pretrain.pth")
    backbone = official.load(tmp_path / "dinov2_reg4_pretrain.pth")
    assert same(backbone, dinov2s(plain, registers))
    assert backbone.interpolation == "antialias" and backbone.vit.num_prefix_tokens == 5
    assert not same(backbone, plain)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def test_the_gated_mlp_of_dinov2s_giant_is_recognized(tmp_path):
    vit = small(init_values=0.5, depth=2)
    for block in vit.blocks:
        block.mlp = SwiGLU(128, 344)  # 2 / 3 of 4 * 128, up to a multiple of 8
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    assert same(official.load(tmp_path / "x.pth"), vit)


def test_positions_for_other_sizes_are_dinos(tmp_path):
    vit = small(img_size=64)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    backbone = official.load(tmp_path / "x.pth")
    image = vit.pos_embed[:, 1:].reshape(1, 8, 8, 128).permute(0, 3, 1, 2)
    image = F.interpolate(image, scale_factor=(4.1 / 8, 4.1 / 8), mode="bicubic")
    resized = small()
    resized.load_state_dict(vit.state_dict() | {"pos_embed": torch.cat([vit.pos_embed[:, :1], image.flatten(2).mT], 1)})
    assert same(backbone, resized) and same(backbone, vit, 64)
    assert not same(official.load(tmp_path / "x.pth", interpolation="antialias"), resized)


@pytest.mark.slow
def test_resnets_of_dino_and_swav_have_the_features_of_timms(tmp_path):
    net = resnet()
    weights = net.state_dict()
    swav = prefixed(weights, "module.") | {"module.projection_head.0.weight": torch.ones(3, 512)}
    swav |= {"module.prototypes.weight": torch.ones(4, 3)}
    old = {name: x for name, x in weights.items() if "num_batches_tracked" not in name}
    for content in (old, {"state_dict": swav}, {"teacher": prefixed(weights, "backbone.") | head()}):
        torch.save(content, tmp_path / "x.pth")
        backbone = official.load(tmp_path / "x.pth")
        assert backbone.name == "resnet18" and same(backbone, net)


@pytest.mark.slow
def test_resnet_50_is_recognized(tmp_path):
    net = timm.create_model("resnet50", num_classes=10)
    torch.save({name: x for name, x in net.state_dict().items()}, tmp_path / "x.pth")
    assert official.load(tmp_path / "x.pth").name == "resnet50"


def test_another_resnet_is_loaded_by_its_name(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("resnet14t", num_classes=0, zero_init_last=False).eval()
    torch.save(net.state_dict(), tmp_path / "x.pth")
    assert same(official.load(tmp_path / "x.pth", name="resnet14t"), net, 64)


@pytest.mark.parametrize(
    ("name", "options"), [("vit_pico_patch8", {}), ("vit_nano_patch8", {"reg_tokens": 4}), ("resnet_pico", {})]
)
def test_our_exports_weights_are_enough(name, options, tmp_path):
    torch.manual_seed(0)
    backbone = Backbone(name, 32, **options).eval()
    save_file(next(backbone.children()).state_dict(), tmp_path / "backbone.safetensors")
    loaded = official.load(tmp_path / "backbone.safetensors")
    assert loaded.name == name
    for size in (32, 16):
        assert same(loaded, lambda x: backbone(x)[0], size)


def test_an_exports_file_is_its_export(tmp_path):
    torch.manual_seed(0)
    backbone = Backbone("vit_pico_patch8", 32, num_heads=2).eval()
    about = {"run": {"backbone": "vit_pico_patch8", "image_size": 32, "backbone_options": {"num_heads": 2}}}
    tensors = {"backbone.safetensors": backbone.vit.state_dict(), "head.safetensors": {"x": torch.ones(2)}}
    storage.write_folder(tmp_path / "export", tensors, {"about.json": about})
    for path in (tmp_path / "export", tmp_path / "export" / "backbone.safetensors"):
        assert same(checkpoints.load_backbone(path), lambda x: backbone(x)[0])
    with pytest.raises(ValueError, match="teacher only"):
        checkpoints.load_backbone(tmp_path / "export" / "backbone.safetensors", "student")
    with pytest.raises(ValueError, match="no vision transformer"):
        checkpoints.load_backbone(tmp_path / "export" / "head.safetensors")


def test_names_of_published_architectures_follow_from_the_shapes(tmp_path):
    wanted = {
        (384, 16, None): "vit_small_patch16_224",
        (384, 8, None): "vit_small_patch8_224",
        (384, 14, 1.0): "vit_small_patch14_dinov2",
        (384, 14, None): "vit_small_patch16_224",
        (192, 16, 1.0): "vit_tiny_patch16_224",
    }
    for (dim, patch, scale), name in wanted.items():
        shape = {"img_size": 2 * patch, "patch_size": patch, "embed_dim": dim, "depth": 1, "num_heads": dim // 64}
        vit = VisionTransformer(**shape, init_values=scale)
        torch.save(vit.state_dict(), tmp_path / "x.pth")
        backbone = official.load(tmp_path / "x.pth", drop_path_rate=0.1)
        assert backbone.name == name and backbone.vit.blocks[0].attn.num_heads == dim // 64
    short = official.load(tmp_path / "x.pth", name="vit_tiny_patch16_224", depth=1, init_values=1.0)
    assert short.name == "vit_tiny_patch16_224" and short.n_layers == 1


def test_heads_that_shapes_do_not_tell_must_be_given(tmp_path):
    vit = small(embed_dim=96, num_heads=3)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="num_heads="):
        official.load(tmp_path / "x.pth")
    assert same(official.load(tmp_path / "x.pth", num_heads=3), vit)


def without(*names):
    return {name: x for name, x in PLAIN.items() if name not in names}


WRONG = {
    "a name too many": (PLAIN | {"blocks.0.attn.q_bias": torch.ones(3)}, r"1 tensors \(blocks\.0\.attn\.q_bias\) have"),
    "a name too few": (without("blocks.2.norm1.bias"), r"blocks\.2\.norm1\.bias.* missing"),
    "a block without attention": (without("blocks.1.attn.qkv.weight"), r"blocks\.1\.attn\.qkv\.weight is missing"),
    "another shape": (PLAIN | {"norm.bias": torch.ones(5)}, r"norm\.bias is \(5,\)"),
    "another width": (PLAIN | {"cls_token": torch.ones(1, 1, 5000)}, "plain transformer of width 5000"),
    "registers of another width": (PLAIN | {"register_tokens": torch.ones(1, 4, 7)}, r"reg_token is \(1, 4, 7\)"),
    "positions of another width": (
        PLAIN | {"register_tokens": torch.ones(1, 4, 128), "pos_embed": torch.ones(1, 17, 9)}, "different width",
    ),
    "no square": (PLAIN | {"pos_embed": torch.ones(1, 19, 128)}, "19 positions"),
    "empty tensors": (PLAIN | {"cls_token": torch.ones(1, 1, 0)}, "cls_token of shape"),
    "one FSDP share": ({"teacher": {"backbone._fsdp_wrapped_module._flat_param": torch.ones(9)}}, "FSDP"),
    "heads only": ({"teacher": head("dino_head.")}, "heads alone, no backbone"),
    "another package": ({"embeddings.cls_token": torch.ones(1, 1, 8)}, "transformers package"),
    "more than a backbone": (prefixed(PLAIN, "backbone.") | {"neck.w": torch.ones(2)}, r"neck\.w"),
    "no tensors": ({"epoch": 3, "args": SETTINGS}, r"no tensors .*\(epoch, args\)"),
    "no student": ({"teacher": PLAIN}, "no student"),
    "a student only": ({"student": PLAIN}, "no teacher, only the student"),
    "another ResNet": ({f"layer{i}.{j}.conv1.weight": torch.ones(1) for i in (1, 2, 3, 4) for j in "012"}, "name="),
    "a list": ([torch.ones(3)], "not a dictionary"),
    "in itself": ({"model": {"model": {"model": {"model": {"model": {}}}}}}, "no tensors"),
    "a mask token of another width": (PLAIN | {"mask_token": torch.ones(1, 9)}, "mask_token"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line_with_its_name(case, tmp_path):
    content, says = WRONG[case]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=says) as caught:
        official.load(tmp_path / "x.pth", "student" if case == "no student" else "teacher")
    assert "\n" not in str(caught.value) and "x.pth" in str(caught.value)


def test_damaged_and_missing_files_are_one_line(tmp_path):
    torch.save(PLAIN, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint", whole[:100]):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pth") as caught:
            checkpoints.load_backbone(tmp_path / "x.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        official.load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="teacher"):
        official.load(tmp_path / "x.pth", "mother")


def test_loading_draws_no_random_numbers_of_others(tmp_path):
    torch.save(PLAIN, tmp_path / "x.pth")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    official.load(tmp_path / "x.pth")
    assert torch.equal(torch.rand(3), wanted)
