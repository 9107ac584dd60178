"""Functions in several processes with a gloo group, for the tests of everything that is exact over ranks.

Four processes at most are forked once from one that has imported torch, and live as long as the tests: a call costs
some hundredths of a second. They do not have the import hook that checks shapes.
"""

import atexit
import datetime
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "pytest", "prototypes_lib.distributed", "prototypes_lib.train"])
GRACE_S = 5.0  # for the others, once one has raised
_pool: list[tuple[Any, Any]] = []
_store: list[dist.TCPStore] = []
_calls = itertools.count()


def together(n: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """function(rank, *args) in n processes that form a group, and what they return, by rank.

    The function is one of a test module, arguments and results can be pickled. Raises AssertionError with the
    traceback of a rank that raised, or with the ranks that were not done in time.
    """
    if not _store:
        _store.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        atexit.register(_clear)
    while len(_pool) < n:
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(len(_pool), there, _store[0].port), daemon=True)
        process.start()
        there.close()
        _pool.append((process, here))
    job = pickle.dumps((str(next(_calls)), n, function, args))
    for _, pipe in _pool[:n]:
        pipe.send_bytes(job)
    results, errors = _gather(n, timeout)
    if errors or len(results) < n:
        _clear()
    if errors:  # a peer that lost its connection only says so
        first = min(errors, key=lambda rank: "gloo/transport" in errors[rank])
        raise AssertionError(f"rank {first} of {n} raised\n{errors[first]}")
    if late := sorted(set(range(n)) - results.keys()):
        raise AssertionError(f"ranks {late} of {n} were not done within {timeout:.0f} s")
    return [results[rank] for rank in range(n)]


def _gather(n: int, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(_pool[:n])}
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    until = time.monotonic() + timeout
    while pipes and (left := until - time.monotonic()) > 0:
        for pipe in multiprocessing.connection.wait(list(pipes), left):
            rank = pipes.pop(pipe)
            try:
                right, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                right, value = False, "its process died"
            if right:
                results[rank] = value
            else:
                errors[rank] = value
                until = min(until, time.monotonic() + GRACE_S)
    return results, errors


def _serve(rank: int, pipe: Any, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            call, n, function, args = pickle.loads(job)
            torch.manual_seed(0)
            apart, within = dist.PrefixStore(call, store), datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", store=apart, rank=rank, world_size=n, timeout=within)
            dist.barrier()  # who is done at once must not leave while others connect
            try:
                answer = pickle.dumps((True, function(rank, *args)))
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _clear() -> None:
    for process, pipe in _pool:
        pipe.close()
        process.kill()
        process.join()
    _pool.clear()
