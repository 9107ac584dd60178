"""Transformers and ResNets from timm, with what pre-training adds: masks, dropped patches, crops of any size.

The model inside (`Backbone.vit`, `Backbone.cnn`) is plain timm: its state dict carries timm's names and loads into
`timm.create_model(name)`.
"""

from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath
from timm.models import is_model_in_modules
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prototypes_lib import stochastic_depth
from prototypes_lib.batch_norm import Unremembered, over_ranks
from prototypes_lib.precision import wide


class ConvStem(nn.Module):
    """A stride-2 convolution before the patches: a small transformer on small images learns little without one."""

    def __init__(self, img_size=32, patch_size=8, in_chans=3, embed_dim=64, **_):
        super().__init__()
        size = img_size if isinstance(img_size, int) else img_size[0]
        self.patch_size = (patch_size, patch_size)
        self.img_size = (size, size)
        self.grid_size = (size // patch_size, size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv = nn.Conv2d(in_chans, embed_dim // 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, embed_dim // 4)
        self.proj = nn.Conv2d(embed_dim // 4, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b gh gw d"]:
        return self.proj(F.gelu(self.norm(self.conv(x)))).permute(0, 2, 3, 1)


# for a CPU: nothing in timm is this small
_SMALL = {
    "vit_pico_patch8": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "embed_layer": ConvStem},
    "vit_nano_patch8": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "embed_layer": ConvStem},
}
_SMALL_RESNET = {
    "resnet_pico": {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
}


class Backbone(nn.Module):
    """A timm vision transformer or ResNet; the name picks the class, as `pathlib.Path` picks its own.

    Args:
        name: a timm vision transformer (`vit_small_patch16_224`, ...), a timm ResNet (`resnet50`, ...), or one of ours
            for a CPU: `vit_pico_patch8` (dim 64, depth 2), `vit_nano_patch8` (dim 128, depth 4), `resnet_pico` (dim
            128, stride 16).
        image_size: side of the global crops; a transformer's position embedding is made for it.
        interpolation: how positions are resized for other crops: "antialias" as timm, "official" as DINO and DINOv2
            (bicubic without antialias, 0.1 added to the target grid), which matters for features of released weights.
            A ResNet has none.
        options: passed to timm: drop_path_rate, pretrained, reg_tokens, init_values, patch_size ...; a transformer's
            drop_path_rate rises from block to block, with uniform_drop_path=True all have it (DINOv2). Its blocks don't
            compute what they drop (`stochastic_depth`).

    Attributes:
        dim: of the features and of the patches.
        patch_size: side of a patch in px; of a ResNet, the stride of its last feature map.
        n_layers: blocks of a transformer; the 4 stages of a ResNet.
        mask_token: what stands for a masked patch (1, dim), None for a ResNet.
        recompute: forget what is inside a block after its forward pass and compute it again in the backward pass
            (activation checkpointing): about a third more time for a fraction of the memory, the same gradients.

    Raises:
        ValueError: an unknown name or option, or an image size that `check_size` refuses.
    """

    dim: int
    patch_size: int
    n_layers: int
    mask_token: nn.Parameter | None
    recompute: bool = False
    _compiled: bool = False

    def __new__(cls, name: str = "", *_, **__):
        if cls is Backbone:
            resnet = name in _SMALL_RESNET or is_model_in_modules(name, ("resnet",))
            cls = ConvolutionalBackbone if resnet else TransformerBackbone
        return super().__new__(cls)

    def __init__(self, name: str, image_size: int, *, interpolation: str = "antialias", **options):
        super().__init__()
        if interpolation not in ("antialias", "official"):
            raise ValueError(f"interpolation={interpolation!r}: choose 'antialias' or 'official'")
        self.name, self.interpolation = name, interpolation
        try:
            self._build(image_size, options)
        except TypeError as error:
            raise ValueError(f"backbone {name!r} does not take an option: {error}") from error
        self.check_size(image_size)

    def _through(self, blocks: nn.Sequential | list[nn.Module], x: Tensor) -> Tensor:
        """Blocks one after the other, with stochastic depth as `stochastic_depth.draw` says and as `recompute` says."""
        for block, kept in zip(blocks, stochastic_depth.draw(blocks, x), strict=True):
            if self._compiled:
                _mark_rows(x, kept)
            if self.recompute and torch.is_grad_enabled():
                twice = lambda block=block: (nullcontext(), Unremembered(block))
                x = checkpoint(stochastic_depth.run, block, x, kept, use_reentrant=False, context_fn=twice)
            else:
                x = stochastic_depth.run(block, x, kept)
        return x


class TransformerBackbone(Backbone):
    """A plain vision transformer, which takes masks, dropped patches and any crop that cuts into whole patches."""

    def _build(self, image_size: int, options: dict) -> None:
        name, uniform = self.name, options.pop("uniform_drop_path", False)
        shared = {"img_size": image_size, "num_classes": 0, "dynamic_img_size": True}
        if name in _SMALL:
            self.vit = VisionTransformer(**shared, **(_SMALL[name] | options))
            for block in self.vit.blocks:
                block.attn.fused_attn = False  # on 17 tokens plain attention is a little faster
        elif timm.is_model(name) and name.startswith(("vit_", "deit_")):
            self.vit = timm.create_model(name, **shared, **options)
        else:
            ours = ", ".join(_SMALL | _SMALL_RESNET)
            raise ValueError(
                f"backbone {name!r} is none of ours ({ours}), no timm vision transformer (vit_*) and no timm ResNet"
            )
        vit = self.vit
        if uniform:
            for block in vit.blocks:
                block.drop_path1, block.drop_path2 = (DropPath(options.get("drop_path_rate", 0.0)) for _ in range(2))
        plain = type(vit) is VisionTransformer and vit.cls_token is not None and vit.pos_embed is not None
        if not plain or vit.attn_pool is not None or options.get("patch_drop_rate"):
            raise ValueError(f"backbone {name!r}: only plain transformers with a class token and positions work here")
        self.dim = vit.embed_dim
        self.patch_size = vit.patch_embed.patch_size[0]
        self.n_layers = len(vit.blocks)
        stochastic_depth.prepare(vit.blocks)
        self.mask_token = nn.Parameter(torch.zeros(1, self.dim))

    def check_size(self, size: int) -> None:
        """Raise ValueError unless a crop of this side cuts into whole patches."""
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(f"crops of {size} px do not cut into patches of {self.patch_size} px; choose a multiple")

    def grid(self, size: int) -> tuple[int, int]:
        """Patches along each side of a crop."""
        return size // self.patch_size, size // self.patch_size

    def layer_of(self, parameter_name: str) -> int:
        """Place of a parameter for layer-wise learning rates, as in DINOv2's code.

        Patch embedding, tokens and positions 0, block i (from 0) i + 1, the final norm n_layers + 1.
        """
        parts = parameter_name.removeprefix("vit.").split(".")
        if parts[0] in ("patch_embed", "cls_token", "pos_embed", "reg_token", "mask_token"):
            return 0
        return int(parts[1]) + 1 if parts[0] == "blocks" else self.n_layers + 1

    def forward(
        self,
        x: Float[Tensor, "batch 3 height width"],
        mask: Bool[Tensor, "batch gh gw"] | None = None,
        keep: Int[Tensor, " kept"] | None = None,
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch patches dim"]]:
        """Features after the final norm: of the class token, and of the patches in row order (of `keep`, in its order).

        mask: True where the mask token replaces the patch embedding, before positions are added (as iBOT).
        keep: indices, in row order, of the patches that the network gets, the same for the whole batch; the others are
            dropped once they have their positions (as MSN).
        """
        x = self.vit.norm(self._through(self.vit.blocks, self._tokens(x, mask, keep)))
        return x[:, 0], x[:, self.vit.num_prefix_tokens :]

    def last_blocks(
        self, x: Float[Tensor, "batch 3 height width"], n: int = 1, norm: bool = True
    ) -> tuple[list[Float[Tensor, "batch dim"]], Float[Tensor, "batch patches dim"]]:
        """Class tokens after each of the last n blocks, the last block's last, and the patches after the last block.

        norm: all passed through the final norm, as DINO's and DINOv2's linear evaluation; without it as they are.

        Raises ValueError for more blocks than there are.
        """
        if not 1 <= n <= self.n_layers:
            raise ValueError(f"{self.name} has {self.n_layers} blocks; take features of 1 to {self.n_layers}, not {n}")
        final = self.vit.norm if norm else nn.Identity()
        x, found = self._through(self.vit.blocks[: self.n_layers - n], self._tokens(x)), []
        for block in self.vit.blocks[self.n_layers - n :]:
            x = self._through([block], x)
            found.append(final(x[:, 0]))
        return found, final(x[:, self.vit.num_prefix_tokens :])

    def _tokens(self, x: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """What goes into the first block: class token, registers, and patches with their positions."""
        vit = self.vit
        x = vit.patch_embed(x)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x.flatten(1, 2) + self._positions(x.shape[1:3])  # in float32 also under autocast, as timm's own forward
        if keep is not None:
            x = x[:, keep]
        prefix = vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], dim=1)
        if not vit.no_embed_class:  # the embedding then holds positions for class token and registers too
            prefix = prefix + vit.pos_embed[:, : vit.num_prefix_tokens]
        return vit.norm_pre(vit.pos_drop(torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)))

    def compile_blocks(self, **options) -> None:
        """Compile each block (options go to torch.compile), in place: names of weights stay, a copy is not compiled.

        All blocks share one program for any number of rows and tokens, another where there is no gradient (a teacher)
        and where no branch is dropped, so this takes a minute or two and not one for each block and size.
        """
        for block in self.vit.blocks:
            block.compile(**options)
        self._compiled = True

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        embed = self.vit.pos_embed[:, -self.vit.patch_embed.num_patches :]
        made = self.vit.patch_embed.grid_size
        if tuple(grid) == tuple(made):
            return embed
        image = wide(embed).reshape(1, *made, self.dim).permute(0, 3, 1, 2)
        if self.interpolation == "official":
            factor = tuple((g + 0.1) / m for g, m in zip(grid, made, strict=True))
            image = F.interpolate(image, scale_factor=factor, mode="bicubic")
        else:
            image = F.interpolate(image, size=tuple(grid), mode="bicubic", antialias=True)
        return image.flatten(2).mT


class ConvolutionalBackbone(Backbone):
    """A ResNet: its features are the pooled last feature map, its patches the places of that map.

    Unlike timm's default, residual branches don't start at zero: torchvision's, which SwAV and DINO train, don't. Its
    BatchNorm is over the images of all processes.
    """

    def _build(self, image_size: int, options: dict) -> None:
        options = {"zero_init_last": False} | options
        shared = {"num_classes": 0, "global_pool": "avg"}
        if self.name in _SMALL_RESNET:
            self.cnn = _small_resnet(**shared, **(_SMALL_RESNET[self.name] | options))
        else:
            self.cnn = timm.create_model(self.name, **shared, **options)
        over_ranks(self.cnn)
        stochastic_depth.prepare(self._blocks)
        pooled = not isinstance(self.cnn.maxpool, nn.Identity)
        self.patch_size = self.cnn.feature_info[-1]["reduction"] // (1 if pooled else 2)
        self.dim, self.n_layers, self.mask_token = self.cnn.num_features, 4, None

    @property
    def _blocks(self) -> list[nn.Module]:
        return [block for i in range(1, 5) for block in getattr(self.cnn, f"layer{i}")]

    def compile_blocks(self, **_) -> None:
        """Raises ValueError: a ResNet's blocks differ in shape, and each would be a program of its own."""
        raise ValueError(f"{self.name} is not compiled: compile=True is for vision transformers (vit_*)")

    def check_size(self, size: int) -> None:
        """Raise ValueError for crops smaller than one place of the last feature map."""
        if size < self.patch_size:
            raise ValueError(
                f"crops of {size} px are smaller than the stride of {self.name}; choose {self.patch_size} px or more"
            )

    def grid(self, size: int) -> tuple[int, int]:
        """Places along each side of the last feature map."""
        return -(-size // self.patch_size), -(-size // self.patch_size)

    def layer_of(self, parameter_name: str) -> int:
        """Place of a parameter for layer-wise learning rates: the stem 0, stage i (from 1) i."""
        part = parameter_name.removeprefix("cnn.").split(".")[0]
        return int(part.removeprefix("layer")) if part.startswith("layer") else 0

    def forward(
        self,
        x: Float[Tensor, "batch 3 height width"],
        mask: Bool[Tensor, "batch gh gw"] | None = None,
        keep: Int[Tensor, " kept"] | None = None,
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch patches dim"]]:
        """The mean of the last feature map, and the map itself in row order.

        Raises ValueError for a mask or dropped patches: a convolution needs the whole crop.
        """
        if mask is not None or keep is not None:
            raise ValueError("convolutional backbones cannot drop or mask patches; take a vision transformer (vit_*)")
        net, x = self.cnn, x.contiguous(memory_format=torch.channels_last)  # faster than channels first
        x = self._through(self._blocks, net.maxpool(net.act1(net.bn1(net.conv1(x)))))
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast the map is bfloat16
        return self.cnn.forward_head(x), x.flatten(2).mT

    def last_blocks(
        self, x: Float[Tensor, "batch 3 height width"], n: int = 1, norm: bool = True
    ) -> tuple[list[Float[Tensor, "batch dim"]], Float[Tensor, "batch patches dim"]]:
        """As of a transformer, for n = 1 only: the mean of the last feature map, and the map. There is no final norm.

        Raises ValueError for more blocks.
        """
        if n != 1:
            raise ValueError(f"{self.name} has features of its last map only: blocks=1, not {n}")
        x, patches = self(x)
        return [x], patches


def _small_resnet(channels: tuple[int, ...], **options) -> ResNet:
    """A ResNet for small images: its stem, one 3 x 3 convolution of stride 2 and no pooling, halves them once only."""
    # the deep stem's width can be chosen, so the stages fit the convolution that replaces it
    net = ResNet(channels=channels, stem_type="deep", stem_width=channels[0] // 2, **options)
    net.conv1 = nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def _mark_rows(x: Tensor, kept: list[stochastic_depth.Rows] | None) -> None:
    """Tell torch.compile which sizes change from call to call: rows and tokens, and the rows a branch keeps."""
    torch._dynamo.maybe_mark_dynamic(x, [0, 1])
    for index, weight in (rows for rows in kept or () if rows is not None):
        torch._dynamo.maybe_mark_dynamic(index, 0)
        torch._dynamo.maybe_mark_dynamic(weight, 0)
