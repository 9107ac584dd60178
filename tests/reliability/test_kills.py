"""Some of the processes that `make soak` kills by the hundred."""

import itertools

import pytest
from kills import doubles, kills, lost_ranks

pytestmark = pytest.mark.slow  # together more than a few seconds


def test_killed_processes_lose_nothing_that_was_saved(tmp_path):
    found = list(kills(4, seed=3, folder=tmp_path))
    assert len(found) == 4 and [what for what in found if what[1]] == []


def test_a_second_trainer_in_a_folder_is_refused_until_the_first_is_gone():
    assert [said for said in doubles(1, seed=1) if said[1]] == []


@pytest.mark.slow
def test_the_end_of_one_rank_ends_the_other_which_names_it_and_the_run_goes_on(tmp_path):
    found = list(itertools.islice(lost_ranks(tmp_path, {"patience": 2.0, "beat": 0.2}), 2))
    assert len(found) == 2 and [what for what in found if what[1]] == []
