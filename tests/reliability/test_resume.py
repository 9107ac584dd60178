"""A stopped run goes on as if nothing had been, in every cell of the matrix; and two runs or a full disk do no harm."""

import contextlib
import errno
import itertools
import os
from unittest import mock

import pytest
import resume
import torch
from kills import Child, trained
from mutants import _fails
from resume import given, method, pictures, tiny

from prototypes_lib import checkpoints
from prototypes_lib import train as training

CELLS = (  # every method family, every precision, stop and number of workers; `make soak` runs all of them
    ("dino-vmf-kp", "fp32", "mid-epoch", 2),
    ("swav", "fp32", "mid-accumulation", 0),
    ("swav", "bf16", "epoch edge", 2),
    ("dinov2", "bf16", "mid-accumulation", 2),
    ("simdinov2", "fp32", "epoch edge", 0),
    ("msn", "bf16", "mid-epoch", 0),
)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: " ".join(map(str, cell)))
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(cell, tmp_path):
    ((_, wrong),) = resume.matrix([cell], tmp_path)
    assert wrong is None


@pytest.mark.slow
def test_so_it_is_for_every_method(tmp_path):
    names = resume.METHODS
    cells = [
        (name, precision, stop, workers)
        for name, (precision, stop, workers) in zip(
            names, itertools.cycle(itertools.product(("fp32", "bf16"), resume.STOPS, (0, 2))), strict=False
        )
    ]
    assert len(cells) == len(names)
    assert [(name, wrong) for name, wrong in resume.matrix(cells, tmp_path) if wrong] == []


@pytest.mark.parametrize("lost", ["chain", "queue", "running_mean"])
def test_the_comparison_notices_a_memory_that_is_not_brought_back(lost, tmp_path, monkeypatch):
    right = checkpoints.load

    def forgetful(folder, step, model, *rest):
        state = right(folder, step, model, *rest)
        for name, tensor in model.state_dict().items():
            if lost in name and tensor.is_floating_point():
                tensor.zero_()
        return state

    monkeypatch.setattr(checkpoints, "load", forgetful)
    name = "swav" if lost == "queue" else "dino"
    ((_, wrong),) = resume.matrix([(name, "fp32", "mid-epoch", 0)], tmp_path)
    assert "differ" in wrong


def test_the_queue_of_the_matrix_is_in_use_when_its_runs_are_stopped(tmp_path):
    with given(pictures()):
        partial = training.train(method("swav"), tiny(tmp_path), "x", stop_after=3)
        learner = training.build(method("swav"), tiny(tmp_path))
    checkpoints.load(partial.folder, 3, learner)
    assert bool((learner.queue.filled >= learner.queue.codes.shape[1]).all())


def test_a_second_trainer_in_the_same_folder_is_refused_in_one_line(tmp_path):
    with Child(trained, tmp_path) as first:
        assert first.until("step", 2)
        with given(pictures()), pytest.raises(ValueError, match=f"in use by process {first.process.pid} ") as error:
            training.train(method("dinov2"), tiny(tmp_path), "x")
        assert "\n" not in str(error.value)
        assert first.rest() == 0


@pytest.mark.parametrize("fault", ["fsync", "rename", "open"])
@pytest.mark.parametrize("at", [1, 14])
def test_a_full_disk_ends_a_run_in_one_line_and_what_was_saved_stays(fault, at, tmp_path):
    target, number = {"fsync": ("os.fsync", errno.ENOSPC), "rename": ("os.rename", errno.EIO)}.get(
        fault, ("io.open", errno.ENOSPC)
    )
    composed, run = method("dino"), tiny(tmp_path / "full", checkpoint_epochs=0.1)
    with given(pictures()):
        whole = training.train(composed, run.but(out=str(tmp_path / "whole")), "x")
        with _fails(target, number, at), pytest.raises(OSError, match="full") as error:
            training.train(composed, run, "x")
        assert "\n" not in str(error.value) and error.value.errno == number
        (folder,) = (tmp_path / "full").iterdir()
        assert all(checkpoints.damage(folder, step) is None for step in checkpoints.steps(folder))
        assert resume.differ(training.train(composed, run, "x").folder, whole.folder) is None
