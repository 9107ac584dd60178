"""Several processes train one learner: join them, spread it over them, decide together, start them from a notebook.

Everything works without a process group, where this process is the only one.
"""

import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prototypes_lib import ranks
from prototypes_lib.distributed.watch import STATUS, Watch

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOIN_S, COLLECTIVE_S = 300.0, 86400.0  # the watch ends a group long before a collective gives up
LAST_WORDS_S = 10.0  # for the others to end by themselves when one process has


@contextlib.contextmanager
def group(device: torch.device, *, patience: float = 20.0, beat: float = 1.0) -> Iterator[tuple[torch.device, Watch]]:
    """Join the processes that torchrun's environment describes; inside are this one's device and the watch over all.

    Without RANK and WORLD_SIZE, or with one process, or within a group that is there already, nothing is joined: the
    device is the one given and the watch looks at nothing. A failed collective ends this process with `watch.STATUS`
    and one line naming the rank that is gone, if one is.

    Args:
        device: cuda, of which this process takes cuda:LOCAL_RANK and NCCL, or cpu with gloo.
        patience, beat: seconds, see `Watch`.

    Raises:
        ValueError: half of the environment, or numbers or GPUs that do not fit.
        ConnectionError: the others did not come.
    """
    place = _place()
    if place is None or dist.is_initialized():
        yield device, Watch()
        return
    rank, world, local = place
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local}, but this machine has {torch.cuda.device_count()} GPUs: "
                "start no more processes on a machine than it has GPUs, or take device='cpu'"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, watch = _meet(rank, world, patience, beat)
    nccl = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    within = datetime.timedelta(seconds=COLLECTIVE_S)
    try:
        dist.init_process_group(**nccl, store=store, rank=rank, world_size=world, timeout=within)
        barrier()  # who is done at once must not leave while others connect
        yield device, watch
    except BaseException as error:
        if _of_collective(error):
            watch.blame()
        watch.leave(f"{type(error).__name__}: {error}".splitlines()[0])
        if device.type == "cpu" and dist.is_initialized():
            dist.destroy_process_group()  # NCCL's could wait for the others
        raise
    watch.leave()
    dist.destroy_process_group()


def _place() -> tuple[int, int, int] | None:
    """Rank, world size and rank on this machine; None for a process by itself."""
    given = {name: os.environ[name] for name in NEEDED if os.environ.get(name)}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return None
    if missing := [name for name in NEEDED if name not in given]:
        there = "is" if len(given) == 1 else "are"
        raise ValueError(
            f"{', '.join(given)} {there} set but {', '.join(missing)} not: start with torchrun, which sets all of "
            f"{', '.join(NEEDED)}, or unset them for one process"
        )
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or given["RANK"]
    try:
        rank, world, port, local = (int(x) for x in (given["RANK"], given["WORLD_SIZE"], given["MASTER_PORT"], local))
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE, MASTER_PORT and LOCAL_RANK must be whole numbers: {error}") from error
    if not (0 <= rank < world and local >= 0 and 0 < port < 65536):
        raise ValueError(f"RANK={rank}, WORLD_SIZE={world}, LOCAL_RANK={local}, MASTER_PORT={port}: no such place")
    return (rank, world, local) if world > 1 else None


def _meet(rank: int, world: int, patience: float, beat: float) -> tuple[dist.Store, Watch]:
    """The store that all processes share, and the watch, which has begun."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    within = datetime.timedelta(seconds=JOIN_S)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=within))
        # a client of its own: the group's may be waiting in another thread
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=within)
        apart = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        watch = Watch(apart, rank, world, f"the launcher at {address}:{port}" if launcher else None, patience, beat)
        watch.start()
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank}: not all of {world} processes have met at {address}:{port}: {str(error).splitlines()[0]}"
        ) from error
    return store, watch


def _of_collective(error: BaseException) -> bool:
    """Gloo raises a RuntimeError with the name of its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def wrap(learner: nn.Module, shard: bool = False) -> nn.Module:
    """The module to call in the learner's place: the same value, and gradients averaged over ranks.

    With `shard` weights are spread over ranks (`sharding.shard`), in place; make the optimizer after it. The learner
    keeps its names, state and other methods either way. Weights start as rank 0's.
    """
    if ranks.world() == 1:
        return learner
    if shard:
        from prototypes_lib.distributed import sharding

        return sharding.shard(learner)
    with warnings.catch_warnings():  # the argument's newer name is not in every torch
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(learner, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def part(model: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one part of an accumulated batch: ranks meet in the last (sharded, in each)."""
    with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def from_all(value: Any) -> list[Any]:
    """Every rank's value (small and picklable), in their order; all ranks ask."""
    if ranks.world() == 1:
        return [value]
    values: list[Any] = [None] * ranks.world()
    dist.all_gather_object(values, value)
    return values


def agree(flag: bool) -> bool:
    """Whether any rank says so; all ranks ask at the same place."""
    return bool(ranks.largest(torch.tensor(float(flag), device=_device())) > 0)


def from_first(value: Any) -> Any:
    """Rank 0's value (small and picklable) on every rank; the others' is ignored."""
    if ranks.world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=_device())
    return values[0]


def barrier() -> None:
    """Wait here for all ranks."""
    if ranks.world() > 1:
        dist.barrier()


def _device() -> torch.device:
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def spawn(function: Callable[..., Any], args: tuple = (), n: int = 2) -> Any:
    """Run function(*args) in n fresh processes of this machine with torchrun's environment; rank 0's return value.

    Function, arguments and value must be picklable, the function importable. Rank 0 writes where this process does;
    of the others only what ends them is seen. An interrupt (Ctrl-C, a notebook's stop) reaches them as SIGTERM.

    Raises: RuntimeError naming the rank that failed first and its error, which is the cause where it can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = (n, _free_port(), folder, function, args)
        processes = [context.Process(target=_child, args=(rank, *place), daemon=True) for rank in range(n)]
        try:
            for process in processes:
                process.start()
            _wait(processes)
        except KeyboardInterrupt:
            _end(processes, 3 * LAST_WORDS_S)
            with contextlib.suppress(OSError, pickle.PickleError):
                said = pickle.loads((Path(folder) / "0.error").read_bytes())
                if isinstance(said, KeyboardInterrupt):  # what rank 0 has saved
                    raise said from None
            raise
        finally:
            _end(processes, 0.0)
        if any(process.exitcode for process in processes):
            _raise(processes, Path(folder))
        return pickle.loads((Path(folder) / "value").read_bytes())


def _child(rank: int, n: int, port: int, folder: str, function: Callable, args: tuple) -> None:
    if hasattr(os, "setsid"):  # a terminal's Ctrl-C reaches the parent alone, which passes it on
        os.setsid()
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    if rank:
        aside = os.open(Path(folder) / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(aside, 2)
    try:
        value = function(*args)
        if rank == 0:
            (Path(folder) / "value").write_bytes(pickle.dumps(value))
    except BaseException as error:
        (Path(folder) / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):
            (Path(folder) / f"{rank}.error").write_bytes(pickle.dumps(error))
        traceback.print_exc()
        sys.exit(1)


def _outlive_nobody() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS_S)
    os._exit(1)


def _wait(processes: list) -> None:
    """Until all have ended, or one has failed and the others had time to end by themselves."""
    running, until = {process.sentinel: process for process in processes}, None
    while running and (until is None or time.monotonic() < until):
        left = None if until is None else max(0.0, until - time.monotonic())
        for sentinel in multiprocessing.connection.wait(list(running), left):
            process = running.pop(sentinel)
            process.join()
            process.ended = time.monotonic()
            if process.exitcode and until is None:
                until = time.monotonic() + LAST_WORDS_S


def _end(processes: list, patience: float) -> None:
    for end in ("terminate", "kill"):
        for process in processes:
            if process.is_alive():
                getattr(process, end)()
        until = time.monotonic() + (patience if end == "terminate" else LAST_WORDS_S)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))


def _raise(processes: list, folder: Path) -> None:
    """Name who failed first: not one that another's end has ended."""
    failed = [
        (p.exitcode == STATUS, getattr(p, "ended", float("inf")), r) for r, p in enumerate(processes) if p.exitcode
    ]
    first = min(failed)[-1]
    code, said, pickled = processes[first].exitcode, folder / f"{first}.txt", folder / f"{first}.error"
    cause = None
    if said.exists():
        what = said.read_text()
        with contextlib.suppress(Exception):
            cause = pickle.loads(pickled.read_bytes())
    else:
        what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    raise RuntimeError(f"rank {first} of {len(processes)}: {what}") from cause


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
