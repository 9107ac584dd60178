"""What the doctor writes: report.json with every number, index.html for people; and the keys of that JSON.

report.json, one top-level key a line, null where something is not known, not asked or not finite:

* format ("prototypes doctor"), format_version, prototypes_lib, commit, environment, command
* path; file: name, sha256, bytes of the file that holds the prototypes; method: name of a run of ours
* eps, seed (of random orders and points), orders (how many)
* verdict: kind (full, partial, some or none: of M = 1, M < K/2, M < 0.95 K, else), text, remarks
* sets: for each set of prototypes, the one looked at closely first
    * network, of, layout, tensor, dtype, score, notes, k, dim
    * m, share, largest, largest_of; order_range [low, high]; components
    * curve: {eps, m, largest} rising with eps; copies: {r, prototypes} (how many unique prototypes stand for r)
    * representatives, redundancy (m numbers each), assignment (k numbers, each a place in representatives)
    * length: quantiles, histogram; tau, kappa (quantiles of |w| / tau)
    * nearest: 1 - cos to the nearest other prototype, quantiles and histogram, and of uniform points the same
    * effective_rank, coding_rate (nats), coding_rate_eps, eigenvalues (of the directions' second moment, falling)
    * other: network, m, k, cosine (quantiles, of matching prototypes)
* data: name, n, side, score, tau, entropy, unique_entropy (nats), perplexity, p, unique_p, by_part, used, used_unique,
  held (images a prototype), code_rank, redundancy (PPC, Fig. 2: evaluate.precision.RedundancyShare), void (count,
  indices, images, cosine quantiles), precision (quantiles of |w| of the images' prototypes), knn (vMF, Fig. 2:
  evaluate.precision.Precision), grids (heading: rows of prototype, label, images, files, cosine)
* papers: paper, table, model, metric, eps, value, measured; papers_text: the same in words
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prototypes_lib import __version__
from prototypes_lib.data import Images
from prototypes_lib.doctor import paper, words
from prototypes_lib.doctor.data import DataExamination
from prototypes_lib.doctor.examination import RATE_EPS, Examination, histogram, quantiles
from prototypes_lib.doctor.subject import Subject
from prototypes_lib.files.storage import write_text
from prototypes_lib.records import environment

FORMAT, FORMAT_VERSION = "prototypes doctor", 1
PAGE, NUMBERS = "index.html", "report.json"


@dataclass(frozen=True)
class Report:
    """All that was found out about a subject: sets, the one looked at closely first, and that one beside data."""

    subject: Subject
    sets: tuple[Examination, ...]
    data: DataExamination | None = None
    images: Images | None = None
    rows: tuple[paper.Row, ...] = ()
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """The content of report.json, as this file's first lines describe it."""
        first, subject, where = self.sets[0], self.subject, environment()
        said = {"kind": words.kind(first), "text": words.verdict(first), "remarks": words.remarks(first, self.data)}
        return plain({
            "format": FORMAT, "format_version": FORMAT_VERSION, "prototypes_lib": __version__,
            "commit": where["commit"], "environment": where, "command": self.command, "path": subject.path,
            "file": {"name": subject.file.name, "sha256": subject.sha256, "bytes": subject.size},
            "method": subject.method, "eps": first.eps, "seed": first.seed, "orders": first.orders, "verdict": said,
            "sets": [of_set(seen) for seen in self.sets],
            "data": self.data and of_data(first, self.data, self.images),
            "papers": self.rows, "papers_text": paper.said(self.rows),
        })  # fmt: skip


def of_set(seen: Examination) -> dict[str, Any]:
    """A set's entry."""
    found, unique, other = seen.found, seen.unique, seen.other
    apart = None
    if seen.nearest is not None:
        ours, even = seen.nearest.clamp_min(0), seen.uniform
        top = float(torch.cat([ours, even]).max())
        apart = {
            "quantiles": quantiles(ours), "histogram": histogram(ours, 60, 0.0, top),
            "uniform_quantiles": quantiles(even), "uniform_histogram": histogram(even, 60, 0.0, top),
        }  # fmt: skip
    return {
        "network": found.network, "of": found.of, "layout": found.layout, "tensor": found.tensor, "dtype": found.dtype,
        "score": found.score, "notes": found.notes, "k": seen.k, "dim": found.w.shape[1],
        "m": unique.count, "share": unique.share, "largest": seen.largest, "largest_of": seen.largest_of,
        "order_range": seen.order_range, "components": seen.components,
        "curve": [{"eps": eps, "m": m, "largest": largest} for eps, m, largest in seen.curve],
        "copies": [{"r": r, "prototypes": n} for r, n in seen.copies()],
        "representatives": unique.representatives, "redundancy": unique.redundancy, "assignment": unique.assignment,
        "length": {"quantiles": quantiles(seen.lengths), "histogram": histogram(seen.lengths)},
        "tau": seen.tau, "kappa": quantiles(seen.lengths / seen.tau) if seen.tau else None,
        "nearest": apart, "effective_rank": seen.effective_rank, "coding_rate": seen.coding_rate,
        "coding_rate_eps": RATE_EPS, "eigenvalues": seen.eigenvalues,
        "other": other and {"network": other.network, "m": other.count, "k": other.k,
                            "cosine": quantiles(other.cosine.clamp(-1, 1))},
    }  # fmt: skip


def of_data(seen: Examination, data: DataExamination, images: Images | None) -> dict[str, Any]:
    """The entry of the data."""
    files = images.files if images is not None else ()
    void = data.void and {
        "count": data.void.count, "indices": torch.nonzero(data.void.mask)[:, 0],
        "images": int(data.held[data.void.mask].sum()), "cosine": quantiles(data.void.cosine),
    }  # fmt: skip
    marginal = data.marginal
    return {
        "name": data.name, "n": data.n, "side": data.side, "score": data.score, "tau": data.tau,
        "entropy": marginal.entropy + 0.0, "unique_entropy": marginal.unique_entropy + 0.0,  # no -0.0
        "perplexity": marginal.perplexity, "p": marginal.p, "unique_p": marginal.unique_p,
        "by_part": marginal.by_part, "used": data.used,
        "used_unique": data.used_unique, "held": data.held, "code_rank": data.code_rank,
        "redundancy": data.redundancy, "void": void, "precision": quantiles(seen.lengths[data.assigned]),
        "knn": data.knn,
        "grids": {
            heading: [vars(row) | {"files": [files[i] for i in row.images] if files else []} for row in rows]
            for heading, rows in data.grids.items()
        },
    }  # fmt: skip


def check_place(folder: str | Path) -> None:
    """Raise ValueError, one line, unless a report can be written there: a new folder, or an earlier report's."""
    folder = Path(folder)
    if folder.is_dir():
        there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{PAGE}.")}
        if there and not (there <= {PAGE, NUMBERS} and _is_report(folder)):
            raise ValueError(f"{folder} exists and is no earlier report of the doctor; name a new folder")
        if any((folder / name).is_dir() for name in there):
            raise ValueError(f"{folder} holds folders where a report's files would lie; name a new folder")
    elif folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to nothing; name a folder for the report")
    elif folder.exists():
        raise ValueError(f"{folder} is a file; name a folder for the report")
    home = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise ValueError(f"{folder}: {home} is no folder one may write into")


def _is_report(folder: Path) -> bool:
    try:
        if (folder / NUMBERS).is_file():
            return json.loads((folder / NUMBERS).read_bytes())["format"] == FORMAT
        return f'content="{FORMAT}' in (folder / PAGE).read_text(encoding="utf-8")[:1000]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(report: Report, folder: str | Path) -> Path:
    """Write report.json and index.html, each whole or not at all, and return the page's path.

    Raises ValueError where the folder is anything but an earlier report, OSError, one line, where it cannot be written.
    """
    from prototypes_lib.doctor.page import page

    folder = Path(folder)
    check_place(folder)
    content = report.to_json()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items())
    made = page(report, content)
    before = (folder / NUMBERS).read_text(encoding="utf-8") if (folder / NUMBERS).is_file() else None
    write_text(folder / NUMBERS, f"{{\n{lines}\n}}\n")
    try:
        write_text(folder / PAGE, made)
    except OSError:
        if before is not None:
            write_text(folder / NUMBERS, before)
        raise
    return folder / PAGE


def plain(value: Any) -> Any:
    """What JSON can hold: names as keys, lists for what has members, null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(x) for x in value]
    raise TypeError(f"{type(value).__name__} is nothing JSON can hold")
