"""The papers' row for a model: what PPC's Table 1 and vMF's Table 4 print for it, beside what is counted here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prototypes_lib.doctor.examination import PPC, VMF, Examination
from prototypes_lib.scoreboard.paper import INITIALIZED, LARGEST, UNIQUE, Printed, printed, split

NO_ROW = "no row of the papers is of this model"
_TABLES = {("PPC", "Table 1"), ("vMF", "Table 4")}
_METHOD = {"dino": "DINO", "dino-vmf": "DINO-vMF", "ibot": "iBOT", "ibot-vmf": "iBOT-vMF", "msn": "MSN", "pmsn": "PMSN"}
_LAYOUT = {"DINO,": "DINO", "iBOT": "iBOT", "MSN": "MSN"}  # beginnings of Found.layout
_WIDTH = {384: "S", 768: "B", 1024: "L"}
_K = {("vMF", "Table 4"): 65536}  # in its text, section 5.2; PPC's Table 1 prints K
_IMAGENET = re.compile(r"imagenet([-_]?1k)?|ilsvrc([-_]?2012)?", re.IGNORECASE)  # a part of a path


@dataclass(frozen=True)
class Row:
    """A number of a paper and ours: value as printed, measured by the same definition at the same threshold."""

    paper: str
    table: str
    model: str
    metric: str
    eps: float
    value: float
    measured: int


def rows(
    seen: Examination, method: str | None, width: int | None, patch: int | None, pretrain: str | None = None
) -> tuple[Row, ...]:
    """All rows of the two tables that are of this model: method or layout, backbone, K; empty where there is none.

    Args:
        method: name of a run of ours, a recipe's or a paper run's, else None: then the file's layout says which.
        width, patch: of the backbone (None where it is not known); only plain transformers are in the tables.
        pretrain: the data of a run of ours; a file is taken to be of the data that its K belongs to.
    """
    if width not in _WIDTH or patch is None:
        return ()
    backbone, found = f"ViT-{_WIDTH[width]}/{patch}", []
    for row in candidates(seen, method):
        metric, asked = split(row.metric)
        if row.backbone == backbone and _same(row, pretrain):
            eps = float(asked["eps"]) if "eps" in asked else round(1 - float(asked["cosine"]), 6)
            count, largest = seen.at({PPC: PPC, VMF: VMF}[eps])
            ours = {UNIQUE: count, LARGEST: largest}[metric]
            found.append(Row(row.paper, row.table, f"{row.method}, {backbone}", metric, eps, float(row.value), ours))
    return tuple(found)


def candidates(seen: Examination, method: str | None) -> list[Printed]:
    """The numbers of the two tables that are of this method and this K, whatever the backbone."""
    if method:
        name = _METHOD.get(re.sub(r"-vit[sbl]\d+.*", "", method))  # of a paper run: dino-vmf-vits16
    else:
        name = next((v for k, v in _LAYOUT.items() if seen.found.layout.startswith(k)), None)
    if not name or seen.found.of != "crops":
        return []
    tables = [row for row in printed() if (row.paper, row.table) in _TABLES]
    k = {_model(row): int(row.value) for row in tables if split(row.metric)[0] == INITIALIZED}
    mine = [row for row in tables if split(row.method)[0] == name and split(row.metric)[0] != INITIALIZED]
    return [row for row in mine if k.get(_model(row), _K.get(_model(row)[:2])) == seen.k]


def _model(row: Printed) -> tuple[str, str, str, str]:
    return row.paper, row.table, row.method, row.backbone


def _same(row: Printed, pretrain: str | None) -> bool:
    if pretrain is None:
        return True
    if row.dataset == "iNat-2018":
        return pretrain == "inaturalist-2018"
    return any(map(_IMAGENET.fullmatch, Path(pretrain).parts))


def said(found: Sequence[Row]) -> list[str]:
    """A line for each number: printed, and ours."""
    return [
        f"{row.paper}, {row.table}, {row.model}: {row.metric} (1 - cos < {row.eps:g}) {row.value:,.0f} printed, "
        f"{row.measured:,} here"
        for row in found
    ] or [NO_ROW]
