"""What the commands of this folder share: one line of progress, one JSON record a command."""

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prototypes_lib.files.storage import write_text
from prototypes_lib.records import environment


def folder(out: str) -> Path:
    """The folder of the record, made now, so that a bad one ends a command before its work. Raises SystemExit."""
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        sys.exit(f"error: --out {out}: {problem.strerror}")
    return path


def told(items: Iterable, n: int, what: str, every: float = 5.0) -> Iterator:
    """The items, with a line of progress every few seconds and at the end."""
    start = said = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > every or i == n:
            said = now
            print(f"{i}/{n} {what}  {now - start:.0f} s", flush=True)


def save(path: Path, script: str, arguments: list[str], parameters: dict[str, Any], run: dict[str, Any]) -> None:
    """Write a command's record: how to run it again, and its one run with seed, hash, seconds, environment and table.

    The hash is over the script, its parameters and `run["what"]`, the names of what was compared.
    """
    what = json.dumps([script, parameters, run["what"]], sort_keys=True).encode()
    run = {"hash": hashlib.sha256(what).hexdigest()[:12], **run, "environment": environment("cpu") | run["environment"]}
    record = {
        "notebook": script,
        "command": shlex.join(["python", script, *arguments]),
        "parameters": parameters,
        "runs": [run],
    }
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(path)


def plain(x: float) -> float | str:
    """A number for JSON, which knows neither nan nor infinity."""
    return x if math.isfinite(x) else str(x)
