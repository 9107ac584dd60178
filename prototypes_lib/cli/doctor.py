"""`prototypes doctor`: how many prototypes a checkpoint really has, alone and beside data."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:  # help is printed without loading torch
    from prototypes_lib.doctor import Examination, Subject
    from prototypes_lib.doctor.paper import Row


def doctor(
    path: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    data: str | None = None,
    out: Path | None = None,
    network: Literal["teacher", "student", "both"] = "both",
    of: str | None = None,
    eps: float = 0.025,
    tau: float | None = None,
    size: int | None = None,
    limit: int = 10_000,
    root: Path | None = None,
    device: str = "auto",
    orders: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """How many prototypes a checkpoint really has, under every reading of the definition, and what data make of them.

    Args:
        path: a run folder, an export, or a checkpoint file of DINO, iBOT, MSN, SwAV or DINOv2; nothing in it is run.
        data: a folder of images or a data set's name: which prototypes its images use.
        out: a folder for the report: index.html, one page with all figures, and report.json, every number.
        network: whose prototypes; of both, the teacher's are looked at closely.
        of: which set: crops, patches, or a head of SwAV's (head 0); all there are by default.
        eps: cosine distance below which two prototypes are copies.
        tau: temperature of the score, where the checkpoint does not say it; 0.1 by default.
        size: side at which images are seen, px; the run's own by default, 224 of a file.
        limit: at most so many images, spread evenly; 0 takes all.
        root: where named data sets lie.
        device: of the backbone: auto, cpu, cuda ...
        orders: random orders in which prototypes are counted again.
        seed: of these orders and of random points.
        progress: a line for each part of the work.
    """
    from prototypes_lib import doctor as it
    from prototypes_lib.cli.task import positive
    from prototypes_lib.doctor import words
    from prototypes_lib.doctor.subject import score, temperature

    positive(tau=tau, size=size, orders=orders)
    if not 0 < eps <= 2:
        raise ValueError(f"eps={eps}: a cosine distance lies in (0, 2]")
    if limit < 0 or not 0 <= seed < 2**63:
        raise ValueError(f"limit={limit} and seed={seed} must not be negative, and seed below 2**63")
    if tau is not None and not 1e-30 <= tau <= 1e30:
        raise ValueError(f"tau={tau} is no temperature")
    if out is not None:
        it.check_place(out)
    wanted = None if network == "both" else network
    subject = it.opened(path, wanted)
    sets = it.chosen(subject.sets, wanted, of)
    first, images, network_of_codes = sets[0], None, None
    if data is not None:
        from prototypes_lib.train import pick_device

        if first.of == "patches":
            raise ValueError("--data is for prototypes of crops: leave out --of patches")
        where = pick_device(device)
        network_of_codes = it.coder(subject, first)
        side = size or subject.config.get("run", {}).get("image_size", 224)
        network_of_codes.backbone.check_size(side)
        images = it.images_of(data, side, root=root, limit=limit or None, progress=progress)
    seen = []
    for found in sets:
        if progress:
            k, dim = found.w.shape
            told = f"counting {k:,} prototypes of dimension {dim} ({found.network}, {found.of})"
            print(told, file=sys.stderr, flush=True)
        own = tau or temperature(subject, found.network)
        seen.append(it.examine(found, eps=eps, tau=own, orders=orders, seed=seed, progress=progress))
    seen = it.compared(seen, subject.sets)
    beside = None
    if images is not None:
        compared, name, own = score(subject, first, tau)
        options = {"name": name, "tau": own, "side": side, "seed": seed, "device": where, "progress": progress}
        beside = it.with_data(seen[0], images, network_of_codes, compared, **options)
    rows = _rows(subject, seen[0])
    print(words.verdict(seen[0]))
    for one in seen:
        print("\n".join(words.lines(one)))
    for text in words.remarks(seen[0], beside):
        print(f"* {text}")
    if rows:
        from prototypes_lib.doctor.paper import said

        print("\n".join(said(rows)))
    if out is not None:
        asked = {"data": data, "out": out, "network": network, "of": of, "eps": eps, "tau": tau, "size": size,
                 "limit": limit, "root": root, "device": device, "orders": orders, "seed": seed}  # fmt: skip
        options = [word for k, v in asked.items() if v is not None for word in (f"--{k}", str(v))]
        command = shlex.join(["prototypes", "doctor", str(path), *options])
        print(it.write(it.Report(subject, tuple(seen), beside, images, rows, command), out))
    return 0


def _rows(subject: "Subject", seen: "Examination") -> "tuple[Row, ...]":
    """The papers' rows of this model; where its backbone cannot be read (heads alone) there are none."""
    from prototypes_lib import checkpoints
    from prototypes_lib.backbones import TransformerBackbone
    from prototypes_lib.doctor import paper

    method, run = subject.method, subject.config.get("run", {})
    if not paper.candidates(seen, method):
        return ()
    try:
        backbone = checkpoints.load_backbone(subject.path, seen.found.network)
    except ValueError:
        return ()
    if not isinstance(backbone, TransformerBackbone):
        return ()
    return paper.rows(seen, method, backbone.dim, backbone.patch_size, run.get("data"))
