"""The command that shows a run while it trains."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def watch(
    run: Annotated[Positional[Path], arg(metavar="RUN")] = Path("runs"),
    html: Path | None = None,
    every: float = 5.0,
    once: bool = False,
) -> int:
    """Show a run's curves and what is wrong with it, in the terminal or as a page, until it is finished or Ctrl-C.

    Args:
        run: a run folder, or a folder of runs, of which the newest is shown.
        html: write a page that refreshes itself to this file, instead of text.
        every: seconds from picture to picture.
        once: one picture, without waiting for more.
    """
    from prototypes_lib import live

    return live.watch(run, html=html, every=every, once=once)
