"""Everything about a run that is not the method."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHOICES = {
    "optimizer": ("adamw", "lars", "larc"),
    "lr_scaling": ("linear", "sqrt", "none"),
    "momentum_schedule": ("cosine", "linear"),
    "clip": ("tensor", "module", "global"),
    "freeze_by": ("gradient", "lr"),
    "head_activation": ("gelu", "relu"),
    "precision": ("auto", "fp32", "bf16"),
}


# settings of the machine and not of the experiment: they decide no record, up to rounding
MACHINE = ("device", "out", "progress", "root", "checkpoint_epochs", "compile", "recompute", "shard", "workers")
MACHINE += ("tensorboard",)


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
    head_layers: int = 3  # linear layers of the projector
    head_activation: str = "gelu"  # between them: gelu or relu
    head_batch_norm: bool = False  # batch normalization in the projector
    epochs: float = 100.0  # passes over the data
    batch_size: int = 256  # images a step, over all processes
    accumulate: int = 1  # parts of a batch, one after the other; centers move with each, Sinkhorn and KoLeo see one
    optimizer: str = "adamw"  # adamw; lars (DINO's ResNet-50); larc (SwAV: biases and norms adapted and decayed too)
    lr: float = 5e-4  # learning rate at its peak, for lr_batch_size images a step, as the official code
    lr_scaling: str = "linear"  # growth of the peak with batch_size / lr_batch_size: linear, sqrt or none
    lr_batch_size: int = 256  # images a step that lr is given for
    min_lr: float = 1e-6  # learning rate at the end of its cosine, whatever the batch size
    warmup_lr: float = 0.0  # learning rate at the first step of its warm-up, whatever the batch size
    warmup_epochs: float = 10.0  # epochs in which the learning rate rises from warmup_lr
    weight_decay: float = 0.04  # at the start; not on biases and norms
    weight_decay_end: float = 0.4  # at the end of its cosine
    momentum_schedule: str = "cosine"  # the way of the teacher's momentum to its end: cosine or linear
    schedule_stretch: float = 1.0  # length of learning rate, decay and momentum schedules, in runs; cut off at 1 (MSN)
    clip_grad: float = 3.0  # largest gradient norm; 0 for none
    clip: str = "tensor"  # what has that norm: tensor, module (backbone, each head) or global (everything)
    clip_prototypes: bool = True  # whether prototypes are clipped (not in MSN)
    freeze_last_layer: float = 1.0  # epochs during which prototypes stand still
    freeze_by: str = "gradient"  # their gradients are dropped, or, by lr, their learning rate is 0 (DINOv2)
    prototype_lr_factor: float = 1.0  # of the prototypes' learning rate, against the rest
    prototype_weight_decay: float = 1.0  # of the prototypes' weight decay, against the rest
    layer_decay: float = 1.0  # of the learning rate, from each layer of the backbone to the one before (DINOv2)
    patch_embed_lr: float = 1.0  # of the patch embedding's learning rate, on top of layer_decay
    drop_path: float = 0.1  # stochastic depth of the student: share of residual branches dropped
    seed: int = 0  # of weights, order and views
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    precision: str = "auto"  # fp32, bf16, or auto: measure a few steps of both
    compile: bool = False  # torch.compile each transformer block: some minutes at the start, then faster on a GPU
    recompute: bool = False  # forget activations inside blocks and compute them again (activation checkpointing)
    shard: bool = False  # spread weights and optimizer over processes (FSDP2), where one GPU cannot hold them
    workers: int = 2  # threads that read the next batches ahead, where images do not fit on the device
    bad_steps: int = 5  # steps in a row without a finite loss, each skipped, before the run stops
    out: str | Path = "runs"  # where run folders are made
    checkpoint_epochs: float = 5.0  # a checkpoint every so many epochs
    monitor_steps: int = 50  # M and a line of metrics every so many steps
    progress: bool = True  # print a line every ten seconds
    tensorboard: bool = False  # event files for TensorBoard, too, in the run folder

    def __post_init__(self):
        for name in ("data", "root", "out"):  # a Path is as good
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        sizes = ("image_size", "local_size", "hidden", "bottleneck", "head_layers")
        sizes += ("batch_size", "accumulate", "lr_batch_size", "monitor_steps", "bad_steps")
        for name in (*sizes, "seed", "workers"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number")
        for name in (*sizes, "epochs", "checkpoint_epochs", "layer_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        not_negative = ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad", "drop_path")
        factors = ("prototype_lr_factor", "prototype_weight_decay", "patch_embed_lr")
        for name in (*not_negative, "workers", "warmup_lr", "freeze_last_layer", *factors):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} does not fit into 64 bits")
        if self.shard and self.optimizer != "adamw":
            raise ValueError(f"shard=True spreads adamw's state only, not that of optimizer={self.optimizer!r}")
        if self.drop_path >= 1:
            raise ValueError(f"drop_path={self.drop_path} must be below 1")
        if not self.schedule_stretch >= 1:
            raise ValueError(f"schedule_stretch={self.schedule_stretch} must be at least 1: schedules last all the run")
        for name, (*others, last) in _CHOICES.items():
            if getattr(self, name) not in (*others, last):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(others)} or {last}")

    @property
    def peak_lr(self) -> float:
        """Learning rate at its peak, for the run's batch size."""
        if self.lr_scaling == "linear":
            return self.lr * self.batch_size / self.lr_batch_size
        return self.lr * (math.sqrt(self.batch_size / self.lr_batch_size) if self.lr_scaling == "sqrt" else 1.0)

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
