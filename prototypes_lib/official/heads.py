"""Prototypes out of other people's checkpoint files: DINO, iBOT, DINOv2, Web-SSL, MSN, SwAV, lightly's DINO.

A file is read without running it (files.foreign), and every set of prototypes in it is found by name and told: whose
it is, of what, how it was stored, and how its method compares it with a code. K and the dimension follow from shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prototypes_lib.official import contents
from prototypes_lib.precision import directions

# whose layer of prototypes -> of what; lightly's names say the network, too
_OWNERS = {"": "crops", "head": "crops", "dino_head": "crops", "ibot_head": "patches", "patch": "patches",
           "teacher_head": "crops", "student_head": "crops"}  # fmt: skip
_LAYER = re.compile(
    r"(?:(?P<owner>.*)[._])?(?P<layer>last_layer2?|prototypes(?:\.prototypes\d+)?)"
    r"(?:\.(?P<part>weight|weight_g|weight_v|parametrizations\.weight\.original[01]))?"
)
_PARTS = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
_ROWS = 8192
_FULL = (
    "take the full checkpoint (DINO: *_full_checkpoint.pth; iBOT: checkpoint.pth; DINOv2 and Web-SSL: "
    "teacher_checkpoint.pth or *_ssl_heads.pth)"
)


@dataclass(frozen=True)
class Found:
    """A set of prototypes in a file.

    w: as the model's scores use it, float32, not normalized (g v / |v| where length and direction are stored apart).
    network: "teacher" or "student". of: "crops", "patches", or "head 0", "head 1" ... (SwAV with several).
    layout: whose file it is, in words. tensor, dtype: name (without wrappers' "module.") and type as stored. score:
    "cosine" where the method sets prototypes to unit length before it compares them, else "dot". notes: what else
    there is to know.
    """

    w: Float[Tensor, "k dim"]
    network: str
    of: str
    layout: str
    tensor: str
    dtype: str
    score: str
    notes: tuple[str, ...] = ()


def prototypes(path: str | Path, network: str | None = None) -> tuple[Found, ...]:
    """Every set of prototypes in a checkpoint file: the teacher's, then the student's; crops' before patches'.

    Known: DINO's full checkpoints (transformers, ResNet-50, dino_k4096, what its code saves), iBOT's, DINOv2's
    teacher_checkpoint, Web-SSL's teachers and heads alone, MSN's, SwAV's with one or several heads, a state of
    lightly's DINO. A last layer that iBOT shares between crops and patches is told once, with a note.

    network: "teacher" or "student" alone. A file's only network is the teacher; MSN's prototypes are of both.

    Memory: beside the w that are returned a few MB, as the file's tensors stay on the disk (today's zip format).

    Raises FileNotFoundError without that file; ValueError, one line, for one that is damaged, in parts or asks to run
    something, that holds no prototypes (SimDINO's have none, backbones alone lack them) or not this network's, and for
    prototypes that are not finite or zero.
    """
    path = Path(path)
    if network not in (None, *contents.NETWORKS):
        raise ValueError(f"network={network!r}: choose 'teacher' or 'student'")
    content = contents.read(path)
    top = content.get("prototypes")
    hints = {str(name) for name in content}
    networks = contents.networks(path, content)
    if isinstance(top, Tensor):  # MSN's, shared by both networks, lie beside them
        other = network or "teacher"
        networks = {other: (networks.get(other) or next(iter(networks.values()))) | {"prototypes": top}}
    elif network is not None:
        networks = _of_lightly(networks, network) or {network: contents.choose(path, networks, network)}
    del content, top
    found = []
    for kind in [name for name in ("teacher", "student", "") if name in networks]:
        tensors = networks.pop(kind)
        found += _found(path, tensors, kind or "teacher", hints)
    if not found:
        raise ValueError(f"{path} {_nothing(tensors, hints)}")
    if network is not None and not (found := [one for one in found if one.network == network]):
        raise ValueError(f"{path} holds no prototypes of the {network}")
    order = {"teacher": 0, "student": 1}
    return tuple(sorted(found, key=lambda one: order[one.network]))


def _of_lightly(networks: Mapping[str, dict[str, Tensor]], network: str) -> dict[str, dict[str, Tensor]]:
    """Both networks, where one box holds them under names of their own."""
    return dict(networks) if any(name.startswith(f"{network}_head.") for name in networks.get("", ())) else {}


def _found(path: Path, tensors: Mapping[str, Tensor], network: str, hints: set[str]) -> list[Found]:
    """A network's sets of prototypes."""
    layers: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, x in tensors.items():
        if match := _LAYER.fullmatch(name):
            owner = match["owner"] or ""
            if owner not in _OWNERS:
                raise ValueError(f"{path}: {name} is in none of the heads we know ({', '.join(filter(None, _OWNERS))})")
            part = match["part"] or "weight"
            layers.setdefault(f"{owner}/{match['layer']}", {})[_PARTS.get(part, part)] = (name, x)
    found: dict[str, Found] = {}
    heads = sum("prototypes.prototypes" in key for key in layers)
    for key, parts in sorted(layers.items(), key=lambda item: _place(item[0])):
        owner, layer = key.split("/")
        of = "patches" if layer == "last_layer2" else _OWNERS[owner]
        if layer.startswith("prototypes.") and heads > 1:
            of = f"head {layer.removeprefix('prototypes.prototypes')}"
        first = layers.get(f"{owner}/last_layer")
        if layer == "last_layer2" and first and _equal(first, parts):
            one = found.pop(f"{owner}/last_layer")
            notes = (*one.notes, "patches share these prototypes (last_layer2 is last_layer)")
            found[f"{owner}/last_layer"] = Found(**{**vars(one), "notes": notes})
            continue
        mine = {"teacher_head": "teacher", "student_head": "student"}.get(owner, network)
        w, notes = made(path, parts, f" of the {mine}")
        unit = layer.startswith("prototypes") and "weight" in parts  # SwAV, MSN; weight-normed ones are an old DINO's
        layout = _layout(tensors, layers, key, hints)
        name, x = parts.get("weight") or parts["weight_v"]
        if layout == "MSN":
            notes.append("teacher and student share these prototypes")
        if layout.startswith(("DINOv2", "heads alone")) and "ibot_head/last_layer" not in layers:
            notes.append("there is no ibot_head: patches, if they have a term, share these prototypes")
        if layout == "DINO, full checkpoint" and "weight" in parts:
            notes.append("last_layer is a plain linear layer, without weight normalization")
        dtype = str(x.dtype).removeprefix("torch.")
        found[key] = Found(w, mine, of, layout, name, dtype, "cosine" if unit else "dot", tuple(notes))
    return list(found.values())


def _place(key: str) -> tuple[str, str, int]:
    """What layers are sorted by: crops before patches, head 2 before head 10."""
    name, number = re.fullmatch(r"(.*?)(\d*)", key).groups()
    return _OWNERS[key.split("/")[0]], name, int(number or 0)


def _equal(a: Mapping[str, tuple[str, Tensor]], b: Mapping[str, tuple[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[part][1].data_ptr() == b[part][1].data_ptr() or torch.equal(a[part][1], b[part][1]) for part in a
    )


def made(path: Path, parts: Mapping[str, tuple[str, Tensor]], whose: str = "") -> tuple[Tensor, list[str]]:
    """The prototypes that a layer's tensors make, block by block, and what is to be said of them.

    parts: weight, or weight_g and weight_v -> name and tensor. Raises ValueError for what makes no prototypes.
    """
    notes = []
    if "weight" not in parts and not {"weight_g", "weight_v"} <= parts.keys():
        raise ValueError(f"{path} holds {next(iter(parts.values()))[0]}, but not the other of weight_g and weight_v")
    name, v = parts.get("weight") or parts["weight_v"]
    if v.ndim != 2 or not v.numel() or not v.is_floating_point():
        raise ValueError(f"{path}: {name} is {tuple(v.shape)} of {v.dtype}; prototypes are (K, dim) of real numbers")
    g = None
    if "weight" not in parts:
        other, g = parts["weight_g"]
        if g.numel() != len(v) or not g.is_floating_point():
            raise ValueError(f"{path}: {other} is {tuple(g.shape)}, but there are {len(v)} rows of {name}")
        g = g.reshape(-1, 1).float()
        if bool((g == 1).all()):
            notes.append("weight_g is 1 everywhere: norm_last_layer")
    if v.dtype != torch.float32:
        notes.append(f"stored in {str(v.dtype).removeprefix('torch.')}, read as float32")
    w = torch.empty(v.shape)  # not the file's: that may change or go
    bad = zero = 0
    for i in range(0, len(v), _ROWS):
        rows = w[i : i + _ROWS]
        rows.copy_(v[i : i + _ROWS])
        if g is not None:
            rows.copy_(directions(rows).mul_(g[i : i + _ROWS]))
        largest = rows.abs().amax(1)
        bad += int((~largest.isfinite()).sum())
        zero += int((largest == 0).sum())
    if bad or zero:
        what = f"{bad} are not finite" if bad else f"{zero} are zero and have no direction"
        raise ValueError(f"{path}: of {len(w)} prototypes in {name}{whose} {what}; did this training fail?")
    return w, notes


def _layout(tensors: Mapping[str, Tensor], layers: Mapping[str, object], key: str, hints: set[str]) -> str:
    """Whose file has a layer of prototypes under this name, beside these others."""
    owner, layer = key.split("/")
    if owner in ("dino_head", "ibot_head"):
        backbone = any(name.startswith("backbone.") for name in tensors)
        return "DINOv2, teacher_checkpoint" if backbone else "heads alone (WebSSL)"
    if owner in ("teacher_head", "student_head"):
        return "lightly"
    if layer == "prototypes" and hints & {"target_encoder", "encoder"}:
        return "MSN"
    if "prototypes" in tensors:
        return "prototypes alone"
    if layer.startswith("prototypes"):
        return "DINO, names of before its release" if owner == "head" else "SwAV"
    if "ibot_loss" in hints or f"{owner}/last_layer2" in layers:
        return "iBOT"
    return "a head alone" if owner in ("", "patch") else "DINO, full checkpoint"


def _nothing(tensors: Mapping[str, Tensor], hints: set[str]) -> str:
    """Why there are no prototypes among these."""
    if any(re.match(r"(\w+_)?head\.(mlp|projection_head)\.", name) for name in tensors):
        return "has a head without a last layer: SimDINO has no prototypes; nothing to count"
    if hints & {"target_encoder", "encoder"}:
        return "holds an encoder of MSN without its prototypes; take the file its authors publish (*.pth.tar)"
    names = [name.removeprefix("backbone.") for name in tensors]
    if any(name.startswith(("cls_token", "pos_embed", "patch_embed.", "layer1.", "embeddings.")) for name in names):
        return f"holds a backbone alone, no prototypes; {_FULL}"
    return f"holds no prototypes, only {contents.some(tensors)}"
