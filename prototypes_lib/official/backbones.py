"""Backbones out of other people's checkpoint files: DINO, iBOT, DINOv2, MSN, SwAV, SimDINO, and timm's own.

A file is read without running it (files.foreign), names become timm's, the architecture follows from the shapes, and
every tensor must find its place: what is left over is an error, never silence.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from prototypes_lib.backbones import Backbone
from prototypes_lib.official import contents

_HEADS = {"head", "fc", "dino_head", "ibot_head", "projection_head", "prototypes", "last_layer"}
_RENAMED = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 keeps blocks in chunks, counted through
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^masked_embed$", "mask_token"),  # iBOT
)
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
_RESNETS = {
    (True, (3, 4, 6, 3)): "resnet50", (True, (3, 4, 23, 3)): "resnet101", (True, (3, 8, 36, 3)): "resnet152",
    (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34", (False, (1, 1, 1, 1)): "resnet_pico",
}  # fmt: skip


def load(
    path: str | Path, network: str = "teacher", *, name: str | None = None, interpolation: str | None = None, **options
) -> Backbone:
    """The backbone of a checkpoint file, in eval mode and float32: of the file as its authors publish it.

    Known: DINO's and iBOT's transformers and ResNets, backbones alone and full checkpoints; DINOv2's and SimDINO's,
    in chunks or not, with registers, LayerScale, SwiGLU; MSN's `target_encoder`; SwAV's ResNets; timm's .safetensors
    and .bin; our exports' backbone.safetensors. Heads and prototypes are left out, the mask token is kept.

    Args:
        network: "teacher" (MSN's target encoder) or "student", where a file holds both.
        name: a backbone's name, where the one that follows from the shapes is wrong; then only `options` are added.
        interpolation: of positions; None is "official", as DINO does it, but "antialias" for timm's files and for
            transformers with registers, whose released weights (DINOv2) are used so.
        options: of `Backbone`, over those that follow from the shapes: num_heads (else one for each 64 dimensions, 16
            for a width of 1280), drop_path_rate ...

    Differs from the official code: MSN resizes positions without DINO's 0.1, which shows at other sizes than 224 only.
    All of them normalize with ImageNet's mean and std, SwAV with 0.228 in place of 0.229.

    Raises FileNotFoundError without that file, ValueError, one line, for one that is damaged or asks to run something,
    that holds no such backbone or not this network, and for tensors that are left over, missing or of another shape.
    """
    path = Path(path)
    if network not in contents.NETWORKS:
        raise ValueError(f"network={network!r}: choose 'teacher' or 'student'")
    tensors = _backbone_of(contents.choose(path, contents.networks(path, contents.read(path)), network), path)
    mask_token = tensors.pop("mask_token", None)
    try:
        if "register_tokens" in tensors:
            tensors |= _timms_registers(tensors.pop("register_tokens"), tensors)
        found, size, shaped = _architecture(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if interpolation is None:
        smooth = "reg_token" in tensors or path.suffix in (".safetensors", ".bin")
        interpolation = "antialias" if smooth else "official"
    if not (name or found):
        raise ValueError(f"{path} is a ResNet, with stages of other numbers of blocks than we know; give its name=")
    options = options if name else shaped | options
    if "num_heads" in shaped and options.get("num_heads", 1) is None:
        raise ValueError(f"{path}: into how many heads {shaped['embed_dim']} is cut is not in it; give num_heads=")
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        backbone = Backbone(name or found, size, interpolation=interpolation, **options)
    _fill(backbone, tensors, path)
    if mask_token is not None and backbone.mask_token is not None:
        if mask_token.numel() != backbone.dim:
            raise ValueError(f"{path}: mask_token of {mask_token.numel()} entries does not fit {backbone.dim}")
        backbone.mask_token.data.copy_(mask_token.reshape(1, -1))
    return backbone.eval()


def _backbone_of(bare: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The backbone's tensors in float32 under timm's names, heads left out."""
    inner = [name for name in bare if name.startswith("backbone.")]
    if inner:
        extra = [name for name in bare if not name.startswith("backbone.") and name.split(".")[0] not in _HEADS]
        if extra:
            raise ValueError(f"{path} holds {contents.some(extra)} beside its backbone, which no known checkpoint does")
        bare = {name.removeprefix("backbone."): bare[name] for name in inner}
    if any(name.startswith("embeddings.") for name in bare):
        raise ValueError(f"{path} has the names of the transformers package; take the authors' own file or timm's")
    found = {}
    for name, x in bare.items():
        if name.split(".")[0] not in _HEADS:
            for old, new in _RENAMED:
                name = re.sub(old, new, name)
            found[name] = x.float() if x.is_floating_point() else x
    return found


def _timms_registers(registers: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's registers, put between class token and patches once these have their positions, as timm has them."""
    token, positions = _shape(tensors, "cls_token", 3), _shape(tensors, "pos_embed", 3)
    if token[2] != positions[2]:
        raise ValueError(f"cls_token {token} and pos_embed {positions} are of different width")
    cls_token = tensors["cls_token"] + tensors["pos_embed"][:, :1]
    return {"reg_token": registers, "cls_token": cls_token, "pos_embed": tensors["pos_embed"][:, 1:]}


def _architecture(tensors: Mapping[str, Tensor]) -> tuple[str, int, dict[str, Any]]:
    """Name ("" where it does not follow), image size and options of the backbone that these tensors are of."""
    if "cls_token" in tensors and "pos_embed" in tensors:
        return _transformer(tensors)
    stages = [{n.split(".")[1] for n in tensors if n.startswith(f"layer{i}.")} for i in range(1, 5)]
    if not all(stages):
        if not tensors:
            raise ValueError("it holds heads alone, no backbone that images could be seen through")
        held = contents.some(tensors)
        raise ValueError(f"no vision transformer with a class token and no ResNet is in it; it holds {held}")
    kind = ("layer1.0.conv3.weight" in tensors, tuple(map(len, stages)))
    return _RESNETS.get(kind, ""), 32 if kind[1] == (1, 1, 1, 1) else 224, {}


def _transformer(tensors: Mapping[str, Tensor]) -> tuple[str, int, dict[str, Any]]:
    indices = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    dim, positions = _shape(tensors, "cls_token", 3)[2], _shape(tensors, "pos_embed", 3)[1]
    for i in indices:  # before anything of that size is made
        if _shape(tensors, f"blocks.{i}.attn.qkv.weight", 2) != (3 * dim, dim):
            raise ValueError(f"block {i} is not one of a plain transformer of width {dim}")
    hidden, fed = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0], _shape(tensors, "blocks.0.mlp.fc2.weight", 2)[1]
    patch = _shape(tensors, "patch_embed.proj.weight", 4)[3]
    prefix = 1 + (_shape(tensors, "reg_token", 3)[1] if "reg_token" in tensors else 0)
    alone = math.isqrt(positions) ** 2 == positions  # positions of patches only
    side = math.isqrt(positions if alone else max(0, positions - prefix))
    if not alone and side**2 + prefix != positions:
        raise ValueError(f"{positions} positions are no square grid of patches and {prefix} tokens before them")
    shaped = {
        "embed_dim": dim,
        "depth": len(indices),
        "num_heads": 16 if dim == 1280 else None if dim % 64 else dim // 64,
        "mlp_ratio": hidden / dim if hidden % dim == 0 else (hidden + 0.5) / dim,  # rounded down again by timm
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "reg_tokens": prefix - 1,
        "no_embed_class": alone,
        "weight_init": "skip",
    }
    if hidden == 2 * fed:
        shaped |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if "patch_embed.conv.weight" in tensors:  # ours for a CPU, whose patches begin with a convolution of stride 2
        name = "vit_pico_patch8" if dim == 64 else "vit_nano_patch8"
        return name, side * 2 * patch, shaped | {"patch_size": 2 * patch, "num_heads": 4}
    width = _WIDTHS.get(dim, "base")
    scaled = shaped["init_values"] is not None  # timm drops a None, so the name must not bring LayerScale along
    names = [f"vit_{width}_patch{patch}_{'dinov2' if scaled else 224}", f"vit_{width}_patch16_224"]
    name = next((n for n in names if timm.is_model(n)), "vit_base_patch16_224")  # all that counts is in the options
    return name, side * patch, shaped | {"patch_size": patch}


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{name} is missing; it holds {contents.some(tensors)}")
    if tensors[name].ndim != ndim or not tensors[name].numel():
        raise ValueError(f"{name} of shape {tuple(tensors[name].shape)} is not a plain vision transformer's")
    return tuple(tensors[name].shape)


def _fill(backbone: Backbone, tensors: Mapping[str, Tensor], path: Path) -> None:
    network = next(backbone.children())  # vit or cnn
    wanted = network.state_dict()
    if extra := [name for name in tensors if name not in wanted]:
        raise ValueError(f"{path}: {contents.some(extra)} have no place in {backbone.name}; is that its name=?")
    if missing := [n for n in wanted if n not in tensors and not n.endswith("num_batches_tracked")]:
        raise ValueError(f"{path}: {contents.some(missing)} of {backbone.name} are missing; is that its name=?")
    for name, x in tensors.items():
        if x.shape != wanted[name].shape:
            here, there = tuple(x.shape), tuple(wanted[name].shape)
            raise ValueError(f"{path}: {name} is {here}, {backbone.name} has {there}; is that its name=?")
    network.load_state_dict(tensors, strict=False)  # all are there but, in old files, a ResNet's count of batches
