"""What a checkpoint file of others holds, network by network, whatever the boxes and prefixes it comes in."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prototypes_lib.files import foreign

NETWORKS = {"teacher": ("teacher", "target_encoder"), "student": ("student", "encoder")}  # the latter are MSN's
_BOXES = ("state_dict", "model")  # around the only network of a file
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of DDP, compile, FSDP
_JOIN = "join its parts first: read each, put all tensors into one dictionary, save that as one file and give it"
_CONSOLIDATED = "take the consolidated teacher_checkpoint.pth (DINOv2: eval/training_*/), or join the shares first"


def read(path: str | Path) -> dict[Any, Any]:
    """A checkpoint file's content; nothing in it is run, and large tensors stay on the disk until they are used.

    Raises FileNotFoundError without that file; ValueError, one line, for one that is damaged or asks to run something,
    and for a part of a checkpoint, which is told by its name: shards, an index of shards, one process's share.
    """
    path = Path(path)
    if (part := re.search(r"-0*(\d+)-of-0*(\d+)\b", path.name)) and int(part[2]) > 1:
        raise ValueError(f"{path} is part {part[1]} of {part[2]} of a checkpoint; {_JOIN}")
    if path.name.endswith(".index.json"):
        raise ValueError(f"{path} lists the parts of a checkpoint and holds none of it; {_JOIN}")
    if re.search(r"\.rank_?\d+\.", path.name):
        raise ValueError(f"{path} is one process's share of an FSDP run; {_CONSOLIDATED}")
    if path.suffix == ".distcp" or (path.is_dir() and (path / ".metadata").is_file()):
        raise ValueError(
            f"{path} is of torch.distributed.checkpoint; make one file of its folder by "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save and give that"
        )
    if path.is_dir() and any(path.glob("*.index.json")):
        raise ValueError(f"{path} holds a checkpoint in parts; {_JOIN}")
    return foreign.read_pickle(path, on_disk=True)


def networks(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors of "teacher" and "student", whichever there are; of a file's only network, which has no name, of "".

    Raises ValueError where no tensors are where weights should be.
    """
    boxes = _boxes(content)
    found = {name: tensors for name, box in boxes.items() if (tensors := _tensors(path, box))}
    if not found:
        raise ValueError(
            f"{path} holds no tensors where weights should be, only {some(next(iter(boxes.values())), 'entries')}"
        )
    return found


def _boxes(content: Mapping[str, Any], depth: int = 4) -> dict[str, Mapping[str, Any]]:
    held = {n: content[key] for n, keys in NETWORKS.items() for key in keys if isinstance(content.get(key), Mapping)}
    if depth and held:
        return {name: _innermost(box, depth - 1) for name, box in held.items()}
    box = next((key for key in _BOXES if isinstance(content.get(key), Mapping)), None)
    return _boxes(content[box], depth - 1) if depth and box else {"": content}


def _innermost(content: Mapping[str, Any], depth: int) -> Mapping[str, Any]:
    box = next((key for key in _BOXES if isinstance(content.get(key), Mapping)), None)
    return _innermost(content[box], depth - 1) if depth and box else content


def _tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """A network's tensors without the prefixes that wrappers leave in their names."""
    tensors = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if any("flat_param" in name for name in tensors):
        raise ValueError(f"{path} is one process's share of an FSDP run; {_CONSOLIDATED}")
    bare = {".".join(part for part in name.split(".") if part not in _WRAPPERS): x for name, x in tensors.items()}
    if len(bare) < len(tensors):
        raise ValueError(f"{path} holds tensors twice, with and without the prefix of a wrapper (module., _orig_mod.)")
    return bare


def choose(path: Path, found: Mapping[str, Any], network: str) -> Any:
    """That of `networks` which is meant. Raises ValueError where it is not there."""
    if network not in NETWORKS:
        raise ValueError(f"network={network!r}: choose 'teacher' or 'student'")
    if "" in found and network == "student":
        raise ValueError(f"{path} holds a single network, which is taken for the teacher, and no student")
    if "" not in found and network not in found:
        raise ValueError(f"{path} holds no {network}, only the {next(iter(found))}")
    return found["" if "" in found else network]


def some(names: Iterable[Any], what: str = "tensors") -> str:
    names = list(names)
    shown = ", ".join(str(name)[:80] for name in names[:3])
    return f"{len(names)} {what} ({shown}{', ...' if len(names) > 3 else ''})"
