"""Vision transformers from timm, with what pre-training adds: a mask token, crops of any size, patch features out.

`Backbone.vit` is a plain timm model: its state dict carries timm's names and loads into `timm.create_model(name)`.
"""

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


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


class Backbone(nn.Module):
    """A timm vision transformer that takes masks and crops of several sizes.

    Args:
        name: a timm vision transformer (`vit_small_patch16_224`, ...) or one of ours for a CPU, `vit_pico_patch8`
            (dim 64, depth 2) and `vit_nano_patch8` (dim 128, depth 4).
        image_size: side of the global crops; the position embedding is made for it.
        interpolation: how positions are resized for other crops: "antialias" as timm, "official" as DINO and DINOv2
            (bicubic without antialias, 0.1 added to the target grid), which matters for features of released weights.
        options: passed to timm: drop_path_rate, reg_tokens, init_values, pretrained, patch_size ...

    Raises:
        ValueError: an unknown name, or an image size that is not a multiple of the patch size.
    """

    def __init__(self, name: str, image_size: int, *, interpolation: str = "antialias", **options):
        super().__init__()
        if interpolation not in ("antialias", "official"):
            raise ValueError(f"interpolation={interpolation!r}: choose 'antialias' or 'official'")
        shared = {"img_size": image_size, "num_classes": 0, "dynamic_img_size": True}
        if name not in _SMALL and not (timm.is_model(name) and name.startswith(("vit_", "deit_"))):
            raise ValueError(f"backbone {name!r} is neither {', '.join(_SMALL)} nor a timm vision transformer (vit_*)")
        try:
            if name in _SMALL:
                self.vit = VisionTransformer(**shared, **(_SMALL[name] | options))
            else:
                self.vit = timm.create_model(name, **shared, **options)
        except TypeError as error:
            raise ValueError(f"backbone {name!r} does not take an option: {error}") from error
        if name in _SMALL:
            for block in self.vit.blocks:
                block.attn.fused_attn = False  # plain attention is faster on 17 tokens
        vit = self.vit
        plain = type(vit) is VisionTransformer and vit.cls_token is not None and vit.pos_embed is not None
        if not plain or vit.attn_pool is not None or options.get("patch_drop_rate"):
            raise ValueError(f"backbone {name!r}: only plain transformers with a class token and positions work here")
        self.name, self.interpolation = name, interpolation
        self.dim: int = self.vit.embed_dim
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.check_size(image_size)
        self.mask_token = nn.Parameter(torch.zeros(1, self.dim))

    def check_size(self, size: int) -> None:
        """Raise ValueError unless a crop of this side cuts into whole patches."""
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(f"crops of {size} px do not cut into patches of {self.patch_size} px; choose a multiple")

    def grid(self, size: int) -> tuple[int, int]:
        """Patches along each side of a crop."""
        return size // self.patch_size, size // self.patch_size

    def forward(
        self, x: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch gh gw"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch patches dim"]]:
        """Features after the final norm: of the class token, and of the patches in row order.

        mask: True where the mask token replaces the patch embedding, before positions are added (as iBOT).
        """
        vit = self.vit
        x = vit.patch_embed(x)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x.flatten(1, 2) + self._positions(x.shape[1:3])  # in float32 also under autocast, as timm's own forward
        prefix = vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], dim=1)
        if not vit.no_embed_class:  # the embedding then holds positions for class token and registers too
            prefix = prefix + vit.pos_embed[:, : vit.num_prefix_tokens]
        x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        x = vit.norm(vit.blocks(vit.norm_pre(vit.pos_drop(x))))
        return x[:, 0], x[:, vit.num_prefix_tokens :]

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        embed = self.vit.pos_embed[:, -self.vit.patch_embed.num_patches :]
        made = self.vit.patch_embed.grid_size
        if tuple(grid) == tuple(made):
            return embed
        image = embed.reshape(1, *made, self.dim).permute(0, 3, 1, 2).float()
        if self.interpolation == "official":
            factor = tuple((g + 0.1) / m for g, m in zip(grid, made, strict=True))
            image = F.interpolate(image, scale_factor=factor, mode="bicubic")
        else:
            image = F.interpolate(image, size=tuple(grid), mode="bicubic", antialias=True)
        return image.flatten(2).mT
