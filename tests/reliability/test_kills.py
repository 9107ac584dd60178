"""Some of the processes that `make soak` kills by the hundred."""

import os
import signal
from pathlib import Path

import pytest
import torch
from kills import Child, kills, trained
from resume import differ

from prototypes_lib import checkpoints


def test_killed_processes_lose_nothing_that_was_saved(tmp_path):
    found = list(kills(6, seed=3, folder=tmp_path))
    assert len(found) == 6 and [what for what in found if what[1]] == []


@pytest.mark.slow
def test_thirty_more_kills(tmp_path):
    found = list(kills(30, seed=4, folder=tmp_path))
    assert len(found) == 30 and [what for what in found if what[1]] == []
