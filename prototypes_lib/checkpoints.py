"""Files of a run: checkpoints to go on from, and exports for others to load. safetensors and JSON, never a pickle.

A checkpoint is a folder `checkpoints/step-00000400/` with model.safetensors (student, teacher, centers), optimizer.
safetensors and state.json. It is written aside and renamed, so a folder with that name is complete. Random numbers
need no saving: every step draws its own from (seed, step).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Prototypes


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write checkpoint `state["step"]` of a run folder, then drop all but the newest `keep`."""
    place = folder / "checkpoints" / f"step-{state['step']:08d}"
    write_folder(
        place,
        {"model.safetensors": _model_tensors(model), "optimizer.safetensors": _optimizer_tensors(optimizer)},
        {"state.json": dict(state)},
    )
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / "checkpoints" / f"step-{old:08d}")
    return place


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder, oldest first."""
    names = [p.name for p in (folder / "checkpoints").glob("step-*")]
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))


def load(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a checkpoint back into a model and an optimizer of the same shapes, and return its state.

    Raises FileNotFoundError without that checkpoint, RuntimeError where names or shapes differ.
    """
    place = Path(folder) / "checkpoints" / f"step-{step:08d}"
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} holds no checkpoint of step {step}; it has {steps(Path(folder)) or 'none'}")
    model.load_state_dict(_restore_aliases(model, load_file(place / "model.safetensors")))
    if optimizer is not None:
        _load_optimizer(optimizer, load_file(place / "optimizer.safetensors"))
    return json.loads((place / "state.json").read_text())


def write_folder(place: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Any]) -> None:
    """Write files into a temporary folder beside `place`, flush them to disk, and rename: all of it or nothing."""
    place = Path(place)
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in tensors.items():
        save_file(dict(content), aside / name)
    for name, content in texts.items():
        (aside / name).write_text(json.dumps(content, indent=2))
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if place.exists():
        shutil.rmtree(place)
    aside.rename(place)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State without aliases (a teacher that is the student is stored once): safetensors refuses shared memory."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _restore_aliases(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        source = first.setdefault(tensor.data_ptr(), name)
        if name not in tensors and source in tensors:
            tensors[name] = tensors[source]
    return tensors


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value.detach().cpu() for i, entry in state.items() for key, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/")
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def export(run_folder: str | Path, path: str | Path) -> Path:
    """Write a run's teacher for others: backbone.safetensors (timm's names), head.safetensors, about.json.

    The head holds the projector (mlp.*) and, where there are prototypes, DINO's last_layer.weight_g and weight_v; of a
    patch head of its own the same under patch_.

    Raises FileNotFoundError where the folder holds no run with a checkpoint, ValueError where the path holds
    anything but an earlier export.
    """
    run_folder, path = Path(run_folder), Path(path)
    files = {"backbone.safetensors", "head.safetensors", "about.json"}
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= files):
        raise ValueError(f"{path} exists and is no export; choose a new folder")
    config, tensors = _newest(run_folder)
    teacher = "teacher." if any(name.startswith("teacher.") for name in tensors) else "student."
    backbone = _timms(tensors, f"{teacher}backbone.")
    head = {f"mlp.{k}": v for k, v in _strip(tensors, f"{teacher}projector.mlp.").items()}
    found = _strip(tensors, f"{teacher}prototypes.") or _strip(tensors, "student.prototypes.")  # shared ones
    head |= {f"last_layer.{k}": v for k, v in found.items()}
    head |= {f"patch_mlp.{k}": v for k, v in _strip(tensors, f"{teacher}patch_projector.mlp.").items()}
    found = _strip(tensors, f"{teacher}patch_prototypes.") or _strip(tensors, "student.patch_prototypes.")
    head |= {f"patch_last_layer.{k}": v for k, v in found.items()}
    write_folder(path, {"backbone.safetensors": backbone, "head.safetensors": head}, {"about.json": config})
    return path


def load_prototypes(path: str | Path, network: str = "teacher", of: str = "crops") -> Tensor:
    """Prototypes w (K, dim) of a run folder or an export, in float32.

    network: "teacher" or "student" (an export holds the teacher only). of: "crops", or "patches" where they have
    prototypes of their own.

    Raises FileNotFoundError where there is neither, ValueError for a method without (such) prototypes, another network,
    or the student of an export.
    """
    path = _check(path, network)
    if of not in ("crops", "patches"):
        raise ValueError(f"of={of!r}: choose 'crops' or 'patches'")
    patch = "patch_" * (of == "patches")
    if (path / "head.safetensors").is_file():
        found = _strip(load_file(path / "head.safetensors"), f"{patch}last_layer.")
    else:
        tensors = _newest(path)[1]
        found = _strip(tensors, f"{network}.{patch}prototypes.") or _strip(tensors, f"student.{patch}prototypes.")
    if not found and patch:
        raise ValueError(f"{path}: patches have no prototypes of their own; take those of='crops'")
    if not found:
        raise ValueError(f"{path}: this method has no prototypes (SimDINO, for example)")
    prototypes = Prototypes(*found["weight_v"].shape, free_norms=True)
    prototypes.load_state_dict(found)
    return prototypes.w.detach()


def load_backbone(path: str | Path, network: str = "teacher") -> Backbone:
    """The backbone of a run folder or an export, in eval mode. Raises FileNotFoundError where there is neither."""
    path = _check(path, network)
    if (path / "backbone.safetensors").is_file():
        config, tensors = json.loads((path / "about.json").read_text()), load_file(path / "backbone.safetensors")
    else:
        config, tensors = _newest(path)
        tensors = _timms(tensors, f"{network}.backbone.") or _timms(tensors, "student.backbone.")
    run = config["run"]
    options = {key: value for key, value in run["backbone_options"].items() if key != "pretrained"}
    backbone = Backbone(run["backbone"], run["image_size"], **options)
    next(backbone.children()).load_state_dict(tensors)  # vit or cnn; our mask token is training's alone
    return backbone.eval()


def _check(path: str | Path, network: str) -> Path:
    if network not in ("teacher", "student"):
        raise ValueError(f"network={network!r}: choose 'teacher' or 'student'")
    if network == "student" and (Path(path) / "head.safetensors").is_file():
        raise ValueError(f"{path} is an export, which holds the teacher only")
    return Path(path)


def _newest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / "config.json").is_file() or not steps(folder):
        raise FileNotFoundError(f"{folder} is neither a run folder with a checkpoint nor an export")
    place = folder / "checkpoints" / f"step-{steps(folder)[-1]:08d}"
    return json.loads((folder / "config.json").read_text()), load_file(place / "model.safetensors")


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _timms(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A backbone's tensors, BatchNorm's statistics too, under timm's names."""
    return _strip(tensors, f"{prefix}vit.") or _strip(tensors, f"{prefix}cnn.")
