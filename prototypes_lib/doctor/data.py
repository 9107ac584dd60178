"""A set of prototypes beside data: which are used, by how many images, and which lie away from all of them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prototypes_lib.collapse import Marginal, UniquePrototypes, VoidSet, void_set
from prototypes_lib.data import DATASETS, Images, default_root, load
from prototypes_lib.data.pixels import decode_all
from prototypes_lib.data.sources import class_folders, image_files
from prototypes_lib.doctor.examination import Examination
from prototypes_lib.doctor.subject import Codes
from prototypes_lib.evaluate.clusters import Score
from prototypes_lib.evaluate.features import Features, extract
from prototypes_lib.evaluate.knn import predict
from prototypes_lib.evaluate.precision import Precision, RedundancyShare, by_precision, redundancy_share
from prototypes_lib.objectives import entropy
from prototypes_lib.precision import directions

IN_A_ROW = 10  # images shown of a prototype


@dataclass(frozen=True)
class Row:
    """A prototype of a picture: its index, why it is there, and the images nearest to it by cosine, nearest first."""

    prototype: int
    label: str
    images: tuple[int, ...]
    cosine: tuple[float, ...]


@dataclass(frozen=True)
class DataExamination:
    """What n images make of K prototypes.

    name, n, side: the images and the side they are seen at, px. score, tau: how they are compared; no centering.
    marginal: mean assignment over all and over unique prototypes. assigned: each image's prototype of the largest
    score; alone: the same among the unique ones, 0 .. M-1. held: images a prototype (K,). redundancy: data share by
    redundancy, from `alone` (PPC, Fig. 2). void: prototypes opposite to the mean code, None where the codes have no
    mean direction. code_rank: effective rank of the codes. knn: accuracy by percentile of precision (vMF, Fig. 2),
    None without labels. grids: heading -> rows of images.
    """

    name: str
    n: int
    side: int
    score: str
    tau: float
    marginal: Marginal
    assigned: Int[Tensor, " n"]
    alone: Int[Tensor, " n"]
    held: Int[Tensor, " k"]
    redundancy: RedundancyShare
    void: VoidSet | None
    code_rank: float
    knn: Precision | None
    grids: dict[str, tuple[Row, ...]]

    @property
    def used(self) -> int:
        """Prototypes with at least one image."""
        return int((self.held > 0).sum())

    @property
    def used_unique(self) -> int:
        """The same where only the unique prototypes compete."""
        return len(self.alone.unique())


def images_of(
    data: str, side: int, *, root: Path | None = None, limit: int | None = None, progress: bool = True
) -> Images:
    """The images of a data set's training split, of a folder CLASS/image, or of a folder of images without classes.

    Raises ValueError or FileNotFoundError, one line, where there are none.
    """
    folder = Path(data).expanduser()
    try:
        if data in DATASETS or not folder.is_dir() or class_folders(folder):
            divided = folder.is_dir() and data not in DATASETS and not (folder / "train").is_dir()
            part = "test" if divided and any((folder / name).is_dir() for name in ("val", "test")) else "train"
            return load(data, part, root=root, image_size=side, limit=limit, progress=progress)
    except RuntimeError as error:  # torchvision's word for a file that is missing or fails its checksum
        raise ValueError(str(error)) from error
    files = image_files(folder)
    if not files:
        raise FileNotFoundError(f"data: {folder} has no images")
    if limit is not None and limit < len(files):  # evenly through the names: a burst of alike frames is no sample
        files = [files[i] for i in np.linspace(0, len(files) - 1, limit).astype(int)]
    where = (default_root() if root is None else root) / "decoded"
    decoded = decode_all(files, side, cache_folder=where, progress=progress, name=folder.resolve().name)
    for skipped in decoded.skipped:
        print(f"  {skipped.path!r} is left out: {skipped.reason}", file=sys.stderr, flush=True)
    names = tuple(str(files[i].relative_to(folder)) for i in decoded.kept)
    labels = np.full(len(decoded.pixels), -1, dtype=np.int64)
    return Images(decoded.pixels, labels, (), folder.resolve().name, decoded.skipped, names)


def with_data(
    seen: Examination,
    images: Images,
    coder: Codes,
    score: Score,
    *,
    name: str = "",
    tau: float = 0.1,
    side: int | None = None,
    rows: int = 6,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> DataExamination:
    """Codes of all images, then everything that needs them; scores are made block by block, never n x K at once.

    Args:
        seen: of the set of prototypes. coder: of `subject.coder`. score: codes and prototypes to log-scores, called
        name, at temperature tau. side: of the view, px. rows: prototypes in each grid of images.

    Raises ValueError for codes that are not finite.
    """
    x = extract(coder.backbone, images, size=side, device=device, progress=progress)
    with torch.no_grad():
        projector = coder.projector.to(device)
        codes = torch.cat([projector(part.to(device)).float().cpu() for part in x.x.split(2**12)])
        coder.projector.cpu()
    if not bool(codes.isfinite().all()):
        raise ValueError(f"codes of {int((~codes.isfinite()).any(1).sum())} images are not finite")
    w, unique = seen.found.w, seen.unique
    p, alone_p, assigned, alone = assign(codes, w, score, unique)
    by_part = torch.zeros_like(alone_p).index_add_(0, unique.assignment, p)
    marginal = Marginal(p, float(entropy(p)), alone_p, float(entropy(alone_p)), by_part)
    held = torch.bincount(assigned, minlength=len(w))
    try:
        void = void_set(w, codes, seen.eps)
    except ValueError:  # the codes average to zero: nothing is opposite to them
        void = None
    second = torch.linalg.eigvalsh(codes.double().T @ codes.double() / len(codes)).clamp_min(0)
    rank = float(torch.special.entr(second / second.sum()).sum().exp())
    knn = _by_precision(x, seen.lengths[assigned], seed)
    grids = {heading: _row(chosen, codes, w, held) for heading, chosen in _choices(seen, held, p, rows)}
    side = side or min(images.pixels.shape[1:3])
    return DataExamination(
        images.name, len(images), side, name, tau, marginal, assigned, alone, held, redundancy_share(alone, unique),
        void, rank, knn, {heading: found for heading, found in grids.items() if found},
    )  # fmt: skip


@torch.no_grad()
def assign(
    codes: Float[Tensor, "n dim"], w: Float[Tensor, "k dim"], score: Score, unique: UniquePrototypes, block: int = 2**23
) -> tuple[Float[Tensor, " k"], Float[Tensor, " m"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Mean assignment over all and over unique prototypes, and each image's best of both; `block` scores at a time."""
    p, alone_p = torch.zeros(len(w), dtype=torch.float64), torch.zeros(unique.count, dtype=torch.float64)
    assigned, alone = [], []
    for part in codes.split(max(1, block // len(w))):
        scores = score(part, w)
        few = scores[:, unique.representatives]
        assigned.append(scores.argmax(1))
        alone.append(few.argmax(1))
        p += torch.softmax(scores, 1).sum(0)
        alone_p += torch.softmax(few, 1).sum(0)
    return (p / len(codes)).float(), (alone_p / len(codes)).float(), torch.cat(assigned), torch.cat(alone)


def _by_precision(x: Features, kappa: Tensor, seed: int) -> Precision | None:
    """kNN of one half of the images from the other, by the precision of their prototypes, where they have labels."""
    labeled = torch.nonzero(x.labels >= 0)[:, 0]
    if len(x.labels[labeled].unique()) < 2 or len(labeled) < 200:
        return None
    order = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(seed))]
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    bank = Features(x.x[train], x.labels[train])
    told = predict(bank, x.x[test], min(20, len(train)), progress=False)
    return by_precision(told == x.labels[test], kappa[test], bins=10, seed=seed)


def _choices(seen: Examination, held: Tensor, p: Tensor, rows: int) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Heading, and (prototype, why) of those to show: most and least used groups' prototypes, copies side by side."""
    unique = seen.unique
    of_part = torch.zeros_like(unique.redundancy).index_add_(0, unique.assignment, held)
    weight = torch.zeros(unique.count).index_add_(0, unique.assignment, p)
    order = sorted(range(unique.count), key=lambda m: (-int(of_part[m]), -float(weight[m])))
    best = _favorites(unique, held, p)

    def told(m: int) -> tuple[int, str]:
        r, n = int(unique.redundancy[m]), int(of_part[m])
        return best[m], f"{n:,} image{'s' * (n != 1)}" + (f" in {r:,} copies" if r > 1 else "")

    yield "most used", [told(m) for m in order[:rows]]
    yield "least used", [told(m) for m in reversed(order[rows:][-rows:])]
    copied = sorted((m for m in order if unique.redundancy[m] > 1), key=lambda m: -int(unique.redundancy[m]))
    chosen = []
    for m in [m for m in copied if of_part[m] > 0][:2] or copied[:1]:
        members = torch.nonzero(unique.assignment == m)[:, 0]
        members = members[torch.argsort(held[members], descending=True, stable=True)][: rows // 2].tolist()
        chosen += [(i, f"a copy of {int(unique.representatives[m])}; {int(held[i]):,} images") for i in members]
    yield "copies side by side", chosen


def _favorites(unique: UniquePrototypes, held: Tensor, p: Tensor) -> list[int]:
    """Of each group the member with most images, of equal ones the likeliest."""
    order = torch.argsort(held.double() + p.double() / 2, stable=True).numpy()  # p < 1: it decides between equals
    best = np.zeros(unique.count, dtype=np.int64)
    best[unique.assignment.numpy()[order]] = order  # the last one written stays
    return best.tolist()


def _row(chosen: list[tuple[int, str]], codes: Tensor, w: Tensor, held: Tensor) -> tuple[Row, ...]:
    if not chosen:
        return ()
    cosine = codes @ directions(w[[k for k, _ in chosen]]).T
    best = cosine.topk(min(IN_A_ROW, len(codes)), dim=0)
    return tuple(
        Row(k, why, tuple(best.indices[:, i].tolist()), tuple(best.values[:, i].tolist()))
        for i, (k, why) in enumerate(chosen)
    )
