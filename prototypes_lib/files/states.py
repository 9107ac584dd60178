"""A model's and an optimizer's state as plain tensors for safetensors, which knows no aliases, and back again."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def of_model(model: nn.Module) -> dict[str, Tensor]:
    """State without aliases (a teacher that is the student is stored once): safetensors refuses shared memory."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def with_aliases(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `of_model` stored, with every alias of this model under its own name again."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        source = first.setdefault(tensor.data_ptr(), name)
        if name not in tensors and source in tensors:
            tensors[name] = tensors[source]
    return tensors


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as index/name -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value.detach().cpu() for i, entry in state.items() for key, value in entry.items()}


def optimizer_entries(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], place: Path
) -> dict[int, dict[str, Tensor]]:
    """An optimizer's state by parameter. Raises ValueError where it is of other parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        shape = parameters[int(index)].shape if index.isdecimal() and int(index) < len(parameters) else None
        if shape is None or (tensor.dim() and tensor.shape != shape):
            raise ValueError(f"{place.name}/optimizer.safetensors: {name} fits no parameter here: another run?")
        entries.setdefault(int(index), {})[key] = tensor.clone()  # out of the file, which may be deleted
    return entries


def check_same(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError, one line, where names, shapes or types differ."""
    if differ := sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"{name} and the network differ in {len(differ)} tensors, {differ[0]} for one: another run?")
    for key, tensor in wanted.items():
        if (found[key].shape, found[key].dtype) != (tensor.shape, tensor.dtype):
            here, there = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, found[key]))
            raise ValueError(f"{name}: {key} is {there}, the network has {here}: another run?")
