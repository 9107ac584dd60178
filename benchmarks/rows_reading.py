"""Rows of speed.py: nearest neighbors, features, and how long an import takes."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from peers import version
from timing import OURS, Goal, Row
from torch import Tensor

from prototypes_lib import evaluate
from prototypes_lib.backbones import Backbone
from prototypes_lib.data import Images
from prototypes_lib.evaluate import Features
from prototypes_lib.evaluate.knn import neighbors
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD


def _clusters(n: int, dim: int, seed: int) -> Features:
    """Ten wide clusters: some test images are closest to those of another class."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(10, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(10, (n,), generator=draw)
    return Features(F.normalize(centers[labels] + 4 * torch.randn(n, dim, generator=draw), dim=-1), labels)


def _knn(dim: int, k: int, size: str, device: str) -> Row:
    n, m = {"small": (500, 100), "cpu": (50_000, 10_000 if dim < 384 else 4_000), "gpu": (1_281_167, 50_000)}[size]
    train, test, k = _clusters(n, dim, 0), _clusters(m, dim, 1), min(k, n // 10)
    bank, labels = train.x.to(device), train.labels.to(device)

    def votes(similarity: Tensor, places: Tensor) -> Tensor:
        weight = torch.exp((similarity - similarity[:, :1]) / 0.07)
        return torch.zeros(len(places), 10, device=device).scatter_add_(1, labels[places], weight).argmax(-1)

    def ours() -> tuple[Tensor, Tensor | None]:
        found = evaluate.knn(train, test, k, device=device)
        return torch.tensor(found.accuracy[k]), None

    def loop() -> tuple[Tensor, Tensor | None]:
        """The released evaluation's way: a hundredth of the test images at a time, one-hot votes."""
        right = 0
        for rows, truth in zip(test.x.chunk(100), test.labels.chunk(100), strict=True):
            similarity, places = (rows.to(device) @ bank.T).topk(k)
            one_hot = F.one_hot(labels[places], 10).float() * torch.exp(similarity / 0.07)[..., None]
            right += int((one_hot.sum(1).argmax(-1).cpu() == truth).sum())
        return torch.tensor(100 * right / m), None

    peers = {"released script": loop}
    if device == "cpu" and find_spec("sklearn"):
        from sklearn.neighbors import KNeighborsClassifier

        x, y, queries = train.x.numpy(), train.labels.numpy(), test.x.numpy()

        def weights(distance: np.ndarray) -> np.ndarray:  # |a - b|^2 = 2 - 2 cos of unit vectors
            return np.exp(-0.5 * np.square(distance) / 0.07)

        def sklearn(metric: str, weights: Callable) -> tuple[Tensor, Tensor | None]:
            options = {"algorithm": "brute", "metric": metric, "n_jobs": torch.get_num_threads()}
            found = KNeighborsClassifier(k, weights=weights, **options).fit(x, y).predict(queries)
            return torch.tensor(100 * float((found == test.labels.numpy()).mean())), None

        # as the protocol says it, and as it is fastest there: unit vectors are as near in either
        peers[f"{version('scikit-learn')}, cosine"] = partial(sklearn, "cosine", lambda d: np.exp(-d / 0.07))
        peers[f"{version('scikit-learn')}, euclidean"] = partial(sklearn, "euclidean", weights)
    if device == "cpu" and find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())

        def flat() -> tuple[Tensor, Tensor | None]:
            index = faiss.IndexFlatIP(dim)
            index.add(train.x.numpy())
            similarity, places = index.search(test.x.numpy(), k)
            found = votes(torch.from_numpy(similarity), torch.from_numpy(places))
            return torch.tensor(100 * float((found == test.labels).float().mean())), torch.from_numpy(places)

        peers[version("faiss-cpu")] = flat

    def check(answers: dict[str, Any]) -> None:
        for name, (accuracy, _) in answers.items():
            apart = abs(float(accuracy - answers[OURS][0]))
            assert apart <= 100 * 2 / m, f"{name} finds {float(accuracy)} %, we {float(answers[OURS][0])} %"
        some = test.x[:200].to(device)
        exact, places = (some.double() @ bank.double().T).topk(k) if size != "gpu" else (some @ bank.T).topk(k)
        mine = neighbors(some, bank, k)
        _same(exact, places, *mine, "ours")
        for name, (_, found) in answers.items():
            if found is not None:
                at = found[:200].to(device)
                _same(exact, places, (some[:, None] * bank[at]).sum(-1), at, name)

    return Row(
        f"kNN, d = {dim}", "Weighted kNN of all test images, from features to accuracy.",
        {"bank": n, "queries": m, "dim": dim, "k": k}, ours, peers, check,
        tuple(Goal(name, 1 / 3 if name.startswith(("scikit", "rel")) else 1.0)
              for name in peers if device != "cpu" or not name.startswith("rel")),
        work=2.0 * n * m * dim, memory="process",
        limit="the product with the bank is the same float32 operation for all, and half or more of every peer's time: "
        "see the share",
    )  # fmt: skip


def _same(exact: Tensor, places: Tensor, similarity: Tensor, found: Tensor, name: str) -> None:
    """The same neighbors in the same order, up to such as are equally near to rounding."""
    assert float((similarity.double() - exact).abs().max()) < 1e-5, f"{name}: another similarity of a neighbor"
    other = found != places
    assert bool((other.float().mean() < 0.01) | (len(places) == 0)), f"{name}: other neighbors"


def knn_192(size: str, device: str) -> Row:
    return _knn(192, 20, size, device)


def knn_384(size: str, device: str) -> Row:
    return _knn(384, 20, size, device)


def features(size: str, device: str) -> Row:
    """Class-token features of decoded images, resized and normalized on the way."""
    name, side, n, stored = {
        "small": ("vit_tiny_patch16_224", 32, 8, 36),
        "cpu": ("vit_tiny_patch16_224", 96, 256, 128),
        "gpu": ("vit_small_patch16_224", 224, 4096, 256),
    }[size]
    torch.manual_seed(0)
    backbone = Backbone(name, side)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (n, stored, stored, 3), dtype=np.uint8)
    images = Images(pixels, np.zeros(n, dtype=np.int64), ("none",), "noise")
    vit = timm.create_model(name, img_size=side, num_classes=0).eval().to(device)
    vit.load_state_dict(backbone.vit.state_dict())
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.inference_mode()
    def direct() -> Tensor:
        from torchvision.transforms.v2 import functional as V

        found = []
        for rows in torch.from_numpy(pixels).split(256):
            x = rows.to(device).permute(0, 3, 1, 2).float() / 255
            x = V.resize(x, side * 256 // 224, interpolation=V.InterpolationMode.BICUBIC, antialias=True)
            x = (V.center_crop(x, side).clamp(0, 1) - mean) / std
            found.append(vit(x).cpu())
        return torch.cat(found)

    def check(answers: dict[str, Any]) -> None:
        a, b = (F.normalize(x.float(), dim=-1) for x in answers.values())
        cosine = float((a * b).sum(-1).min())
        assert cosine > 0.999, f"features of one image have a cosine of {cosine:.4f}"

    peer = f"{version('timm')}, written directly"
    return Row(
        "features", features.__doc__, {"backbone": name, "images": n, "side": side},
        lambda: evaluate.extract(backbone, images, size=side, device=device).x, {peer: direct}, check,
        (Goal(peer, 1 / 0.97),), limit="the network is timm's on both sides",
    )  # fmt: skip


def cold_start(size: str, device: str) -> Row:
    """Importing what trains, in a fresh process, torch included."""

    def imports(*modules: str) -> Any:
        def run() -> bool:
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {', '.join(modules)}"])
            return done.returncode == 0

        return run

    peers = {version("timm"): imports("timm")}
    if find_spec("lightly"):
        peers[version("lightly")] = imports("lightly.loss", "lightly.models.modules", "lightly.transforms")

    def check(answers: dict[str, Any]) -> None:
        assert all(answers.values()), f"an import fails: {answers}"

    return Row(
        "cold start", cold_start.__doc__, {}, imports("prototypes_lib.train"), peers, check,
        tuple(Goal(name, 0.5) for name in peers if "lightly" in name), memory=None, once=True,
        limit="torch and timm alone, which all of us import, take most of it",
    )  # fmt: skip


ROWS = {"knn-192": knn_192, "knn-384": knn_384, "features": features, "cold-start": cold_start}
