"""Fetch the official checkpoints, let the doctor look at each, and print what the papers say beside what it counts.

    python tools/official_checkpoints.py --list
    python tools/official_checkpoints.py [--only NAME ...] [--cache DIR] [--out report]

data/official_checkpoints.csv says where they are. A download that was cut off goes on where it stopped; what is there
is not fetched again. Reports are left in OUT/NAME/index.html, the table in OUT/table.csv. Exit status 1 where anything
failed; the others are done all the same.
"""

import argparse
import csv
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from prototypes_lib.data import default_root
from prototypes_lib.scoreboard.paper import LARGEST, UNIQUE, printed, split

ROOT = Path(__file__).parent.parent
COLUMNS = ("name", "set", "K", "metric", "eps", "paper", "ours")


@dataclass(frozen=True)
class Checkpoint:
    """A row of data/official_checkpoints.csv; paper and table: where the papers count its prototypes, else empty."""

    name: str
    url: str
    layout: str
    method: str
    backbone: str
    pretrain: str
    paper: str
    table: str

    @property
    def rows(self) -> dict[tuple[str, float], float]:
        """(metric, eps) -> what the paper prints for it."""
        found = {}
        for row in printed() if self.paper else ():
            metric, asked = split(row.metric)
            here = (row.paper, row.table, row.method, row.backbone) == (
                self.paper,
                self.table,
                self.method,
                self.backbone,
            )
            if here and metric in (UNIQUE, LARGEST):
                eps = float(asked["eps"]) if "eps" in asked else round(1 - float(asked["cosine"]), 6)
                found[metric, eps] = float(row.value)
        return found


def checkpoints(path: Path = ROOT / "data" / "official_checkpoints.csv") -> list[Checkpoint]:
    with path.open(newline="") as file:
        return [Checkpoint(**row) for row in csv.DictReader(file)]


def fetch(url: str, folder: Path, progress: bool = True) -> Path:
    """The file behind a URL, in this folder; a part that is there is continued. Raises OSError, one line."""
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to fetch
            raise OSError(f"{url}: {error.code} {error.reason}") from error
        size = error.headers.get("Content-Range", "").rpartition("/")[2]
        if size != str(have):
            part.unlink()
            raise OSError(f"{url}: what was fetched before is of another file; it is removed, run again") from error
        return part.rename(path)
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from error
    with answer:
        have = have if answer.status == 206 else 0  # else it is sent from its beginning
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True, mininterval=2,
                   file=sys.stdout, disable=not progress)  # fmt: skip
        with part.open("ab" if have else "wb") as file, bar:
            while block := answer.read(2**20):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{url}: {part.stat().st_size:,} of {total:,} bytes came; run again to go on")
    return part.rename(path)


def examine(path: Path, out: Path) -> dict:
    """The doctor's report on a file. Raises ValueError with what it says where it fails."""
    command = [sys.executable, "-m", "prototypes_lib", "doctor", str(path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ValueError((done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1])
    return json.loads((out / "report.json").read_text())


def compared(checkpoint: Checkpoint, report: dict) -> list[tuple]:
    """Rows of COLUMNS: M of each set at both papers' thresholds; the teacher's crops' with what the paper prints."""
    rows, said = [], checkpoint.rows
    for i, found in enumerate(report["sets"]):
        curve = {round(point["eps"], 6): point for point in found["curve"]}
        for metric, eps in [(UNIQUE, 0.025), (UNIQUE, 0.1), (LARGEST, 0.1)]:
            value, ours = said.get((metric, eps)) if i == 0 else None, curve[eps]
            name = f"{found['network']}, {found['of']}"
            printed_value = "" if value is None else f"{value:.0f}"
            number = ours["m"] if metric == UNIQUE else ours["largest"]
            rows.append((checkpoint.name, name, found["k"], metric, eps, printed_value, number))
    return rows


def table(rows: Sequence[tuple]) -> str:
    texts = [COLUMNS, *[tuple(map(str, row)) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)).rstrip() for line in texts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print them, fetch nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--cache", type=Path, default=default_root() / "official", help="where files are kept")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where reports go")
    parser.add_argument("--table", type=Path, default=ROOT / "data" / "official_checkpoints.csv", help="another list")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    asked = parser.parse_args(argv)
    known = checkpoints(asked.table)
    if unknown := sorted(set(asked.only or ()) - {one.name for one in known}):
        parser.error(f"unknown: {', '.join(unknown)}; --list has the names")
    chosen = [one for one in known if not asked.only or one.name in asked.only]
    if asked.list:
        for one in chosen:
            beside = f"{one.paper}, {one.table}" if one.paper else "in no table of the papers"
            print(f"{one.name:26s} {one.method:8s} {one.backbone:10s} {beside}\n{'':26s} {one.url}")
        return 0
    rows, failed = [], []
    for i, one in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {one.name}", flush=True)
        try:
            path = fetch(one.url, asked.cache / one.name, not asked.quiet)
            rows += compared(one, examine(path, asked.out / one.name))
        except (OSError, ValueError) as error:
            failed.append(one.name)
            print(f"  {one.name}: {error}", file=sys.stderr, flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    with (asked.out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(table(rows))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
