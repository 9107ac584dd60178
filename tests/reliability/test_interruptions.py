"""Some of the signals that `make soak` sends by the dozen."""

import os
import signal
import threading
import time

import psutil
import pytest
from interruptions import PLACES, interruptions, of_ranks
from resume import method, tiny

from prototypes_lib import checkpoints
from prototypes_lib import train as training
from prototypes_lib.interrupts import Interrupted

pytestmark = pytest.mark.slow  # together more than a few seconds


@pytest.mark.parametrize(
    "case",
    [
        ("SIGTERM", ("rehearsal", 1), 0),
        ("SIGINT", ("forward", 4), 2),
        ("SIGUSR1", ("save", 1), 0),
    ],
    ids=lambda case: f"{case[0]} at {case[1][0]}",
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_from_there(case, tmp_path):
    ((_, wrong),) = interruptions([case], folder=tmp_path)
    assert wrong is None


def test_a_signal_to_one_of_two_ranks_stops_both_with_their_last_step_saved():
    ((_, wrong),) = of_ranks(("SIGTERM",))
    assert wrong is None


@pytest.mark.slow
def test_ranks_that_train_starts_stop_too_and_say_so_as_one_process_does(tmp_path):
    def ask() -> None:
        while not any(path.read_text().count("\n") > 2 for path in tmp_path.rglob("metrics.jsonl")):
            time.sleep(0.02)
        started = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        os.kill(started[-1].pid, signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Interrupted) as stopped:
        training.train(method("dino"), tiny(tmp_path, data="cifar10-5k", limit=48, epochs=300.0), "x", ranks=2)
    assert stopped.value.step > 2 and checkpoints.newest(stopped.value.folder) == stopped.value.step


@pytest.mark.slow
def test_so_it_is_at_every_place(tmp_path):
    signals = ("SIGTERM", "SIGINT", "SIGUSR1")
    cases = [(signals[i % 3], place, 2 * (i % 2)) for i, place in enumerate(PLACES)]
    assert [said for said in interruptions(cases, seed=1, folder=tmp_path) if said[1]] == []
