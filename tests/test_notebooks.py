"""The notebooks run, say what a notebook must say, and their executed copies are theirs."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prototypes_lib import course
from prototypes_lib.course import copies

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
THEORY = [p for p in NOTEBOOKS if "10" <= p.stem[:2] < "50"]
OTHER = [p for p in NOTEBOOKS if p not in THEORY]


def cells(path):
    return copies.convert(path).cells


def test_the_course_is_there():
    numbers = [p.stem[:2] for p in NOTEBOOKS]
    found = " ".join(numbers)
    assert found == "00 10 12 14 16 18 20 22 40 50 52 54 56 58 60 62 64 80 82 84 86 90"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_anatomy(path):
    found = cells(path)
    first = found[0].source
    assert first.startswith("# ") and "Deviations" in first and "Cost" in first
    assert len(path.read_text().splitlines()) <= 300
    course.parameters(path)
    code = [c for c in found if c.cell_type == "code"]
    assert code[-1].source.strip() == "course.finish()"
    assert sum(c.cell_type == "markdown" and c.source.startswith("## ") for c in found) <= 5
    for cell in code:
        assert len(cell.source.splitlines()) <= 20, cell.source[:60]
    for cell in code[1:2]:
        imports = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert len(imports) <= 10


@pytest.mark.parametrize("path", THEORY, ids=lambda p: p.stem)
def test_theory_asserts_its_claims(path):
    checks = [n for c in cells(path) if c.cell_type == "code" for n in ast.walk(ast.parse(c.source))]
    asserts = [n for n in checks if isinstance(n, ast.Assert)]
    assert len(asserts) >= 6 and all(n.msg is not None for n in asserts)
    figures = sum("figures.show(" in c.source for c in cells(path))
    assert figures >= 2


def test_executed_copies_match_their_sources():
    stale = course.stale(ROOT / "notebooks", ROOT / "notebooks" / "executed")
    assert stale == [], f"run `make executed`: {', '.join(p.name for p in stale)}"


def test_executed_copies_hold_figures_with_alt_text_and_no_errors():
    for path in sorted((ROOT / "notebooks" / "executed").glob("*.ipynb")):
        notebook = copies.read(path)
        outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
        assert not [o for o in outputs if o.output_type == "error"]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert pictures and all(o.metadata["image/png"]["alt"] for o in pictures), path.name
        assert not re.search(r"/(home|root|tmp|Users)/", path.read_text()), path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nbmake_runs_theory_in_full_and_the_rest_mocked(path, tmp_path):
    """As CI of any project would: convert with jupytext, then pytest --nbmake."""
    (tmp_path / "notebooks").mkdir()
    shutil.copytree(ROOT / "notebooks" / "results", tmp_path / "notebooks" / "results")
    target = tmp_path / "notebooks" / f"{path.stem}.ipynb"
    jupytext = [sys.executable, "-m", "jupytext", "--to", "ipynb", "-o", str(target), str(path)]
    subprocess.run(jupytext, check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=300", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), str(target)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout[-3000:]
