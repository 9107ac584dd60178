"""Extreme inputs through everything there is: no value and no gradient may be infinite or nan.

The inputs are those of benchmarks/numerics.py, which counts the same thing for other implementations.
"""

import json
from functools import partial

import numerics
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from prototypes_lib import scores
from prototypes_lib.assignment import Center, Chain, Normalize, ProbabilityCenter, Sinkhorn
from prototypes_lib.objectives import alignment, cross_entropy, entropy, over_views
from prototypes_lib.precision import directions
from prototypes_lib.regularizers import (
    coding_rate,
    expansion,
    koleo,
    mean_entropy,
    power_law,
    power_law_matching,
    prior_matching,
)

SCORES = {
    "dot": scores.dot,
    "cosine": scores.cosine,
    "vmf": scores.vmf,
    "vmf, one term": partial(scores.vmf, terms=1),
}
CHAINS = {
    "softmax": (),
    "center": (Center,),
    "probability center": (ProbabilityCenter,),
    "sinkhorn": (Sinkhorn,),
    "softmax, sinkhorn": (Normalize, Sinkhorn),
    "center, sinkhorn": (Center, partial(Sinkhorn, steps=1)),
    "probability center, center": (ProbabilityCenter, Center),
    "sinkhorn, probability center": (Sinkhorn, ProbabilityCenter),
}
OF_THE_BATCH = {
    "center of the batch": (partial(Center, momentum=0.0),),
    "probability center of the batch": (partial(ProbabilityCenter, momentum=0.0),),
}


def scored(score, x):
    """The score of two views of teacher and three of student, through every chain twice, all losses in one sum."""
    w = x.prototypes
    teacher = score(torch.cat([x.teacher_codes, x.codes.detach()]), w.detach(), x.teacher_tau)
    student = [score(y, w, x.tau) for y in (x.codes, x.teacher_codes, x.codes)]
    loss = 0.0
    for links in (CHAINS | OF_THE_BATCH).values():
        chain = Chain(links, x.k)
        for _ in range(2):
            log_q = chain(teacher, x.teacher_tau)
        loss = loss + over_views(cross_entropy, log_q.exp().unflatten(0, (2, -1)), student)
    return loss


def ours():
    """Every score, link, objective and regularizer, as functions of an input of benchmarks/numerics.py."""
    yield from ((what, implementations[numerics.OURS]) for what, implementations in numerics.LOSSES.items())
    for name, links in (CHAINS | OF_THE_BATCH).items():
        yield f"given scores, {name}", partial(numerics.our_cross_entropy, links)
    for name, score in SCORES.items():
        yield f"{name} scores, every chain", partial(scored, score)
    probabilities = lambda x: torch.softmax(scores.wide(x.student) / x.tau, -1)
    marginal = lambda x: torch.softmax(scores.cosine(x.codes, x.prototypes, x.tau), -1)
    yield "koleo, prototypes", lambda x: koleo(x.prototypes)
    yield "koleo, parts", lambda x: koleo(x.prototypes, parts=2)
    yield "expansion", lambda x: expansion(x.codes, eps=1e-3)
    yield "coding rate, prototypes", lambda x: coding_rate(x.prototypes, eps=0.5)
    yield "mean entropy", lambda x: mean_entropy(probabilities(x)) + mean_entropy(marginal(x))
    for exponent in (0.0, 1.0):
        yield f"prior of exponent {exponent}", lambda x, e=exponent: prior_matching(probabilities(x), power_law(x.k, e))
    yield "power law", lambda x: power_law_matching(probabilities(x), 0.25)
    yield "entropy, a meter", lambda x: entropy(probabilities(x)).sum()
    yield "alignment", lambda x: alignment(directions(x.teacher_codes), directions(x.codes))
    yield "alignment over views", lambda x: over_views(alignment, x.teacher_codes[None], [x.codes, x.codes])
    yield "alignment of patches", lambda x: alignment(x.teacher_codes[x.rows], x.codes[x.rows], x.rows[x.rows].float())


@pytest.mark.parametrize("kind", numerics.KINDS)
@settings(max_examples=settings().max_examples // 8, phases=[Phase.generate])  # a seed has no smaller example
@given(seed=st.integers(0, 2**31))
def test_every_value_and_gradient_is_finite(kind, seed):
    x = numerics.draw(kind, seed)
    bad = [name for name, loss in ours() if numerics.finite(loss, x) != (True, True)]
    assert not bad


@pytest.mark.parametrize("kind", numerics.KINDS)
@settings(max_examples=settings().max_examples // 12, phases=[Phase.generate])
@given(seed=st.integers(0, 2**31))
def test_targets_are_distributions(kind, seed):
    x = numerics.draw(kind, seed)
    for name, links in CHAINS.items():
        targets = numerics.twice(Chain(links, x.k), x)
        assert (targets >= 0).all(), name
        assert torch.allclose(targets.sum(-1), torch.ones(len(targets)), atol=1e-5), name


@pytest.mark.parametrize("kind", numerics.KINDS)
def test_a_kind_is_what_it_is_called(kind):
    """The inputs are the same for the same seed, differ between seeds, and are extreme where the name says so."""
    x, again, other = numerics.draw(kind, 0), numerics.draw(kind, 0), numerics.draw(kind, 1)
    assert torch.equal(x.teacher, again.teacher) and torch.equal(x.mask, again.mask)
    assert x.codes.shape != other.codes.shape or not torch.equal(x.codes, other.codes)
    n_rows = len(torch.unique(x.codes, dim=0))
    says = {
        "ordinary": x.student.abs().max() <= 1 + 1e-6 and 0 < x.rows.sum() < len(x.rows),
        "scores of ±1e4": x.teacher.max() > 9e3 and x.student.min() < -9e3,
        "temperatures 1e-3 to 1": min(x.tau, x.teacher_tau) >= 1e-3 and max(x.tau, x.teacher_tau) <= 1,
        "prototypes of length 1 to 100": x.prototypes.norm(dim=-1).max() > 20,
        "prototypes of length 1e-8 to 1": x.prototypes.norm(dim=-1).min() < 1e-4,
        "duplicate samples": n_rows <= 4,
        "duplicate prototypes": len(torch.unique(x.prototypes, dim=0)) <= 4,
        "samples 1e-9 to 1e-3 apart": (x.codes - x.codes[0]).norm(dim=-1).max() < 0.1,
        "one sample": len(x.codes) == 1,
        "more prototypes than samples": x.k > 100 * len(x.codes),
        "one prototype takes all": bool((x.teacher.argmax(-1) == 0).all()) and x.teacher.max() > 5,
        "zero vectors": not x.codes[0].any() and not x.prototypes[0].any(),
        "codes of length 1e-8 to 1e8": (x.codes.norm(dim=-1).log10().abs() > 0.1).all(),
        "no patch masked": not x.mask.any(),
        "every patch masked": bool(x.mask.all()),
        "a score of -inf": bool((x.teacher == -torch.inf).all(0).any()),
        "bfloat16": x.codes.dtype == x.student.dtype == torch.bfloat16,
        "everything at once": x.teacher.abs().max() > 1e3,
    }
    assert says[kind]


@pytest.mark.slow
def test_the_command_counts_what_is_not_finite(tmp_path, capsys):
    numerics.main(["--n", str(len(numerics.KINDS)), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "numerics_peers.json").read_text())
    (run,) = record["runs"]
    assert record["parameters"] == {"n": len(numerics.KINDS), "seed": 0} and run["environment"]["commit"]
    rows = {(row["loss"], row["implementation"]): row for row in run["table"]}
    assert {loss for loss, _ in rows} == set(numerics.LOSSES)
    for (_, implementation), row in rows.items():
        assert row["n"] == len(numerics.KINDS) and row["kinds"]["ordinary"]["either"] == 0
        assert row["either"] == 0 if implementation == numerics.OURS else row["either"] <= row["n"]
    exponentials = rows["Sinkhorn targets (SwAV, DINOv2)", "plain formula (exp-space Sinkhorn, float32)"]
    assert exponentials["kinds"]["scores of ±1e4"] == {"n": 1, "value": 1, "gradient": 1, "either": 1}
    assert "scores of ±1e4 1/1" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [(["--n", "3"], "--n 3"), (["--seed", "-1"], "--seed -1")])
def test_an_impossible_argument_is_one_line(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        numerics.main([*arguments, "--out", str(tmp_path)])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: --out .*folder: "):
        numerics.main(["--out", str(tmp_path / "file" / "folder")])
