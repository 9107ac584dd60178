"""Steps with numbers that are not finite leave nothing behind, and a run with nothing else ends with names."""

import math

import nans
import pytest
import torch
from resume import given, method, pictures, tiny

from prototypes_lib import train as training
from prototypes_lib.trainer import Trainer

CASES = (  # every place at least once; `make soak` has every method, place and value
    ("ibot-vmf", "pixel", math.nan),
    ("dinov2", "pixel of a local crop", math.inf),
    ("msn", "loss", -math.inf),
    ("simdinov2", "gradient", math.nan),
    ("dino", "student's weight", math.nan),
    ("dinov2", "student's projector", math.inf),
    ("ibot-vmf", "teacher's weight", math.nan),
    ("dino", "teacher's projector", -math.inf),
    ("dino", "center", math.nan),
    ("swav", "queue", math.inf),
    ("dino-vmf-kp", "student's kappa", math.inf),
    ("ibot-vmf", "teacher's kappa", math.nan),
    ("swav", "prototype", math.nan),
)


def test_there_is_a_case_for_every_place():
    assert {place for _, place, _ in CASES} == set(nans.PLACES) and set(CASES) < set(nans.cases()) | set(CASES)
    assert all(nans.possible(name, place) for name, place, _ in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]} in {case[1]}")
def test_a_step_that_is_not_finite_is_skipped_and_nothing_of_it_stays(case, tmp_path):
    ((_, wrong),) = nans.injections([case], tmp_path)
    assert wrong is None


@pytest.mark.slow
@pytest.mark.parametrize("case", [("dinov2", "pixel", math.nan), ("ibot-vmf", "gradient", math.inf)])
def test_where_one_rank_has_it_all_ranks_skip_the_step(case, tmp_path):
    ((_, wrong),) = nans.of_one_rank([case], tmp_path)
    assert wrong is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place"), [("dino", "pixel"), pytest.param("ibot", "gradient", marks=pytest.mark.slow)]
)
def test_a_fault_that_stays_ends_the_run_with_names_also_when_it_is_started_again(name, place, tmp_path):
    assert nans.persistent(tmp_path, name, place, resumed=True) is None


@pytest.mark.slow
def test_a_run_with_a_bad_step_counts_it_and_resumes_bit_for_bit(tmp_path):
    assert nans.transient(tmp_path, "dinov2", "pixel") is None


def test_the_judgment_notices_what_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_remember", lambda self: None)  # so nothing can be taken back
    ((_, wrong),) = nans.injections([("dino", "pixel", math.nan)], tmp_path)
    assert wrong == "something of it stayed"


def test_a_broken_optimizer_is_never_saved(tmp_path, monkeypatch):
    """A weight that breaks after the look at the gradients ends the run at the next save."""
    right = torch.optim.AdamW.step

    def step(self, *args):
        right(self, *args)
        self.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with given(pictures()), pytest.raises(FloatingPointError, match="weights"):
        training.train(method("dino"), tiny(tmp_path, checkpoint_epochs=0.1), "x")
    assert not list(tmp_path.rglob("step-*"))
