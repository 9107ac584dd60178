"""The most memory a program has held, of a process of its own."""

import os
import resource
import subprocess
import sys
from pathlib import Path


def peak() -> float:
    """Megabytes this process has held at most: not getrusage's figure, which on Linux starts at that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def run(program: str, *arguments) -> subprocess.CompletedProcess:
    """The text of a program, run by a Python of its own that finds this file and the library; its output as text."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done
