"""Recipes of fine-tuning: iBOT's, which are BEiT's and DeiT's, and one for a CPU."""

import dataclasses
import math
from dataclasses import dataclass

from timm.data.auto_augment import rand_augment_transform


@dataclass(frozen=True)
class FineTuning:
    """A recipe. Defaults are iBOT's (BEiT's) for ViT-S/16 on ImageNet, `VIT_S`; times are in epochs.

    Raises ValueError for a value that makes no sense.
    """

    lrs: tuple[float, ...] = (8e-4, 9e-4, 1e-3, 2e-3)  # peak learning rates, each a run of its own
    lr_batch_size: int | None = None  # images a step that lrs are for, scaled linearly (DeiT); None: never scaled
    epochs: int = 200
    batch_size: int = 1024
    accumulate: int = 8  # parts of a batch, one after the other, each mixed on its own: the 8 GPUs of the official code
    repeats: int = 1  # copies of an image in a batch, of so many fewer images an epoch (DeiT's repeated augmentation)
    warmup_epochs: int = 20
    warmup_lr: float = 0.0  # learning rate at the first step
    min_lr: float = 1e-6  # learning rate at the end of its cosine
    weight_decay: float = 0.05  # not on biases, norms, tokens and positions
    layer_decay: float = 0.75  # of the learning rate, from each layer to the one before
    drop_path: float = 0.1  # stochastic depth, rising from block to block
    init_scale: float = 0.001  # of the head's initial weights, whose deviation is 0.02
    augment: bool = True  # False: no crops, flips, RandAugment and erasing, but the view of the test images
    rand_augment: str = "rand-m9-mstd0.5-inc1"  # timm's name; "" for color jitter 0.4 instead
    erase: float = 0.25  # probability of random erasing, by noise
    mixup: float = 0.8  # alpha of mixup, which takes turns with cutmix; 0 for none
    cutmix: float = 1.0  # alpha of cutmix; 0 for none
    smoothing: float = 0.1  # of labels

    def __post_init__(self):
        wholes = ("epochs", "batch_size", "accumulate", "repeats")
        bad = [name for name in wholes if not isinstance(getattr(self, name), int) or getattr(self, name) < 1]
        bad += [name for name in ("drop_path", "smoothing") if not 0 <= getattr(self, name) < 1]
        bad += [] if 0 <= self.erase <= 1 else ["erase"]
        sizes = ("warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "init_scale", "mixup", "cutmix")
        bad += [name for name in sizes if not 0 <= getattr(self, name) < math.inf]
        bad += [] if 0 < self.layer_decay <= 1 else ["layer_decay"]
        bad += [] if self.lr_batch_size is None or self.lr_batch_size > 0 else ["lr_batch_size"]
        bad += [] if self.lrs and len(set(self.lrs)) == len(self.lrs) else ["lrs"]
        if bad:
            raise ValueError(f"fine-tuning: {bad[0]}={getattr(self, bad[0])!r} is out of range")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"fine-tuning: warmup_epochs={self.warmup_epochs} must be fewer than epochs={self.epochs}")
        for lr in self.lrs:
            if not (0 < lr < math.inf and self.min_lr <= self.peak(lr)):
                raise ValueError(f"fine-tuning: lr={lr} peaks at {self.peak(lr):g}, not above min_lr={self.min_lr:g}")
        part, rest = divmod(self.batch_size, self.accumulate)
        if rest or ((self.mixup or self.cutmix) and part % 2):
            raise ValueError(
                f"fine-tuning: batch_size={self.batch_size} must cut into accumulate={self.accumulate} equal parts, "
                "even ones for mixup and cutmix"
            )
        try:
            rand_augment_transform(self.rand_augment or "rand-m9")
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"fine-tuning: rand_augment={self.rand_augment!r} is no RandAugment of timm") from error

    def peak(self, lr: float) -> float:
        """The learning rate that one of `lrs` stands for, at the recipe's batch size."""
        return lr if self.lr_batch_size is None else lr * self.batch_size / self.lr_batch_size

    def but(self, **changes) -> "FineTuning":
        """The same recipe with these settings changed."""
        return dataclasses.replace(self, **changes)


VIT_S = FineTuning()
VIT_B = VIT_S.but(epochs=100, layer_decay=0.65, drop_path=0.2)  # later versions of iBOT's page leave drop_path at 0.1
# DeiT's recipe, which iBOT takes for CIFAR-10, CIFAR-100 and Flowers; for Cars lrs=(7.5e-5,)
SMALL_SETS = VIT_S.but(
    lrs=(7.5e-6,), lr_batch_size=512, epochs=1000, batch_size=768, repeats=3, warmup_epochs=5, warmup_lr=1e-6,
    min_lr=1e-5, layer_decay=1.0, init_scale=1.0,
)  # fmt: skip
INAT_B = SMALL_SETS.but(epochs=360, erase=0.1)
INAT_S = INAT_B.but(lrs=(5e-5,))  # iNaturalist-2018; 2.5e-5 for 2019
# no paper's: a minute or two for a few thousand images of 32 px and a network of ours, too short for augmentation
CPU = FineTuning(
    lrs=(2e-3,), epochs=10, batch_size=64, accumulate=1, warmup_epochs=1, layer_decay=1.0, drop_path=0.0,
    init_scale=1.0, augment=False, mixup=0.0, cutmix=0.0,
)  # fmt: skip
PRESETS = {"vit-s": VIT_S, "vit-b": VIT_B, "small-sets": SMALL_SETS, "inat-b": INAT_B, "inat-s": INAT_S, "cpu": CPU}
