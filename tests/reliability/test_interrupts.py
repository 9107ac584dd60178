"""Real signals, to this process and to a child: at once outside whole sections, never inside."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prototypes_lib.interrupts import NAMES, Interrupted, Signals


def send(name: str = "SIGTERM") -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    yield
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_raises_at_once(name):
    with pytest.raises(Interrupted) as caught, Signals() as signals:
        send(name)
        raise AssertionError("went on")
    assert caught.value.signal == signals.asked == name and isinstance(caught.value, KeyboardInterrupt)


def test_a_whole_section_is_finished_first():
    done = []
    with pytest.raises(Interrupted), Signals() as signals:
        with signals.whole():
            send()
            done.append("inside")
        done.append("after")
    assert done == ["inside"]


def test_sections_inside_sections_are_whole_too():
    done = []
    with pytest.raises(Interrupted), Signals() as signals:
        with signals.whole():
            with signals.whole():
                send()
            done.append("outer")
        done.append("after")
    assert done == ["outer"]


def test_further_signals_do_not_break_the_last_save():
    done = []
    with Signals() as signals:
        try:
            send()
        except Interrupted:
            send("SIGINT")  # before the section begins
            with signals.whole(last=True):
                send("SIGUSR1")
                done.append("saved")
            send("SIGINT")
    assert done == ["saved"] and signals.asked == "SIGTERM"


def test_an_error_inside_a_section_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), Signals() as signals, signals.whole():
        send()
        raise ZeroDivisionError


def test_where_ranks_must_agree_a_signal_is_only_noted():
    with Signals(raise_now=False) as signals:
        assert signals.asked is None
        send("SIGUSR1")
        with signals.whole():
            send("SIGTERM")
        assert signals.asked == "SIGUSR1"


class _Swallows:
    def __del__(self):
        send()
        time.sleep(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_in_a_destructor_is_raised_at_the_next_section():
    with pytest.raises(Interrupted), Signals() as signals:
        thing = _Swallows()
        del thing
        assert signals.asked == "SIGTERM"
        with signals.whole():
            pass
        raise AssertionError("went on")


def test_outside_of_the_main_thread_nothing_is_installed():
    seen = []

    def run():
        before = signal.getsignal(signal.SIGTERM)
        with Signals() as signals, signals.whole():
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_forked_child_dies_of_the_signal_as_usual():
    with Signals() as signals:
        child = os.fork()
        if not child:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert signals.asked is None


def test_an_interruption_tells_the_step_and_survives_a_process_boundary():
    error = Interrupted("SIGTERM")
    error.step, error.folder = 12, Path("runs/x")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.signal, copy.step, copy.folder) == ("SIGTERM", 12, Path("runs/x"))
    assert "after step 12" in str(copy) and str(Path("runs/x")) in str(copy)
    assert str(Interrupted("SIGINT")) == "stopped by SIGINT"


CHILD = """
import sys, time
from pathlib import Path
from prototypes_lib.interrupts import Interrupted, Signals

step = 0
with Signals() as signals:
    try:
        print("ready", flush=True)
        while True:
            time.sleep(float(sys.argv[1]))  # a long step
            with signals.whole():
                half = step + 1
                time.sleep(0.05)
                step = half
    except Interrupted as stop:
        with signals.whole(last=True):
            time.sleep(0.3)
            assert step == half if step else True
            print(stop.signal, step, flush=True)
        sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pause"), [("SIGTERM", 30), ("SIGINT", 30), ("SIGUSR1", 0), ("SIGTERM", 0)])
def test_a_child_in_a_long_step_saves_within_seconds_though_signals_rain(name, pause):
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(pause)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.12)
        start = time.monotonic()
        for _ in range(3):
            child.send_signal(getattr(signal, name))
            time.sleep(0.05)
        said = child.stdout.read().split()
        assert child.wait() == 75 and said[0] == name and time.monotonic() - start < 5
