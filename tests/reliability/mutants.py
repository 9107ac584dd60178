"""Damaged checkpoints and failing disks, by the hundred: none is ever loaded, none costs an older one.

`damaged_checkpoints(folder, n, seed)` and `disk_faults(folder, n, seed)` each try n, the same ones for a seed, and
return (survived, tried, what was wrong).
"""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from prototypes_lib import checkpoints
from prototypes_lib.files import storage

try:
    import resource  # quotas by the kernel
except ImportError:
    resource = None

HASH, OTHER = "0123456789ab", "ba9876543210"
STEPS = (100, 200, 300)
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", storage.MANIFEST)
NO_PROCESS = 2**22 + 1  # above the largest process number there is


def network(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    return model, torch.optim.AdamW(model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 5)).square().sum().backward()
    optimizer.step()


def run_folder(folder: Path, digest: str = HASH, seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    """A run of three checkpoints, and what its network was at each."""
    model, optimizer = network(seed)
    config, truth = {"name": "x", "hash": digest, "run": {"seed": seed}}, {}
    folder.mkdir(parents=True)
    storage.write_text(folder / "config.json", json.dumps(config))
    for step in STEPS:
        train(model, optimizer)
        state = {"step": step, "hash": digest, "precision": "fp32"}
        checkpoints.save(folder, model, optimizer, state, keep=3, config=config)
        truth[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return truth


def place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


# ------------------------------------------------------------------------------------------- damaged checkpoints


def _consistent(at: Path) -> None:
    """Make a manifest fit what lies there now, as somebody would who edits a checkpoint by hand."""
    files = {p.name: storage._entry(p) for p in sorted(at.iterdir()) if p.name != storage.MANIFEST}
    (at / storage.MANIFEST).write_text(json.dumps({"format": 1, "files": files}))


def _edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _truncated(r: random.Random, run: Path, other: Path, at: Path) -> None:
    path = at / r.choice(FILES)
    path.write_bytes(path.read_bytes()[: r.randrange(path.stat().st_size)])


def _flipped(r: random.Random, run: Path, other: Path, at: Path) -> None:
    path = at / r.choice(FILES)
    data = bytearray(path.read_bytes())
    data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    path.write_bytes(data)


def _lost_block(r: random.Random, run: Path, other: Path, at: Path) -> None:
    path = at / r.choice(FILES[:2])
    data = bytearray(path.read_bytes())
    start = r.randrange(len(data) - 64)
    zeros = bytes(64) if data[start : start + 64] != bytes(64) else b"\xff" * 64
    data[start : start + 64] = zeros
    path.write_bytes(data)


def _appended(r: random.Random, run: Path, other: Path, at: Path) -> None:
    with (at / r.choice(FILES)).open("ab") as file:
        file.write(r.randbytes(r.randrange(1, 100)))


def _empty(r: random.Random, run: Path, other: Path, at: Path) -> None:
    for name in FILES if r.random() < 0.3 else (r.choice(FILES),):
        (at / name).write_bytes(b"")


def _missing(r: random.Random, run: Path, other: Path, at: Path) -> None:
    for name in r.sample(FILES, r.randrange(1, len(FILES) + 1)):
        (at / name).unlink()


def _swapped(r: random.Random, run: Path, other: Path, at: Path) -> None:
    name = r.choice([name for name in FILES if name != "config.json"])  # that one is the same in both
    older = place(run, 100)
    mine, its = (at / name).read_bytes(), (older / name).read_bytes()
    (at / name).write_bytes(its)
    (older / name).write_bytes(mine)


def _of_another_run(r: random.Random, run: Path, other: Path, at: Path) -> None:
    name = r.choice(FILES)
    shutil.copy(place(other, 300) / name, at / name)


def _another_runs_folder(r: random.Random, run: Path, other: Path, at: Path) -> None:
    shutil.rmtree(at)
    shutil.copytree(place(other, r.choice((200, 300))), at)
    if r.random() < 0.5:
        _edit(at / "state.json", step=300)
        _consistent(at)


def _wrong_config(r: random.Random, run: Path, other: Path, at: Path) -> None:
    _edit(at / "state.json", hash=r.choice([OTHER, None, "", 5]))
    _consistent(at)


def _wrong_step(r: random.Random, run: Path, other: Path, at: Path) -> None:
    _edit(at / "state.json", step=r.choice([100, 200, 301, None, "300", -300]))
    _consistent(at)


def _older_inside(r: random.Random, run: Path, other: Path, at: Path) -> None:
    for name in r.choice([FILES[:1], FILES[1:2], FILES[:2]]):
        shutil.copy(place(run, 100) / name, at / name)
    _consistent(at)


def _copied(r: random.Random, run: Path, other: Path, at: Path) -> None:
    shutil.rmtree(at)
    shutil.copytree(place(run, r.choice((100, 200))), at)


def _renamed(r: random.Random, run: Path, other: Path, at: Path) -> None:
    at.rename(place(run, r.choice((150, 299, 301, 99999999))))


def _no_manifest(r: random.Random, run: Path, other: Path, at: Path) -> None:
    """As if of version 0.1.0, which had none; but the rest tells that it had one."""
    (at / storage.MANIFEST).unlink()
    if r.random() < 0.5:
        _edit(at / "state.json", format=None)
    _flip_tensor(r, at)


def _flip_tensor(r: random.Random, at: Path) -> None:
    path = at / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-r.randrange(1, 40)] ^= 1 << r.randrange(8)
    path.write_bytes(data)


def _old_version(r: random.Random, run: Path, other: Path, at: Path) -> None:
    """Version 0.1.0's files, one of them cut off, empty or gone."""
    for name in FILES[:2]:
        save_file({key: value.clone() for key, value in load_file(at / name).items()}, at / name)
    for name in FILES[3:]:
        (at / name).unlink()
    _edit(at / "state.json", format=None)
    path = at / r.choice(FILES[:3])
    match r.randrange(3):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(b"")
        case _:
            path.write_bytes(path.read_bytes()[: r.randrange(path.stat().st_size)])


def _other_manifest(r: random.Random, run: Path, other: Path, at: Path) -> None:
    content = json.loads((at / storage.MANIFEST).read_text())
    files = content["files"]
    name = r.choice(FILES[:3])
    text = r.choice(
        [
            json.dumps(content | {"format": 2}), json.dumps(content | {"format": None}), json.dumps({"format": 1}),
            json.dumps(content | {"files": {k: v for k, v in files.items() if k != name}}),
            json.dumps(content | {"files": {}}), json.dumps(content | {"files": [1]}), json.dumps([content]),
            json.dumps(content | {"files": files | {"../config.json": files[name]}}),
            json.dumps(content | {"files": files | {name: {"size": -1, "sha256": ""}}}),
            json.dumps(content | {"files": files | {name: None}}), "null", "{", "[" * 100_000, "\udcff",
        ]
    )  # fmt: skip
    (at / storage.MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    if f'"{name}"' not in text and r.random() < 0.5:
        _flip_tensor(r, at)


def _no_folder(r: random.Random, run: Path, other: Path, at: Path) -> None:
    shutil.rmtree(at)
    match r.randrange(4):
        case 0:
            at.write_text("a file")
        case 1:
            at.mkdir()
        case 2:
            at.symlink_to(run / "nowhere")
        case _:
            at.mkdir()
            for name in FILES:
                (at / name).mkdir()


_KINDS: tuple[Callable[[random.Random, Path, Path, Path], None], ...] = (
    _truncated, _flipped, _lost_block, _appended, _empty, _missing, _swapped, _of_another_run, _another_runs_folder,
    _wrong_config, _wrong_step, _older_inside, _copied, _renamed, _no_manifest, _old_version, _other_manifest,
    _no_folder,
)  # fmt: skip


def damaged_checkpoints(folder: Path, n: int, seed: int = 0) -> tuple[int, int, list[str]]:
    """n times: damage a run's newest checkpoint, now and then the one before too, and go on from what is left.

    Survived: the newest good checkpoint is found and loaded, every tensor as it was when saved, and the damaged one is
    refused by name without touching a number of the network.
    """
    truth, wrong = run_folder(folder / "mine"), []
    run_folder(folder / "other", OTHER, seed=1)
    for i in range(n):
        r = random.Random(f"{seed} {i}")
        kind = _KINDS[i % len(_KINDS)]
        run = folder / "try"
        shutil.copytree(folder / "mine", run)
        expected = 200
        kind(r, run, folder / "other", place(run, 300))
        if kind is not _swapped and r.random() < 0.2:
            _flipped(r, run, folder / "other", place(run, 200))
            expected = 100
        said = _went_wrong(run, expected, truth)
        wrong += [f"{i} {kind.__name__}: {said}"] if said else []
        shutil.rmtree(run)
    return n - len(wrong), n, wrong


def _went_wrong(run: Path, expected: int, truth: dict[int, dict[str, torch.Tensor]]) -> str | None:
    model, optimizer = network(seed=7)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            step = checkpoints.newest(run, HASH)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if step != expected:
        return f"step {step} was found, not {expected}"
    newer = [s for s in checkpoints.steps(run) if s > expected]
    if any(said.getvalue().count(str(place(run, s))) != 1 for s in newer):
        return f"not each of {newer} was named once"
    for bad in newer:
        with contextlib.suppress(ValueError, FileNotFoundError):
            checkpoints.load(run, bad, model, optimizer, HASH)
            return f"step {bad} was loaded"
        if optimizer.state or any(not torch.equal(t, start[k]) for k, t in model.state_dict().items()):
            return f"loading step {bad} failed halfway"
    if checkpoints.load(run, step, model, optimizer, HASH)["step"] != expected:
        return "another state was loaded"
    if any(not torch.equal(t, truth[expected][k]) for k, t in model.state_dict().items()):
        return "other numbers were loaded"
    return None


# -------------------------------------------------------------------------------------------------- disk faults


@contextlib.contextmanager
def _fails(target: str, number: int, at: int) -> Iterator[None]:
    """The call of an os function that comes as number `at` (from 0) fails, and no other."""
    module, name = target.rsplit(".", 1)
    right, calls = getattr({"os": os, "io": io}[module], name), iter(range(10**9))

    def wrong(*args: object, **options: object) -> object:
        writes = name != "open" or any(str(x)[:1] in ("w", "a", "x") for x in (*args[1:2], options.get("mode", "")))
        if writes and next(calls) == at:
            raise OSError(number, os.strerror(number))
        return right(*args, **options)

    with mock.patch(target, wrong):
        yield


@contextlib.contextmanager
def _quota(n: int) -> Iterator[None]:
    """The kernel takes no byte beyond the n-th of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _tensors_fail(keep: float, number: int | None) -> Iterator[None]:
    """safetensors writes a part of its file and says so (with the system's number), or says nothing."""

    def wrong(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        save_file(tensors, path, metadata)
        os.truncate(path, int(path.stat().st_size * keep))
        if number is not None:
            cause = f"{os.strerror(number)} (os error {number})"
            raise SafetensorError(f"Error while serializing: I/O error: {cause}")

    with mock.patch.object(storage, "save_file", wrong):
        yield


def _fault(r: random.Random, i: int) -> tuple[str, contextlib.AbstractContextManager]:
    disk = r.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))
    closed = r.choice((errno.EACCES, errno.EROFS, errno.EPERM))
    match i % 8:
        case 0 if resource is not None:
            n = r.randrange(400)
            return f"quota at byte {n}", _quota(n)
        case 0 | 1:
            return "no room for the tensors", _tensors_fail(r.random(), disk)
        case 2:
            return "a short write that nobody reports", _tensors_fail(r.random() * 0.99, None)
        case 3:
            at = r.randrange(6)
            return f"fsync {at}: {errno.errorcode[disk]}", _fails("os.fsync", disk, at)
        case 4:
            return f"rename: {errno.errorcode[closed]}", _fails("os.rename", r.choice((closed, disk)), 0)
        case 5:  # the first call finds its folder there
            return f"mkdir: {errno.errorcode[closed]}", _fails("os.mkdir", closed, 1)
        case 6:
            return f"open: {errno.errorcode[closed]}", _fails(
                "io.open", r.choice((closed, errno.EMFILE)), r.randrange(2)
            )
        case _:
            return "rename of the new folder", _fails("os.rename", r.choice((closed, disk)), 1)


def disk_faults(folder: Path, n: int, seed: int = 0) -> tuple[int, int, list[str]]:
    """n times: a disk that fails while a checkpoint is written, a new one or one more time the newest.

    Survived: one line of OSError that names the folder and what to do, all older checkpoints load with the numbers they
    were saved with, nothing half-written stays, the network is what it was, and the next save works.
    """
    truth, wrong = run_folder(folder / "mine"), []
    for i in range(n):
        r = random.Random(f"{seed} {i}")
        run = folder / "try"
        shutil.copytree(folder / "mine", run)
        what, fault = _fault(r, i)
        again = i % 8 == 7 or r.random() < 0.3
        said = _fault_went_wrong(run, 300 if again else 400, fault, truth)
        wrong += [f"{i} {what}{' (again)' * again}: {said}"] if said else []
        shutil.rmtree(run)
    return n - len(wrong), n, wrong


def _fault_went_wrong(
    run: Path, step: int, fault: contextlib.AbstractContextManager, truth: dict[int, dict[str, torch.Tensor]]
) -> str | None:
    model, optimizer = network(seed=7)
    checkpoints.load(run, 300, model, optimizer, HASH)
    train(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {"step": step, "hash": HASH}
    try:
        with fault:
            checkpoints.save(run, model, optimizer, state, keep=3)
        return "nobody noticed"
    except OSError as error:
        text = str(error)
        if "\n" in text or str(place(run, step)) not in text or "choose another out" not in text:
            return f"unclear: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if any(not torch.equal(t, before[k]) for k, t in model.state_dict().items()):
        return "the network changed"
    again, other = network(seed=8)
    for old in STEPS:
        try:
            checkpoints.load(run, old, again, other, HASH)
        except Exception as error:
            return f"step {old} was lost: {error}"
        if any(not torch.equal(t, truth[old][k]) for k, t in again.state_dict().items()):
            return f"step {old} changed"
    if left := [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]:
        return f"{left} was left"
    if [s for s in checkpoints.steps(run) if checkpoints.damage(run, s, HASH)]:
        return "a damaged checkpoint was left"
    checkpoints.save(run, model, optimizer, state, keep=3)
    return None if checkpoints.newest(run, HASH) == step else "the next save failed"


if __name__ == "__main__":
    for function in (damaged_checkpoints, disk_faults):
        with tempfile.TemporaryDirectory() as temporary:
            print(function.__name__, *function(Path(temporary), 500 if function is damaged_checkpoints else 100))
