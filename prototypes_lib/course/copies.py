"""Executed copies: what a source becomes before it runs, what is checked after, and what is kept to read."""

import hashlib
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from prototypes_lib.course.closing import sentinel

MAX_BYTES = 1_000_000
RECORD = "prototypes_lib"  # key of our record in a copy's metadata
_WORD = r"""(?<![^\s"'(<])[^\s"'(<]*"""
_WIDGET = "application/vnd.jupyter.widget-view+json"


def convert(source: Path) -> NotebookNode:
    """The py:percent `source` as a notebook without outputs, with cell ids `cell-00`, `cell-01`, ..."""
    if not source.is_file():
        raise FileNotFoundError(f"no notebook {source}")
    nb = jupytext.read(source, fmt="py:percent")
    for i, cell in enumerate(nb.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata.pop("lines_to_next_cell", None)
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.metadata = NotebookNode(kernelspec=NotebookNode(spec))
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def fingerprint(source: Path) -> str:
    """SHA-256 of the cells of `source` (type, metadata, text); nothing but trailing white space is left out."""
    cells = [
        (cell.cell_type, cell.metadata, [line.rstrip() for line in cell.source.rstrip().splitlines()])
        for cell in convert(source).cells
    ]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def heading(nb: NotebookNode, default: str = "") -> str:
    """The first heading of the notebook as plain text."""
    for cell in nb.cells:
        found = re.search(r"^#+\s+(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if found:
            return re.sub(r"[*`]", "", found[1]).strip()
    return default


def first_line(nb: NotebookNode, cell_id: str) -> str:
    """The first line of a cell, for messages."""
    sources = [cell.source for cell in nb.cells if cell.get("id") == cell_id]
    return next((line.strip()[:80] for line in "".join(sources).splitlines() if line.strip()), "")


def fault(nb: NotebookNode, run_id: str) -> tuple[str, str] | None:
    """(cell id, reason) of the first thing that shows the execution did not come to its end, else None.

    papermill takes `sys.exit(0)` for success and marks the cells of a dead kernel "completed", so its word is
    not enough: no error output, every cell with code executed, and this run's sentinel from the last cell.
    """
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                return cell.id, f"{output.ename}: {_first_words(output.evalue)}".rstrip(": ")
    for cell in code:
        if cell.metadata.get("papermill", {}).get("exception"):
            return cell.id, "an exception"
        if cell.execution_count is None:
            return cell.id, "not executed"
    printed = "".join(o.text for o in code[-1].outputs if o.output_type == "stream") if code else ""
    if sentinel(run_id) not in printed.splitlines():
        return (code[-1].id if code else "cell-00"), "course.finish() did not report this run"
    return None


def clean(nb: NotebookNode, run_id: str, record: dict[str, Any], folder: Path) -> NotebookNode:
    """The copy to keep: no widgets, timings, sentinel or absolute paths, so that two runs differ little.

    `record` becomes the metadata `prototypes_lib`; `folder` is where the notebook ran (shown as `.`).
    """
    language = nb.metadata.get("language_info", {"name": "python"})  # absent after a kill
    nb.metadata = NotebookNode(
        kernelspec=nb.metadata.kernelspec, language_info=language, **{RECORD: NotebookNode(record)}
    )
    seen: set[str] = set()
    for cell in nb.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill's empty list
        if not re.fullmatch(r"cell-\d+|injected-parameters", cell.get("id", "")):
            cell.id = f"note-{len(seen)}"  # the runner's or papermill's remarks on a failure
        seen.add(cell.id)
        if cell.cell_type == "code":
            joined = _joined(cell.outputs)
            for output in joined:
                _clean_output(output, run_id, folder)
            cell.outputs = [o for o in joined if o.get("text", "x") and o.get("data", "x")]
    return nb


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighboring pieces of one stream as one, each line as a terminal shows it at the end (a bar's last state)."""
    # nbclient's own `coalesce_streams` takes quadratic time on a long line: a megabyte hangs it
    joined: list[NotebookNode] = []
    for output in outputs:
        stream = output.output_type == "stream"
        if stream and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if "text" in output:
            lines = output.text.split("\n")
            output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
    return joined


def _clean_output(output: NotebookNode, run_id: str, folder: Path) -> None:
    data = output.get("data", {})
    data.pop(_WIDGET, None)
    if "text" in output:
        output.text = _without_paths(output.text.replace(sentinel(run_id) + "\n", ""), folder)
    if "text/plain" in data:
        data["text/plain"] = _without_paths(data["text/plain"], folder)
    if "traceback" in output:
        output.traceback = [_without_paths(line, folder) for line in output.traceback]


def _without_paths(text: str, folder: Path) -> str:
    # a match starts only where a word starts: from every letter, a long line would take quadratic time
    text = re.sub(_WORD + r"[/\\]ipykernel_\d+[/\\]\d+\.py", "<cell>", text)
    text = re.sub(_WORD + r"[/\\]site-packages[/\\]", "site-packages/", text)
    checkout = Path(__file__).resolve().parents[2]
    names = {folder.resolve(): ".", checkout: "<checkout>", Path(sys.prefix): "<env>", Path.home(): "~"}
    for path in sorted(names, key=lambda path: -len(str(path))):  # the inner folder before the outer
        if len(path.parts) > 1:
            text = text.replace(str(path), names[path])
    return text


def _first_words(text: str) -> str:
    """The first line of an error without terminal colors."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return lines[0] if lines else ""


def write(text: str, path: Path) -> None:
    """Writes `path` as a whole or not at all (a temporary file beside it, then a rename)."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> NotebookNode:
    """The notebook file `path` in the current format."""
    return nbformat.read(path, as_version=4)


def is_stale(source: Path, executed: Path) -> bool:
    """Whether `executed` is no clean, full run of `source` as it is now (missing, failed, smoke or other cells)."""
    if not executed.is_file():
        return True
    record = read(executed).metadata.get(RECORD, {})
    clean_run = record.get("status") == "ok" and not record.get("smoke", True)
    return not clean_run or record.get("source_sha256") != fingerprint(source)


def stale(notebooks_dir: Path, executed_dir: Path) -> list[Path]:
    """Sources whose executed copy is stale, and copies whose source is gone; empty when all is current."""
    sources = sorted(notebooks_dir.glob("[0-9][0-9]_*.py"))
    names = {source.stem for source in sources}
    old = [source for source in sources if is_stale(source, executed_dir / f"{source.stem}.ipynb")]
    return old + [copy for copy in sorted(executed_dir.glob("*.ipynb")) if copy.stem not in names]
