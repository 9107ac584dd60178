import dataclasses

import numpy as np
import pytest
import torch
from real_features import real

from prototypes_lib.data import DATASETS
from prototypes_lib.evaluate.features import Features
from prototypes_lib.evaluate.transfer import LAMBDAS, METRIC, Transfer, _folds, accuracy, transfer

GRID = (1e-3, 1e-1, 1.0, 1e2, 1e4)


def some(n=300, dim=16):
    train, test = real()
    return (
        Features(train.x[:n, :dim].contiguous(), train.labels[:n]),
        Features(test.x[:, :dim].contiguous(), test.labels),
    )


def peer(train, lam):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / lam, tol=1e-10, solver="newton-cholesky", max_iter=200)
    return model.fit(train.x.double().numpy(), train.labels.numpy())


def quiet(*features, **options):
    return transfer(*features, progress=False, **options)


def test_the_grid_is_the_official_one():
    assert np.allclose(LAMBDAS, np.logspace(-6, 5, 45), rtol=1e-12)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_selection_and_refit_are_those_of_scikit_learn_by_hand(metric):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    score = accuracy_score if metric == "top1" else balanced_accuracy_score
    train, test = some()
    train, val = Features(train.x[:220], train.labels[:220]), Features(train.x[220:], train.labels[220:])
    tried = [100 * score(val.labels, peer(train, lam).predict(val.x.double().numpy())) for lam in GRID]
    best = int(np.argmax(tried))
    both = Features(torch.cat([train.x, val.x]), torch.cat([train.labels, val.labels]))
    expected = 100 * score(test.labels, peer(both, GRID[best]).predict(test.x.double().numpy()))
    found = quiet(train, test, val=val, lambdas=GRID, metric=metric)
    assert found.validation == pytest.approx(tried)
    assert (found.lam, found.c) == (GRID[best], 1 / GRID[best])
    assert found.accuracy == pytest.approx(expected)
    assert found.converged and found.metric == metric and found.n == 500 and found.lambdas == GRID
    assert found.interval[0] < found.accuracy < found.interval[1]
    assert found.at_edge == (best in (0, len(GRID) - 1))


def test_folds_are_those_of_scikit_learn_by_hand():
    train, test = some(150, 8)
    part = _folds(train.labels, 3, 0).numpy()
    lambdas, right = (1e-1, 1e2), np.zeros(2)
    for fold in range(3):
        seen, out = (Features(train.x[mask], train.labels[mask]) for mask in (part != fold, part == fold))
        right += [np.sum(peer(seen, lam).predict(out.x.double().numpy()) == out.labels.numpy()) for lam in lambdas]
    found = quiet(train, test, folds=3, lambdas=lambdas)
    assert found.validation == pytest.approx(100 * right / 150)


def test_folds_hold_each_class_as_evenly_as_can_be():
    labels = torch.tensor([0] * 23 + [1] * 10 + [2] * 3 + [3])[torch.randperm(37)]
    part = _folds(labels, 5, 0)
    table = torch.stack([torch.bincount(part[labels == c], minlength=5) for c in range(4)])
    assert int((table.amax(1) - table.amin(1)).max()) <= 1
    sizes = part.bincount(minlength=5)
    assert int(sizes.max() - sizes.min()) <= 1
    assert not torch.equal(part, _folds(labels, 5, 1))


def test_a_random_fifth_validates_and_the_seed_draws_it():
    train, test = some(100, 8)
    found = [quiet(train, test, lambdas=GRID, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0].validation != found[2].validation
    assert all(float(v) / 5 == pytest.approx(round(v / 5)) for v in found[0].validation)  # of 20 images
    assert isinstance(found[0], Transfer) and found[2].seed == 1


def test_mean_per_class_leaves_out_classes_without_test_images():
    predicted, labels = torch.tensor([0, 0, 0, 3, 5]), torch.tensor([0, 0, 0, 0, 5])
    assert accuracy(predicted, labels) == 80
    assert accuracy(predicted, labels, "mean_per_class") == (75 + 100) / 2


@pytest.mark.slow
def test_a_class_of_one_image_and_a_class_only_tested_are_missed_not_fatal():
    train, test = some(60, 8)
    lonely = torch.cat([train.labels[:-1], torch.tensor([77])])
    for options in ({"folds": 5}, {}):
        found = quiet(Features(train.x, lonely), test, lambdas=GRID, **options)
        assert 0 <= found.accuracy <= 100
    nowhere = quiet(train, Features(test.x, test.labels + 100), lambdas=(1.0,))
    assert nowhere.accuracy == 0 and nowhere.at_edge


def test_a_fold_that_leaves_one_class_is_answered_by_it():
    """39 images of one class and one of another: without its fold there is nothing to tell apart."""
    train, test = some(40, 8)
    lonely = Features(train.x, (torch.arange(40) == 7).long())
    found = quiet(lonely, Features(test.x, test.labels.clamp(max=1)), folds=5, lambdas=(1.0, 10.0))
    assert found.validation == (97.5, 97.5)
    alone = [quiet(lonely, test, lambdas=(1.0,), seed=seed).validation for seed in range(5, 8)]
    assert set(alone) == {(100.0,), (87.5,)}, "of eight images that choose, the other one is missed where it is there"
    for options in ({"folds": 5}, {"val": lonely}):
        one = Features(train.x, torch.zeros(40, dtype=torch.long))
        assert "val" not in options or quiet(one, test, lambdas=(1.0,), **options).validation == (97.5,)
        with pytest.raises(ValueError, match="all training images have label 0"):
            quiet(one, test, lambdas=(1.0,), **(options | ({"val": one} if "val" in options else {})))


def test_fits_that_stop_early_are_counted(monkeypatch):
    from prototypes_lib.evaluate import logistic

    train, test = some(60, 8)
    assert quiet(train, test, folds=2, lambdas=(1e-1, 1.0)).unconverged == 0
    path = logistic.path
    monkeypatch.setattr(logistic, "path", lambda *given, **own: path(*given, **{"max_iterations": 1} | own))
    hurried = quiet(train, test, folds=2, lambdas=(1e-3, 1.0))
    assert hurried.unconverged == 4 and hurried.converged


def test_constant_features_are_at_chance():
    train, test = some(100, 8)
    found = quiet(*(Features(torch.ones_like(f.x), f.labels) for f in (train, test)), lambdas=GRID, folds=2)
    assert found.accuracy == 10


def test_few_test_images_are_enough():
    train, test = some(100, 8)
    few = Features(test.x[:3], test.labels[:3])
    for metric in ("top1", "mean_per_class"):
        assert quiet(train, few, lambdas=(1.0,), metric=metric).n == 3


def test_each_data_set_has_its_official_metric():
    assert set(METRIC) == set(DATASETS)
    assert {name for name, metric in METRIC.items() if metric == "mean_per_class"} == {
        "aircraft", "caltech101", "flowers102", "pets"}  # fmt: skip


def test_the_result_is_frozen():
    train, test = some(60, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        quiet(train, test, lambdas=(1.0,)).accuracy = 1.0


def test_wrong_requests_name_themselves():
    train, test = some(60, 4)
    for options, says in (
        ({"metric": "top5"}, "top5"),
        ({"folds": 1}, "folds=1"),
        ({"folds": 61}, "61 parts"),
        ({"folds": 2, "val": test}, "not both"),
        ({"lambdas": ()}, "at least one"),
        ({"lambdas": (0.0,)}, "positive"),
        ({"seed": -1}, "seed=-1 must"),
    ):
        with pytest.raises(ValueError, match=says):
            quiet(train, test, **options)
    with pytest.raises(ValueError, match="not finite"):
        quiet(train, Features(test.x * float("nan"), test.labels))
    with pytest.raises(ValueError, match="two classes"):
        quiet(Features(train.x, train.labels * 0), test)
    with pytest.raises(ValueError, match="dimensions"):
        quiet(train, test, val=Features(test.x[:, :2], test.labels))
