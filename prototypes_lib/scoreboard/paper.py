"""What the three papers print: every number of data/paper_tables.csv, every figure, and the command to run each."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).parents[2] / "data" / "paper_tables.csv"
KNN, LINEAR = "kNN top-1 (%)", "linear top-1 (%)"
UNIQUE, INITIALIZED = "unique prototypes M", "initialized prototypes K"
LARGEST = "largest duplicate set (prototypes)"


@dataclass(frozen=True)
class Printed:
    """A number of a paper; value as printed ("nan" where a training failed), the rest as in data/README.md."""

    paper: str
    table: str
    method: str
    backbone: str
    dataset: str
    metric: str
    value: str


def printed(path: str | Path = TABLES) -> list[Printed]:
    """All of them, in the file's order. Raises FileNotFoundError where the file is not beside the package."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {path}; the scoreboard reads data/paper_tables.csv of a checkout")
    with Path(path).open(newline="") as file:
        return [Printed(**row) for row in csv.DictReader(file)]


def split(text: str) -> tuple[str, dict[str, str]]:
    """A name and its qualifiers: "DINO [epochs=100; seed=0]" is ("DINO", {"epochs": "100", "seed": "0"})."""
    name, _, rest = text.partition(" [")
    return name, dict(pair.split("=", 1) for pair in rest.rstrip("]").split("; ")) if rest else {}


# names of methods.METHODS; what is not here are other papers' methods, quoted for comparison
METHOD = {"DINO": "dino", "DINO-vMF": "dino-vmf", "iBOT": "ibot", "iBOT-vMF": "ibot-vmf",
          "iBOT-vMF (kd)": "ibot-vmf-kd", "iBOT-vMF (kp)": "ibot-vmf-kp", "MSN": "msn", "PMSN": "pmsn",
          "DINOv2": "dinov2", "SimDINO": "simdino", "SimDINOv2": "simdinov2"}  # fmt: skip
TRANSFER = {"Aircraft": "aircraft", "Caltech101": "caltech101", "CIFAR10": "cifar10", "CIFAR100": "cifar100",
            "DTD": "dtd", "Flowers": "flowers102", "Food": "food101", "Pets": "pets", "SUN397": "sun397"}  # fmt: skip
# tables that a notebook makes again as a whole, at the papers' scale with PATH = ImageNet
WHOLE = {("vMF", "Table 1"): 54, ("vMF", "Table 8"): 54, ("PPC", "Fig. 3"): 56, ("Sim", "Table 5"): 58,
         ("Sim", "Table 6"): 58, ("Sim", "Table 8"): 58}  # fmt: skip
NO_PROTOCOL = "no protocol here yet: "
NO_RUN = "no paper run here: "


def command(row: Printed) -> str:
    """How the number would be made at the paper's scale, or a text that starts with NO_PROTOCOL or NO_RUN.

    PATH is ImageNet with train/ and val/, RUN the folder that the training prints.
    """
    metric, qualifiers = split(row.metric)
    if dense := next((task for unit, task in _DENSE.items() if unit in metric), None):
        return NO_PROTOCOL + dense
    if notebook := WHOLE.get((row.paper, row.table)):
        return f"prototypes run --only {notebook} -p scale full -p data PATH"
    train, inat = _train(row)
    if train.startswith(NO_RUN):
        return train
    if metric in (UNIQUE, INITIALIZED, LARGEST):
        return f"{train}  # M and K are in the run's metrics.csv and config.json"
    home = "inaturalist-2018" if inat else "PATH"
    if metric == KNN:
        return f"{train} && prototypes evaluate knn RUN --data {home}"
    if metric.startswith("few-shot"):
        share = qualifiers["images"]
        asked = "--share 0.01" if share == "1%" else f"--images {share.split('/')[0]}"
        return f"{train} && prototypes evaluate few-shot RUN --data {home} {asked}"
    if metric.startswith("fine-tuned"):
        inats = f" --recipe inat-{row.backbone[4].lower()}" if inat else ""
        recipe = " --recipe small-sets" if row.dataset in TRANSFER else inats
        return f"{train} && prototypes evaluate fine-tune RUN --data {TRANSFER.get(row.dataset, home)}{recipe}"
    if metric == LINEAR:
        features = "C" if qualifiers.get("features") == "CLS" else "D"
        return f"{train} && prototypes evaluate linear RUN --data {home} --features {features}"
    names = [TRANSFER[row.dataset]] if row.dataset in TRANSFER else list(TRANSFER.values())
    if row.dataset == "transfer average":  # PPC's is without Aircraft (tests/test_paper_tables.py)
        names.remove("aircraft")
    if len(names) == 1:
        return f"{train} && prototypes evaluate transfer RUN --data {names[0]} --folds 5"
    return f"{train} && for d in {' '.join(names)}; do prototypes evaluate transfer RUN --data $d --folds 5; done"


_DENSE = {"mAP": "image retrieval", "J&F": "video object segmentation", "J mean": "video object segmentation",
          "F mean": "video object segmentation", "mIoU": "linear segmentation", "mAcc": "linear segmentation",
          "AP": "detection and segmentation by MaskCut"}  # fmt: skip


def paper_run(row: Printed) -> str:
    """Name of the paper run that trains the row's network as it is; empty where none does without changes."""
    found = re.fullmatch(r"prototypes train --paper-run (\S+)( --data PATH)?", _train(row)[0])
    return found[1] if found and (row.paper, row.table) not in WHOLE else ""


def _train(row: Printed) -> tuple[str, bool]:
    """The training's command, and whether it is on iNaturalist."""
    (method, asked), size = split(row.method), row.backbone[4:5].lower()
    name, inat = METHOD.get(method), asked.get("pretrain") == "iNat-2018"
    if name is None:
        return f"{NO_RUN}{method} is another paper's method, quoted for comparison", inat
    if name.startswith("ibot") and size == "l":
        return f"{NO_RUN}the settings of iBOT's ViT-L could not be read", inat
    options, run = "", f"{name}-vit{size}16"
    if name == "dino" and row.paper == "Sim":
        run += "-100ep"
    if name == "dinov2" and size == "l":
        run += "-short"
    if row.backbone.endswith("/8"):
        options += f" --backbone vit_{'small' if size == 's' else 'base'}_patch8_224"
    if asked.get("epochs", "100") != "100" or (row.paper, row.table) == ("vMF", "Table 11"):
        options += f" --epochs {asked['epochs']}"
    data = "" if inat else " --data PATH"
    return f"prototypes train --paper-run {run}{'-inat' * inat}{data}{options}", inat


@dataclass(frozen=True)
class Picture:
    """A figure of a paper (or a table without results): what it shows, which notebooks and records show it here."""

    paper: str
    name: str
    shows: str
    here: str
    records: Sequence[str] = ()  # beginnings of their names; empty where a notebook computes it itself
    not_run: str = ""  # why, where nothing here shows it


PICTURES = (
    Picture("PPC", "Fig. 1", "Four sketches on the circle: full collapse, partial collapse with centering, with "
            "KoLeo-data, none with KoLeo-proto; the marginal over unique prototypes is less uniform",
            "16_collapse_on_the_circle, 18_koleo_proto, 56_number_of_prototypes", ("56_",)),
    Picture("PPC", "Fig. 2", "Data re-assigned to unique prototypes alone: those with more copies get more",
            "56_number_of_prototypes", ("56_",)),
    Picture("PPC", "Fig. 3", "M and accuracy against K for base, KoLeo-data and KoLeo-proto",
            "50_pretraining, 56_number_of_prototypes", ("50_", "56_")),
    Picture("vMF", "Fig. 1", "The pipeline and its head", "00_start, 52_methods (in words and code)"),
    Picture("vMF", "Fig. 2", "kNN accuracy by percentile of the prototype's precision: rises for DINO-vMF",
            "54_vmf_ablation", ("54_",)),
    Picture("vMF", "Fig. 3", "Density on the circle for two lengths of a prototype", "10_vmf_mixture"),
    Picture("vMF", "Fig. 4", "The approximation of log C_p against kappa", "10_vmf_mixture"),
    Picture("vMF", "Fig. 5", "Error of that approximation against scipy for several dimensions", "10_vmf_mixture"),
    Picture("vMF", "Fig. 6", "Unique prototypes against the cosine threshold: more with DINO-vMF",
            "54_vmf_ablation", ("54_",)),
    Picture("vMF", "Fig. 7", "Largest set of copies against the threshold: DINO ViT-B has a void set",
            "54_vmf_ablation", ("54_",)),
    Picture("Sim", "Fig. 1", "The pipelines before and after the simplification", "52_methods (table of compositions)"),
    Picture("Sim", "Fig. 2", "kNN over 100 epochs: SimDINO rises steadily, DINO slows and falls a little", "",
            not_run="the records hold kNN of the last step only; prototypes train --paper-run simdino-vitb16 --data "
            "PATH && prototypes train --paper-run dino-vitb16-100ep --data PATH; on each: prototypes evaluate knn RUN "
            "--data PATH, of several checkpoints"),
    Picture("Sim", "Fig. 3", "MaskCut segmentations of DINO and SimDINO", "", not_run=NO_PROTOCOL + "MaskCut"),
    Picture("Sim", "Fig. 4", "kNN on ImageNet of ViT-B trained on COCO: SimDINO far above DINO", "",
            not_run="prototypes train --paper-run simdino-vitb16 --data COCO && prototypes train --paper-run "
            "dino-vitb16-100ep --data COCO; on each: prototypes evaluate knn RUN --data PATH"),
    Picture("Sim", "Fig. 5", "Average self-attention maps of the four methods", "",
            not_run=NO_PROTOCOL + "attention maps"),
    Picture("Sim", "Table 4", "Hyperparameters (no results, so not in paper_tables.csv)",
            "the package's paper_runs, `prototypes train --paper-run list`"),
)  # fmt: skip


def qualified(metric: str, **qualifiers: str) -> str:
    """The spelling of a metric with its qualifiers: qualified(LINEAR, features="CLS")."""
    return f"{metric} [{'; '.join(f'{k}={v}' for k, v in qualifiers.items())}]" if qualifiers else metric


def tables(rows: Sequence[Printed]) -> dict[tuple[str, str], list[Printed]]:
    """(paper, table) -> its numbers, in the order of the file."""
    found: dict[tuple[str, str], list[Printed]] = {}
    for row in rows:
        found.setdefault((row.paper, row.table), []).append(row)
    return found


def gap(rows: Sequence[Printed], paper: str, table: str, a: str, b: str, metric: str) -> dict[str, float]:
    """backbone -> what the table prints for method a less what it prints for b; where both are and neither is nan."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        if (row.paper, row.table, row.metric) == (paper, table, metric) and re.fullmatch(r"[\d.]+", row.value):
            found.setdefault((row.method, row.backbone), float(row.value))
    sizes = [size for method, size in found if method == a and (b, size) in found]
    return {size: found[a, size] - found[b, size] for size in sizes}
