"""Notebooks with faults through this course's runner and through plain papermill: does the exit status tell?"""

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A toy *claim*

# %% tags=["parameters"]
epochs: int = 1  # passes over the data

# %%
"""
END = """

# %%
from prototypes_lib import course

course.finish()
"""


@dataclass(frozen=True)
class Fault:
    """A cell of a notebook, parameters it is given, and whether the run is a success."""

    name: str
    cell: str
    parameters: tuple[tuple[str, str], ...] = ()
    success: bool = False


FAULTS = (
    Fault("nothing wrong", "print(epochs)", success=True),
    Fault("a known parameter", "print(epochs)", (("epochs", "3"),), success=True),
    Fault("an exception", "raise KeyError('lost')"),
    Fault("sys.exit(0)", "import sys\nsys.exit(0)"),
    Fault("the kernel is killed", "import os\nos.kill(os.getpid(), 9)"),
    Fault("the kernel leaves", "import os\nos._exit(0)"),
    Fault("a cell hangs", "import time\ntime.sleep(600)"),
    Fault("an unknown parameter", "print(epochs)", (("epoch", "3"),)),
    Fault("a parameter of another type", "print(epochs)", (("epochs", "three"),)),
    Fault("the output folder is deleted", "import shutil\nshutil.rmtree('../out')"),
    Fault("a syntax error", "x = (1"),
)
LIMIT_S = 10


def _source(folder: Path, fault: Fault) -> Path:
    (folder / "nb").mkdir(parents=True)
    path = folder / "nb" / "10_x.py"
    path.write_text(HEADER + fault.cell + END)
    return path


def ours(folder: Path, fault: Fault) -> int:
    """Exit status of `prototypes run` on the notebook."""
    from prototypes_lib import course

    source = _source(folder, fault)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return course.run_cli(
            [], fault.parameters, folder / "out", notebooks=source.parent, timeout_s=LIMIT_S, pages_too=False
        )


def papermill(folder: Path, fault: Fault) -> int:
    """Exit status of papermill on the same notebook, converted."""
    from prototypes_lib.course import copies

    source = _source(folder, fault)
    (folder / "out").mkdir()
    import nbformat

    nbformat.write(copies.convert(source), source.with_suffix(".ipynb"))
    command = [str(Path(sys.executable).parent / "papermill"), "10_x.ipynb", "../out/10_x.ipynb"]
    command += ["--execution-timeout", str(LIMIT_S), "--no-progress-bar"]
    for name, value in fault.parameters:
        command += ["-p", name, value]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=source.parent, capture_output=True, timeout=6 * LIMIT_S).returncode
    return 0  # it waits for ever: nobody is told


RUNNERS = {"prototypes_lib": ours, "papermill": papermill}


def told(folder: Path, by: str, faults: tuple[Fault, ...] = FAULTS) -> Iterator[tuple[str, str | None]]:
    """Each fault, and what the exit status says instead of the truth, or None."""
    for i, fault in enumerate(faults):
        status = RUNNERS[by](folder / f"{i}", fault)
        yield fault.name, None if (status == 0) == fault.success else f"exit status {status}"
