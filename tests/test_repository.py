"""What the repository promises about itself: one environment, small files, layers that point one way."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("notebooks", "eval", "cli", "dev")
IDEAS = {
    "vmf", "scores", "blockwise", "assignment", "objectives", "regularizers", "methods", "collapse", "precision",
    "ranks",
}  # fmt: skip
MACHINERY = {
    "data", "resampling", "photometric", "views", "masks", "batches", "backbones", "stochastic_depth", "batch_norm",
    "heads", "learner", "schedules", "optimizers", "settings", "paper_runs", "distributed", "interrupts", "trainer",
    "train", "files", "official", "checkpoints", "records", "meters", "event_files",
}  # fmt: skip
READING = {"evaluate", "sweeps", "scoreboard", "figures", "course", "doctor", "live", "cli"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def names(requirements) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", text)[0].lower().replace("_", "-") for text in requirements}


def test_conda_make_and_pyproject_install_the_same_extras():
    conda = (ROOT / "environment.yml").read_text()
    make = (ROOT / "Makefile").read_text()
    wanted = f".[{','.join(EXTRAS)}]"
    assert set(PROJECT["optional-dependencies"]) == {*EXTRAS, "tensorboard", "peers"}  # what few need
    assert f"--editable {wanted}" in conda and f'-e "{wanted}"' in make
    floor = re.search(r"python>=(\d+\.\d+)", conda)[1]
    assert PROJECT["requires-python"] == f">={floor}"
    assert "--constraint constraints.txt" in conda and "PINS ?= constraints.txt" in make


def test_every_requirement_is_pinned_once_without_addresses():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.!]+( ; .+)?", line), line
    pinned = [line.split("==")[0] for line in lines]
    assert len(pinned) == len(set(pinned))
    wanted = names(PROJECT["dependencies"]).union(*(names(PROJECT["optional-dependencies"][x]) for x in EXTRAS))
    assert wanted <= set(pinned)


def test_data_flows_one_way():
    allowed = {name: IDEAS for name in IDEAS}
    allowed |= {name: IDEAS | MACHINERY for name in MACHINERY}
    allowed |= {name: IDEAS | MACHINERY | READING for name in READING}
    modules = {layer(path) for path in library()}
    assert modules - {"__init__", "__main__"} == set(allowed)
    for path in library():
        here = layer(path)
        if here in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prototypes_lib"):
                parts = node.module.split(".")
                found = {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
                assert found - {"__version__"} <= allowed[here], f"{path.name} imports {found}"


def layer(path: Path) -> str:
    """The module or package directly in the library that a file belongs to."""
    return path.relative_to(ROOT / "prototypes_lib").parts[0].removesuffix(".py")


def library() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.is_relative_to(ROOT / "prototypes_lib")]


def test_the_layers_are_told_the_same_everywhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "prototypes_lib" / "__init__.py"):
        text = path.read_text()
        assert not [name for name in IDEAS | MACHINERY | READING if not re.search(rf"\b{name}\b", text)], path


def test_files_stay_short_enough_to_read():
    assert library()
    for path in library():
        assert len(path.read_text().splitlines()) <= 350, path


def test_no_file_over_one_megabyte_but_the_embedded_data():
    for path in tracked():
        assert path.stat().st_size <= 1_000_000 or path.name == "cifar10_5k.png", path


def test_results_are_complete():
    records = sorted((ROOT / "notebooks" / "results").glob("*.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text())
        assert {"notebook", "command", "parameters", "runs"} <= set(record), path
        for run in record["runs"]:
            assert {"seed", "hash", "seconds", "environment"} <= set(run), path
            assert {"commit", "hardware", "torch"} <= set(run["environment"]), path


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md", "docs/checkpoints.md"])
def test_local_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert target.startswith(("http", "mailto")) or (path.parent / target).exists(), target


def test_the_readme_says_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make run" in text and "make test" in text
