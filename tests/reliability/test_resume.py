"""A stopped run goes on as if nothing had been, in every cell of the matrix; and two runs or a full disk do no harm."""

import errno
import itertools

import pytest
import resume
from resume import given, method, pictures, tiny

from prototypes_lib import checkpoints
from prototypes_lib import train as training
from prototypes_lib.methods import METHODS

pytestmark = pytest.mark.slow  # together more than a few seconds

CELLS = (  # a few of the matrix, which `make soak` runs as a whole
    ("swav", "bf16", "mid-accumulation", 0),
    ("dinov2", "fp32", "mid-epoch", 2),
    ("simdinov2", "bf16", "epoch edge", 0),
)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: " ".join(map(str, cell)))
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(cell, tmp_path):
    ((_, wrong),) = resume.matrix([cell], tmp_path)
    assert wrong is None


@pytest.mark.slow
def test_so_it_is_for_every_method_without_its_variants(tmp_path):
    names = [name for name in METHODS if not name.endswith(("-kd", "-kp"))]
    cells = [
        (name, precision, stop, workers)
        for name, (precision, stop, workers) in zip(
            names, itertools.cycle(itertools.product(("fp32", "bf16"), resume.STOPS, (0, 2))), strict=False
        )
    ]
    assert len(cells) == len(names)
    assert [(name, wrong) for name, wrong in resume.matrix(cells, tmp_path) if wrong] == []


def test_the_comparison_notices_a_memory_that_is_not_brought_back(tmp_path, monkeypatch):
    right = checkpoints.load

    def forgetful(folder, step, model, *rest):
        state = right(folder, step, model, *rest)
        for name, tensor in model.state_dict().items():
            if "chain" in name and tensor.is_floating_point():
                tensor.zero_()
        return state

    monkeypatch.setattr(checkpoints, "load", forgetful)
    ((_, wrong),) = resume.matrix([("dino", "fp32", "mid-epoch", 0)], tmp_path)
    assert "differ" in wrong


def test_the_queue_of_the_matrix_is_in_use_when_its_runs_are_stopped(tmp_path):
    with given(pictures()):
        partial = training.train(method("swav"), tiny(tmp_path), "x", stop_after=3)
        learner = training.build(method("swav"), tiny(tmp_path))
    checkpoints.load(partial.folder, 3, learner)
    assert bool((learner.queue.filled >= learner.queue.codes.shape[1]).all())


@pytest.mark.parametrize(
    ("call", "number", "at"),
    [("os.fsync", errno.ENOSPC, 16), pytest.param("io.open", errno.EIO, 9, marks=pytest.mark.slow)],
)
def test_a_full_disk_ends_a_run_in_one_line_and_what_was_saved_stays(call, number, at, tmp_path):
    assert resume.full_disk(tmp_path, call, number, at) == (True, None)
