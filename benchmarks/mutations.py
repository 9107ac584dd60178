"""Do the tests notice mistakes? Plants the faults of faults.py one at a time and tells which test catches each.

    python benchmarks/mutations.py [--only WORDS] [--least N] [--out FOLDER]

Each fault goes into a temporary copy of this checkout, where the fast tests of its file run, then those of the whole
family and at last the slow ones of its file, up to the first that fails; at the end the tests that failed must pass
without any fault. Every run of pytest is a fresh process, forked (where the system can) from one that has imported
torch already.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from fault import Fault
from faults import FAULTS

ROOT = Path(__file__).parent.parent
NEEDED = ("prototypes_lib", "tests", "benchmarks", "data", "pyproject.toml")
SECOND = ("tests/test_learner.py", "tests/test_faithful.py", "tests/test_train.py")
TIMEOUT = 300.0
NONE_SUCH = 5  # how pytest ends where -m leaves no test
SURVIVED = "SURVIVED"


def stale(faults: Sequence[Fault] = FAULTS, root: Path = ROOT) -> list[str]:
    """What keeps faults from being planted: nothing, or a line a fault whose old text is not there exactly once."""
    found = []
    for fault in faults:
        count = (root / "prototypes_lib" / fault.file).read_text().count(fault.old)
        if count != 1:
            found.append(f"{fault.file} holds the old text of {fault.name!r} {count} times, not once")
    return found


def copy(to: Path) -> None:
    """This checkout as it stands, without what git ignores."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *NEEDED]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def failing(folder: Path, tests: Sequence[str], marked: str = "not slow") -> str | None:
    """The first test that fails in this copy, or None. Raises RuntimeError where pytest could not run them."""
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(
            ["torch", "torchvision", "timm", "scipy.stats", "hypothesis", "beartype", "pytest"]
        )
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_pytest, args=(str(folder), list(tests), marked, there))
    process.start()
    there.close()
    try:
        code, test = here.recv() if here.poll(TIMEOUT) else (1, f"nothing within {TIMEOUT:.0f} s")
    except EOFError:
        code, test = 1, "a crash of the interpreter"
    process.kill()
    process.join()
    if code == NONE_SUCH:
        return None
    if code not in (0, 1, 2):  # 2: a file could not even be imported
        raise RuntimeError(f"pytest ended with {code} for {' '.join(tests)}")
    return test if code else None


class _First:
    """A pytest plugin that remembers the first test, or file, that failed."""

    test = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def _pytest(folder: str, tests: list[str], marked: str, answer: Connection) -> None:
    sys.dont_write_bytecode = True  # two faults of one length in one second would be one to the cache
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the plugins for notebooks take longer than most tests
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "prototypes_lib"]:
        del sys.modules[name]  # loaded ahead where a whole suite shares one fork server: the copy's is wanted
    import pytest

    first = _First()
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        code = pytest.main(["-x", "-q", "-m", marked, "-p", "no:cacheprovider", *tests], plugins=[first])
    answer.send((int(code), first.test))


def plant(fault: Fault, folder: Path) -> tuple[str, float]:
    """Which test of the copy catches the fault, or SURVIVED, and the seconds that took. The copy is put back."""
    path, start = folder / "prototypes_lib" / fault.file, time.monotonic()
    right = path.read_text()
    path.write_text(right.replace(fault.old, fault.new))
    try:
        caught = (
            failing(folder, fault.first)
            or failing(folder, [test for test in SECOND if test not in fault.first])
            or failing(folder, fault.first, "slow")
        )
    finally:
        path.write_text(right)
    return caught or SURVIVED, time.monotonic() - start


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="plant only the faults with these words in their name; no record")
    parser.add_argument("--least", type=int, help="exit 1 if fewer are caught (all but 2)")
    parser.add_argument("--out", default="notebooks/results", help="folder of the record (notebooks/results)")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    if not chosen:
        sys.exit(f"error: --only {options.only}: no fault has these words in its name")
    if old := stale(chosen):
        sys.exit("\n".join(["error: faults.py is out of date", *old]))
    least = max(0, len(chosen) - 2) if options.least is None else options.least
    os.environ["OMP_NUM_THREADS"] = "1"
    from recording import folder, save  # not above: a forked process must find the library of the copy, and no other

    out, start, table = folder(options.out), time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        copy(place)
        for i, fault in enumerate(chosen, 1):
            caught, seconds = plant(fault, place)
            row = {"fault": fault.name, "file": fault.file, "what": f"{fault.old.strip()} -> {fault.new.strip()}"}
            table.append(row | {"caught_by": caught, "seconds": round(seconds, 1)})
            print(f"{i}/{len(chosen)}  {fault.file}: {fault.name}  {caught}  {seconds:.1f} s", flush=True)
        tests = sorted({row["caught_by"] for row in table if "::" in row["caught_by"]})
        if tests and (test := failing(place, tests, "slow or not slow")):
            sys.exit(f"error: {test} fails without any fault too, so it has caught none")
    survivors = [row for row in table if row["caught_by"] == SURVIVED]
    caught = len(table) - len(survivors)
    print(f"\n{caught} of {len(table)} faults caught, at least {least} wanted")
    for row in survivors:
        print(f"SURVIVED  {row['file']}: {row['fault']}")
    if not options.only:
        what = {"seed": None, "seconds": time.monotonic() - start, "environment": {}, "caught": caught}
        what |= {"what": [row["fault"] for row in table], "table": table}
        save(out / "mutations.json", "benchmarks/mutations.py", arguments, {"least": least}, what)
    if caught < least:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
