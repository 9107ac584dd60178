"""What a run writes down: metrics as JSON lines and CSV, progress as text, and where and with what it ran."""

import csv
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from prototypes_lib import __version__
from prototypes_lib.collapse.diagnosis import Finding, diagnose
from prototypes_lib.event_files import EventFiles
from prototypes_lib.files.storage import clear_error, write_text

HISTORY = 500  # rows that a diagnosis looks back


class Log:
    """metrics.jsonl line by line, a line of progress at most every 10 s, metrics.csv and result.json at the end.

    What `collapse.diagnose` finds wrong is said once of each kind, and a line of findings.jsonl; the run goes on.

    writes: False on all ranks but the first, which keep the rows only. events: whether TensorBoard gets the rows, too.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        batch_size: int,
        k: int,
        progress: bool,
        writes: bool = True,
        events: bool = False,
    ):
        self.folder, self.name, self.steps, self.progress, self.writes = folder, name, steps, progress, writes
        self.batch_size, self.k = batch_size, k
        self.rows: list[dict[str, float]] = []
        self.findings: list[dict[str, Any]] = []
        self._events = EventFiles(folder / "tensorboard") if events and writes else None
        self._said = -math.inf

    def rewind(self, step: int) -> None:
        """Forget what was written after the checkpoint a run goes on from."""
        self.rows = _up_to(step, self.folder / "metrics.jsonl")
        self.findings = _up_to(step, self.folder / "findings.jsonl")
        if not self.writes:
            return
        write_text(self.folder / "metrics.jsonl", _lines(self.rows))
        if (self.folder / "findings.jsonl").exists():
            write_text(self.folder / "findings.jsonl", _lines(self.findings))
        if self._events:
            self._events.start(self.rows)

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if not self.writes:
            return
        self._append("metrics.jsonl", row)
        if self._events:
            self._events.write(row)
        now = time.monotonic()
        if self.progress and (now - self._said > 10 or row["step"] == self.steps):
            self._said = now
            print(self.line(row), flush=True)
        for finding in diagnose(self.rows[-HISTORY:]):
            if finding.kind not in {known["kind"] for known in self.findings}:
                self._tell(finding)

    def _tell(self, finding: Finding) -> None:
        self.findings.append(dataclasses.asdict(finding))
        self._append("findings.jsonl", self.findings[-1])
        if self.progress:
            print(f"{self.name}  {finding}", flush=True)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise clear_error(path, error) from error

    def sync(self) -> None:
        """Flush the metrics to the disk: a checkpoint must not outlive the rows before it."""
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise clear_error(path, error) from error

    def line(self, row: dict[str, float]) -> str:
        """A row as a person reads it: loss against ln K, teacher entropy, M, speed, time left."""
        step, seconds = int(row["step"]), row["seconds"]
        text = f"{self.name}  step {step}/{self.steps}  loss {row['loss']:.3f}"
        if self.k:
            text += (
                f" (ln K {math.log(self.k):.3f})  teacher entropy {row['teacher_entropy']:.3f}"
                f"  M {row.get('M', '?')}/{self.k}"
            )
        left = seconds / step * (self.steps - step)
        return f"{text}  {step * self.batch_size / seconds:.0f} images/s  {int(left // 60)}:{int(left % 60):02d} left"

    def finish(self, summary: dict[str, Any]) -> None:
        if not self.writes:
            return
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / "metrics.csv", table.getvalue())
        write_text(self.folder / "result.json", json.dumps(summary, indent=2))

    def close(self) -> None:
        if self._events:
            self._events.close()


def _up_to(step: int, path: Path) -> list[dict[str, Any]]:
    """A file's lines of no later step."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := _parsed(line)) and row["step"] <= step]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of metrics, or nothing for one that was cut off by a crash (then it lies after the checkpoint)."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions, hardware and commit: what a number needs beside it to be a result."""
    device = torch.device(device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        n = torch.get_num_threads()
        hardware = f"{_processor()}, {n} thread{'s' * (n != 1)}"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    return {
        "prototypes_lib": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **versions,
        "hardware": hardware,
        "platform": f"{platform.system()} {platform.machine()}",
    }


_OUTPUTS = (":(exclude,top)notebooks/executed", ":(exclude,top)notebooks/results", ":(exclude,top)docs")


def commit() -> str:
    """The checkout's commit, with "+" where tracked sources differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # installed inside somebody else's repository
            return "unknown"
        changed = git("status", "--porcelain", "-uno", ":/", *_OUTPUTS)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
