"""Corruption errors against counting by hand, on real features of real images."""

import copy
import functools
import math
import re

import numpy as np
import pytest
import torch
from real_features import backbone, images, real

from prototypes_lib.data import Images
from prototypes_lib.evaluate import Features, extract
from prototypes_lib.evaluate.corruptions import CORRUPTIONS, corrupt
from prototypes_lib.evaluate.knn import knn, predict
from prototypes_lib.evaluate.restricted import check_names, label_map, restricted
from prototypes_lib.evaluate.robustness import ALEXNET, robustness

SOME = ("gaussian_noise", "contrast")


@functools.lru_cache
def found(**options):
    return robustness(
        backbone(), real()[0], images()[1], corruptions=SOME, severities=(1, 5), progress=False, **options
    )


def corrupted(name, severity):
    """The test set corrupted as a whole, outside `robustness`."""
    test = images()[1]
    pixels = torch.from_numpy(test.pixels).permute(0, 3, 1, 2)
    made = corrupt(pixels, name, severity, torch.arange(len(test))).permute(0, 2, 3, 1).numpy()
    return Images(made, test.labels, test.classes, "corrupted")


def by_hand(name, severity):
    other = extract(backbone(), corrupted(name, severity))
    return 100 - knn(real()[0], other, 20, progress=False).accuracy[20]


@pytest.mark.slow
def test_errors_are_those_of_knn_on_corrupted_images():
    result = found()
    assert result.accuracy == knn(*real(), 20, progress=False).accuracy[20] and result.n == 500
    for name in SOME:
        assert result.error[name] == pytest.approx([by_hand(name, 1), by_hand(name, 5)])
        assert result.error[name][1] > 100 - result.accuracy, f"{name} at severity 5 should cost accuracy"


def test_without_a_baseline_mce_is_the_mean_error():
    result = found()
    ce = {name: np.mean(result.error[name]) for name in SOME}
    assert result.ce == pytest.approx(ce) and result.mce == pytest.approx(np.mean(list(ce.values())))
    assert result.relative_mce == pytest.approx(result.mce - (100 - result.accuracy))
    assert result.interval[0] < result.mce < result.interval[1]
    assert result.mean_error == pytest.approx(ce | {"clean": 100 - result.accuracy})


def test_a_baseline_divides_as_in_the_paper():
    few = images()[1].subset(slice(40))
    result = robustness(backbone(), real()[0], few, corruptions=SOME, baseline=ALEXNET, progress=False)
    clean = 100 - result.accuracy
    ce = {name: 100 * sum(result.error[name]) / (5 * ALEXNET[name]) for name in SOME}
    relative = [100 * (np.mean(result.error[name]) - clean) / (ALEXNET[name] - ALEXNET["clean"]) for name in SOME]
    assert result.ce == pytest.approx(ce) and result.mce == pytest.approx(np.mean(list(ce.values())))
    assert result.relative_mce == pytest.approx(np.mean(relative))
    assert result.relative_interval[0] < result.relative_mce < result.relative_interval[1]


def test_alexnet_loses_accuracy_to_each_corruption():
    assert list(ALEXNET) == ["clean", *CORRUPTIONS]
    assert all(ALEXNET["clean"] < ALEXNET[name] < 100 for name in CORRUPTIONS)


def test_a_result_is_a_baseline_and_its_own_mce_is_100():
    result = robustness(
        backbone(), real()[0], images()[1], corruptions=SOME, severities=(1, 5), baseline=found(), progress=False
    )
    assert result.mce == pytest.approx(100) and result.relative_mce == pytest.approx(100)


def test_a_baseline_measured_otherwise_is_refused_before_any_work(monkeypatch):
    base, train, test = found(), real()[0], images()[1]
    monkeypatch.setattr("prototypes_lib.evaluate.features.extract", None)
    own = {"corruptions": SOME, "severities": (5, 1), "baseline": base, "progress": False}
    for change, word in (
        ({"severities": (1, 2)}, "severities [1, 5], not [1, 2]"),
        ({"baseline": dict(ALEXNET)}, "severities [1, 2, 3, 4, 5], not [1, 5]"),
        ({"classifier": "logistic"}, "classifier knn, not logistic"),
        ({"test": test.subset(slice(40))}, "test images 500, not 40"),
        ({"seed": -1}, "seed=-1 must"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)) as error:
            robustness(backbone(), **({"train": train, "test": test} | own | change))
        assert "\n" not in str(error.value)


def test_a_baseline_that_loses_nothing_has_no_relative_error():
    flat = {"clean": 90.0, "gaussian_noise": 90.0, "contrast": 95.0}
    result = robustness(
        backbone(), real()[0], images()[1], corruptions=SOME, severities=(1,), baseline=flat, progress=False
    )
    assert math.isnan(result.relative_mce) and result.mce > 0


def test_the_interval_is_that_of_the_mean_of_each_images_own_error():
    """Against the central limit theorem."""
    train, test = real()[0], images()[1]
    sets = [extract(backbone(), corrupted(name, severity)).x for name in SOME for severity in (1, 5)]
    wrong = [(predict(train, x, 20, progress=False) != torch.from_numpy(test.labels)).double() for x in sets]
    each = 100 * torch.stack(wrong).mean(0)
    half = 1.96 * float(each.std()) / len(each) ** 0.5
    low, high = found().interval
    assert (low, high) == pytest.approx((float(each.mean()) - half, float(each.mean()) + half), abs=0.15 * half)


@pytest.mark.slow
def test_the_seed_changes_chance_only_and_batches_nothing():
    assert found(batch_size=77) == found()
    other = found(seed=1)
    assert other.error["gaussian_noise"] != found().error["gaussian_noise"]
    assert other.error["contrast"] == found().error["contrast"] and other.accuracy == found().accuracy


def test_logistic_regression_is_trained_on_clean_features():
    from prototypes_lib.evaluate import logistic

    result = found(classifier="logistic")
    train, test = real()
    predicted = logistic.fit(train, c=1.0).predict(test.x)
    assert result.accuracy == pytest.approx(100 * float((predicted == test.labels).double().mean()))
    assert result.error["contrast"][1] > result.error["contrast"][0]


def test_constant_features_are_at_chance_and_few_images_work():
    constant = copy.deepcopy(backbone())
    for parameter in constant.parameters():
        torch.nn.init.zeros_(parameter)
    few = images()[1].subset(slice(20))
    train = extract(constant, images()[0])
    result = robustness(constant, train, few, corruptions=("fog",), severities=(3,), progress=False)
    assert result.n == 20 and 0 <= result.accuracy <= 100 and result.relative_mce == 0


def test_options_of_the_features_are_passed_on_and_others_are_told():
    train = extract(backbone(), images()[0], blocks=2)
    few = images()[1].subset(slice(50))
    made = robustness(backbone(), train, few, corruptions=("fog",), severities=(1,), progress=False, blocks=2)
    assert made.n == 50
    with pytest.raises(ValueError, match="same backbone and options"):
        robustness(backbone(), train, few, corruptions=("fog",), severities=(1,), progress=False)


def test_wrong_requests_name_themselves_in_one_line():
    train, test = real()[0], images()[1]
    unlabeled = Images(test.pixels, np.full(500, -1), test.classes, "unlabeled")
    broken = Features(train.x.clone().fill_(math.nan), train.labels)
    for change, word in (
        ({"corruptions": ("rain",)}, "no corruption 'rain'"),
        ({"severities": (6,)}, "severity 6"),
        ({"severities": ()}, "each once"),
        ({"corruptions": ("fog", "fog")}, "each once"),
        ({"classifier": "tree"}, "choose 'knn' or 'logistic'"),
        ({"k": 1001}, "1000 training images"),
        ({"baseline": {"clean": 10.0}}, "no error of gaussian_noise"),
        ({"baseline": dict(ALEXNET, fog=0.0)}, "error of fog is 0.0"),
        ({"size": 33}, "33"),
        ({"train": broken}, "not finite"),
        ({"test": unlabeled}, "no label"),
        ({"test": test.subset(slice(0))}, "no test images"),
    ):
        arguments = {"train": train, "test": test, "progress": False} | change
        with pytest.raises(ValueError, match=re.escape(word)) as error:
            robustness(backbone(), **arguments)
        assert "\n" not in str(error.value)


def test_predictions_are_limited_to_the_kept_classes():
    """Three classes in another order, as a folder of them would count them."""
    train, test = real()
    kept = (7, 2, 5)
    own = torch.isin(test.labels, torch.tensor(kept))
    labels = torch.tensor([kept.index(int(y)) for y in test.labels[own]])
    result = restricted(train, Features(test.x[own], labels), kept)
    bank = torch.isin(train.labels, torch.tensor(kept))
    among = knn(
        Features(train.x[bank], train.labels[bank]), Features(test.x[own], test.labels[own]), 20, progress=False
    )
    assert result.accuracy == among.accuracy[20] and result.interval == among.interval[20]
    assert (result.classes, result.n) == (3, int(own.sum()))
    free = knn(train, Features(test.x[own], test.labels[own]), 20, progress=False).accuracy[20]
    assert result.accuracy > free, "fewer classes to confuse should help"


def test_logistic_scores_on_other_classes_are_ignored():
    from prototypes_lib.evaluate import logistic

    train, test = real()
    kept = (1, 4, 8)
    own = torch.isin(test.labels, torch.tensor(kept))
    labels = torch.tensor([kept.index(int(y)) for y in test.labels[own]])
    scores = logistic.fit(train, c=1.0).scores(test.x[own])
    right = (scores[:, list(kept)].argmax(1) == labels).double().mean()
    result = restricted(train, Features(test.x[own], labels), kept, classifier="logistic")
    assert result.accuracy == pytest.approx(100 * float(right))


CLASSES = ("n01", "n02", "great white shark", "n04", "shark 4")


def listed(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    return label_map(path, CLASSES)


def test_a_label_map_is_read_with_and_without_indices(tmp_path):
    assert listed(tmp_path, "n04\n\n# a comment\nn01\n") == (0, 3)
    assert listed(tmp_path, "n04 3\nn01\t0\ngreat white shark 2\nshark 4") == (2, 0, 3, 4)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("n01\nn05", "line 2: 'n05' is none of the 5 training classes; did you mean"),
        ("n01 1", "'n01' is class 0, not 1"),
        ("n01\nn01", "line 2: 'n01' is there twice"),
        ("\n#\n", "lists no class"),
    ],
)
def test_a_faulty_label_map_is_told_in_one_line(tmp_path, text, word):
    with pytest.raises(ValueError, match=re.escape(word)) as error:
        listed(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_label_map_is_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("größe\nalt\n".encode("utf-8-sig"))
    assert label_map(path, ("größe", "alt", "neu")) == (1, 0)
    path.write_bytes("alt\ngröße\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt is no UTF-8 text \(byte 6\)"):
        label_map(path, ("größe", "alt", "neu"))


def test_a_test_folder_must_have_the_classes_of_the_label_map_by_name():
    check_names("natural", ("cat", "ship"), "classes.txt", ["ship", "cat"])
    told = "natural has 2 classes and classes.txt names 2: 'cat' is in natural and not in classes.txt"
    with pytest.raises(ValueError, match=told):
        check_names("natural", ("cat", "ship"), "classes.txt", ["dog", "ship"])
    with pytest.raises(ValueError, match=r"1 classes and classes\.txt names 2: 'ant' is in classes.txt and not in nat"):
        check_names("natural", ("ship",), "classes.txt", ["ant", "ship"])


def test_a_missing_label_map_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no list of classes"):
        label_map(tmp_path / "none.txt", CLASSES)


def test_restricted_refuses_what_does_not_fit():
    train, test = real()
    for kept, word in (
        ((0, 1), "labels go up to 9"),
        ((*range(9), 12), "no training image has class 12"),
        ((), "0 classes"),
        ((*range(9), 3, 9), "class 3 is kept twice"),
    ):
        with pytest.raises(ValueError, match=word):
            restricted(train, test, kept)
    with pytest.raises(ValueError, match="k=2000"):
        restricted(train, test, range(10), k=2000)
