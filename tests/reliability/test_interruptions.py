"""Some of the signals that `make soak` sends by the dozen."""

import pytest
from interruptions import PLACES, interruptions, of_ranks


@pytest.mark.parametrize(
    "case",
    [
        ("SIGTERM", ("rehearsal", 1), 0),
        ("SIGINT", ("forward", 4), 2),
        ("SIGUSR1", ("optimizer", 2), 0),
        ("SIGTERM", ("save", 1), 2),
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
def test_so_it_is_at_every_place(tmp_path):
    signals = ("SIGTERM", "SIGINT", "SIGUSR1")
    cases = [(signals[i % 3], place, 2 * (i % 2)) for i, place in enumerate(PLACES)]
    assert [said for said in interruptions(cases, seed=1, folder=tmp_path) if said[1]] == []
