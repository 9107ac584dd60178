"""What does the library survive? Kills, signals, full disks, damaged and hostile files, lost processes, odd settings.

    python benchmarks/soak.py [--small] [--only WORDS] [--seed S] [--out FOLDER]

Every corpus of tests/reliability at full size, and where it is cheap the same files or faults through others. Prints
survived / tried and the first faults of each; ends with 1 where something did not survive with us.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]

US = "prototypes_lib"
Told = Iterable[tuple[str, str | None]]  # what was tried, and what went wrong, or None


def _kills(folder: Path, small: bool, seed: int) -> Told:
    from kills import kills

    return kills(2 if small else 100, seed)


def _signals(folder: Path, small: bool, seed: int) -> Iterator[tuple[str, str | None]]:
    from interruptions import cases, interruptions, of_ranks

    yield from interruptions(cases()[7:9] if small else cases(), seed)
    yield from of_ranks(("SIGTERM",) if small else ("SIGTERM", "SIGINT", "SIGUSR1"))


def _resume(folder: Path, small: bool, seed: int) -> Told:
    from resume import cells, matrix

    return matrix(cells(["dino"])[:2] if small else cells(), folder)


def _full_disks(folder: Path, small: bool, seed: int) -> Told:
    from resume import full_disks

    return full_disks(2 if small else 60, seed)


def _growth(folder: Path, small: bool, seed: int) -> Told:
    from resume import growth

    return growth(100 if small else 1000)


def _not_finite(folder: Path, small: bool, seed: int) -> Iterator[tuple[str, str | None]]:
    import nans

    cases = nans.cases()
    yield from nans.injections(cases[:2] if small else cases, folder / "alone")
    yield from nans.of_one_rank(cases[:1] if small else cases[:: len(cases) // 20], folder / "ranks")
    for name in nans.METHODS[: 1 if small else None]:
        for place in ("pixel", "gradient"):
            yield f"a {place} again and again, {name}", nans.persistent(folder / f"{name} {place}", name, place, True)
            yield f"a {place} once, {name}", nans.transient(folder / f"{name} {place} once", name, place)


def _lost_ranks(folder: Path, small: bool, seed: int) -> Told:
    from kills import lost_ranks

    return lost_ranks(folder, {"patience": 2.0, "beat": 0.2} if small else {})


def _doubles(folder: Path, small: bool, seed: int) -> Told:
    from kills import doubles

    return doubles(2 if small else 20, seed)


def _ranks(folder: Path, small: bool, seed: int) -> Iterator[tuple[str, str | None]]:
    from test_world_size import VARIANTS, everything, largest_difference

    ones = everything(1)
    for world in (2,) if small else (2, 4):
        others = everything(world)
        for name in VARIANTS:
            ((told, grads, state),) = ones[name]
            worst = 0.0
            for other_told, other_grads, other_state in others[name]:
                pairs = [*zip(told, other_told, strict=True), (grads, other_grads), (state, other_state)]
                worst = max(worst, *(largest_difference(*pair) for pair in pairs))
            yield f"{name} on {world} processes", None if worst <= 1e-10 else f"differs by {worst:.1e}"


def _counted(result: tuple[int, int, list[str]]) -> Iterator[tuple[str, str | None]]:
    """What survived, was tried and went wrong, one by one."""
    survived, tried, wrong = result
    yield from (("", said) for said in wrong)
    yield from (("", None) for _ in range(survived if survived + len(wrong) == tried else tried - len(wrong)))


def _checkpoints(folder: Path, small: bool, seed: int) -> Told:
    import mutants

    return _counted(mutants.damaged_checkpoints(folder, 18 if small else 500, seed))


def _disks(folder: Path, small: bool, seed: int) -> Told:
    import mutants

    return _counted(mutants.disk_faults(folder, 8 if small else 100, seed))


def _pickles(folder: Path, small: bool, seed: int) -> Told:
    import malice

    return _counted(malice.refused_pickles(folder))


def _archives(folder: Path, small: bool, seed: int) -> Told:
    import malice

    return _counted(malice.contained_archives(folder))


def _images(folder: Path, small: bool, seed: int) -> dict[str, Told]:
    import images

    files = images.corpus()
    files = files[:20] if small else files
    place = images.write(folder / "set", files)
    with contextlib.redirect_stderr(io.StringIO()):  # where every skipped file is reported
        survived, tried, faults = images.ours(place, files)
    told = {US: _counted((survived, tried, [f"{name}: {fault}" for name, fault in faults.items()]))}
    for name, (survived, tried, kinds) in images.peers(place, files).items():
        told[name] = _counted((survived, tried, [kind for kind, n in kinds.most_common() for _ in range(n)]))
    return told


def _layouts(folder: Path, small: bool, seed: int) -> Iterator[tuple[str, str | None]]:
    import numpy as np
    from layouts import LAYOUTS

    from prototypes_lib import data

    for i, layout in enumerate(LAYOUTS[: 3 if small else None]):
        root = folder / f"{i}" / "set"
        root.parent.mkdir(parents=True)
        layout.make(root)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                images = data.load(root, layout.split, root=root.parent / "cache", image_size=8, progress=False)
            found = dict(zip(images.classes, np.bincount(images.labels).tolist(), strict=True))
            yield layout.name, None if found == layout.right else f"{found}"
        except (ValueError, FileNotFoundError) as error:
            refused = isinstance(layout.right, str) and re.search(layout.right, str(error)) and "\n" not in str(error)
            yield layout.name, None if refused else f"{error}"


def _odd_settings(folder: Path, small: bool, seed: int) -> Iterator[tuple[str, str | None]]:
    from degenerate import CASES, degenerate, places

    yield from degenerate(CASES[:5] if small else CASES)
    yield from places()


def _notebooks(folder: Path, small: bool, seed: int) -> dict[str, Told]:
    from soak_notebooks import FAULTS, RUNNERS, told

    faults = FAULTS[2:3] if small else FAULTS
    return {by: told(folder / by, by, faults) for by in RUNNERS}


CORPORA: dict[str, Callable[[Path, bool, int], Told | dict[str, Told]]] = {
    "processes killed at a random instant": _kills,
    "signals that ask to stop": _signals,
    "stopped runs of every method, bit for bit": _resume,
    "disks that are full during a run": _full_disks,
    "a long run that must not grow": _growth,
    "steps that are not finite": _not_finite,
    "one of two ranks lost": _lost_ranks,
    "second trainers in one folder": _doubles,
    "every method on 2 and 4 processes": _ranks,
    "damaged checkpoints": _checkpoints,
    "disks that fail under a checkpoint": _disks,
    "hostile pickles": _pickles,
    "hostile archives": _archives,
    "image files": _images,
    "folder layouts": _layouts,
    "odd settings": _odd_settings,
    "notebooks with faults": _notebooks,
}
PEERS = ("lightly", "torchvision", "papermill")


def judged(what: str, by: str, told: Told) -> dict:
    """A row of the table: how many were tried and survived, in which time, and the first that did not."""
    start = said = time.monotonic()
    tried, wrong = 0, []
    for tried, (name, fault) in enumerate(told, 1):
        if fault:
            wrong.append(f"{name}: {fault}" if name else fault)
            if by == US:
                print(f"  FAULT {wrong[-1][:300]}", flush=True)
        if (now := time.monotonic()) - said > 10:
            said = now
            print(f"  {what}: {tried} tried, {now - start:.0f} s", flush=True)
    row = {"what": what, "by": by, "survived": tried - len(wrong), "tried": tried}
    return row | {"seconds": round(time.monotonic() - start, 1), "faults": [text[:300] for text in wrong[:5]]}


def main(arguments: list[str]) -> None:
    """The command; `--help` says what it takes. Raises SystemExit: 1 where a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few of each, to see that the command works")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the corpora with these words in their name")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    parser.add_argument("--out", default="notebooks/results", help="folder of the record (notebooks/results)")
    options = parser.parse_args(arguments)
    chosen = {name: make for name, make in CORPORA.items() if options.only in name}
    if not chosen:
        sys.exit(f"error: --only {options.only}: no corpus has these words in its name; there are {', '.join(CORPORA)}")
    import torch
    from recording import folder, save

    torch.set_num_threads(1)
    out, start, table = folder(options.out), time.monotonic(), []
    for i, (what, make) in enumerate(chosen.items(), 1):
        with tempfile.TemporaryDirectory() as temporary:
            began = time.monotonic()
            told = make(Path(temporary), options.small, options.seed)
            for by, one in (told if isinstance(told, dict) else {US: told}).items():
                row = judged(what, by, one)
                row["seconds"] = round(time.monotonic() - began, 1)
                began = time.monotonic()
                table.append(row)
                print(f"{i}/{len(chosen)}  {what}, {by}: {row['survived']} of {row['tried']}  {row['seconds']:.0f} s")
    lost = [row for row in table if row["by"] == US and row["survived"] < row["tried"]]
    versions = {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}
    run = {"seed": options.seed, "seconds": time.monotonic() - start, "environment": versions}
    run |= {"what": [[row["what"], row["by"]] for row in table], "table": table}
    parameters = {"small": options.small, "only": options.only, "seed": options.seed}
    whole = not (options.small or options.only)
    save(out / ("soak.json" if whole else "soak_part.json"), "benchmarks/soak.py", arguments, parameters, run)
    if lost:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
