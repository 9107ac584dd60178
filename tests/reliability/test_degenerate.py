"""Settings at the edge train, or are refused in one line before anything is written."""

import degenerate
import pytest

pytestmark = pytest.mark.slow  # together more than a few seconds

LIGHT = (
    "a batch of one",
    "crops of one patch",
    "one global crop",
    "no local crops",
    "one prototype",
    "a negative seed",
)


@pytest.mark.parametrize("case", [case for case in degenerate.CASES if case.says], ids=lambda case: case.name)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(case, tmp_path):
    assert degenerate.outcome(case, tmp_path) is None


@pytest.mark.parametrize("case", [c for c in degenerate.CASES if c.name in LIGHT], ids=lambda case: case.name)
def test_what_is_odd_but_possible_trains(case, tmp_path):
    assert degenerate.outcome(case, tmp_path) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_all_the_rest_of_it_trains_too():
    cases = tuple(case for case in degenerate.CASES if not case.says and case.name not in LIGHT)
    assert len(cases) > 40 and [said for said in degenerate.degenerate(cases) if said[1]] == []


def test_there_are_enough_cases_with_names_of_their_own():
    assert len({case.name for case in degenerate.CASES}) == len(degenerate.CASES) >= 60


def test_a_place_that_cannot_be_written_is_refused_in_one_line():
    assert [said for said in degenerate.places() if said[1]] == []
