"""Projectors out of other people's checkpoint files: what makes a backbone's feature the code that prototypes see."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prototypes_lib.heads import Projector
from prototypes_lib.official import contents

_MSN = {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4, "fc3": 6}
_CROPS = ("head.mlp", "dino_head.mlp", "head.projection_head", "mlp", "fc", "projection_head")
_PATCHES = ("ibot_head.mlp", "patch_mlp")


def projector(path: str | Path, network: str = "teacher", of: str = "crops") -> Projector:
    """The projector of a checkpoint file, in eval mode: features (n, d) of its backbone to unit codes (n, p).

    DINO, iBOT, DINOv2, SimDINO: linear layers with GELU between them, with BatchNorm before it or without, any number
    (their `mlp`); MSN: its `fc`, with BatchNorm and GELU; SwAV: its `projection_head`, with BatchNorm and ReLU; then
    all go to the unit sphere. Widths follow from the shapes.

    Args:
        of: "crops"; "patches", the projector of their own where there is one (DINOv2), else the one they share with
            crops; "head 0" ... of SwAV, whose heads all have one projector.

    Differs from the official code in MSN, whose target network normalizes each batch by itself, also when it is used;
    here BatchNorm has its running statistics, so that a code does not depend on the rest of its batch.

    Raises FileNotFoundError without that file; ValueError, one line, for one that is damaged or asks to run something,
    and for a head that is missing, or is none of these.
    """
    path = Path(path)
    if of not in ("crops", "patches") and not re.fullmatch(r"head \d+", of):
        raise ValueError(f"of={of!r}: choose 'crops', 'patches' or 'head 0', 'head 1' ...")
    tensors = _tensors(path, network)
    lightly = f"{network}_head.layers"
    for prefix in (*(_PATCHES if of == "patches" else ()), lightly, *_CROPS):
        if layers := _layers(tensors, prefix):
            return _built(path, prefix, layers, "relu" if prefix == "projection_head" else "gelu")
    raise ValueError(f"{path} holds no projector, only {contents.some(tensors)}")


def _tensors(path: Path, network: str) -> dict[str, Tensor]:
    networks = contents.networks(path, contents.read(path))
    if any(name.startswith(f"{network}_head.") for name in networks.get("", ())):  # lightly's, both in one box
        return networks[""]
    return contents.choose(path, networks, network)


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    """Position -> a layer's tensors, of a sequence under this name, or of a single layer that has it."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if prefix == "fc" and (match := re.fullmatch(r"fc\.(fc[123]|bn[12])\.(\w+)", name)):
            found.setdefault(_MSN[match[1]], {})[match[2]] = x
        elif prefix != "fc" and (match := re.fullmatch(rf"{re.escape(prefix)}\.(?:(\d+)\.)?(\w+)", name)):
            found.setdefault(int(match[1] or 0), {})[match[2]] = x
    return found


def _built(path: Path, prefix: str, layers: Mapping[int, Mapping[str, Tensor]], activation: str) -> Projector:
    linear = [i for i in sorted(layers) if layers[i].get("weight", torch.empty(0)).ndim == 2]
    norm = len(layers) > len(linear)
    step = 3 if norm else 2
    wanted = {step * i for i in range(len(linear))} | {step * i + 1 for i in range(len(linear) - 1) if norm}
    if not linear or set(layers) != wanted:
        raise ValueError(f"{path}: {prefix} has layers at {sorted(layers)}, which is no projector we know")
    shapes = [tuple(layers[i]["weight"].shape) for i in linear]
    hidden = {a for a, _ in shapes[:-1]} | {b for _, b in shapes[1:]}
    if len(hidden) > 1:
        raise ValueError(f"{path}: {prefix} has layers of {shapes}, which do not fit one another")
    sizes = (shapes[0][1], *hidden) if hidden else (shapes[0][1],)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # nothing is drawn, nothing is made twice
        made = Projector(*sizes, bottleneck=shapes[-1][0], layers=len(linear), batch_norm=norm, activation=activation)
    state = {}
    for name, x in made.mlp.state_dict().items():
        i, kind = name.split(".")
        found = layers[int(i)].get(kind)
        if found is None and kind in ("bias", "num_batches_tracked"):  # DINOv2's mlp_bias=False; old files
            found = torch.zeros(x.shape)
        if found is None or found.shape != x.shape:
            here = "missing" if found is None else f"{tuple(found.shape)}, not {tuple(x.shape)}"
            raise ValueError(f"{path}: {prefix}.{name} is {here}")
        state[name] = found.detach().to(x.dtype, copy=True)  # out of the file, which may change or go
    made.mlp.load_state_dict(state, assign=True)
    return made.eval()
