"""Everything about a run that is not the method."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """Everything about a run that is not the method: data, network, optimization, machine. Times in epochs.

    Defaults are DINO's for ImageNet (ViT-S/16); `Run.small()` is the setting of the course on a CPU.
    """

    data: str = "cifar10-5k"  # a name of `prototypes data`, or a folder
    split: str = "train"
    root: str | None = None  # where data sets lie; None: the cache folder
    limit: int | None = None  # use only this many images
    backbone: str = "vit_small_patch16_224"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224  # side of global crops, px
    local_size: int = 96  # side of local crops, px
    hidden: int = 2048  # width of the projector
    bottleneck: int = 256  # dimension of the codes
    head_batch_norm: bool = False
    epochs: float = 100.0
    batch_size: int = 256
    lr: float = 5e-4  # per 256 images, as the official code
    min_lr: float = 1e-6
    warmup_epochs: float = 10.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip_grad: float = 3.0  # per tensor; 0 for none
    freeze_last_layer: float = 1.0  # epochs during which prototypes stand still
    prototype_lr_factor: float = 1.0  # of the prototypes' learning rate, against the rest
    drop_path: float = 0.1
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    precision: str = "auto"  # fp32, bf16, or auto: measure a few steps of both
    out: str = "runs"
    checkpoint_epochs: float = 5.0
    monitor_steps: int = 50  # M and a line of metrics every so many steps
    progress: bool = True

    def __post_init__(self):
        positive = ("image_size", "local_size", "hidden", "bottleneck", "epochs", "batch_size", "monitor_steps")
        for name in (*positive, "checkpoint_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        not_negative = ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad", "drop_path")
        for name in (*not_negative, "freeze_last_layer", "prototype_lr_factor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r}: choose auto, fp32 or bf16")

    @property
    def stored_size(self) -> int:
        """Side at which images are kept: a little larger than the crops, as the usual 256 for 224."""
        return self.image_size if self.image_size < 64 else self.image_size * 256 // 224

    def but(self, **changes) -> "Run":
        """The same run with these settings changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def small(cls, **changes) -> "Run":
        """A few minutes on a CPU: 32-px images, ViT of dim 64, bottleneck 16."""
        small = {
            "backbone": "vit_pico_patch8", "image_size": 32, "local_size": 16, "hidden": 128, "bottleneck": 16,
            "batch_size": 128, "epochs": 10.0, "warmup_epochs": 1.0, "freeze_last_layer": 0.0, "drop_path": 0.0,
            "precision": "fp32",
        }  # fmt: skip
        return cls(**(small | changes))
