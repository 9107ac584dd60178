import json
from functools import partial

import pytest

from prototypes_lib import methods, scores
from prototypes_lib.assignment import Center, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.methods import METHODS, Method, Patch, Views, Warmup, describe
from prototypes_lib.regularizers import koleo, power_law, prior_matching


def test_the_family_of_this_course():
    vmf = [f"{base}{add}" for base in ("dino", "dino-vmf", "ibot", "ibot-vmf") for add in ("", "-kd", "-kp")]
    assert set(METHODS) >= {*vmf, "simdino"}


def test_a_recipe_states_only_its_difference():
    assert METHODS["dino-vmf"] == METHODS["dino"].but(
        paper="2405.10939", score=scores.vmf, targets=(ProbabilityCenter,)
    )
    base, kp = METHODS["ibot-vmf"], METHODS["ibot-vmf-kp"]
    assert kp == base.but(regularizers=((0.1, koleo, "prototypes"),))


def test_the_grid_of_vmf_table_1_is_but_alone():
    grid = {
        (score.__name__, link.__name__): METHODS["dino"].but(score=score, targets=(link,))
        for score in (scores.dot, scores.cosine, scores.vmf)
        for link in (Center, ProbabilityCenter)
    }
    assert len({json.dumps(describe(m)) for m in grid.values()}) == 6


def test_description_tells_any_two_recipes_apart_and_is_plain_data():
    texts = {name: json.dumps(describe(m)) for name, m in METHODS.items()}
    assert len(set(texts.values())) == len(METHODS)
    a = METHODS["dino"].but(targets=(Normalize, partial(Sinkhorn, steps=2)))
    b = METHODS["dino"].but(targets=(Normalize, partial(Sinkhorn, steps=3)))
    assert describe(a) != describe(b)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_prototypes": -1}, "n_prototypes"),
        ({"student_temp": 0.0}, "positive"),
        ({"teacher_temp": Warmup(0.0, 0.07)}, "positive"),
        ({"ema": 1.5}, "ema"),
        ({"regularizers": ((0.1, koleo, "prototype"),)}, "prototype"),
        ({"n_prototypes": 0, "targets": (), "regularizers": ((0.1, koleo, "prototypes"),)}, "needs prototypes"),
    ],
)
def test_a_composition_that_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        METHODS["dino"].but(**changes)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Views(1, 0), "two views"),
        (lambda: Views(2, 2, local_scale=(0.5, 0.1)), "low before high"),
        (lambda: Patch(ratio=(0.5, 0.1)), "ratio"),
        (lambda: Patch(probability=2.0), "probability"),
        (lambda: Patch(shape="blob"), "blob"),
    ],
)
def test_views_and_masks_that_cannot_be_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_functions_of_one_name_are_told_apart_and_tensors_are_data():
    base = METHODS["dino"]
    one, two = (base.plus(0.1, f, on="codes") for f in (lambda x: x.sum(), lambda x: -x.sum()))
    assert describe(one) != describe(two)
    strong, weak = (base.plus(0.1, _scaled(by), on="codes") for by in (1.0, 2.0))
    assert describe(strong) != describe(weak)
    prior = base.plus(1.0, partial(prior_matching, prior=power_law(16, 0.25)), on="probabilities")
    assert json.dumps(describe(prior))


def _scaled(by):
    def scaled(x):
        return by * x.sum()

    return scaled


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        METHODS["dino"].but(temprature=0.1)


def test_a_method_is_frozen():
    with pytest.raises(AttributeError):
        METHODS["dino"].ema = 0.5
    assert isinstance(METHODS["dino"], Method) and methods.dino.free_norms is False
