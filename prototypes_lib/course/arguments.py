"""The parameters of a notebook: read from its `parameters` cell, and checked before anything runs.

papermill accepts any name and any type (a typo silently runs the defaults); here both are errors.
"""

import ast
import difflib
import io
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from prototypes_lib.course.copies import convert

_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = default  # help` of a notebook's `parameters` cell."""

    name: str
    type: str
    default: Any
    help: str

    @property
    def values(self) -> str:
        """The type as a reader takes it: `Literal["a", "b"]` is `one of "a", "b"`."""
        return re.sub(r"(typing\.)?Literal\[(.*?)\]", r"one of \2", self.type)


def parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of the notebook source `path`, in their order; empty when no cell is tagged `parameters`.

    Raises:
        ValueError: several tagged cells, a line that is not `name: type = literal`, or an ill-typed default.
    """
    cells = [c for c in convert(path).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) > 1:
        raise ValueError(f"{path.name}: {len(cells)} cells are tagged 'parameters'; keep one")
    return _read(cells[0].source, path.name) if cells else {}


def smoke_values(path: Path) -> dict[str, Any]:
    """The notebook's small values for a smoke test: the nbmake mock of its `parameters` cell.

    Raises:
        ValueError: another cell carries a mock (nbmake would apply it, the runner could not).
    """
    found: dict[str, Any] = {}
    for i, cell in enumerate(convert(path).cells):
        mock = cell.metadata.get("nbmake", {}).get("mock", {})
        if mock and "parameters" not in cell.metadata.get("tags", []):
            raise ValueError(f"{path.name}, cell {i}: move the nbmake mock to the cell tagged 'parameters'")
        found |= mock
    return found


def resolve(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `given` as the notebook `path` declares them; text is read, other values are checked.

    Raises:
        ValueError: a name the notebook does not have (with the closest one), or a value of another type.
    """
    known = parameters(path)
    _reject_unknown(given, known, path.name)
    return {name: _value(value, known[name], path.name) for name, value in given.items()}


def resolve_each(paths: Sequence[Path], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`resolve` over several notebooks: each takes the names it has, and every name is taken by at least one."""
    known = [parameters(path) for path in paths]
    _reject_unknown(given, {n: p for names in known for n, p in names.items()}, "the notebooks asked for")
    return [
        resolve(path, {n: v for n, v in given.items() if n in names}) for path, names in zip(paths, known, strict=True)
    ]


def from_here(paths: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with folders named from the current directory made absolute, as a notebook runs in its own.

    That is: text for a parameter of type `str` whose help says "folder", where such a file or folder exists here.
    The name of a data set stays a name ("./cifar10" is a folder of that name), and so does a path not found here.
    """
    from prototypes_lib.data import DATASETS

    found = dict(given)
    for known in map(parameters, paths):
        for name, text in given.items():
            folder = name in known and "str" in known[name].type and "folder" in known[name].help
            if folder and isinstance(text, str) and text and text not in DATASETS and Path(text).exists():
                found[name] = str(Path(text).resolve())
    return found


def _reject_unknown(given: Mapping[str, Any], known: Mapping[str, Parameter], where: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"unknown parameter {name!r} of {where}; {hint}")


def _read(cell: str, where: str) -> dict[str, Parameter]:
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(cell).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, Parameter] = {}
    for node in ast.parse(cell).body:
        line = f"{where}, parameters cell, line {node.lineno}"
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
            raise ValueError(f"{line}: write `name: type = value  # meaning and unit`")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"{line}: a default must be a literal, not `{ast.unparse(node.value)}`") from None
        quoted = isinstance(node.annotation, ast.Constant) and isinstance(node.annotation.value, str)
        kind = node.annotation.value if quoted else ast.unparse(node.annotation)
        name = node.target.id
        try:
            _check(default, node.annotation)
        except ValueError:
            raise ValueError(f"{line}: the default {default!r} of {name} is not {kind}") from None
        found[name] = Parameter(name, kind, default, comments.get(node.end_lineno or node.lineno, ""))
    return found


def _value(value: Any, parameter: Parameter, where: str) -> Any:
    kind = ast.parse(parameter.type, mode="eval").body
    try:
        return _parse(value, kind) if isinstance(value, str) else _check(value, kind)
    except (ValueError, SyntaxError):
        raise ValueError(f"parameter {parameter.name!r} of {where} is {parameter.values}, not {value!r}") from None


def _parts(kind: ast.expr) -> tuple[str, list[ast.expr]]:
    """An annotation as (name, arguments): `list[int]` → ("list", [int]); `int | None` → ("union", [int, None])."""
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        return "union", [*_options(kind.left), *_options(kind.right)]
    if isinstance(kind, ast.Constant) and kind.value is None:
        return "None", []
    if isinstance(kind, ast.Constant) and isinstance(kind.value, str):  # a quoted annotation
        return _parts(ast.parse(kind.value, mode="eval").body)
    if isinstance(kind, ast.Subscript):
        inside = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        return ast.unparse(kind.value).rpartition(".")[2], list(inside)
    return ast.unparse(kind).rpartition(".")[2], []


def _options(kind: ast.expr) -> list[ast.expr]:
    name, inside = _parts(kind)
    if name == "Optional":
        return [*inside, ast.Constant(None)]
    return inside if name in ("union", "Union") else [kind]


def _element_kinds(name: str, inside: list[ast.expr], count: int, default: ast.expr) -> list[ast.expr]:
    """The kind of each of `count` elements of a list or tuple; a tuple without `...` has a fixed length."""
    if name == "tuple" and inside and ast.unparse(inside[-1]) != "...":
        if len(inside) != count:
            raise ValueError(f"{len(inside)} elements, not {count}")
        return inside
    return [inside[0] if inside else default] * count


def _parse(text: str, kind: ast.expr) -> Any:
    """Text from a command line as a value of `kind`; sequences also as `8,16,32`."""
    name, inside = _parts(kind)
    if name in ("union", "Union", "Optional"):
        options = sorted(_options(kind), key=lambda k: _parts(k)[0] == "str")  # text fits everything: last
        for option in options:
            try:
                return _parse(text, option)
            except (ValueError, SyntaxError):
                continue
        raise ValueError(text)
    if name in ("str", "Any", "Path"):
        return text
    if name == "bool" and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if name in ("int", "float"):
        return {"int": int, "float": float}[name](text)
    if name in ("list", "tuple") and not text.strip().startswith(("[", "(")):
        pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
        kinds = _element_kinds(name, inside, len(pieces), ast.Name("str"))
        return _check([_parse(p, k) for p, k in zip(pieces, kinds, strict=True)], kind)
    if name == "Literal":
        for option in map(ast.literal_eval, inside):
            if text == str(option):
                return option
        raise ValueError(text)
    return _check(ast.literal_eval(text.strip()), kind)


def _check(value: Any, kind: ast.expr) -> Any:
    """`value` if it is of `kind` (an int passes as a float, a list as a tuple), else ValueError."""
    name, inside = _parts(kind)
    if name in ("union", "Union", "Optional"):
        for option in _options(kind):
            try:
                return _check(value, option)
            except ValueError:
                continue
    elif name == "Any" or (name == "None" and value is None):
        return value
    elif name == "Literal":
        if value in map(ast.literal_eval, inside):
            return value
    elif name == "bool" or isinstance(value, bool):
        if name == "bool" and isinstance(value, bool):
            return value
    elif name == "float" and isinstance(value, int | float):
        return float(value)
    elif (name == "int" and isinstance(value, int)) or (name in ("str", "Path") and isinstance(value, str)):
        return value
    elif name == "dict" and isinstance(value, dict):
        if not inside:
            return value
        return {_check(k, inside[0]): _check(v, inside[1]) for k, v in value.items()}
    elif name in ("list", "tuple") and isinstance(value, list | tuple):
        kinds = _element_kinds(name, inside, len(value), ast.Name("Any"))
        return (list if name == "list" else tuple)(_check(v, k) for v, k in zip(value, kinds, strict=True))
    raise ValueError(value)


def inject(nb: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """The notebook with papermill's injected cell; written here because papermill turns a tuple into text."""
    if values:
        at = next(i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", []))
        lines = ["# Parameters", *(f"{name} = {as_code(value)}" for name, value in values.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
        cell.id = "injected-parameters"
        nb.cells.insert(at + 1, cell)
    return nb


def as_code(value: Any) -> str:
    """`value` as a Python expression (`repr`, but for infinities and nan)."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_code(k)}: {as_code(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_code, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(as_code, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
