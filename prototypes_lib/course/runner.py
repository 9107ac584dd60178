"""`prototypes run`: the notebooks asked for, one after the other, each ending in a copy that ran or in an error."""

import math
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from prototypes_lib.course import copies, pages
from prototypes_lib.course.arguments import as_code, from_here, inject, parameters, resolve, resolve_each, smoke_values
from prototypes_lib.course.guards import Interrupted, lock, signals
from prototypes_lib.course.kernel import execute

_EVERY_S = 10.0


@dataclass(frozen=True)
class Result:
    """How one notebook ended; `cell` and `line` (its first) say where it failed, `reason` why."""

    source: Path
    ok: bool
    wall_s: float
    output: Path | None
    cell: str = ""
    line: str = ""
    reason: str = ""

    @property
    def message(self) -> str:
        """One line: the notebook, and if it failed the cell, its first line and the reason."""
        if self.ok:
            return f"{self.source.stem}: done in {duration(self.wall_s)}"
        where = f" at {self.cell} ({self.line})" if self.cell else ""
        return f"{self.source.stem}: FAILED after {duration(self.wall_s)}{where}: {self.reason}"


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min 07 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def find(notebooks_dir: Path, only: Sequence[str] = ()) -> list[Path]:
    """The notebook sources, all or those named by number ("10") or name ("10_x", "x"), in the course's order.

    Raises:
        FileNotFoundError: no notebooks there. ValueError: an unknown one is asked for.
    """
    sources = sorted(notebooks_dir.glob("[0-9][0-9]_*.py"))
    if not sources:
        raise FileNotFoundError(f"no notebooks NN_name.py in {notebooks_dir}; run this in a clone of the repository")
    asked = [only] if isinstance(only, str) else list(only)
    found = set()
    for word in asked:
        name = word.removesuffix(".py")
        matches = [s for s in sources if name in (s.stem, s.stem[3:], s.stem[:2], s.stem[:2].lstrip("0"))]
        if not matches:
            raise ValueError(f"no notebook {word!r}; there are: {', '.join(s.stem for s in sources)}")
        found |= set(matches)
    return sorted(found) if asked else sources


def run(
    sources: Sequence[Path],
    out_dir: Path,
    params: Mapping[str, Any] | None = None,
    *,
    timeout_s: int | float | None = 1800.0,
    total_timeout_s: int | float | None = 3600.0,
    smoke: bool = False,
    progress: bool = True,
) -> list[Result]:
    """Executes `sources` into `out_dir`: `NN_name.ipynb` for a run that came to its end, else `NN_name.failed.ipynb`.

    A failed notebook does not stop the others. `params` are values or texts, each known to at least one notebook;
    `smoke` starts from the small values of each notebook's nbmake mock. `timeout_s` (a cell) and
    `total_timeout_s` (a notebook) are seconds, 0 or None for no limit.

    Raises:
        ValueError: a time limit below 0, an unknown or ill-typed parameter, a notebook without `course.finish()` as
            its last code cell, or another run at work in `out_dir`. Nothing has run or changed then.
    """
    timeout_s, total_timeout_s = _limit("timeout", timeout_s), _limit("total-timeout", total_timeout_s)
    given = resolve_each(sources, params or {})
    if smoke:
        given = [resolve(s, smoke_values(s)) | g for s, g in zip(sources, given, strict=True)]
    for source in sources:
        _require_finish(source)
    out_dir.mkdir(parents=True, exist_ok=True)
    results = []
    with signals(), lock(out_dir):
        (out_dir / "index.html").unlink(missing_ok=True)
        for i, (source, values) in enumerate(zip(sources, given, strict=True)):
            say = _Progress(f"[{i + 1}/{len(sources)}] ", source.stem, progress)
            results.append(_run_one(source, out_dir, values, timeout_s, total_timeout_s, smoke, say))
            say(results[-1].message)
    return results


def _limit(name: str, seconds: float | None) -> int | None:
    """A time limit in whole seconds, as nbclient wants it; None, 0 and infinity are no limit."""
    if seconds is None or seconds in (0, math.inf):
        return None
    if not seconds > 0:
        raise ValueError(f"{name} {seconds:g}: give seconds, or 0 for no limit")
    return math.ceil(seconds)


class _Progress:
    """Plain lines: start, the current cell every ten seconds, end."""

    def __init__(self, prefix: str, name: str, on: bool) -> None:
        self.prefix, self.name, self.on = prefix, name, on
        self.start = self.last = time.monotonic()
        self.cells: list[str] = []
        self(f"{name}: start")

    def __call__(self, text: str) -> None:
        if self.on:
            print(self.prefix + text, flush=True)

    def tick(self, cell: str) -> None:
        now = time.monotonic()
        if cell in self.cells and now - self.last >= _EVERY_S:
            self.last = now
            at = self.cells.index(cell) + 1
            self(f"{self.name}: cell {at}/{len(self.cells)}, {duration(now - self.start)}")


def _run_one(
    source: Path,
    out_dir: Path,
    values: dict[str, Any],
    timeout_s: int | None,
    total_timeout_s: int | None,
    smoke: bool,
    say: _Progress,
) -> Result:
    start = time.monotonic()
    run_id = uuid.uuid4().hex
    folder = out_dir / f".{source.stem}.{run_id[:8]}"
    nb = inject(copies.convert(source), values)
    say.cells = [cell.id for cell in nb.cells]
    cell, reason, output = "", "", None
    try:
        for ending in ("ipynb", "html", "failed.ipynb", "failed.html"):  # an older run must not pass for this one
            (out_dir / f"{source.stem}.{ending}").unlink(missing_ok=True)
        folder.mkdir()
        cell, reason = execute(
            nb,
            folder,
            cwd=source.parent,
            run_id=run_id,
            timeout_s=timeout_s,
            total_timeout_s=total_timeout_s,
            tick=say.tick,
        )
        executed = copies.read(folder / "out.ipynb") if (folder / "out.ipynb").is_file() else nb
        if not reason:
            cell, reason = copies.fault(executed, run_id) or ("", "")
        record = {
            "source": source.name,
            "source_sha256": copies.fingerprint(source),
            "parameters": {name: as_code(value) for name, value in values.items()},
            "smoke": smoke,
            "status": "failed" if reason else "ok",
            "wall_s": round(time.monotonic() - start, 1),
        }
        text = nbformat.writes(copies.clean(executed, run_id, record, source.parent)) + "\n"
        if not reason and len(text.encode()) > copies.MAX_BYTES:
            reason = f"the executed copy has {len(text.encode()) / 1e6:.1f} MB, more than {copies.MAX_BYTES / 1e6:g} MB"
            text = text.replace('"status": "ok"', '"status": "failed"')
        output = out_dir / f"{source.stem}{'.failed' if reason else ''}.ipynb"
        copies.write(text, output)
    except OSError as error:
        output, reason = None, reason or f"{type(error).__name__}: {error.strerror or error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    line = copies.first_line(nb, cell)
    return Result(source, not reason, time.monotonic() - start, output, cell, line, reason)


def _require_finish(source: Path) -> None:
    code = [c.source for c in copies.convert(source).cells if c.cell_type == "code" and c.source.strip()]
    if not code or "course.finish()" not in code[-1]:
        raise ValueError(f"{source.name}: the last code cell must call course.finish()")


def run_cli(
    only: Sequence[str] = (),
    params: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    out: Path = Path("out"),
    *,
    notebooks: Path | None = None,
    timeout_s: int | float | None = 1800.0,
    total_timeout_s: int | float | None = 3600.0,
    smoke: bool = False,
    pages_too: bool = True,
    list_only: bool = False,
) -> int:
    """`prototypes run`: exit status 0 all ran, 1 some failed, 2 a wrong request, 128 + n ended by signal n.

    `pages_too` adds an HTML page of each notebook and `index.html`; `list_only` prints the notebooks asked for
    and their parameters, and runs nothing. Folders in `params` are taken from the current directory
    (`arguments.from_here`), time limits of 0 lift them. `notebooks` defaults to the folder of this checkout.
    """
    try:
        sources = find(notebooks or Path(__file__).resolve().parents[2] / "notebooks", only)
        if list_only:
            for source in sources:
                print(f"{source.stem}: {copies.heading(copies.convert(source))}")
                for p in parameters(source).values():
                    print(f"    {p.name}: {p.values} = {p.default!r}" + f"  # {p.help}" * bool(p.help))
            return 0
        results = run(
            sources,
            out,
            from_here(sources, dict(params)),
            timeout_s=timeout_s,
            total_timeout_s=total_timeout_s,
            smoke=smoke,
        )
        if pages_too:
            for result in results:
                if result.output:
                    pages.to_html(result.output, home="index.html")
            print(f"read {pages.index(out, results)}")
    except Interrupted as signalled:
        print(f"ended by {signalled}; the notebook at work left no record", file=sys.stderr)
        return signalled.code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [result for result in results if not result.ok]
    for result in failed:
        print(result.message, file=sys.stderr)
    return 1 if failed else 0
