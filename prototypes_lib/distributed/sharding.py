"""FSDP2: weights, gradients and optimizer state spread over processes, for learners that one GPU cannot hold.

Blocks and projectors, student's and teacher's, are gathered one at a time while they compute; what is left
(tokens, patch embedding, norms, prototypes) is gathered for the whole of a step. State is read and written whole, so
that a checkpoint is the same file for any number of processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from prototypes_lib import ranks

BLOCKS = (Block, BasicBlock, Bottleneck)


def shard(learner: nn.Module) -> nn.Module:
    """Spread a learner's parameters over ranks, in place; it is called as before and averages gradients over ranks.

    Parameters become `DTensor`s: make the optimizer after this, and read values through `whole`.
    """
    mesh = init_device_mesh(next(learner.parameters()).device.type, (ranks.world(),))
    for tensor in learner.state_dict().values():
        dist.broadcast(tensor, src=0)
    seen: set[nn.Module] = set()
    for network in (learner.student, learner.teacher):
        blocks = [module for module in network.backbone.modules() if isinstance(module, BLOCKS)]
        for module in (*blocks, network.projector, network.patch_projector):
            if module is not None and module not in seen:
                seen.add(module)  # without a teacher, its network is the student's
                fully_shard(module, mesh=mesh)
    fully_shard(learner, mesh=mesh, reshard_after_forward=False)
    learner.register_forward_pre_hook(_renormalize, prepend=True)
    return learner


def _renormalize(learner: nn.Module, _) -> None:
    """On the shards: what forward does to the gathered weights is forgotten with them."""
    for network in (learner.student, learner.teacher):
        for prototypes in (network.prototypes, network.patch_prototypes):
            if prototypes is not None:
                prototypes.renormalize()


def whole(tensor: Tensor) -> Tensor:
    """The values of a tensor that may be spread over ranks; all ranks ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, spread as a parameter of the same shape is; others stay whole."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    mesh, places = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, places, src_data_rank=None)


def to_save(learner: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """What rank 0 hands to `checkpoints.save` in their place: all values, gathered. All ranks call it."""
    if not _is_spread(learner):
        return learner, optimizer
    return _Module(learner, values=True), _Optimizer(optimizer, values=True)


def to_load(learner: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """What every rank hands to `checkpoints.load` in their place; each takes its share of the files."""
    if not _is_spread(learner):
        return learner, optimizer
    return _Module(learner, values=False), _Optimizer(optimizer, values=False)


def _is_spread(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _on_first(tensor: Tensor, values: bool) -> Tensor:
    """Gathered, on the CPU of rank 0; elsewhere, and without values, memory that nobody touches."""
    gathered = whole(tensor.detach()) if values else None
    if gathered is None or ranks.rank():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return gathered.cpu()


class _Module:
    """A module's state as one process alone would have it, shared tensors shared."""

    def __init__(self, module: nn.Module, values: bool):
        self._own = module.state_dict(keep_vars=True)
        once: dict[int, Tensor] = {}
        for tensor in self._own.values():
            if id(tensor) not in once:
                once[id(tensor)] = _on_first(tensor, values)
        self._tensors = {name: once[id(tensor)] for name, tensor in self._own.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self._tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in self._own.items():
            own.copy_(like(tensors[name], own))


class _Optimizer:
    """An optimizer's state likewise."""

    def __init__(self, optimizer: torch.optim.Optimizer, values: bool):
        self._optimizer, self.param_groups = optimizer, optimizer.param_groups
        found = optimizer.state_dict()
        state = {
            i: {key: _on_first(value, values) for key, value in entry.items()} for i, entry in found["state"].items()
        }
        self._state = {"state": state, "param_groups": found["param_groups"]}

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        state = {
            i: {key: like(value, parameters[i]) for key, value in entry.items()} for i, entry in found["state"].items()
        }
        self._optimizer.load_state_dict({"state": state, "param_groups": found["param_groups"]})
