"""Watch a run while it trains: its curves in a terminal, or an HTML page that refreshes itself."""

import io
import math
import os
import shutil
import sys
import time
from pathlib import Path

from prototypes_lib.files.storage import write_text
from prototypes_lib.live.run import Watched, find, read
from prototypes_lib.live.terminal import draw

__all__ = ["Watched", "draw", "find", "read", "watch"]


def watch(
    place: str | Path,
    *,
    html: str | Path | None = None,
    every: float = 5.0,
    once: bool = False,
    to: io.TextIOBase | None = None,
) -> int:
    """Show a run, again and again until it is finished or Ctrl-C; it may be one that is finished, or has yet to begin.

    Args:
        place: a run folder, or a folder of runs, of which the newest is shown.
        html: a file to write as a page instead of text. every: seconds from picture to picture.
        once: one picture, without waiting for anything. to: where text goes, stdout by default.

    Returns: 0. Raises ValueError, FileNotFoundError: nothing that could be shown, or with `once` nothing to show.
    """
    to = sys.stdout if to is None else to
    if not 0 < every < math.inf:
        raise ValueError(f"every={every}: seconds from picture to picture must be positive and finite")
    if html is not None and Path(html).is_dir():
        raise ValueError(f"{html} is a folder; name the page to write in it, as {Path(html) / 'watch.html'}")
    shown, waiting = "", False
    try:
        while True:
            folder = find(place)
            run = None if folder is None else read(folder)
            if run is None or not run.rows:
                if once or (run is not None and run.finished):
                    raise FileNotFoundError(
                        f"{folder or place} holds no metrics yet; train into it, or name another run"
                    )
                if not waiting:
                    print(f"waiting for metrics in {folder or place} (Ctrl-C ends)", file=to, flush=True)
                waiting = True
            if run is not None and html is not None:
                shown = _write(run, Path(html), every, shown, to)
            elif run is not None and run.rows:
                shown = _print(run, shown, to)
            if once or (run is not None and run.finished):
                return 0
            time.sleep(every)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # who reads has gone, as `head` does
        if to is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())
        return 0


def _write(run: Watched, path: Path, every: float, shown: str, to: io.TextIOBase) -> str:
    from prototypes_lib.live.page import page  # its colors come with matplotlib

    write_text(path, page(run, every))
    if not shown:
        ends = "" if run.finished else f" (refreshes every {every:g} s; Ctrl-C ends)"
        print(f"{path}{ends}", file=to, flush=True)
    return str(path)


def _print(run: Watched, shown: str, to: io.TextIOBase) -> str:
    """Over the picture before on a terminal; elsewhere below it, and only where there is a new row."""
    screen = to.isatty()
    size = shutil.get_terminal_size((80, 40)) if screen else os.terminal_size((80, 40))
    colors = screen and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    new = f"{run.folder} {run.rows[-1]['step']} {run.finished}"
    if not screen and shown == new:
        return shown
    text = draw(run, size.columns - 1 if screen else size.columns, size.lines - 1, _has_dots(to), colors)
    print(("\x1b[H\x1b[2J" if screen and shown else "") + text, file=to, flush=True)
    return new


def _has_dots(to: io.TextIOBase) -> bool:
    try:
        "⣿│┄".encode(to.encoding or "ascii")
        return True
    except (UnicodeEncodeError, LookupError):
        return False
