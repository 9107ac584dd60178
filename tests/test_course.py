"""The course runner: what it refuses, what it takes for a run, and what it leaves behind when a notebook fails."""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prototypes_lib import course
from prototypes_lib.course import copies, kernel, runner
from prototypes_lib.course.arguments import as_code, from_here, smoke_values
from prototypes_lib.course.closing import RUN_ID, sentinel

HEADER = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A toy *claim*

"""
PARAMETERS = """# %% tags=["parameters"] nbmake={"mock": {"epochs": 1, "widths": [2, 4]}}
epochs: int = 10  # passes over the data
rate: float = 0.5  # per step
recipe: str = "dino"  # name in METHODS
fast: bool = False  # skip the slow part
widths: tuple[int, ...] = (8, 16)  # prototypes
device: str | None = None  # None chooses
limit: int | None = None  # images
names: list[str] = ["a"]  # recipes

"""
END = """
# %%
from prototypes_lib import course

course.finish()
"""


def notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, end: str = END) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(HEADER + parameters + "".join(f"# %%\n{cell}\n\n" for cell in cells) + end)
    return path


def texts(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


# --- which notebooks, with which parameters -----------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name in ("00_start", "10_mixture", "50_pretrain"):
        notebook(tmp_path / "nb", name)
    return tmp_path / "nb"


def test_notebooks_are_found_by_number_and_by_name_in_the_order_of_the_course(three):
    def names(*only: str) -> list[str]:
        return [path.stem for path in course.find(three, only)]

    assert names() == ["00_start", "10_mixture", "50_pretrain"]
    assert names("50", "mixture") == ["10_mixture", "50_pretrain"]
    assert names("00", "00_start", "00_start.py") == ["00_start"]


def test_an_unknown_notebook_is_one_error_that_lists_what_exists(three, tmp_path):
    with pytest.raises(ValueError, match=r"'11'.*00_start, 10_mixture, 50_pretrain"):
        course.find(three, ["10", "11"])
    with pytest.raises(FileNotFoundError, match="no notebooks"):
        course.find(tmp_path / "nowhere", [])


def test_parameters_are_read_with_type_default_and_meaning(three):
    found = course.parameters(three / "10_mixture.py")
    assert list(found) == ["epochs", "rate", "recipe", "fast", "widths", "device", "limit", "names"]
    assert found["epochs"] == course.Parameter("epochs", "int", 10, "passes over the data")
    assert found["widths"] == course.Parameter("widths", "tuple[int, ...]", (8, 16), "prototypes")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("n = 3  # no type", "write `name: type = value"),
        ("n: int = 2 * 3  # not a literal", "must be a literal"),
        ("n: int = 'three'  # wrong", "is not int"),
        ("n: int = True  # a truth value is no number", "is not int"),
    ],
)
def test_a_parameters_cell_that_cannot_be_checked_is_an_error(tmp_path, line, complaint):
    path = notebook(tmp_path, "10_x", parameters=f'# %% tags=["parameters"]\n{line}\n\n')
    with pytest.raises(ValueError, match=complaint):
        course.parameters(path)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("epochs", "3", 3),
        ("epochs", 3, 3),
        ("rate", "1e-3", 0.001),
        ("rate", 1, 1.0),
        ("rate", "inf", float("inf")),
        ("recipe", "3", "3"),
        ("fast", "true", True),
        ("fast", "False", False),
        ("widths", "4,5", (4, 5)),
        ("widths", "7", (7,)),
        ("widths", "[4, 5]", (4, 5)),
        ("widths", [4, 5], (4, 5)),
        ("device", "cuda", "cuda"),
        ("device", "None", None),
        ("limit", "None", None),
        ("limit", "7", 7),
        ("names", "dino,ibot-vmf", ["dino", "ibot-vmf"]),
    ],
)
def test_a_value_arrives_in_the_declared_type(three, name, given, value):
    found = course.resolve(three / "10_mixture.py", {name: given})[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("epochs", "ten"),
        ("epochs", "1.5"),
        ("epochs", 1.5),
        ("epochs", True),
        ("rate", "fast"),
        ("fast", "1"),
        ("recipe", 3),
        ("widths", "4,x"),
        ("widths", "["),
        ("limit", "x"),
        ("names", [1]),
    ],
)
def test_an_ill_typed_value_is_an_error_naming_parameter_and_type(three, name, given):
    with pytest.raises(ValueError, match=rf"{name}.*10_mixture.py is .*{re.escape(repr(given))}"):
        course.resolve(three / "10_mixture.py", {name: given})


def test_a_mistyped_parameter_is_an_error_with_the_closest_name(three):
    with pytest.raises(ValueError, match=r"unknown parameter 'epoch'.*did you mean 'epochs'"):
        course.resolve(three / "10_mixture.py", {"epoch": 3})


def test_each_notebook_takes_the_parameters_it_has_and_every_one_must_be_taken(tmp_path):
    one = notebook(tmp_path, "10_a", parameters='# %% tags=["parameters"]\nn: int = 1  # n\nm: int = 2  # m\n\n')
    two = notebook(tmp_path, "12_b", parameters='# %% tags=["parameters"]\nn: float = 1.0  # n\n\n')
    bare = notebook(tmp_path, "14_c", parameters="")
    assert course.resolve_each([one, two, bare], {"n": "3", "m": "4"}) == [{"n": 3, "m": 4}, {"n": 3.0}, {}]
    with pytest.raises(ValueError, match="unknown parameter 'm'"):
        course.resolve_each([two, bare], {"m": "4"})


CHOICE = """# %% tags=["parameters"]
scale: 'Literal["time-lapse", "small"]' = "time-lapse"  # how long
"""


def test_a_value_outside_the_declared_choices_is_refused_with_the_choices_before_anything_runs(tmp_path, capsys):
    notebook(tmp_path / "nb", "50_x", parameters=CHOICE)
    assert course.run_cli([], {"scale": "tiny"}, tmp_path / "out", notebooks=tmp_path / "nb") == 2
    said = capsys.readouterr().err
    assert said == "error: parameter 'scale' of 50_x.py is one of \"time-lapse\", \"small\", not 'tiny'\n"
    assert not (tmp_path / "out").exists()
    assert course.resolve(tmp_path / "nb" / "50_x.py", {"scale": "small"}) == {"scale": "small"}
    assert course.run_cli([], notebooks=tmp_path / "nb", list_only=True) == 0
    assert 'scale: one of "time-lapse", "small" = \'time-lapse\'  # how long\n' in capsys.readouterr().out


FOLDERS = """# %% tags=["parameters"]
data: str = "cifar10-5k"  # a name, or a folder
root: str | None = None  # folder of data
label: str = ""  # of the figure
"""


def test_a_folder_named_from_here_reaches_the_notebook_as_an_absolute_path(tmp_path, monkeypatch):
    path = notebook(tmp_path / "nb", "50_x", parameters=FOLDERS)
    for name in ("mine/train", "cifar10"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    mine = str(tmp_path / "mine")
    for text, value in (("mine", mine), ("./mine/", mine), ("./cifar10", str(tmp_path / "cifar10"))):
        assert from_here([path], {"data": text, "root": text}) == {"data": value, "root": value}
    for text in ("cifar10", "cifar10-5k", "elsewhere/train", mine, ""):  # data sets, no folder here, absolute
        assert from_here([path], {"data": text}) == {"data": text}
    assert from_here([path], {"label": "mine", "unknown": "mine"}) == {"label": "mine", "unknown": "mine"}
    seen = {}
    monkeypatch.setattr(runner, "run", lambda _sources, _out, params, **_: seen.update(params) or [])
    course.run_cli([], [("data", "mine")], tmp_path / "out", notebooks=tmp_path / "nb", pages_too=False)
    assert seen == {"data": mine}


def test_smoke_values_are_the_mock_of_the_parameters_cell_alone(three, tmp_path):
    assert smoke_values(three / "10_mixture.py") == {"epochs": 1, "widths": [2, 4]}
    path = notebook(tmp_path, "10_x", end='# %% nbmake={"mock": {"n": 1}}\nn = 2\n' + END)
    with pytest.raises(ValueError, match="move the nbmake mock"):
        smoke_values(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=25)
@given(values)
def test_injected_code_evaluates_to_the_value(value):
    assert ast.literal_eval(as_code(value)) == value


def test_infinities_survive_injection():
    assert eval(as_code([float("inf"), (float("-inf"),)])) == [float("inf"), (float("-inf"),)]


# --- nothing runs on a wrong request --------------------------------------------------------------


def test_a_wrong_request_is_exit_status_2_before_anything_is_touched(three, tmp_path, capsys):
    out = tmp_path / "out"
    assert course.run_cli(["10"], {"epoch": "3"}, out, notebooks=three) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    assert course.run_cli(["99"], {}, out, notebooks=three) == 2
    assert course.run_cli(["10"], [("epochs", "x")], out, notebooks=three) == 2
    notebook(three, "12_x", end="")
    assert course.run_cli([], {}, out, notebooks=three) == 2
    assert "12_x.py: the last code cell must call course.finish()" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("limit", [-1, -0.5, float("nan"), float("-inf")])
@pytest.mark.parametrize("which", ["timeout", "total_timeout"])
def test_a_time_limit_below_zero_or_nan_is_exit_status_2_in_one_line(three, tmp_path, capsys, which, limit):
    assert course.run_cli(["10"], {}, tmp_path / "out", notebooks=three, **{f"{which}_s": limit}) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and which.replace("_", "-") in said and "0 for no limit" in said
    assert not (tmp_path / "out").exists()


def test_time_limits_reach_the_notebook_in_whole_seconds_and_zero_lifts_them(three, tmp_path, monkeypatch):
    seen = []

    def execute(*_, timeout_s, total_timeout_s, **__):
        seen.append((timeout_s, total_timeout_s))
        return "cell-00", "not run"

    monkeypatch.setattr(runner, "execute", execute)
    for limits in ((0, 0.0), (None, float("inf")), (0.2, 90.0)):
        timeout, total = limits
        course.run(course.find(three, ["10"]), tmp_path, timeout_s=timeout, total_timeout_s=total, progress=False)
    assert seen == [(None, None), (None, None), (1, 90)]
    assert all(type(limit) in (int, type(None)) for pair in seen for limit in pair)


def test_an_output_folder_that_cannot_be_made_is_exit_status_2(three, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert course.run_cli(["10"], {}, tmp_path / "file" / "out", notebooks=three) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_parameters_of_a_notebook_can_be_listed(three, capsys):
    assert course.run_cli(["10"], notebooks=three, list_only=True) == 0
    printed = capsys.readouterr().out
    assert "10_mixture: A toy claim" in printed and "epochs: int = 10  # passes over the data" in printed


# --- what counts as a run -------------------------------------------------------------------------


def executed(*outputs: list, counts: tuple[int | None, ...] = (1, 2)) -> nbformat.NotebookNode:
    cells = [
        nbformat.v4.new_code_cell("x = 1", outputs=o, execution_count=c, id=f"cell-{i:02d}")
        for i, (o, c) in enumerate(zip(outputs, counts, strict=True))
    ]
    return nbformat.v4.new_notebook(cells=cells)


def printed(text: str) -> list:
    return [nbformat.v4.new_output("stream", text=text)]


def test_only_a_notebook_executed_to_the_sentinel_of_this_run_is_without_fault():
    error = [nbformat.v4.new_output("error", ename="SystemExit", evalue="0", traceback=[])]
    end = printed(f"versions\n{sentinel('new')}\n")
    assert copies.fault(executed([], end), "new") is None
    assert copies.fault(executed(error, end), "new") == ("cell-00", "SystemExit: 0")
    assert copies.fault(executed([], end, counts=(None, 2)), "new") == ("cell-00", "not executed")
    assert copies.fault(executed([], end), "other")[0] == "cell-01"
    assert copies.fault(executed(end, []), "new")[0] == "cell-01"
    assert copies.fault(nbformat.v4.new_notebook(), "new")[0] == "cell-00"


def test_finish_prints_versions_and_hardware_but_neither_paths_nor_host_name(capsys, monkeypatch):
    monkeypatch.delenv(RUN_ID, raising=False)
    course.finish()
    plain = capsys.readouterr().out
    assert [line.split(":")[0] for line in plain.splitlines()] == ["versions", "hardware", "commit", "wall time"]
    assert f"python {sys.version.split()[0]}" in plain and re.search(r"torch \d", plain)
    assert not re.search(r"(^|\s)/\w", plain) and str(Path.home()) not in plain and os.uname().nodename not in plain
    monkeypatch.setenv(RUN_ID, "abc")
    course.finish()
    assert capsys.readouterr().out.splitlines()[-1] == sentinel("abc")


def test_a_copy_is_stale_when_a_cell_changed_but_not_for_trailing_white_space(tmp_path):
    source = notebook(tmp_path / "nb", "10_x", "print(1)")
    copy = tmp_path / "done" / "10_x.ipynb"
    copy.parent.mkdir()
    assert course.stale(tmp_path / "nb", copy.parent) == [source]

    def record(**changes: object) -> None:
        fields = {"source_sha256": copies.fingerprint(source), "status": "ok", "smoke": False} | changes
        nbformat.write(nbformat.v4.new_notebook(metadata={copies.RECORD: fields}), copy)

    record()
    assert course.stale(tmp_path / "nb", copy.parent) == []
    text = source.read_text()
    source.write_text(text.replace("print(1)", "print(1)  ") + "\n\n")
    assert not course.is_stale(source, copy)
    for old, new in (("print(1)", "print(2)"), ("toy", "new"), ('"epochs": 1', '"epochs": 2')):
        source.write_text(text.replace(old, new))
        assert course.is_stale(source, copy), new
    source.write_text(text)
    record(smoke=True)
    assert course.is_stale(source, copy)
    record(status="failed")
    assert course.is_stale(source, copy)
    (copy.parent / "99_gone.ipynb").write_text(copy.read_text())
    assert course.stale(tmp_path / "nb", copy.parent) == [source, copy.parent / "99_gone.ipynb"]


def test_long_lines_are_cleaned_in_linear_time_and_bars_keep_their_last_state(tmp_path):
    pieces = printed("x" * 2_000_000 + "\n") + printed("10%\r50%") + printed("\r100%\r\nend\n")
    nb = executed(pieces, printed('File "/tmp/ipykernel_12/345.py", line 1\n/usr/site-packages/torch/x.py: odd\n'))
    nb.metadata.kernelspec = {"name": "python3"}
    first, second = (cell.outputs for cell in copies.clean(nb, "id", {}, tmp_path).cells)
    assert first[0].text == "x" * 2_000_000 + "\n100%\nend\n" and len(first) == 1
    assert second[0].text == 'File "<cell>", line 1\nsite-packages/torch/x.py: odd\n'


# --- pages ------------------------------------------------------------------------------------------

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def page_of(folder: Path, name: str, title: str, metadata: dict, claim: str = "") -> Path:
    figure = nbformat.v4.new_output("display_data", {"image/png": PIXEL}, metadata=metadata)
    cells = [
        nbformat.v4.new_markdown_cell(f"# {title}\n\n{claim}"),
        nbformat.v4.new_code_cell("plot()", outputs=[figure]),
    ]
    path = folder / f"{name}.ipynb"
    record = {copies.RECORD: {"status": "ok", "wall_s": 61.0}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=record), path)
    return path


def test_a_page_embeds_its_figures_with_text_and_loads_only_mathjax(tmp_path):
    path = course.to_html(page_of(tmp_path, "10_x", "Codes <spread>", {"image/png": {"alt": "A dot & more"}}))
    page = path.read_text()
    assert "<title>Codes &lt;spread&gt;</title>" in page and 'alt="A dot &amp; more"' in page and PIXEL in page
    loaded = re.findall(r"<script[^>]*src=\"([^\"]*)", page) + re.findall(r"<link[^>]*href=\"([^\"]*)", page)
    assert (
        len(loaded) == 1
        and "mathjax" in loaded[0]
        and "import " not in "".join(re.findall(r"<script.*?</script>", page))
    )
    assert str(tmp_path) not in page


def test_the_index_links_every_notebook_with_its_figure_and_says_what_failed(tmp_path):
    done = page_of(tmp_path, "10_x", "Codes & prototypes", {})
    course.to_html(done)
    page_of(tmp_path, "12_old", "An earlier one", {})
    results = [
        course.Result(tmp_path / "10_x.py", True, 3.0, done),
        course.Result(tmp_path / "14_bad.py", False, 2.0, None, "cell-03", "a < b", "ValueError: <no>"),
    ]
    page = course.index(tmp_path, results).read_text()
    assert '<a href="10_x.html">Codes &amp; prototypes</a>' in page and 'href="10_x.ipynb"' in page
    assert re.search(r'<a href="10_x.html"><img [^>]*></a>', page)
    assert page.count(PIXEL) == 2 and 'alt="Figure 1 of: Codes &amp; prototypes"' in page
    assert "ran in 1 min 01 s, earlier" in page and "1 of 2 notebooks ran to the end, 1 failed" in page
    assert "cell-03 (a &lt; b): ValueError: &lt;no&gt;" in page
    assert str(tmp_path) not in page and "prefers-color-scheme: dark" in page and "<script" not in page
    assert page.index("10_x") < page.index("12_old") < page.index("14_bad")


def test_the_index_gives_each_claim_as_text_and_says_where_and_when_it_was_made(tmp_path):
    claim = "**Claim.** *Codes* meet\n`K` < [all](x.md) $w^{(k)}$, $\\log C_p$. $R_\\varepsilon$ is 1.5."
    claim += " Not shown.\n**Papers.** X."
    result = course.Result(tmp_path / "10_x.py", True, 3.0, page_of(tmp_path, "10_x", "Codes", {}, claim))
    page = course.index(tmp_path, [result]).read_text()
    assert (
        "<p>Codes meet K &lt; all w<sup>(k)</sup>, log C<sub>p</sub>. R<sub>ε</sub> is 1.5.</p>" in page
        and "Papers" not in page
    )
    assert "1 of 1 notebooks ran to the end, every assertion held" in page
    footer = re.search(r"<footer.*</footer>", page, re.DOTALL)[0]
    assert re.search(r"\d{4}-\d\d-\d\d · commit (\w{10}\+?|unknown) · \S", footer) and "MathJax" in footer
    assert os.uname().nodename not in footer


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_a_copy_with_fixed_ids_and_without_the_traces_of_this_machine(tmp_path, capsys):
    cells = (
        "import os, sys, warnings\nprint(epochs, widths, os.getcwd(), sys.prefix)",
        "warnings.warn('careful')\nprint('é', end='')",
        "from IPython.display import HTML\nHTML('<b>x</b>')",
        "from tqdm.notebook import WARN_NOIPYW\nfrom tqdm.std import TqdmWarning\nimport tqdm.auto\n"
        "warnings.warn(WARN_NOIPYW, TqdmWarning)",
    )
    source = notebook(tmp_path / "nb {braces}", "10_x", *cells)
    out = tmp_path / "out {epochs}"
    (result,) = course.run([source], out, {"widths": "4,5"}, timeout_s=60)
    assert result.ok and result.output == out / "10_x.ipynb", result.message
    assert re.search(r"\[1/1\] 10_x: start\n(.*\n)*\[1/1\] 10_x: done in \d+ s\n", capsys.readouterr().out)
    assert sorted(p.name for p in out.iterdir()) == ["10_x.ipynb"]
    nb = nbformat.read(result.output, as_version=4)
    nbformat.validate(nb)
    ids = [cell.id for cell in nb.cells]
    assert ids == ["cell-00", "cell-01", "injected-parameters", "cell-02", "cell-03", "cell-04", "cell-05", "cell-06"]
    assert texts(result.output).startswith("10 (4, 5) . <env>")
    assert "careful" in texts(
        result.output
    ) and "IProgress" not in "".join(  # of all warnings, tqdm's alone is left out
        o.get("text", "") for cell in nb.cells for o in cell.get("outputs", [])
    )
    raw = result.output.read_text()
    assert (
        str(tmp_path) not in raw and sys.prefix not in raw and "ipykernel_" not in raw and "came to its end" not in raw
    )
    assert set(nb.metadata) == {"kernelspec", "language_info", "prototypes_lib"}
    assert nb.metadata.prototypes_lib.parameters == {"widths": "(4, 5)"}
    assert not any({"papermill", "execution"} & set(cell.metadata) for cell in nb.cells)
    assert not course.is_stale(source, result.output)


FAULTS = {
    "10_raises": ("x = 1\nraise KeyError('lost')", r"cell-02 \(x = 1\): KeyError: 'lost'"),
    "11_exits": ("import sys\nsys.exit(0)", r"cell-02 \(import sys\): SystemExit: 0"),
    "12_killed": ("import os\nos.kill(os.getpid(), 9)", r"cell-02 \(import os\): the kernel died"),
    "13_leaves": ("import os\nos._exit(0)", r"cell-02 \(import os\): the kernel died"),
    "14_hangs": ("import time\ntime.sleep(600)", r"cell-02 \(import time\): the cell took longer than 5 s"),
    "15_quiet": ("course = __import__('types').SimpleNamespace(finish=print)", r"cell-03 .*did not report"),
    "16_large": ("print('x' * 1_100_000)", r"1\.1 MB, more than 1 MB"),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    out = folder / "out"
    out.mkdir()
    for name, (cell, _) in FAULTS.items():
        end = "# %%\ncourse.finish()\n" if name == "15_quiet" else END
        notebook(folder / "nb", name, cell, end=end)
        page_of(out, name, "An older success", {})
        (out / f"{name}.html").write_text("an older page")
    notebook(folder / "nb", "17_good", "print(epochs, widths)")
    (out / ".running").write_text("1")  # a lock file left behind by a process that died
    results = course.run(course.find(folder / "nb"), out, timeout_s=5, smoke=True, progress=False)
    return out, {result.source.stem: result for result in results}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_cell_and_leaves_no_success_record(faults, name):
    out, results = faults
    assert not results[name].ok
    assert re.search(FAULTS[name][1], results[name].message), results[name].message
    assert results[name].output == out / f"{name}.failed.ipynb"
    assert json.loads(results[name].output.read_text())["metadata"]["prototypes_lib"]["status"] == "failed"
    assert not (out / f"{name}.ipynb").exists() and not (out / f"{name}.html").exists()


@pytest.mark.slow
def test_a_notebook_after_failed_ones_runs_with_its_smoke_values(faults):
    out, results = faults
    assert results["17_good"].ok
    assert texts(out / "17_good.ipynb").startswith("1 (2, 4)")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_failed_run_is_exit_status_1_with_a_page_that_shows_it(tmp_path, capsys, monkeypatch):
    asleep = tmp_path / "nb" / "asleep"

    def clock() -> float:  # an hour passes when the second cell has slept for a second, however slow the start
        late = asleep.exists() and time.time() - asleep.stat().st_mtime > 1
        return time.monotonic() + 3600 * late

    monkeypatch.setattr(kernel, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(runner, "_EVERY_S", 0.2)
    cells = "import os, time\nopen('pid', 'w').write(str(os.getpid()))", "open('asleep', 'w')\ntime.sleep(600)"
    notebook(tmp_path / "nb", "10_hangs", *cells)
    out = tmp_path / "out"
    assert course.run_cli([], {}, out, notebooks=asleep.parent, total_timeout_s=1800) == 1
    captured = capsys.readouterr()
    assert re.search(r"\[1/1\] 10_hangs: cell 4/5, \d+ s\n", captured.out)
    assert "10_hangs: FAILED" in captured.err and "cell-03 (open('asleep', 'w'))" in captured.err
    assert "the notebook took longer than 1800 s" in captured.err
    assert is_gone(int((tmp_path / "nb" / "pid").read_text()))
    index = (out / "index.html").read_text()
    assert 'href="10_hangs.failed.html"' in index and "the notebook took longer than 1800 s" in index


@pytest.mark.slow
def test_an_output_folder_removed_during_the_run_is_a_failure(tmp_path):
    source = notebook(tmp_path / "nb", "10_x", "import shutil\nshutil.rmtree('../out')")
    (result,) = course.run([source], tmp_path / "out", timeout_s=60, progress=False)
    assert not result.ok and result.reason and result.output is None


@contextlib.contextmanager
def runner_at_work(tmp_path: Path):
    """A runner in a process of its own, whose notebook hangs in a cell; gives the runner and the kernel's pid."""
    notebook(tmp_path / "nb", "10_hangs", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    pid = tmp_path / "nb" / "pid"
    code = (
        "import sys; from pathlib import Path; from prototypes_lib import course;"
        f"sys.exit(course.run_cli([], {{}}, Path({str(tmp_path / 'out')!r}), notebooks=Path({str(pid.parent)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield process, int(pid.read_text())
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_runner_ends_the_kernel_and_leaves_nothing(tmp_path, signum):
    with runner_at_work(tmp_path) as (process, pid):
        with pytest.raises(ValueError, match=rf"another run \(process {process.pid}\) is at work"):
            course.run(course.find(tmp_path / "nb"), tmp_path / "out", progress=False)
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum
        assert is_gone(pid)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_runner_killed_outright_takes_its_kernel_along_and_frees_the_folder(tmp_path):
    with runner_at_work(tmp_path) as (process, pid):
        process.kill()
        process.wait(20)
        assert is_gone(pid)
    source = notebook(tmp_path / "nb", "12_next", "print('fine')")
    (result,) = course.run([source], tmp_path / "out", progress=False)
    assert result.ok, result.message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["12_next.ipynb"]


@pytest.mark.slow
def test_jupytext_papermill_and_nbmake_run_a_source_without_the_runner(tmp_path):
    source = notebook(tmp_path, "10_x", "print(epochs, widths)\nopen('seen', 'w').write(f'{epochs} {widths}')")
    tools = Path(sys.executable).parent
    to_ipynb = [tools / "jupytext", "--to", "ipynb", "-o", "-", source]
    ipynb = subprocess.run(to_ipynb, check=True, capture_output=True).stdout
    papermill = [tools / "papermill", "-", "out.ipynb", "-p", "epochs", "3"]
    subprocess.run(papermill, input=ipynb, check=True, capture_output=True, cwd=tmp_path)
    assert texts(tmp_path / "out.ipynb").startswith("3 (8, 16)\nversions: ")
    (tmp_path / "10_x.ipynb").write_bytes(ipynb)
    nbmake = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", "10_x.ipynb"]
    subprocess.run(nbmake, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "seen").read_text() == "1 [2, 4]"
