"""Checkpoint files as other people publish them, made small and with planted prototypes: known M, copies, void set.

`planted` draws prototypes whose count is beyond doubt; `make(layout, folder, w)` writes them as that layout does.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from prototypes_lib.backbones import Backbone


@dataclass(frozen=True)
class Planted:
    """Prototypes w (k, p) of any length. Copies lie within 1 - cos < 0.01 of each other, all others beyond 0.2.

    So at both papers' thresholds, in every order and as connected components, there are `m` of them with these
    redundancies (in order of first appearance). void: which rows point away from the mean of `codes` (n, p).
    """

    w: Tensor
    m: int
    redundancy: tuple[int, ...]
    void: Tensor
    codes: Tensor


def planted(redundancy: Sequence[int], dim: int, void: int = 0, seed: int = 0, n: int = 200) -> Planted:
    """len(redundancy) groups of so many copies, and one more of `void` copies away from all codes; rows shuffled."""
    g = torch.Generator().manual_seed(seed)
    away = F.normalize(torch.randn(dim, generator=g), dim=0)
    kept = [away]
    for _ in range(100_000):
        if len(kept) == len(redundancy) + 1:
            break
        new = F.normalize(torch.randn(dim, generator=g), dim=0)
        if float((torch.stack(kept) @ new).max()) < 0.8:
            kept.append(new)
    assert len(kept) == len(redundancy) + 1, f"{dim} dimensions are too few for {len(redundancy)} prototypes apart"
    sizes = torch.tensor([void, *redundancy])
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    group = group[torch.randperm(len(group), generator=g)]
    noise = F.normalize(torch.randn(len(group), dim, generator=g), dim=1)
    w = F.normalize(torch.stack(kept)[group] + 0.03 * noise, dim=1)
    w = w * torch.empty(len(group), 1).uniform_(0.5, 4, generator=g)
    codes = F.normalize(0.5 * torch.randn(n // 2, dim, generator=g), dim=1)
    codes = torch.cat(
        [codes - away, 2 * (codes @ away)[:, None] * away - codes - away]
    )  # mirrored: their mean is -away
    order = list(dict.fromkeys(group.tolist()))
    counts = tuple(int(sizes[i]) for i in order)
    return Planted(w, len(counts), counts, group == 0, F.normalize(codes, dim=1))


class _Maker:
    """Draws the tensors of one file; all from one seed."""

    def __init__(self, w: Tensor, student: Tensor, patches: Tensor, features: int, hidden: int, seed: int):
        self.w, self.student, self.patches = w, student, patches
        self.features, self.hidden = features, hidden
        self.g = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=self.g)

    def vit(self, chunks: bool = False) -> dict[str, Tensor]:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": self.features, "depth": 2, "num_classes": 0}
        network = VisionTransformer(**shape, num_heads=self.features // 64)
        found = {name: self.normal(*x.shape, scale=0.1) for name, x in network.state_dict().items()}
        if chunks:  # DINOv2's block i lies in chunk c as blocks.c.i
            found = {
                n.replace("blocks.", f"blocks.{n.split('.')[1]}.") if "blocks." in n else n: x for n, x in found.items()
            }
            found["mask_token"] = self.normal(1, self.features)
        return found

    def resnet(self) -> dict[str, Tensor]:
        found = next(Backbone("resnet_pico", 32).children()).state_dict()
        return {name: x if "num_batches" in name else self._positive(name, x) for name, x in found.items()}

    def _positive(self, name: str, x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=self.g) + 0.5 if "running_var" in name else self.normal(*x.shape)

    def linear(self, rows: int, columns: int, bias: bool = True) -> dict[str, Tensor]:
        weight = self.normal(rows, columns, scale=columns**-0.5)
        return {"weight": weight} | ({"bias": self.normal(rows)} if bias else {})

    def batch_norm(self, width: int) -> dict[str, Tensor]:
        return {
            "weight": 1 + self.normal(width), "bias": self.normal(width), "running_mean": self.normal(width),
            "running_var": torch.rand(width, generator=self.g) + 0.5, "num_batches_tracked": torch.tensor(100),
        }  # fmt: skip

    def mlp(self, dim: int, layers: int = 3, norm: bool = False, features: int | None = None) -> dict[str, Tensor]:
        """DINO's: linear layers with GELU between, and BatchNorm before it where `norm`."""
        widths = [features or self.features, *[self.hidden] * (layers - 1), dim]
        found, at = {}, 0
        for i in range(layers):
            found |= prefixed(self.linear(widths[i + 1], widths[i]), f"{at}.")
            if norm and i < layers - 1:
                found |= prefixed(self.batch_norm(self.hidden), f"{at + 1}.")
            at += 3 if norm else 2
        return found

    def last(self, w: Tensor, kind: str = "weight_norm", name: str = "last_layer") -> dict[str, Tensor]:
        """w as its length g and a vector v along it of another length; or as it is."""
        if kind == "plain":
            return {f"{name}.weight": w.clone()}
        length = w.norm(dim=1, keepdim=True)
        v = w / length * torch.empty(len(w), 1).uniform_(0.3, 3, generator=self.g)
        if kind == "parametrized":
            return {f"{name}.parametrizations.weight.original{i}": x for i, x in enumerate((length, v))}
        return {f"{name}.weight_g": length, f"{name}.weight_v": v}

    def head(self, w: Tensor, kind: str = "weight_norm", **options: Any) -> dict[str, Tensor]:
        return prefixed(self.mlp(w.shape[1], **options), "mlp.") | self.last(w, kind)


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in tensors.items()}


def _dino(m: _Maker, student: str = "module.", teacher: str = "", backbone=None, kind="weight_norm", **head) -> dict:
    def network(w, prefix):
        return prefixed((backbone or m.vit)(), f"{prefix}backbone.") | prefixed(
            m.head(w, kind, **head), f"{prefix}head."
        )

    settings = argparse.Namespace(arch="vit_small", out_dim=len(m.w), norm_last_layer=False)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "student": network(m.student, student), "teacher": network(m.w, teacher), "optimizer": optimizer, "epoch": 100,
        "args": settings, "dino_loss": {"center": torch.zeros(1, len(m.w))}, "fp16_scaler": None,
    }  # fmt: skip


def _resnet50(m: _Maker) -> dict:
    return _dino(m, backbone=m.resnet, kind="plain", layers=2, norm=True, features=_width(m.resnet()))


def _width(resnet: dict[str, Tensor]) -> int:
    return max(x.shape[0] for name, x in resnet.items() if name.startswith("layer4.") and x.ndim == 4)


def _k4096(m: _Maker) -> dict:
    """DINO's names of before its release, without a backbone's prefix."""

    def network(w):
        head = prefixed(m.mlp(w.shape[1]), "projection_head.") | m.last(w, name="prototypes")
        return m.vit() | prefixed(head, "head.")

    return {"student": network(m.student), "teacher": network(m.w), "epoch": 100}


def _ibot(m: _Maker, own_patches: bool = False) -> dict:
    def network(w, prefix):
        head = m.head(w)
        second = m.last(m.patches, name="last_layer2")
        alias = {name.replace("last_layer.", "last_layer2."): x for name, x in head.items() if "last_layer." in name}
        head |= second if own_patches else alias
        return prefixed(m.vit(), f"{prefix}backbone.") | prefixed(head, f"{prefix}head.")

    student = network(m.student, "module.") | {"module.backbone.masked_embed": m.normal(1, m.features)}
    settings = argparse.Namespace(arch="vit_base", shared_head=not own_patches)
    center2 = torch.zeros(1, 1, len(m.patches if own_patches else m.w))
    loss = {"center": torch.zeros(1, len(m.w)), "center2": center2}
    return {"student": student, "teacher": network(m.w, ""), "epoch": 80, "args": settings, "ibot_loss": loss}


def _msn(m: _Maker, own: bool = False) -> dict:
    """own: as one trains it oneself, with the anchors' encoder; the released files have the targets' only."""

    def encoder():
        fc = prefixed(m.linear(m.hidden, m.features), "fc1.") | prefixed(m.batch_norm(m.hidden), "bn1.")
        fc |= prefixed(m.linear(m.hidden, m.hidden), "fc2.") | prefixed(m.batch_norm(m.hidden), "bn2.")
        fc |= prefixed(m.linear(m.w.shape[1], m.hidden), "fc3.")
        return prefixed(m.vit() | prefixed(fc, "fc."), "module.")

    extra = {"encoder": encoder(), "opt": {"state": {}, "param_groups": []}, "epoch": 3, "lr": 1e-3} if own else {}
    return {"target_encoder": encoder(), "prototypes": m.w.clone()} | extra


def _swav(m: _Maker, prefix: str = "module.", heads: bool = False) -> dict:
    width = _width(m.resnet())
    fc = prefixed(m.linear(m.hidden, width), "projection_head.0.")
    fc |= prefixed(m.batch_norm(m.hidden), "projection_head.1.")
    fc |= prefixed(m.linear(m.w.shape[1], m.hidden), "projection_head.3.")
    one = {"prototypes.weight": m.w.clone()}
    many = {f"prototypes.prototypes{i}.weight": w.clone() for i, w in enumerate((m.w, m.patches))}
    return prefixed(m.resnet() | fc | (many if heads else one), prefix)


def _dinov2(m: _Maker, tied: bool = False, backbone: bool = True) -> dict[str, Tensor]:
    found = prefixed(m.head(m.w), "dino_head.")
    found |= {} if tied else prefixed(m.head(m.patches), "ibot_head.")
    return (prefixed(m.vit(chunks=True), "backbone.") if backbone else {}) | found


def _simdino(m: _Maker) -> dict:
    def network(prefix):
        return prefixed(m.vit(), f"{prefix}backbone.") | prefixed(m.mlp(m.w.shape[1]), f"{prefix}head.mlp.")

    return {"student": network("module."), "teacher": network(""), "epoch": 100, "args": argparse.Namespace(eps=0.05)}


LAYOUTS: dict[str, tuple[str, Callable[[_Maker], dict]]] = {
    "dino": ("dino_deitsmall16_pretrain_full_checkpoint.pth", _dino),
    "dino-self": ("checkpoint.pth", lambda m: _dino(m) | {"fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0}}),
    "dino-bn": ("checkpoint.pth", lambda m: _dino(m, teacher="module.", norm=True)),
    "dino-parametrized": (
        "checkpoint.pth", lambda m: _dino(m, "module._orig_mod.", "_orig_mod.module.", kind="parametrized"),
    ),
    "dino-resnet50": ("dino_resnet50_pretrain_full_checkpoint.pth", _resnet50),
    "dino-k4096": ("dino_k4096.pth", _k4096),
    "ibot": ("checkpoint.pth", _ibot),
    "ibot-own-patches": ("checkpoint.pth", lambda m: _ibot(m, True)),
    "msn": ("vits16_800ep.pth.tar", _msn),
    "msn-self": ("msn-latest.pth.tar", lambda m: _msn(m, True)),
    "swav": ("swav_800ep_pretrain.pth.tar", _swav),
    "swav-self": ("checkpoint.pth.tar", lambda m: {"epoch": 5, "state_dict": _swav(m), "optimizer": {"state": {}}}),
    "swav-heads": ("deepclusterv2_800ep_pretrain.pth.tar", lambda m: _swav(m, heads=True)),
    "dinov2": ("teacher_checkpoint.pth", lambda m: {"teacher": _dinov2(m)}),
    "dinov2-tied": ("teacher_checkpoint.pth", lambda m: {"teacher": _dinov2(m, tied=True)}),
    "dinov2-fsdp": (
        "teacher_checkpoint.pth",
        lambda m: {"teacher": {n.replace(".", "._fsdp_wrapped_module.", 1): x for n, x in _dinov2(m).items()}},
    ),
    "webssl": ("webssl_dino1b_in1k_224_ssl_heads.pth", lambda m: {"teacher": _dinov2(m, backbone=False)}),
    "webssl-flat": ("webssl_dino1b_in1k_224_ssl_heads.pth", lambda m: _dinov2(m, backbone=False)),
    "simdino": ("checkpoint.pth", _simdino),
    "dino-backbone": ("dino_deitsmall16_pretrain.pth", lambda m: m.vit()),
    "ibot-teacher": ("checkpoint_teacher.pth", lambda m: {"state_dict": m.vit()}),
    "swav-backbone": ("resnet50.pth", lambda m: m.resnet()),
}  # fmt: skip

NO_PROTOTYPES = ("simdino", "dino-backbone", "ibot-teacher", "swav-backbone")
WITH_STUDENT = ("dino", "dino-self", "dino-bn", "dino-parametrized", "dino-resnet50", "dino-k4096", "ibot",
                "ibot-own-patches")  # fmt: skip
OWN_PATCHES = ("ibot-own-patches", "dinov2", "dinov2-fsdp", "webssl", "webssl-flat")


def content(
    layout: str,
    w: Tensor,
    *,
    student: Tensor | None = None,
    patches: Tensor | None = None,
    features: int = 64,
    hidden: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """What a file of this layout holds.

    w: the teacher's prototypes (of the crops; in "swav-heads" of head 0). student: the student's, where the layout has
    one. patches: the patches' own (in "swav-heads" head 1). Those that are not given are drawn. features: the
    backbone's width, of transformers only, a multiple of 64. dtype: of all floating-point tensors.
    """
    g = torch.Generator().manual_seed(seed + 1)
    student = torch.randn(w.shape, generator=g) if student is None else student
    patches = torch.randn(len(w) // 2 + 3, w.shape[1], generator=g) if patches is None else patches
    return cast(LAYOUTS[layout][1](_Maker(w, student, patches, features, hidden, seed)), dtype)


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {name: cast(value, dtype) for name, value in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def make(layout: str, folder: Path, w: Tensor, **options: Any) -> Path:
    """Write such a file under its authors' name into the folder (options of `content`), and return its path."""
    path = Path(folder) / LAYOUTS[layout][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content(layout, w, **options), path)
    return path
