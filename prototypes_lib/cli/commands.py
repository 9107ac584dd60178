"""The commands without a file of their own: run, train, export, data."""

import ast
import dataclasses
import os
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from prototypes_lib.settings import Run

IMAGENET = Run()


def run(
    only: tuple[str, ...] = (),
    params: Annotated[UseAppendAction[tuple[tuple[str, str], ...]], arg(name="p", aliases=("-p",))] = (),
    out: Path = Path("out"),
    timeout: float = 1800.0,
    total_timeout: float = 3600.0,
    smoke: bool = False,
    list: bool = False,
) -> int:
    """Run the course's notebooks and leave executed copies, HTML pages and index.html.

    Args:
        only: notebooks by number or name; all of them by default.
        params: NAME VALUE, repeatable, checked first; a folder found from here is made absolute, other text is kept.
        out: folder for the results.
        timeout: seconds a cell may take; 0 = no limit.
        total_timeout: seconds a notebook may take; 0 = no limit.
        smoke: small values from each notebook's header.
        list: print the notebooks and their parameters, and run nothing.
    """
    from prototypes_lib import course

    return course.run_cli(
        only, params, out, timeout_s=timeout, total_timeout_s=total_timeout, smoke=smoke, list_only=list
    )


def train(
    method: Annotated[Positional[str | None], arg(metavar="METHOD")] = None,
    run: OmitArgPrefixes[Run] = IMAGENET,
    small: bool = False,
    paper_run: str | None = None,
    n_prototypes: int | None = None,
    n_local: int | None = None,
    ema: float | None = None,
    ema_end: float | None = None,
    backbone_option: Annotated[UseAppendAction[tuple[tuple[str, str], ...]], arg(name="backbone-option")] = (),
    name: str | None = None,
) -> int:
    """Pre-train one method of the family and leave a run folder; an interrupted run goes on.

    Args:
        method: a recipe: dino, dino-vmf, ibot, ibot-vmf, each also with -kd and -kp, ibot-vmf-me, swav, msn, pmsn,
            dinov2, simdino or simdinov2; none with --paper-run.
        run: settings of the run.
        small: defaults of the other options for a few minutes on a CPU instead of ImageNet's.
        paper_run: a paper's method and settings at full scale as defaults of the other options, with --data PATH for
            ImageNet; "list" prints them.
        n_prototypes: K, where it is not the recipe's.
        n_local: local crops, where they are not the recipe's.
        ema: the teacher's first momentum, where it is not the recipe's.
        ema_end: its last one, where it is not the recipe's.
        backbone_option: NAME VALUE, repeatable, a further argument of the backbone (init_values 0.1).
        name: label of the run folder.
    """
    from prototypes_lib.methods import METHODS
    from prototypes_lib.train import train as start

    if paper_run == "list":
        print(_paper_runs())
        return 0
    if (method is None) == (paper_run is None):
        raise ValueError("name a METHOD or a --paper-run NAME, one of the two")
    if method is not None and method not in METHODS:
        raise ValueError(f"no method {method!r}; choose one of {', '.join(METHODS)}")
    composed = METHODS[method] if method is not None else paper_run_named(paper_run).method
    if n_prototypes is not None:
        composed = composed.but(n_prototypes=n_prototypes)
    if n_local is not None:
        composed = composed.but(views=dataclasses.replace(composed.views, n_local=n_local))
    if ema is not None:
        composed = composed.but(ema=ema)
    if ema_end is not None:
        composed = composed.but(ema_end=ema_end)
    if backbone_option:
        run = run.but(backbone_options=run.backbone_options | {k: _literal(v) for k, v in backbone_option})
    if paper_run and run.data == "imagenet" and not Path(run.data).is_dir():
        raise ValueError("this paper run is on ImageNet: give its folder (with train/ and val/) by --data PATH")
    result = start(composed, run, name or method or paper_run)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this once a process
        print(result.folder)
    return 0


def _literal(text: str):
    """A number, True or a tuple from the command line; other words are text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def paper_run_named(name: str):
    """A PaperRun by name. Raises ValueError where there is none."""
    from prototypes_lib.paper_runs import PAPER_RUNS

    if name not in PAPER_RUNS:
        raise ValueError(f"no paper run {name!r}; `prototypes train --paper-run list` prints them")
    return PAPER_RUNS[name]


def _paper_runs() -> str:
    from prototypes_lib.paper_runs import PAPER_RUNS

    lines = []
    for name, paper in PAPER_RUNS.items():
        run = paper.run
        what = f"{run.data}, {run.backbone}, {run.epochs:.0f} epochs, batch {run.batch_size}"
        lines.append(f"{name:28s} {what}\n{'':28s} {paper.source}")
    return "\n".join(lines)


def export(
    run_folder: Annotated[Positional[Path], arg(metavar="RUN-FOLDER")],
    path: Annotated[Positional[Path], arg(metavar="PATH")],
) -> int:
    """Write a run's teacher for others: backbone.safetensors (timm's names), head.safetensors, about.json.

    Args:
        run_folder: a run folder with a checkpoint.
        path: the folder to write; what it holds is replaced if it is an export, else it must not exist.
    """
    from prototypes_lib import checkpoints

    if path.exists() and not (path / "backbone.safetensors").is_file():
        raise ValueError(f"{path} exists and is no export; name a new folder")
    print(checkpoints.export(run_folder, path))
    return 0


def data(name: Positional[str | None] = None, root: Path | None = None) -> int:
    """List the data sets, or fetch one with its checksums.

    Args:
        name: a data set to fetch; without it, the list.
        root: where data sets lie; by default $PROTOTYPES_DATA or ~/.cache/prototypes_lib.
    """
    from prototypes_lib.data import describe, fetch

    try:
        print(describe() if name is None else fetch(name, root))
    except RuntimeError as error:  # torchvision's word for a file that is missing or fails its checksum
        raise ValueError(f"{name}: {error}") from error
    return 0
