"""Execution of one notebook in a process of its own, which dies as a whole at a time limit or with the runner.

    runner ── child (papermill) ── kernel (a session of its own) ── its workers

The kernel leaves the child's process group, so a group kill would miss it: every process of a run is found as a
descendant of the child or by the run id in its environment.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from prototypes_lib.course.closing import RUN_ID

_CHILD = "from prototypes_lib.course.kernel import child; child()"


def execute(
    nb: NotebookNode,
    folder: Path,
    *,
    cwd: Path,
    run_id: str,
    timeout_s: int | None,
    total_timeout_s: int | None,
    tick: Callable[[str], None],
) -> tuple[str, str]:
    """Runs `nb` in the directory `cwd`, writes `folder/out.ipynb`; returns (cell id, reason) of what went wrong.

    The reason is empty when the execution ended by itself, be it with a traceback: `copies.fault` judges the
    notebook. `tick(cell id)` is called several times a second. Limits are in seconds: `timeout_s` for a
    cell, `total_timeout_s` for the notebook with its start; None is no limit.
    """
    nbformat.write(nb, folder / "in.ipynb")
    (folder / "job.json").write_text(json.dumps({"cwd": str(cwd.resolve()), "timeout_s": timeout_s}))
    start = time.monotonic()
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(folder.resolve())],
            stdin=subprocess.PIPE,  # its end tells the child that the runner is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(folder.resolve(), run_id),
            start_new_session=True,  # a Ctrl-C reaches the runner alone, which then ends the child
        )
    try:
        while child.poll() is None:
            tick(_text(folder / "cell"))
            if total_timeout_s is not None and time.monotonic() - start > total_timeout_s:
                return _text(folder / "cell"), f"the notebook took longer than {total_timeout_s:g} s"
            try:
                child.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    finally:
        _kill(child.pid, run_id)
        child.wait()
        assert child.stdin is not None
        child.stdin.close()
    if child.returncode == 0:
        return "", ""
    last_words = _text(folder / "log").strip().splitlines()[-1:]
    reason = _text(folder / "reason") or " ".join(last_words) or f"its process ended with {child.returncode}"
    return _text(folder / "cell"), reason if folder.is_dir() else "the output folder was removed"


def _environment(folder: Path, run_id: str) -> dict[str, str]:
    """The environment of a run: the kernel is this interpreter, whatever kernels and start-up files a user has."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    ours = {
        RUN_ID: run_id,
        "JUPYTER_PATH": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # tqdm.auto asks for widgets, which a copy could not keep; a filter by text works before tqdm is imported
    ours["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"]))
    # a backend chosen for scripts (MPLBACKEND=agg) would leave the notebooks without figures
    return {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | ours


def _kill(pid: int, run_id: str) -> None:
    import psutil

    for _ in range(5):  # a process may start another while we look
        found = [p for p in psutil.process_iter() if p.pid != os.getpid() and _belongs(p, run_id)]
        try:
            root = psutil.Process(pid)
            found += [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            pass
        found = [p for p in found if p.is_running() and _alive(p)]
        if not found:
            return
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=2)


def _alive(process: Any) -> bool:
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _belongs(process: Any, run_id: str) -> bool:
    import psutil

    try:
        return process.environ().get(RUN_ID) == run_id
    except (psutil.Error, OSError):  # ended meanwhile, or another user's
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def child() -> None:
    """The child's work: papermill on `in.ipynb`, the current cell's id in `cell`, a failure's text in `reason`."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_the_runner, args=(folder,), daemon=True).start()

    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    class Reporting(NBClientEngine):
        """papermill's engine, saying which cell starts."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            begin = nb_man.cell_start

            def report(cell: NotebookNode, index: int) -> None:
                (folder / "next").write_text(cell.id)
                (folder / "next").replace(folder / "cell")
                begin(cell, index)

            nb_man.cell_start = report
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("reporting", Reporting)
    tempfile.tempdir = str(folder)  # the connection file goes with the folder, even after a kill
    job = json.loads((folder / "job.json").read_text())
    try:
        papermill.execute_notebook(
            str(folder / "in.ipynb").replace("{", "{{").replace("}", "}}"),  # papermill formats its paths
            str(folder / "out.ipynb").replace("{", "{{").replace("}", "}}"),
            engine_name="reporting",
            progress_bar=False,
            cwd=job["cwd"],
            start_timeout=120,
            execution_timeout=job["timeout_s"],
            iopub_timeout=60,  # seconds; the default 4 fails on a busy machine
            store_widget_state=False,
        )
    except DeadKernelError:
        reason = "the kernel died (killed, or out of memory)"
    except CellTimeoutError:
        reason = f"the cell took longer than {job['timeout_s']:g} s"
    except PapermillExecutionError:
        return  # the notebook holds the traceback, which `copies.fault` finds
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    else:
        return
    (folder / "reason").write_text(reason)
    sys.exit(1)


def _end_with_the_runner(folder: Path) -> None:
    while os.read(0, 1):
        continue
    _kill_below()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _kill_below() -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
