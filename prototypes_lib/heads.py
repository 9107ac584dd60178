"""From a feature to a unit code (projector), and the vectors it is compared with (prototypes)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prototypes_lib.batch_norm import BatchNorm1d
from prototypes_lib.precision import directions, wide


class Projector(nn.Module):
    """Linear layers to a bottleneck, then the unit sphere: y = h(x) / |h(x)| (vMF, Fig. 1b).

    Three layers of 2048 with GELU and a bottleneck of 256 in DINO, without normalization inside; `batch_norm` puts
    BatchNorm (over all processes' rows) before each activation, as the official use_bn_in_head, MSN, SwAV; SwAV has two
    layers, ReLU and 128.
    Weights truncated normal with deviation 0.02, biases zero.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        activation: str = "gelu",
    ):
        super().__init__()
        if min(dim, hidden, bottleneck, layers) < 1 or bottleneck < 2:
            raise ValueError(f"a projector {dim} -> {hidden} -> {bottleneck} in {layers} layers does not exist")
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        stack: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            stack.append(nn.Linear(a, b))
            if i < layers - 1:
                stack += [BatchNorm1d(b)] * batch_norm + [{"gelu": nn.GELU, "relu": nn.ReLU}[activation]()]
        self.mlp = nn.Sequential(*stack)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch bottleneck"]:
        return F.normalize(wide(self.mlp(x)), dim=-1, eps=1e-6)


class Prototypes(nn.Module):
    """K vectors w_k = g_k v_k / |v_k|: direction and length apart, as the official weight-normalized last layer.

    The EMA averages g and v, not w, and weight decay reaches both, as there. With `free_norms=False` g stays 1 and is
    not trained. plain=True: w_k = v_k, which `renormalize` sets to unit length before each step (SwAV): the gradient
    then keeps its part along w. Parameter names and shapes are DINO's: weight_g (K, 1), weight_v.
    """

    def __init__(self, k: int, dim: int, free_norms: bool, plain: bool = False):
        super().__init__()
        self.plain = plain
        self.weight_g = nn.Parameter(torch.ones(k, 1), requires_grad=free_norms and not plain)
        self.weight_v = nn.Parameter(torch.empty(k, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.renormalize()

    @property
    def w(self) -> Float[Tensor, "k dim"]:
        return self.weight_v if self.plain else self.weight_g * directions(self.weight_v)

    @torch.no_grad()
    def renormalize(self) -> None:
        """Set plain vectors to unit length, in place; others have none to set."""
        if self.plain:
            self.weight_v.copy_(directions(self.weight_v))
