"""The linear probe: one layer trained with SGD on frozen features, and all learning rates of a sweep in one pass."""

import functools
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from prototypes_lib.backbones import Backbone
from prototypes_lib.data import Images, check_classes
from prototypes_lib.evaluate.features import Features, _in_eval_mode, check, extract, kind
from prototypes_lib.evaluate.intervals import check_seed, wilson
from prototypes_lib.photometric import Photometric
from prototypes_lib.schedules import cosine
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD, MultiCrop

# learning rates for a batch of 256; `linear` scales them with the batch
LRS_DINO = (1e-3,)
LRS_IBOT = tuple(float(f"{n}e{k}") for k in range(-4, 1) for n in range(1, 10))
LRS_DINOV2 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

MOST_HELD_OUT = 10_000  # images are enough to tell learning rates apart, and the others are better trained on


@dataclass(frozen=True)
class Linear:
    """Accuracies in percent on n test images.

    Attributes:
        accuracy: after the last epoch, at the learning rate `lr`, which the test images had no part in choosing.
        interval: its 95 % Wilson interval over the test images.
        official: what the official scripts print, the best of all epochs and learning rates on the test images.
        last, best: of each learning rate (for a batch of 256), after the last and after its best epoch.
        held_out: of each learning rate on the training images held out to choose one; empty where nothing was chosen.
        features: which ones, as asked for. augmented: whether they were of random crops.
    """

    accuracy: float
    interval: tuple[float, float]
    lr: float
    official: float
    last: dict[float, float]
    best: dict[float, float]
    held_out: dict[float, float]
    n: int
    epochs: int
    seed: int
    features: str
    augmented: bool


def linear(
    train: Features | Images,
    test: Features | Images,
    *,
    backbone: Backbone | None = None,
    features: str = "C",
    size: int | None = None,
    lrs: Sequence[float] = LRS_DINO,
    epochs: int = 100,
    batch_size: int = 256,
    schedule: str = "epoch",
    holdout: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    progress: bool = True,
) -> Linear:
    """Train W x + b on frozen features with SGD as DINO does, for all learning rates at once, and try it on `test`.

    Images and a backbone: the official protocol. In each epoch every training image is seen as another random crop
    (8-100 % of its area, flipped or not) through the frozen backbone. Features: the same training on features as they
    are, without augmentation, which is not the official protocol but needs no pixels and one pass of the backbone.

    SGD with momentum 0.9 and no weight decay on the mean cross entropy, learning rate lr * batch_size / 256 that falls
    along half a cosine to 0 over the epochs; W starts at N(0, 0.01^2) and b at 0. iBOT trains a head for each of 45
    learning rates on the same batches and reports the best, DINOv2 for each of 13: `lrs=LRS_IBOT`, `LRS_DINOV2`.

    The scripts choose the learning rate and the epoch by accuracy on the test images, which is optimistic: `official`.
    `accuracy` is that of the last epoch, and of several learning rates the one whose twin, trained in the same pass
    but without a tenth of the training images, is best on these (the twin only chooses; what is tried on the test
    images was trained on all). With holdout=0 the test images choose the learning rate for `accuracy` too.

    Further differences from the official code: all heads start from the same weights; classes are counted from the
    labels; crops are bicubic and antialiased as DINOv2's (DINO and iBOT: bilinear); DINO concatenates class token and
    mean patch token in another order, which matters for nothing but loading its heads. DINOv2 also tries 1 and 4
    blocks, with and without the mean patch token, and draws batches from an endless shuffle of 10 x 1250 steps.

    Args:
        train, test: both Features, or both Images with `backbone`.
        features: of images, "C" the class token of the last block, or "D" what DINO takes (`features.kind`); of
            Features, only the name is kept.
        size: side of the views in pixels; by default the images' own, cut to whole patches.
        lrs: learning rates for a batch of 256.
        schedule: whether the learning rate changes after each "epoch" (DINO, iBOT) or each "step" (DINOv2).
        holdout: share of the training images (at most 10,000) that chooses among several learning rates.
        seed: of weights, order, crops, and which images are held out.

    Raises:
        ValueError: features or labels that `check` refuses, Images without a backbone or Features with one, classes
            that differ, an option out of range, no image to hold out.
    """
    lrs = tuple(float(lr) for lr in lrs)
    check_seed(seed)
    check_options(lrs, epochs, batch_size, schedule, holdout)
    augmented = _check_sets(train, test, backbone)
    labels = torch.as_tensor(train.labels)
    held = _held_out(labels, holdout, seed) if holdout and len(lrs) > 1 else None
    draw = torch.Generator().manual_seed(seed)
    if augmented:
        side = min(train.pixels.shape[1:3])
        size = size or side - side % backbone.patch_size
        view = kind(backbone, features) | {"size": size, "mean": mean, "std": std}
        own = {"batch_size": batch_size, "device": device, "progress": progress}
        tried = extract(backbone, test, **view, **own)
        judges = tried if held is None else extract(backbone, train.subset(held.numpy()), **view, **own)
        check(judges, tried)
        batch = functools.partial(_crops, backbone, train, draw, device, view)
    else:
        tried = test
        judges = test if held is None else Features(train.x[held], labels[held])
        batch = functools.partial(_rows, _near(train.x, device), device)
    heads = Heads(labels.unique(), tried.x, lrs if held is None else lrs * 2, batch_size / 256, draw, device)
    shares = torch.ones(1 if held is None else 2, len(labels))
    if held is not None:
        shares[1, held] = 0  # the twins don't see what is held out
    steps = math.ceil(len(labels) / batch_size)
    factors = cosine(1.0, 0.0, epochs if schedule == "epoch" else epochs * steps).tolist()
    best = torch.zeros(len(lrs), dtype=torch.long)
    with (
        _in_eval_mode(backbone, device) if augmented else nullcontext(),
        tqdm(total=epochs * steps, desc="linear", file=sys.stdout, mininterval=5, disable=not progress) as bar,
    ):
        for epoch in range(epochs):
            for step, rows in enumerate(torch.randperm(len(labels), generator=draw).split(batch_size)):
                factor = factors[epoch if schedule == "epoch" else epoch * steps + step]
                heads.step(batch(rows), labels[rows], shares[:, rows], factor)
                bar.update()
            last = heads.hits(tried)[: len(lrs)]
            best = torch.maximum(best, last)
    chosen_by = last if held is None else heads.hits(judges)[len(lrs) :]
    chosen, n = int(chosen_by.argmax()), len(tried.x)
    percent = lambda hits, of: dict(zip(lrs, (100 * hits.double() / of).tolist(), strict=True))
    return Linear(
        accuracy=100 * int(last[chosen]) / n,
        interval=wilson(int(last[chosen]), n),
        lr=lrs[chosen],
        official=100 * int(best.max()) / n,
        last=percent(last, n),
        best=percent(best, n),
        held_out={} if held is None else percent(chosen_by, len(judges.x)),
        n=n,
        epochs=epochs,
        seed=seed,
        features=features,
        augmented=augmented,
    )


class Heads:
    """Linear classifiers of one start and many learning rates, (classes, heads, dim + 1), trained as one tensor.

    No head touches another's numbers, so one that diverges spoils itself only; what it can't score is missed. Heads
    lie side by side, not the classes of a head, as softmax over ten neighboring numbers is slow.

    Args: classes: the labels in ascending order; x: features, for their length and precision; lrs: one a head, times
    `scale`; draw: for the weights.
    """

    def __init__(
        self,
        classes: Int[Tensor, " classes"],
        x: Shaped[Tensor, "n dim"],
        lrs: Sequence[float],
        scale: float,
        draw: torch.Generator,
        device: str | torch.device = "cpu",
    ):
        dtype = torch.promote_types(x.dtype, torch.float32)
        start = F.pad(0.01 * torch.randn(len(classes), x.shape[1], generator=draw), (0, 1))  # the bias comes last
        self.classes, self.rate = classes.to(device), torch.tensor(lrs, dtype=dtype, device=device) * scale
        self.weight = start.to(device, dtype)[:, None].repeat(1, len(lrs), 1)
        self.velocity = torch.zeros_like(self.weight)

    @torch.no_grad()
    def scores(self, x: Shaped[Tensor, "n dim"]) -> Float[Tensor, "n classes heads"]:
        """W x + b of each head, in float32 at least."""
        weight, x = self.weight.flatten(0, 1), x.to(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            return torch.addmm(weight[:, -1], x, weight[:, :-1].T).unflatten(1, self.weight.shape[:2])

    @torch.no_grad()
    def step(
        self,
        x: Shaped[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        shares: Float[Tensor, "groups batch"],
        factor: float,
    ) -> None:
        """One step of SGD, learning rates times `factor`: v <- 0.9 v + dL/dW, W <- W - lr v (torch.optim.SGD).

        L is the mean cross entropy, weighted by `shares` of the images, alike for as many heads as there are heads to
        a group: dL/d(Wx + b) = share (softmax - one-hot) / sum of shares.
        """
        x = F.pad(x.to(self.weight), (0, 1), value=1.0)
        truth = torch.searchsorted(self.classes, labels.to(self.classes))
        shares = shares.to(self.weight)
        shares = (shares / shares.sum(1, keepdim=True).clamp(min=1)).repeat_interleave(len(self.rate) // len(shares), 0)
        error = self.scores(x[:, :-1]).softmax(1)
        error[torch.arange(len(x), device=x.device), truth] -= 1
        error *= shares.T[:, None]
        with torch.autocast(x.device.type, enabled=False):
            self.velocity.flatten(0, 1).addmm_(error.flatten(1).T, x, beta=0.9)
        self.weight.addcmul_(self.rate[:, None], self.velocity, value=-factor)

    def hits(self, features: Features, block: int = 2**26) -> Int[Tensor, " heads"]:
        """How many images each head classifies rightly; labels it has not learned are missed."""
        hits = torch.zeros(len(self.rate), dtype=torch.long, device=self.weight.device)
        rows = max(1, block // self.weight[..., 0].numel())
        for x, truth in zip(features.x.split(rows), features.labels.split(rows), strict=True):
            top = self.scores(x).max(1)
            right = (self.classes[top.indices] == truth.to(self.classes)[:, None]) & top.values.isfinite()
            hits += right.sum(0)
        return hits.cpu()


def _rows(x: Tensor, device: str | torch.device, rows: Tensor) -> Tensor:
    return x[rows.to(x.device)].to(device)


def _near(x: Tensor, device: str | torch.device) -> Tensor:
    """On the device, unless they would fill half of a GPU's free memory: then they are taken batch by batch."""
    gpu = torch.device(device).type == "cuda"
    return x if gpu and x.nbytes > torch.cuda.mem_get_info(device)[0] // 2 else x.to(device)


@torch.no_grad()
def _crops(
    backbone: Backbone, images: Images, draw: torch.Generator, device: str | torch.device, view: dict, rows: Tensor
) -> Float[Tensor, "batch dim"]:
    """Features of one random crop of each of the images: 8-100 % of the area, half of them flipped."""
    crop = MultiCrop(
        n_global=1, n_local=0, global_size=view["size"], global_scale=(0.08, 1.0),
        first=Photometric(jitter=0, gray=0, blur=0), mean=view["mean"], std=view["std"],
    )  # fmt: skip
    pixels = torch.from_numpy(images.pixels[rows.numpy()]).to(device)
    tokens, patches = backbone.last_blocks(crop.views(pixels, draw)[0], view["blocks"], view["norm"])
    return torch.cat([*tokens, patches.mean(1)] if view["pool"] else tokens, dim=1).float()


def _held_out(labels: Tensor, holdout: float, seed: int) -> Tensor:
    """Images drawn to choose among learning rates; of each class one is left to learn from."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = np.unique(labels[order].numpy(), return_index=True)[1]
    free = torch.from_numpy(np.delete(order.numpy(), kept))
    if not len(free):
        raise ValueError(
            "no training image can be held out to choose a learning rate, each class has but one; "
            "give one learning rate, or holdout=0 to choose on the test images as the official scripts do"
        )
    return free[: min(max(1, round(holdout * len(labels))), MOST_HELD_OUT)].sort().values


def _check_sets(train: Features | Images, test: Features | Images, backbone: Backbone | None) -> bool:
    """Whether they are images; raises ValueError unless a probe can be trained on the one and tried on the other."""
    augmented = isinstance(train, Images)
    if augmented != isinstance(test, Images) or augmented != (backbone is not None):
        raise ValueError("linear takes Features and Features, or Images and Images with a backbone")
    if not augmented:
        check(train, test)
        return False
    check_classes(train, test)
    for name, images in (("training", train), ("test", test)):
        if not len(images) or images.labels.min() < 0:
            raise ValueError(f"{int((images.labels < 0).sum())} of {len(images)} {name} images have no label")
    return True


def check_options(lrs: tuple[float, ...], epochs: int, batch_size: int, schedule: str, holdout: float) -> None:
    """Raise ValueError, one line, for options that `linear` would refuse: to be told before data are read."""
    if not lrs or len(set(lrs)) < len(lrs) or not all(0 < lr < math.inf for lr in lrs):
        raise ValueError(f"lrs={lrs}: give positive learning rates, each once")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1")
    if schedule not in ("epoch", "step"):
        raise ValueError(f"schedule={schedule!r}: choose 'epoch' (DINO, iBOT) or 'step' (DINOv2)")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} must be a share in [0, 1)")
