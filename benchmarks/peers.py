"""What the rows of speed.py share about peers: their versions, and their best precision."""

import contextlib
import importlib.metadata

import torch


def version(package: str) -> str:
    """Name and version of an installed package, as rows name their peers."""
    return f"{package} {importlib.metadata.version(package)}"


def autocast(device: str, low: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast where asked for."""
    return torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext()
