"""Speed and memory beside others, on the same tensors in the same process: ratios only, right answers first.

    python benchmarks/speed.py [--small | --gpu] [--only ROW ...] [--repeats 5] [--threads 2] [--out notebooks/results]

Every implementation answers once, and a wrong answer makes its row void and the command fail. Then they take turns,
forwards and backwards alternately; what is told is ours / peer, the median over the turns and its quartiles, and the
ratio of peaks of memory. Peers: lightly, timm, kornia, scikit-learn, faiss-cpu, scipy where they are installed
(`pip install -e ".[peers]"`), and published algorithms written as loops. With --only, other rows of the record stay,
so that a long record is made row by row.
"""

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import rows_evaluation
import rows_prototypes
import rows_reading
import rows_regularizers
import rows_training
import timing
import torch
from recording import folder, save
from timing import OURS, Measured, Row

from prototypes_lib.records import commit, environment

ROWS = rows_prototypes.ROWS | rows_regularizers.ROWS | rows_reading.ROWS | rows_evaluation.ROWS | rows_training.ROWS
PEERS = ("lightly", "kornia", "faiss-cpu", "scikit-learn", "scipy", "timm")


def described(key: str, found: Measured, size: str) -> dict[str, Any]:
    """A row for the record: everything in ratios."""
    row = found.row
    ratios = {
        name: {"time": r.median, "quartiles": [r.low, r.high], "memory": r.memory, "first call": r.first}
        for name, r in found.ratios.items()
    }
    short = [] if size == "small" else found.short()  # goals are of real sizes
    right = "answers agree" if size == "small" or not row.goals else "met"
    outcome = f"void: {found.void}" if found.void else f"short of: {'; '.join(short)}" if short else right
    return {
        "row": key, "name": row.name, "what": row.what.split("\n")[0], "size": size, "sizes": row.sizes,
        "ours / peer": ratios, "memory of": row.memory, "share of a matrix product's speed": found.share,
        "goals": [asdict(goal) for goal in row.goals], "outcome": outcome,
        "why": row.limit if short else "", **found.notes,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The record as a person reads it."""
    lines = [f"{'row':18} {'peer':36} {'time, ours / peer':>20} {'memory':>7}"]
    for row in rows:
        for name, ratio in row["ours / peer"].items():
            low, high = ratio["quartiles"]
            time_ = f"{ratio['time']:.2f} ({low:.2f}-{high:.2f})"
            memory = "" if ratio["memory"] is None else f"{ratio['memory']:.2f}"
            lines.append(f"{row['row']:18} {name:36} {time_:>20} {memory:>7}")
        share = row["share of a matrix product's speed"]
        lines.append(f"{'':18} {row['outcome']}" + (f"; {100 * share:.0f} % of a product's speed" if share else ""))
        if row["why"]:
            lines.append(f"{'':18} why: {row['why']}")
    return "\n".join(lines)


def run_row(key: str, size: str, device: str, repeats: int, speed: float, threads: int) -> dict[str, Any] | None:
    """One row, built, checked and timed; None where what it needs is not there."""
    row = ROWS[key](size, device)
    if row is None:
        return None
    rss = partial(resident, key, size, threads) if size == "cpu" and sys.platform == "linux" else None
    return described(key, timing.measure(row, repeats, device, speed, rss=rss), size)


def resident(key: str, size: str, threads: int, name: str) -> int:
    sizes = ["--small"] if size == "small" else []
    options = ["--resident", name, "--only", key, "--threads", str(threads), *sizes]
    return timing.resident_of_child(__file__, *options)


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows, and those of a record that is there already, in the order of ROWS."""
    old = json.loads(path.read_text())["runs"][0]["table"] if path.is_file() else []
    by_key = {row["row"]: row for row in [*old, *rows]}
    return [by_key[key] for key in ROWS if key in by_key]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_true", help="tiny sizes: are the answers right, does it run")
    which.add_argument("--gpu", action="store_true", help="the sizes of a GPU, on one")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all sides")
    parser.add_argument("--out", default="notebooks/results", help="folder of the record")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # peers' notices of what they will change
    size, device = ("gpu", "cuda") if options.gpu else ("small" if options.small else "cpu", "cpu")
    if options.gpu and not torch.cuda.is_available():
        sys.exit("error: --gpu needs a GPU that torch can use")
    if options.resident:
        row: Row = ROWS[options.only[0]](size, device)
        print(timing.resident_growth(row.all[options.resident]))
        return
    path = folder(options.out) / ("speed_small.json" if options.small else f"speed_{size}.json")
    start, rows = time.monotonic(), []
    speed = timing.product_speed(device)
    for key in options.only or ROWS:
        print(f"{key} ... {time.monotonic() - start:.0f} s", flush=True)
        row = run_row(key, size, device, options.repeats, speed, options.threads)
        rows += [row | {"commit": commit()}] if row else []  # of --only, others stay as they were made
        print(table(rows[-1:]) if row else f"{key}: its peers are not installed", flush=True)
    everything = merged(path, rows) if options.only else rows
    installed = {name: importlib.metadata.version(name) for name in PEERS if _installed(name)}
    hardware = environment(device)["hardware"] if options.gpu else _cpu(options.threads)
    parameters = {"size": size, "repeats": options.repeats, "threads": options.threads}
    run = {
        "seed": 0, "seconds": time.monotonic() - start, "environment": {**installed, "hardware": hardware},
        "what": [row["row"] for row in everything], "ours": OURS, "table": everything,
    }  # fmt: skip
    print(table(everything) if len(rows) > 1 else "")
    save(path, "benchmarks/speed.py", given, parameters, run)
    if wrong := [row["row"] for row in rows if row["outcome"].startswith("void")]:
        sys.exit(f"void, because an answer is wrong: {', '.join(wrong)}")


def _cpu(threads: int) -> str:
    return environment("cpu")["hardware"].split(",")[0] + f", {threads} threads"


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
