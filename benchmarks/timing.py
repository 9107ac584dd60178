"""How speed.py compares: right answers first, then turns, each with its own peak of memory; ratios, never seconds."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OURS = "prototypes_lib"


@dataclass(frozen=True)
class Goal:
    """Ours / peer, of time and of peak memory, that we want to stay below; None where it is no goal."""

    peer: str
    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Row:
    """One comparison: the same work by us and by others, as functions without arguments that return their answer.

    check gets the answers by name and raises AssertionError where one is wrong, which makes the row void. peers name
    themselves with their version. goals: of ours against peers. work: floating-point operations that the answer needs,
    for the share of what a product of matrices reaches on this machine. memory: how the peak is taken, "tensors" (every
    live storage of torch beyond the arguments'), "process" (resident size of a child process: for peers without torch),
    or None. limit: what stands in the way where a goal is not reached. once: the answer cannot be had in a loop.
    turns: as many at most, for a row of minutes.
    notes: further figures, such as a share of inputs, from the answers.
    """

    name: str
    what: str
    sizes: dict[str, Any]
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], None]
    goals: tuple[Goal, ...] = ()
    work: float | None = None
    memory: str | None = "tensors"
    limit: str = ""
    once: bool = False
    turns: int | None = None
    notes: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def all(self) -> dict[str, Callable[[], Any]]:
        return {OURS: self.ours, **self.peers}


@dataclass(frozen=True)
class Ratio:
    """Ours / peer over the turns: median, quartiles. memory: of the peaks. first: of the first calls, with warm-up."""

    median: float
    low: float
    high: float
    memory: float | None = None
    first: float | None = None

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Measured:
    """A row's ratios by peer; share of a matrix product's speed; or the reason why it is void."""

    row: Row
    ratios: dict[str, Ratio] = field(default_factory=dict)
    share: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    void: str = ""

    def short(self) -> list[str]:
        """Goals that are missed, in words."""
        missed = []
        for goal in self.row.goals:
            ratio = self.ratios.get(goal.peer)
            for what, aim in (("time", goal.time), ("memory", goal.memory)):
                got = None if ratio is None else (ratio.median if what == "time" else ratio.memory)
                if aim is not None and got is not None and got > aim:
                    missed.append(f"{what} {got:.2f} > {aim:g} of {goal.peer}")
        return missed


def measure(
    row: Row,
    repeats: int = 7,
    device: str = "cpu",
    speed: float | None = None,
    least: float = 0.03,
    rss: Callable[[str], int] | None = None,
) -> Measured:
    """Check the answers, then time all in turns, forwards and backwards alternately, and take their peaks of memory.

    speed: operations a second of a matrix product, for `share`. least: seconds a turn lasts at least, by repeating
    the call. rss: bytes of one implementation's child process, where the row wants that.
    """
    answers, first = {}, {}
    for name, function in row.all.items():
        seconds, answers[name] = timed(function, device)
        first[name] = seconds
    try:
        row.check(answers)
    except AssertionError as wrong:
        return Measured(row, void=str(wrong) or "a wrong answer")
    notes = row.notes(answers) if row.notes else {}
    answers.clear()
    peaks: dict[str, int] = {}
    if row.memory == "tensors":
        peaks = {name: peak_bytes(function, device) for name, function in row.all.items()}
    elif row.memory == "process" and rss is not None:
        peaks = {name: rss(name) for name in row.all}
    turns = {
        name: 1 if row.once or first[name] > 10 * least else max(1, round(least / timed(f, device)[0]))
        for name, f in row.all.items()
    }
    found: dict[str, list[float]] = {name: [] for name in row.all}
    for i in range(min(repeats, row.turns or repeats)):
        names = list(row.all)
        for name in names if i % 2 == 0 else reversed(names):
            found[name].append(timed(row.all[name], device, turns[name])[0])
    ratios = {}
    for name in row.peers:
        low, median, high = quartiles([a / b for a, b in zip(found[OURS], found[name], strict=True)])
        memory = peaks[OURS] / peaks[name] if peaks.get(name) else None
        ratios[name] = Ratio(median, low, high, memory, first[OURS] / first[name])
    share = row.work / statistics.median(found[OURS]) / speed if row.work and speed else None
    return Measured(row, ratios, share, notes)


def timed(function: Callable[[], Any], device: str = "cpu", times: int = 1) -> tuple[float, Any]:
    """Seconds a call and the last answer; on a GPU by events, after what was still running."""
    gc.collect()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            answer = function()
        return (time.perf_counter() - start) / times, answer
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        answer = function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times, answer


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


class _Storages(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Largest number of bytes in tensors that a call had alive at once, beyond those alive before it.

    On the CPU storages are counted where operations make them (what a single kernel takes inside is not seen); on a
    GPU the allocator counts.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Storages() as counted:
        function()
    return counted.peak


def resident_growth(function: Callable[[], Any]) -> int:
    """Bytes by which a call raised the peak of this process's resident size (Linux): what child processes report."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(field_name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name))


def resident_of_child(script: str, *arguments: str) -> int:
    """`resident_growth` of one implementation of a row, in a fresh process that gives memory back at once."""
    here = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script, *arguments], env=here, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def product_speed(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a square matrix product, the best of some: the limit that shares are of."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / min(timed(lambda: torch.mm(a, b, out=out), device)[0] for _ in range(8))


def gradients(loss: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Value and gradients by the leaves."""
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def agree(name: str, answers: dict[str, Any], tolerance: float, of: tuple[str, ...] = ()) -> None:
    """Raise AssertionError unless the tensors of all answers (or those named) are ours to this share of their size."""
    for other in of or answers:
        for a, b in zip(answers[OURS], answers[other], strict=True):
            gap = float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-30)
            assert gap <= tolerance, f"{name}: {OURS} and {other} differ by {gap:.1e} of the largest, > {tolerance:g}"
