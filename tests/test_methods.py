import ast
import dataclasses
import inspect
import json
import math
from functools import partial

import pytest

from prototypes_lib import methods, scores
from prototypes_lib.assignment import Center, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.methods import METHODS, Cosine, Method, Patch, Queue, Views, Warmup, at, describe
from prototypes_lib.regularizers import expansion, koleo, mean_entropy, power_law, prior_matching


def test_the_family_of_this_course():
    vmf = [f"{base}{add}" for base in ("dino", "dino-vmf", "ibot", "ibot-vmf") for add in ("", "-kd", "-kp")]
    assert set(METHODS) == {*vmf, "ibot-vmf-me", "swav", "msn", "pmsn", "dinov2", "simdino", "simdinov2"}


def test_a_recipe_is_at_most_ten_lines():
    names = {
        id(method): name for name, method in vars(methods).items() if isinstance(method, Method) and name[0] != "_"
    }
    found = set()
    for node in ast.parse(inspect.getsource(methods)).body:
        for target in getattr(node, "targets", []):
            if isinstance(target, ast.Name) and target.id in names.values():
                found.add(target.id)
                assert node.end_lineno - node.lineno + 1 <= 10, target.id
    derived = [name for name, method in METHODS.items() if id(method) not in names]
    assert len(found) == 11 and set(derived) == {n for n in METHODS if n.endswith(("-kd", "-kp"))}


# image crops' K, temperatures of student and teacher (start, end, epochs), momentum, global and local crops and their
# scales, as the released code that made the weights has them
@pytest.mark.parametrize(
    ("name", "k", "temperatures", "ema", "crops", "scales"),
    [
        ("dino", 65536, (0.1, 0.04, 0.07, 30), (0.996, 1.0), (2, 10), ((0.25, 1), (0.05, 0.25))),
        ("ibot", 8192, (0.1, 0.04, 0.07, 30), (0.996, 1.0), (2, 10), ((0.25, 1), (0.05, 0.25))),
        ("swav", 3000, (0.1, 0.05, 0.05, 0), None, (2, 6), ((0.14, 1), (0.05, 0.14))),
        ("msn", 1024, (0.1, 0.025, 0.025, 0), (0.996, 1.0), (2, 10), ((0.3, 1), (0.05, 0.3))),
        ("pmsn", 1024, (0.1, 0.025, 0.025, 0), (0.996, 1.0), (2, 10), ((0.3, 1), (0.05, 0.3))),
        ("dinov2", 131072, (0.1, 0.04, 0.07, 30), (0.994, 1.0), (2, 8), ((0.32, 1), (0.05, 0.32))),
        ("simdino", 0, None, (0.996, 1.0), (2, 10), ((0.4, 1), (0.05, 0.4))),
        ("simdinov2", 0, None, (0.9, 1.0), (2, 10), ((0.4, 1), (0.05, 0.4))),
    ],
)
def test_recipes_have_the_published_numbers(name, k, temperatures, ema, crops, scales):
    method = METHODS[name]
    views, heat = method.views, method.teacher_temp
    assert method.n_prototypes == k
    assert temperatures in (None, (method.student_temp, heat.start, heat.end, heat.epochs))
    assert (method.ema, method.ema_end) == ema if ema else method.ema is None
    assert (views.n_global, views.n_local) == crops and (views.global_scale, views.local_scale) == scales


def test_recipes_differ_where_their_papers_do():
    swav, msn, dinov2 = METHODS["swav"], METHODS["msn"], METHODS["dinov2"]
    assert swav.queue == Queue(3840, epoch=15) and not swav.joint_targets and swav.renormalize
    assert msn.views.n_targets == 1 and msn.first_view == 1 and msn.shared_prototypes and msn.mask_student == 0.15
    assert METHODS["dino"].first_view == 0
    assert dinov2.patch.head == "own" and dinov2.patch.targets_from == "masked" and dinov2.patch.stratified
    assert (dinov2.patch.probability, dinov2.patch.ratio, dinov2.patch.min_area) == (0.5, (0.1, 0.5), 4)
    assert METHODS["ibot"].patch.head == "shared" and METHODS["ibot"].patch.targets_from == "all"
    assert not METHODS["dino"].free_norms and METHODS["dino-vmf"].free_norms and dinov2.free_norms
    assert not swav.free_norms and not msn.free_norms
    colors = {name: method.views.colors for name, method in METHODS.items()}
    assert colors["swav"] == "swav" and colors["msn"] == colors["pmsn"] == "msn" and colors["dinov2"] == "dino"


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
        ({"mask_student": 0.3, "patch": Patch()}, "mask_student=0.3"),
        ({"mask_student": 1.0}, "mask_student=1.0"),
        ({"mask_student": -0.1}, "mask_student=-0.1"),
        ({"patch": Patch(), "views": Views(2, 2, n_targets=1)}, "leave views.n_targets out"),
        ({"n_prototypes": 0, "targets": (), "queue": Queue(8)}, "need prototypes"),
        ({"n_prototypes": 0, "targets": (), "renormalize": True}, "need prototypes"),
        ({"n_prototypes": 0, "targets": (), "shared_prototypes": True}, "need prototypes"),
        ({"ema_end": -0.5}, "ema=0.996 to -0.5"),
        ({"regularizers": ((1.0, mean_entropy, "patch probabilities"),)}, "needs a patch term"),
        (
            {"regularizers": ((1.0, expansion, "averaged codes"),), "views": Views(2, 2, n_targets=1)},
            "global crops that both networks see",
        ),
        ({"regularizers": ((0.1, koleo, "features"),), "views": Views(1, 3)}, "a global crop that the student sees"),
        ({"regularizers": ((0.1, koleo, "codes"),), "views": Views(1, 3)}, "a global crop that the student sees"),
        (
            {"regularizers": ((1.0, expansion, "averaged codes"),), "views": Views(1, 3)},
            "a global crop that the student sees",
        ),
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
        (lambda: Patch(head="twin"), "head 'twin'"),
        (lambda: Patch(targets_from="none"), "targets_from 'none'"),
        (lambda: Views(2, 2, colors="sepia"), "sepia"),
        (lambda: Views(2, 2, n_targets=3), "n_targets=3"),
        (lambda: Views(2, 2, n_targets=0), "n_targets=0"),
        (lambda: Queue(0), "length 0"),
        (lambda: Queue(8, epoch=-1), "epoch -1"),
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


def test_a_cosine_coefficient_goes_from_start_to_end_and_half_way_is_half_way():
    fade = Cosine(2.0, 0.5)
    assert fade.at(0.0) == 2.0 and fade.at(1.0) == pytest.approx(0.5) and fade.at(0.5) == pytest.approx(1.25)
    assert fade.at(1 / 3) == pytest.approx(0.5 + 1.5 * 0.75)
    values = [fade.at(i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True) and all(math.isfinite(v) for v in values)


def test_coefficients_are_read_at_a_share_of_the_run_also_inside_a_partial():
    assert at(0.3, 0.7) == 0.3 and at(Cosine(1.0, 0.0), 0.5) == pytest.approx(0.5) and at(koleo, 0.5) is koleo
    term = partial(expansion, eps=Cosine(0.5, 0.1), groups=2)
    now = at(term, 0.5)
    assert now.func is expansion and now.keywords == {"eps": pytest.approx(0.3), "groups": 2}
    assert term.keywords["eps"] == Cosine(0.5, 0.1), "the recipe's own stays as it is"
    fixed = partial(expansion, eps=0.5)
    assert at(fixed, 0.5) is fixed


def test_views_are_changed_without_losing_who_makes_targets():
    views = dataclasses.replace(METHODS["msn"].views, n_local=3)
    assert (views.n_targets, views.colors, views.n_local) == (1, "msn", 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: METHODS["msn"].but(views=Views(1, 4, n_targets=1)), "sees none"),
        (lambda: METHODS["dino"].but(n_prototypes=0), r"targets=\(\)"),
        (lambda: Warmup(0.04, 0.07, -3), "-3 epochs"),
        (lambda: Patch(min_area=0), "min_area"),
    ],
)
def test_what_would_do_something_else_than_it_says_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
