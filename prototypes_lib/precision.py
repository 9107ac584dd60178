"""One rule for every idea: compute in float32 at least, whatever the network's precision or autocast says."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
