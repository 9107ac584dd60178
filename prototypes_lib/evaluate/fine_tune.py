"""Fine-tuning the whole network with a linear head: how good a start are these weights?"""

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from tqdm import tqdm

from prototypes_lib import stochastic_depth
from prototypes_lib.backbones import Backbone
from prototypes_lib.batches import generator, number
from prototypes_lib.data import Images, check_batch, check_classes
from prototypes_lib.evaluate.augmented import batches, mix, random_state, reseed
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.recipes import CPU, INAT_B, INAT_S, PRESETS, SMALL_SETS, VIT_B, VIT_S, FineTuning
from prototypes_lib.schedules import cosine
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD, eval_view

__all__ = [
    "CPU",
    "INAT_B",
    "INAT_S",
    "PRESETS",
    "SMALL_SETS",
    "VIT_B",
    "VIT_S",
    "Classifier",
    "FineTune",
    "FineTuning",
    "fine_tune",
]


@dataclass(frozen=True)
class FineTune:
    """Accuracy in percent after the last epoch, at the learning rate where that is highest.

    accuracy, interval (95 % Wilson over the n test images), per_class (mean over classes that have test images) are of
    `lr`'s last epoch. curves: accuracy after every epoch for each learning rate, losses: mean training loss. `best` is
    the number the official code prints.
    """

    accuracy: float
    interval: tuple[float, float]
    per_class: float
    lr: float
    curves: dict[float, tuple[float, ...]]
    losses: dict[float, tuple[float, ...]]
    n: int
    seed: int

    @property
    def best(self) -> tuple[float, int, float]:
        """(lr, epoch from 1, accuracy) of the best epoch of all: chosen on the test images, so slightly optimistic."""
        lr = max(self.curves, key=lambda lr: max(self.curves[lr]))
        highest = max(self.curves[lr])
        return lr, self.curves[lr].index(highest) + 1, highest


def fine_tune(
    backbone: Backbone,
    train: Images,
    test: Images,
    *,
    settings: FineTuning = VIT_S,
    size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    progress: bool = True,
) -> FineTune:
    """Train a copy of the backbone with a linear head on its class token (a ResNet's pooled map), and test each epoch.

    AdamW on the cross-entropy with soft labels of mixed, randomly augmented images; the learning rate of layer l of L
    is layer_decay^(L + 1 - l) of the head's, which rises linearly and falls as a cosine (BEiT; vMF, A.6.5; iBOT). The
    result is a function of the arguments without `workers`, and no global random state is moved.

    Differences from the official code:

    * it prints the best epoch on the test images (`best` here); `accuracy` is the last epoch's. With several learning
      rates both choose the rate on the test images;
    * float32, on a GPU bfloat16 autocast, instead of float16 with loss scaling. One process: a part of a batch
      (`accumulate`) is what a process has there, with its own mixup; dropped paths and augmentation are other draws;
    * test images are resized bicubically on the device, not by Pillow, where BEiT's script resizes bilinearly;
    * images of 32 px or less are padded and cropped only if they have the size of the network's input; all others get
      random resized crops;
    * positions are resized to the input on the fly and keep their own grid, where BEiT resizes them once, before;
    * SMALL_SETS and INAT: the schedule goes by step and not by epoch, tokens and positions are not decayed, and there
      is no moving average of the weights (the official code keeps one, but tests without it).

    As in BEiT the final norm learns as fast as the head; timm's groups have it in the last block. A ResNet's layers are
    its stem and its 4 stages.

    Args:
        backbone: stays as it is. train, test: with the same classes and a label for every image.
        settings: a recipe: VIT_S, VIT_B, SMALL_SETS, INAT_S, INAT_B, CPU, or any with `.but(...)`.
        size: side of the network's input in px; by default the training images' own side, cut to whole patches.
        workers: processes that augment the next images meanwhile, each with a copy of the images where processes cannot
            be forked (macOS, Windows).
        mean, std: of the colors, those the backbone was trained with.

    Raises:
        ValueError: before any work: a batch larger than the training set, images without label, a single class, classes
            that differ, a size that does not cut into patches, a backbone whose weights are not finite.
        FloatingPointError: a training loss that is not finite.
    """
    device = torch.device(device)
    with random_state(device):
        _check(backbone, train, test, settings)
        side = min(train.pixels.shape[1:3])
        size = size or side - side % backbone.patch_size
        backbone.check_size(size)
        n_classes = int(max(train.labels.max(), test.labels.max())) + 1
        truth = torch.from_numpy(np.asarray(test.labels))
        colors = {"mean": mean, "std": std}
        steps = len(settings.lrs) * settings.epochs * (len(train) // settings.batch_size)
        curves: dict[float, tuple[float, ...]] = {}
        losses: dict[float, tuple[float, ...]] = {}
        last: dict[float, Tensor] = {}
        with tqdm(total=steps, desc="fine-tuning", file=sys.stdout, mininterval=5, disable=not progress) as bar:
            for lr in settings.lrs:
                network = Classifier(backbone, n_classes, settings, seed).to(device)
                own = {"size": size, "seed": seed, "workers": workers, "bar": bar}
                for loss in epochs(network, train, lr, settings, **own, **colors):
                    last[lr] = predict(network, test, size, device, **colors) == truth
                    curves[lr] = (*curves.get(lr, ()), 100 * float(last[lr].double().mean()))
                    losses[lr] = (*losses.get(lr, ()), loss)
                    bar.set_postfix_str(f"lr {lr:g}, epoch {len(losses[lr])}: {curves[lr][-1]:.1f} %", refresh=False)
        lr = max(curves, key=lambda lr: curves[lr][-1])
        per_class = [float(last[lr][truth == label].double().mean()) for label in truth.unique()]
        mean = 100 * sum(per_class) / len(per_class)
        interval = wilson(int(last[lr].sum()), len(test))
        return FineTune(curves[lr][-1], interval, mean, lr, curves, losses, len(test), seed)


class Classifier(nn.Module):
    """A copy of the backbone, all of it trainable, with stochastic depth and a new linear head made from the seed."""

    def __init__(self, backbone: Backbone, n_classes: int, settings: FineTuning, seed: int):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).float().requires_grad_(True)  # a teacher's copy too learns
        if self.backbone.mask_token is not None:
            self.backbone.mask_token.requires_grad_(False)  # masks nothing here
        drop_paths(self.backbone, settings.drop_path)
        # made without drawing: torch's own initialization would move the global generator
        self.head = nn.utils.skip_init(nn.Linear, self.backbone.dim, n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=generator(seed, "head"))
        self.head.weight.data *= settings.init_scale
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.backbone(images)[0])


def drop_paths(backbone: Backbone, rate: float) -> None:
    """Set stochastic depth, in place, to what `Backbone(..., drop_path_rate=rate)` has: 0 in the first block, linear.

    So the copy keeps whatever options its backbone was made with.
    """
    blocks = list(backbone.vit.blocks if hasattr(backbone, "vit") else backbone._blocks)
    for block, share in zip(blocks, np.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for owner in list(block.modules()):
            for name in ("drop_path", "drop_path1", "drop_path2"):
                if hasattr(owner, name):
                    setattr(owner, name, DropPath(share))
    stochastic_depth.prepare(blocks)


def parameter_groups(network: Classifier, settings: FineTuning) -> list[dict]:
    """Groups for AdamW: `lr_scale` = layer_decay^(L + 1 - layer), 1 for final norm and head, and their weight decay.

    Biases, one-dimensional parameters, class token and positions are not decayed.
    """
    backbone, groups = network.backbone, {}
    tokens = {f"backbone.vit.{name}" for name in backbone.vit.no_weight_decay()} if hasattr(backbone, "vit") else ()
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        top = backbone.n_layers + 1
        layer = backbone.layer_of(name.removeprefix("backbone.")) if name.startswith("backbone.") else top
        decay = 0.0 if parameter.ndim == 1 or name in tokens else settings.weight_decay
        groups.setdefault((settings.layer_decay ** (top - layer), decay), []).append(parameter)
    return [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


def epochs(
    network: Classifier,
    train: Images,
    lr: float,
    settings: FineTuning,
    *,
    size: int,
    seed: int,
    workers: int = 0,
    bar: tqdm | None = None,
    **colors: tuple[float, float, float],
) -> Iterator[float]:
    """Train the network in place, on the device where it is; yields the mean loss after each epoch.

    colors: mean and std, ImageNet's by default.

    Raises FloatingPointError where the loss is not finite.
    """
    device, parts, n = network.head.weight.device, settings.accumulate, settings.batch_size
    per_epoch = len(train) // n
    groups = parameter_groups(network, settings)
    rates = cosine(
        settings.peak(lr), settings.min_lr, settings.epochs * per_epoch,
        warmup_steps=settings.warmup_epochs * per_epoch, warmup_from=settings.warmup_lr,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    loader = iter(batches(train, settings, size, seed, workers, **colors))
    for epoch in range(settings.epochs):
        network.train()
        total = 0.0
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = float(rates[step]) * group["lr_scale"]
            optimizer.zero_grad(set_to_none=True)
            for part in range(parts):
                images, labels = (x.to(device, non_blocking=True) for x in next(loader))
                draw = number(seed, "part", step, part)
                reseed(draw, device)
                with stochastic_depth.at(draw, n, part, parts):
                    images, targets = mix(images, labels, network.head.out_features, settings)
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        scores = network(images)
                    loss = SoftTargetCrossEntropy()(scores.float(), targets) / parts
                    loss.backward()
                total += loss.item() / per_epoch
                if not math.isfinite(total):
                    raise FloatingPointError(
                        f"fine-tuning: the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}, at lr={lr:g}; "
                        "take smaller lrs"
                    )
            optimizer.step()
            if bar is not None:
                bar.update()
        yield total


@torch.no_grad()
def predict(
    network: Classifier, images: Images, size: int, device: torch.device, **colors: tuple[float, float, float]
) -> Int[Tensor, " n"]:
    """The class with the highest score for each image, on the CPU."""
    network.eval()
    found = []
    for start in range(0, len(images), 256):
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels[start : start + 256])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found.append(network(eval_view(pixels, size, **colors)).argmax(-1).cpu())
    return torch.cat(found)


def _check(backbone: Backbone, train: Images, test: Images, settings: FineTuning) -> None:
    for name, part in (("training", train), ("test", test)):
        if not len(part):
            raise ValueError(f"fine-tuning: there are no {name} images; give at least one")
        if int(part.labels.min()) < 0:
            n = int((part.labels < 0).sum())
            raise ValueError(f"fine-tuning: {n} {name} images have no label (-1); take labeled ones")
    check_classes(train, test)
    check_batch(train, settings.batch_size)
    if len(np.unique(train.labels)) < 2:
        raise ValueError("fine-tuning: all training images are of one class; a classifier needs two")
    if not all(bool(p.isfinite().all()) for p in backbone.state_dict().values()):
        raise ValueError(f"fine-tuning: weights of {backbone.name} are not finite; take another checkpoint")
