"""Processes join, agree, and train as one; a killed or stalled one ends the others soon, and they name it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import CONTEXT, together
from test_learner import batch, make, small

from prototypes_lib import distributed, ranks
from prototypes_lib.distributed.watch import STATUS, Watch

CPU = torch.device("cpu")
HOST = socket.gethostname()
QUICK = {"patience": 1.5, "beat": 0.1}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """target(rank, folder, ...) in processes with torchrun's environment; what each writes to stderr is kept."""

    def __init__(self, n: int, folder: Path, target, *args):
        self.folder, self.n, port = folder, n, free_port()
        self.all = [
            CONTEXT.Process(target=placed, args=(rank, n, port, folder, target, args), daemon=True) for rank in range(n)
        ]

    def __enter__(self):
        for process in self.all:
            process.start()
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.join()

    def wait_for(self, what: str, seconds: float = 60.0) -> None:
        """Until every rank has written down that it is there."""
        until = time.monotonic() + seconds
        while not all((self.folder / f"{rank}.{what}").exists() for rank in range(self.n)):
            assert time.monotonic() < until, [self.said(rank) for rank in range(self.n)]
            time.sleep(0.01)

    def end(self, *who: int, within: float) -> dict[int, tuple[int | None, str]]:
        """Exit status and stderr of these ranks, which have so many seconds."""
        until = time.monotonic() + within
        for rank in who:
            self.all[rank].join(max(0.0, until - time.monotonic()))
        return {rank: (self.all[rank].exitcode, self.said(rank)) for rank in who}

    def said(self, rank: int) -> str:
        path = self.folder / f"{rank}.err"
        return path.read_text() if path.exists() else ""


def placed(rank, n, port, folder, target, args):
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        target(rank, folder, *args)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def steps(rank, folder, timing, trouble="", late=0.0):
    """All-reduce for ever, as training does; rank 1 may get into trouble at step 3."""
    with distributed.group(CPU, **timing) as (_, watch):
        for step in range(10**9):
            if step == 3:
                (folder / f"{rank}.ready").touch()
                if rank == 1 and trouble == "loop":
                    while True:
                        pass
                if rank == 1 and trouble == "raise":
                    raise ValueError("this crop is too small")
                if rank == 1 and trouble == "leave":
                    return
            if rank == 1 and trouble == "slow start" and step == 0:
                time.sleep(late)
            if rank == 0 and trouble == "busy" and step == 2:
                with watch.busy():
                    time.sleep(late)
            if trouble in ("slow start", "busy") and step == 5:
                return
            dist.all_reduce(torch.ones(3))
            watch.alive(step)
            time.sleep(0.005)


TROUBLES = {
    # what happens to which rank, and what the others say
    "kill": (1, signal.SIGKILL, "has not been heard of for"),
    "kill the first": (0, signal.SIGKILL, "has died"),
    "stop": (1, signal.SIGSTOP, "has not been heard of for"),
    "stop the first": (0, signal.SIGSTOP, "has not been heard of for"),
}


def lose(folder: Path, trouble: str, timing: dict, within: float) -> None:
    who, what, line = TROUBLES[trouble]
    with Processes(3, folder, steps, timing) as processes:
        processes.wait_for("ready")
        os.kill(processes.all[who].pid, what)
        others = [rank for rank in range(3) if rank != who]
        for status, said in processes.end(*others, within=within).values():
            assert status == STATUS, said
            assert f"rank {who} (pid {processes.all[who].pid}, host {HOST}) {line}" in said


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.slow
def test_a_killed_or_stopped_rank_ends_the_others_which_name_it(trouble, tmp_path):
    lose(tmp_path, trouble, QUICK, within=6.0)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_by_default_that_takes_30_seconds_at_most(trouble, tmp_path):
    lose(tmp_path, trouble, {}, within=30.0)


def stall(folder: Path, timing: dict, within: float) -> None:
    with Processes(3, folder, steps, timing, "loop") as processes:
        processes.wait_for("ready")
        for rank, (status, said) in processes.end(0, 1, 2, within=within).items():
            assert status == STATUS, said
            assert f"rank 1 (pid {processes.all[1].pid}, host {HOST}) has stalled after step 2" in said
            assert ("while True" in said or "pass" in said) == (rank == 1)  # where it hangs


@pytest.mark.slow
def test_a_rank_that_loops_forever_ends_all_and_shows_where(tmp_path):
    stall(tmp_path, QUICK, within=6.0)


@pytest.mark.slow
def test_by_default_that_too_takes_30_seconds_at_most(tmp_path):
    stall(tmp_path, {}, within=30.0)


@pytest.mark.slow
def test_a_rank_that_raises_is_named_with_its_error(tmp_path):
    with Processes(3, tmp_path, steps, QUICK, "raise") as processes:
        found = processes.end(0, 1, 2, within=60.0)
    assert found[1][0] == 1 and "ValueError: this crop is too small" in found[1][1]
    for rank in (0, 2):
        assert found[rank][0] == STATUS
        assert f"rank 1 (pid {processes.all[1].pid}, host {HOST}) has failed: ValueError: this crop" in found[rank][1]


@pytest.mark.slow
def test_a_rank_that_leaves_too_early_is_named(tmp_path):
    with Processes(2, tmp_path, steps, QUICK, "leave") as processes:
        found = processes.end(0, 1, within=60.0)
    assert found[1][0] == 0 and found[0][0] == STATUS
    assert f"rank 1 (pid {processes.all[1].pid}, host {HOST}) has left before the others were done" in found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["slow start", "busy"])
def test_a_long_first_step_and_long_writing_are_no_stall(trouble, tmp_path):
    with Processes(2, tmp_path, steps, {"patience": 1.0, "beat": 0.1}, trouble, 1.6) as processes:
        assert processes.end(0, 1, within=60.0) == {0: (0, ""), 1: (0, "")}


def quit_apart(rank, folder):
    """Rank 0 ends long after the others; nobody is missed."""
    with distributed.group(CPU, patience=1.0, beat=0.1) as (device, watch):
        assert device == CPU and ranks.world() == 2 and ranks.rank() == rank
        watch.alive(0)
        if rank == 0:
            time.sleep(1.6)
    assert not dist.is_initialized()


@pytest.mark.slow
def test_ranks_that_end_at_different_times_are_not_missed(tmp_path):
    with Processes(2, tmp_path, quit_apart) as processes:
        assert processes.end(0, 1, within=60.0) == {0: (0, ""), 1: (0, "")}


def fail_together(rank, folder):
    """An error all ranks agreed on, after which rank 0 still writes something."""
    with distributed.group(CPU, patience=1.0, beat=0.1) as (_, watch):
        watch.alive(0)
        dist.barrier()
        if rank == 0:
            with watch.busy():
                time.sleep(1.5)
        raise FloatingPointError("no finite loss")


@pytest.mark.slow
def test_an_error_that_all_ranks_raise_is_everyones_own(tmp_path):
    with Processes(2, tmp_path, fail_together) as processes:
        for status, said in processes.end(0, 1, within=60.0).values():
            assert status == 1 and said == "FloatingPointError: no finite loss\n"


def test_without_torchruns_environment_there_is_no_group(monkeypatch):
    for name in distributed.NEEDED:
        monkeypatch.delenv(name, raising=False)
    with distributed.group(CPU) as (device, watch):
        watch.alive(3)
        with watch.busy():
            watch.blame()
        assert device == CPU and not dist.is_initialized()
    assert distributed.agree(True) and not distributed.agree(False)
    assert distributed.from_first("x") == "x" and distributed.barrier() is None
    model = torch.nn.Linear(1, 1)
    assert distributed.wrap(model) is model and distributed.wrap(model, shard=True) is model
    Watch().leave()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "are set but MASTER_PORT not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "must be whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "no such place"),
    ],
)
def test_half_an_environment_is_one_clear_line(monkeypatch, given, said):
    for name in (*distributed.NEEDED, "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said) as error, distributed.group(CPU):
        pass
    assert "\n" not in str(error.value)


def test_more_processes_than_gpus_are_one_clear_line(monkeypatch):
    place = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "LOCAL_RANK=2, but this machine has 2 GPUs"
    with pytest.raises(ValueError, match=message), distributed.group(torch.device("cuda")):
        pass


def decide(rank):
    some = distributed.agree(rank == 1), distributed.agree(False), distributed.agree(True)
    value = distributed.from_first({"folder": "runs/a"} if rank == 0 else None)
    distributed.barrier()
    return some, value


def test_ranks_agree_where_one_says_so_and_take_the_firsts_value():
    assert together(2, decide) == [((True, False, True), {"folder": "runs/a"})] * 2


def raise_on_last(rank, n):
    if rank == n - 1:
        raise LookupError("no such crop")
    dist.barrier()


@pytest.mark.slow
def test_the_tests_own_processes_show_what_failed_and_go_on():
    with pytest.raises(AssertionError, match=r"rank 1 of 2 raised\n(.*\n)*LookupError: no such crop"):
        together(2, raise_on_last, 2)
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 were not done within 1 s"):
        together(2, sleep_on_last, 2, timeout=1.0)
    assert together(2, decide)[0][1] == {"folder": "runs/a"}


def sleep_on_last(rank, n):
    if rank == n - 1:
        time.sleep(60.0)


def gradients(rank, name, n, parts, world):
    """Gradients of a step over `parts` parts, of this rank's rows of each, in float64."""
    method = small(name)
    learner = make(method, seed=rank).double()  # ranks start apart: the wrapper gives them rank 0's weights
    if world == 1:
        learner = make(method, seed=0).double()
    views, _ = batch(method, n)
    rows = torch.arange(n).view(parts, world, -1)[:, rank]
    model = distributed.wrap(learner)
    for j in range(parts):
        with distributed.part(model, last=j == parts - 1):
            step = model([v[rows[j]].double() for v in views], None, 0.04)
            (step.loss / parts).backward()
    found = {k: p.grad for k, p in learner.student.named_parameters() if p.requires_grad}
    frozen = [p.grad for p in learner.parameters() if not p.requires_grad]
    assert all(g is None for g in frozen)
    return float(step.loss.detach()), found, sorted(step.parts | step.meters)


@pytest.mark.parametrize(
    "name, world, parts", [("dino", 2, 1), pytest.param("dino", 4, 1, marks=pytest.mark.slow), ("dino-vmf", 2, 2)]
)
def test_gradients_over_ranks_are_those_of_the_whole_batch(name, world, parts):
    _, wanted, meters = gradients(0, name, 8, parts, 1)
    found = together(world, gradients, name, 8, parts, world)
    for _, grads, said in found:
        assert said == meters and grads.keys() == wanted.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, wanted[key], rtol=0.0, atol=1e-12, msg=key)


def greet(word):
    print(f"{word} of {os.environ['WORLD_SIZE']}", flush=True)
    with distributed.group(CPU) as (_, _):
        return ranks.total(torch.tensor(1 + ranks.rank())).item(), word


def complain():
    with distributed.group(CPU, **QUICK):
        if ranks.rank() == 1:
            raise ValueError("crops of 7 px")
        dist.barrier()


def vanish():
    with distributed.group(CPU, **QUICK):
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


@pytest.mark.slow
def test_a_function_runs_in_fresh_processes_and_returns_what_the_first_does(capfd):
    assert distributed.spawn(greet, ("hello",), 2) == (3, "hello")
    assert capfd.readouterr().out == "hello of 2\n"


@pytest.mark.slow
def test_a_failure_in_fresh_processes_is_one_error_that_names_the_rank():
    with pytest.raises(RuntimeError, match="rank 1 of 2: ValueError: crops of 7 px") as error:
        distributed.spawn(complain, (), 2)
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(RuntimeError, match="rank 1 of 2: killed by SIGKILL"):
        distributed.spawn(vanish, (), 2)


def wait_long(folder):
    with distributed.group(CPU):
        (folder / f"{ranks.rank()}.started").touch()
        try:
            time.sleep(60.0)
        finally:
            (folder / f"{ranks.rank()}.ended").touch()


def start_waiting(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    try:
        distributed.spawn(with_handler, (folder,), 2)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()


def with_handler(folder):
    """As a run does: SIGTERM is an exception."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wait_long(folder)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_fresh_processes_end_when_their_parent_is_interrupted_or_killed(end, tmp_path):
    parent = CONTEXT.Process(target=start_waiting, args=(tmp_path,))
    parent.start()
    until = time.monotonic() + 60.0
    while len(list(tmp_path.glob("*.started"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(parent.pid, end)
    parent.join(20.0)
    while len(list(tmp_path.glob("*.ended"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert {p.name for p in tmp_path.glob("*.ended")} == {"0.ended", "1.ended"}
    assert (tmp_path / "interrupted").exists() == (end == signal.SIGINT)


@pytest.mark.slow
def test_torchrun_starts_the_group(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch\n"
        "from prototypes_lib import distributed, ranks\n"
        "with distributed.group(torch.device('cpu')) as (device, watch):\n"
        "    total = int(ranks.total(torch.tensor(1 + ranks.rank())))\n"
        "    os.write(1, f'{ranks.rank()} {total} {device}\\n'.encode())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert sorted(said.stdout.splitlines()) == ["0 3 cpu", "1 3 cpu"], said.stderr
