"""Everything about a run that is not the method."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """Everything about a run that is not the method: data, network, optimization, machine. Times in epochs.

    Defaults are DINO's for ImageNet (ViT-S/16); `Run.small()` is the setting of the course on a CPU.
    """

    data: str | Path = "cifar10-5k"  # a name of `prototypes data`, or a folder
    split: str = "train"  # part of the data to train on
    root: str | Path | None = None  # where data sets lie; None: the cache folder
    limit: int | None = None  # use only this many images
    backbone: str = "vit_small_patch16_224"  # a vision transformer of timm, or vit_pico_patch8
    backbone_options: dict[str, Any] = field(default_factory=dict)  # further arguments of the backbone
    image_size: int = 224  # side of global crops, px
    local_size: int = 96  # side of local crops, px
    hidden: int = 2048  # width of the projector
    bottleneck: int = 256  # dimension of the codes
    head_batch_norm: bool = False  # batch normalization in the projector
    epochs: float = 100.0  # passes over the data
    batch_size: int = 256  # images a step
    lr: float = 5e-4  # learning rate at its peak, per 256 images a step, as the official code
    min_lr: float = 1e-6  # learning rate at the end of its cosine, whatever the batch size
    warmup_epochs: float = 10.0  # epochs in which the learning rate rises from 0
    weight_decay: float = 0.04  # at the start; not on biases and norms
    weight_decay_end: float = 0.4  # at the end of its cosine
    clip_grad: float = 3.0  # largest gradient norm of a tensor; 0 for none
    freeze_last_layer: float = 1.0  # epochs during which prototypes stand still
    prototype_lr_factor: float = 1.0  # of the prototypes' learning rate, against the rest
    drop_path: float = 0.1  # stochastic depth of the student: share of residual branches dropped
    seed: int = 0  # of weights, order and views
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    precision: str = "auto"  # fp32, bf16, or auto: measure a few steps of both
    out: str | Path = "runs"  # where run folders are made
    checkpoint_epochs: float = 5.0  # a checkpoint every so many epochs
    monitor_steps: int = 50  # M and a line of metrics every so many steps
    progress: bool = True  # print a line every ten seconds

    def __post_init__(self):
        for name in ("data", "root", "out"):  # a Path is as good
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("image_size", "local_size", "hidden", "bottleneck", "batch_size", "monitor_steps", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number")
        positive = ("image_size", "local_size", "hidden", "bottleneck", "epochs", "batch_size", "monitor_steps")
        for name in (*positive, "checkpoint_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        not_negative = ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad", "drop_path")
        for name in (*not_negative, "freeze_last_layer", "prototype_lr_factor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.drop_path >= 1:
            raise ValueError(f"drop_path={self.drop_path} must be below 1")
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
