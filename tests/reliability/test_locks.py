"""A run folder has one writer at a time, and a dead one never stands in the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prototypes_lib.files import locks
from prototypes_lib.files.locks import only_one

HOLD = """
import sys, time
from prototypes_lib.files.locks import only_one
with only_one(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    ) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_second_process_is_refused_by_name_until_the_first_is_dead(tmp_path, holder):
    with (
        pytest.raises(ValueError, match=f"in use by process {holder.pid} on .* since") as error,
        only_one(tmp_path / "run"),
    ):
        pass
    assert "\n" not in str(error.value) and "choose another out" in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()  # left behind, and no hindrance
    with only_one(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with only_one(tmp_path):
        with pytest.raises(ValueError, match=str(os.getpid())), only_one(tmp_path):
            pass
        with pytest.raises(ValueError, match="in use"), only_one(tmp_path):  # the refusal gave nothing away
            pass
    with only_one(tmp_path):
        pass


def test_the_clock_plays_no_part(tmp_path, holder):
    for when in (0, 2**31 + 10**6):  # 1970, and after 2038
        os.utime(tmp_path / "run" / ".lock", (when, when))
        with pytest.raises(ValueError, match="in use"), only_one(tmp_path / "run"):
            pass


def test_a_folder_made_for_nothing_goes_away_and_one_in_use_stays(tmp_path):
    with pytest.raises(KeyError), only_one(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with only_one(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").write_text("x")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x"]
    (tmp_path / "there").mkdir()
    with only_one(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    right, calls = locks._lock, []

    def late(descriptor, folder):
        if not calls:
            (tmp_path / ".lock").unlink()  # its holder left between our opening it and locking it
        calls.append(1)
        return right(descriptor, folder)

    monkeypatch.setattr(locks, "_lock", late)
    with only_one(tmp_path):
        assert len(calls) == 2 and str(os.getpid()) in (tmp_path / ".lock").read_text()


@pytest.mark.slow
def test_of_many_that_start_at_once_one_at_a_time_gets_it(tmp_path):
    folder, winners = tmp_path / "run", 0
    children = []
    for _ in range(8):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                try:
                    with only_one(folder):
                        os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))  # raises where two are inside
                        (folder / "alone").unlink()
                        status = 0
                except ValueError:
                    time.sleep(0.001)
        except BaseException:
            status = 2
        os._exit(status)
    for child in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1), "two were inside at once"
        winners += status == 0
    assert winners >= 1 and not (folder / ".lock").exists()


def test_where_nothing_can_be_locked_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "fcntl", None)
    with only_one(tmp_path), only_one(tmp_path):
        pass
    assert capsys.readouterr().err.count("cannot be locked here") == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run cannot be written"), only_one(tmp_path / "file" / "run"):
        pass
