"""Files of a run: checkpoints to go on from, and exports for others to load. safetensors and JSON, never a pickle.

A checkpoint is a folder `checkpoints/step-00000400/` with model.safetensors (student, teacher, centers), optimizer.
safetensors, state.json, config.json and a manifest of their checksums (storage.py). One that does not verify is never
loaded: readers go back to the newest that does. Random numbers need no saving: every step draws its own from
(seed, step).

Checkpoints of version 0.1.0 have no manifest. They are taken where nothing in them is of a later version, state.json
names their step and the safetensors files are whole to the byte; a flipped bit inside a tensor goes unseen there.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prototypes_lib import official
from prototypes_lib.backbones import Backbone
from prototypes_lib.files import states, storage
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Network
from prototypes_lib.official import Found, own

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_EXPORT = ("backbone.safetensors", "head.safetensors", "about.json")


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
    config: Mapping[str, Any] | None = None,
    prune: bool = True,
) -> Path:
    """Write checkpoint `state["step"]` of a run folder, then drop all that are older than the newest `keep` good ones.

    state: what JSON can hold; "step" and "hash" (the run's) tell later whose it is. config: the run's config.json.
    prune: False leaves all older ones, which are then not read through to see which are good (in a hurry).

    Raises OSError, one line, where it cannot be written; the older ones are then as they were.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: keep at least 2 checkpoints, one for when the other is damaged")
    folder = Path(folder)
    place = _place(folder, state["step"])
    storage.tidy(place.parent)
    storage.write_folder(
        place,
        {"model.safetensors": states.of_model(model), "optimizer.safetensors": states.of_optimizer(optimizer)},
        {"state.json": dict(state) | {"format": storage.FORMAT}} | ({"config.json": dict(config)} if config else {}),
        label=_label(state),
    )
    good = 1  # the new one was read back
    for step in reversed([step for step in steps(folder) if step != state["step"]]) if prune else ():
        if good >= keep and step < state["step"]:
            storage.remove(_place(folder, step))
        elif damage(folder, step, state.get("hash")) is None:
            good += 1
    return place


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, oldest first; `newest` says which of them is good."""
    names = [p.name for p in (Path(folder) / "checkpoints").glob("step-*") if p.is_dir()]
    found = [int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name))]
    return sorted(step for step in found if _place(Path(folder), step).name in names)


def newest(folder: Path, expect_hash: str | None = None) -> int | None:
    """Step of the newest checkpoint that verifies, None where there is none at all; for the one who goes on with a run.

    What a dead process left half-written is put in order first. Each damaged checkpoint that is newer is named in a
    line on stderr. expect_hash: the run's; another run's is no good.

    Raises ValueError where there are checkpoints and all are damaged: to start anew in silence would lose the run.
    """
    storage.tidy(Path(folder) / "checkpoints")
    return _walk_back(Path(folder), expect_hash)


def _walk_back(folder: Path, expect_hash: str | None) -> int | None:
    reason = ""
    for step in reversed(steps(folder)):
        reason = damage(folder, step, expect_hash)
        if reason is None:
            return step
        print(f"{_place(folder, step)} is damaged and left out: {reason}", file=sys.stderr, flush=True)
    if reason:
        raise ValueError(
            f"{folder / 'checkpoints'}: none of {len(steps(folder))} checkpoints can be used (the oldest: {reason}); "
            f"put a good copy there, or delete {folder} to start anew"
        )
    return None


def damage(folder: Path, step: int, expect_hash: str | None = None) -> str | None:
    """Why checkpoint `step` of a run folder cannot be used, in a few words; None where all of it verifies."""
    place = _place(Path(folder), step)
    reason = storage.verify(place, _FILES)
    if reason and (reason != f"{storage.MANIFEST} is missing" or not _is_of_0_1_0(place)):
        return reason
    try:
        state = json.loads((place / "state.json").read_bytes())
        found, owner = state["step"], state.get("hash")
        labels = {name: storage.label_of(place / name) for name in _FILES[:2]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError):
        return "its files cannot be read"
    if found != step:
        return f"it is the checkpoint of step {found} under another name"
    if expect_hash is not None and owner != expect_hash:
        return f"it belongs to another run (config hash {owner}, not {expect_hash})"
    if not reason:
        for name, label in labels.items():
            if label != _label(state):
                return f"{name} belongs to another checkpoint ({label or 'without a label'})"
    return None


def load(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    expect_hash: str | None = None,
) -> dict[str, Any]:
    """Put a checkpoint back into a model and an optimizer of the same shapes, and return its state.

    Everything is checked before anything is changed: after an error model and optimizer are what they were.

    Raises FileNotFoundError without that checkpoint, ValueError for a damaged one or another run's (expect_hash),
    for names, shapes or types that differ.
    """
    place = _place(Path(folder), step)
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} holds no checkpoint of step {step}; it has {steps(Path(folder)) or 'none'}")
    if reason := damage(folder, step, expect_hash):
        raise ValueError(f"{place} is damaged: {reason}; delete it to go on from an older one")
    state = json.loads((place / "state.json").read_bytes())
    tensors = states.with_aliases(model, load_file(place / "model.safetensors"))
    states.check_same(f"{place.name}/model.safetensors", tensors, model.state_dict())
    if optimizer is not None:
        entries = states.optimizer_entries(optimizer, load_file(place / "optimizer.safetensors"), place)
        groups = optimizer.state_dict()["param_groups"]
    model.load_state_dict(tensors)
    if optimizer is not None:
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    return {key: value for key, value in state.items() if key != "format"}


def _place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _label(state: Mapping[str, Any]) -> str:
    return f"step {state['step']} of {state.get('hash', 'a run')}"


def _is_of_0_1_0(place: Path) -> bool:
    """Whether a checkpoint without a manifest never had one, and all its files are whole."""
    paths = [place / name for name in _FILES]
    if not all(map(storage.readable, paths)):
        return False
    state = json.loads(paths[2].read_bytes())
    return isinstance(state, dict) and "format" not in state and not any(map(storage.label_of, paths[:2]))


def export(run_folder: str | Path, path: str | Path) -> Path:
    """Write a run's teacher for others: backbone.safetensors (timm's names), head.safetensors, about.json.

    The head holds the projector (mlp.*) and, where there are prototypes, DINO's last_layer.weight_g and weight_v; of a
    patch head of its own the same under patch_.

    Raises FileNotFoundError where the folder holds no run with a checkpoint, ValueError where the path holds
    anything but an earlier export.
    """
    run_folder, path = Path(run_folder), Path(path)
    files = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if path.exists() and not (path.is_dir() and files <= {*_EXPORT, storage.MANIFEST}):
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
    storage.write_folder(path, {"backbone.safetensors": backbone, "head.safetensors": head}, {"about.json": config})
    return path


def load_prototypes(path: str | Path, network: str = "teacher", of: str = "crops") -> Tensor:
    """Prototypes w (K, dim) of a run folder, an export, or a checkpoint file of others, in float32.

    network: "teacher" or "student" (an export holds the teacher only). of: "crops", or "patches" where they have
    prototypes of their own; of a file with several sets also "head 0", "head 1" ... (SwAV). `all_prototypes` has all.

    Raises FileNotFoundError where there is none of them, ValueError for a method without (such) prototypes, another
    network, the student of an export, or a file that is damaged or none we know (`official.prototypes`).
    """
    if network not in ("teacher", "student"):
        raise ValueError(f"network={network!r}: choose 'teacher' or 'student'")
    path = Path(path)
    if _is_others(path):
        sets = official.prototypes(path, network)
        if fitting := [found.w for found in sets if found.of == of]:
            return fitting[0]
        raise ValueError(f"{path} holds no prototypes of={of!r}; it has those of {', '.join(f.of for f in sets)}")
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


def all_prototypes(path: str | Path) -> tuple[Found, ...]:
    """Every set of prototypes of a run folder, an export, or a checkpoint file of others, the teacher's crops' first.

    What teacher and student share, or patches and crops, is told once, with a note.

    Raises what `load_prototypes` does, and ValueError for prototypes that are not finite or zero.
    """
    path = Path(path)
    if _is_others(path):
        return official.prototypes(path)
    path = _check(path, "teacher")
    exported = (path / "head.safetensors").is_file()
    if exported:
        config, tensors = json.loads((path / "about.json").read_bytes()), load_file(path / "head.safetensors")
    else:
        config, tensors = _newest(path)
    return own.sets(path, config["method"], tensors, exported)


def _is_others(path: Path) -> bool:
    """Whether a path is a single file and none of our runs' or exports'. Raises ValueError for one inside a run."""
    if path.parent.parent.name == "checkpoints" and path.parent.name.startswith("step-") and path.is_file():
        raise ValueError(f"{path} is a part of a run; give the run folder {path.parents[2]}")
    if path.is_dir():
        return (path / ".metadata").is_file() or any(path.glob("*.index.json"))
    return path.name.endswith(".index.json") or (
        path.is_file() and not (path.name in _EXPORT and (path.parent / "about.json").is_file())
    )


def load_backbone(path: str | Path, network: str = "teacher") -> Backbone:
    """The backbone of a run folder, an export, or a checkpoint file of others (`official.load`), in eval mode.

    Raises FileNotFoundError where there is none of them, ValueError for a file that is damaged or none we know.
    """
    path = Path(path)
    if path.name == _EXPORT[1] or _is_others(path):
        return official.load(path, network)
    path = _check(path, network)
    if (path / "backbone.safetensors").is_file():
        config, tensors = json.loads((path / "about.json").read_text()), load_file(path / "backbone.safetensors")
    else:
        config, tensors = _newest(path)
        tensors = _timms(tensors, f"{network}.backbone.") or _timms(tensors, "student.backbone.")
    backbone = _built(config["run"])
    next(backbone.children()).load_state_dict(tensors)  # vit or cnn; our mask token is training's alone
    return backbone.eval()


def load_network(path: str | Path, network: str = "teacher") -> Network:
    """Backbone, projectors and prototypes of a run folder (no export), in eval mode. Raises FileNotFoundError."""
    config, tensors = _newest(_check(path, network))
    found = _strip(tensors, "student.") | _strip(tensors, f"{network}.")  # what both share is stored once
    sizes = ("hidden", "bottleneck", "head_layers", "head_batch_norm", "head_activation")
    parts = [_built(config["run"])]
    for kind in ("", "patch_"):
        own, vectors = f"{kind}projector.mlp.0.weight" in found, found.get(f"{kind}prototypes.weight_v")
        parts.append(Projector(parts[0].dim, *(config["run"][name] for name in sizes)) if own else None)
        parts.append(None if vectors is None else Prototypes(*vectors.shape, free_norms=True))
    whole = Network(*parts)
    whole.load_state_dict(found)
    return whole.eval()


def _built(run: Mapping[str, Any]) -> Backbone:
    options = {key: value for key, value in run["backbone_options"].items() if key != "pretrained"}
    return Backbone(run["backbone"], run["image_size"], **options)


def _check(path: str | Path, network: str) -> Path:
    if network not in ("teacher", "student"):
        raise ValueError(f"network={network!r}: choose 'teacher' or 'student'")
    path = Path(path)
    path = path.parent if path.is_file() else path  # a file of an export
    exported = (path / "about.json").is_file() or (path / "head.safetensors").is_file()
    if network == "student" and exported:
        raise ValueError(f"{path} is an export, which holds the teacher only")
    if exported and (reason := storage.verify(path, _EXPORT)):
        old = reason == f"{storage.MANIFEST} is missing"  # version 0.1.0 wrote none
        if not (old and all(storage.readable(path / name) for name in _EXPORT)):
            raise ValueError(f"{path} is a damaged export: {reason}; export the run again")
    return path


def _newest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a run's newest good checkpoint; the config is the checkpoint's own where it has one."""
    if not (folder / "config.json").is_file() or not steps(folder):
        lacks = "is neither a run folder with a checkpoint nor an export" if folder.exists() else "is not there"
        raise FileNotFoundError(f"{folder} {lacks}")
    try:
        config = dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}); restore it or train the run again") from error
    place = _place(folder, _walk_back(folder, config.get("hash")))
    if (place / "config.json").is_file():
        config = json.loads((place / "config.json").read_bytes())
    return config, load_file(place / "model.safetensors")


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _timms(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A backbone's tensors, BatchNorm's statistics too, under timm's names."""
    return _strip(tensors, f"{prefix}vit.") or _strip(tensors, f"{prefix}cnn.")
