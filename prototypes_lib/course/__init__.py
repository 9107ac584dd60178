"""The course: run the notebooks, check that they ran, and leave something to read.

`run` executes `notebooks/NN_name.py` in order, `run_cli` is `prototypes run`, and `finish` is the last code cell of
every notebook. Needs the extra `notebooks` (jupytext, papermill, ipykernel, nbconvert).
"""

import importlib
from typing import Any

from prototypes_lib.course.closing import finish

# Every notebook imports this module for `finish` alone; the rest, with two seconds of imports, waits for its use.
_WHERE = {
    "Parameter": "arguments",
    "parameters": "arguments",
    "resolve": "arguments",
    "resolve_each": "arguments",
    "is_stale": "copies",
    "stale": "copies",
    "index": "pages",
    "to_html": "pages",
    "Result": "runner",
    "find": "runner",
    "run": "runner",
    "run_cli": "runner",
}

__all__ = ["finish", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
