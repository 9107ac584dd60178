"""Long-tailed data by name, and scores that tell head from tail."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from real_features import real
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from test_data import make_folder

from prototypes_lib import data
from prototypes_lib.data import long_tail
from prototypes_lib.evaluate import Features, logistic
from prototypes_lib.evaluate.knn import predict
from prototypes_lib.evaluate.long_tail import long_tail as scored
from prototypes_lib.evaluate.long_tail import scores

CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # as printed with Cao et al.'s code


def test_the_sizes_are_those_of_cifar_lt():
    assert long_tail.sizes(np.full(10, 5000), 100).tolist() == CIFAR10_LT_100
    for classes, n_max in ((10, 5000), (100, 500), (200, 500), (10, 400)):
        for factor in (10, 20, 50, 100, 200):
            got = long_tail.sizes(np.full(classes, n_max), factor).tolist()
            official = [int(n_max * (1 / factor) ** (c / (classes - 1.0))) for c in range(classes)]
            assert all(0 <= mine - theirs <= 1 for mine, theirs in zip(got, np.maximum(official, 1), strict=True))
            assert got[0] == n_max and got[-1] == max(n_max // factor, 1), (classes, n_max, factor)
    assert sum(long_tail.sizes(np.full(10, 5000), 100)) == 12_406  # the size told in the literature
    assert sum(long_tail.sizes(np.full(100, 500), 100)) == 10_847


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.floats(1, 300), st.integers(0, 5))
def test_every_class_keeps_what_the_formula_says_or_what_it_has(have, factor, seed):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(have)), have))
    kept = long_tail.exponential(labels, factor, seed)
    assert np.all(np.diff(kept) > 0), "ascending, no image twice"
    present = np.bincount(labels)  # classes behind the last one that has images are unknown
    for label, n in enumerate(present):
        curve = max(present) * factor ** (-label / max(len(present) - 1, 1))
        lowest, highest = min(n, max(1, int(curve))), min(n, max(1, int(curve + 1e-6)))
        assert lowest <= int((labels[kept] == label).sum()) <= highest
    assert np.array_equal(kept, long_tail.exponential(labels, factor, seed))
    assert set(long_tail.exponential(labels, 2 * factor, seed)) <= set(kept), "tails are nested"


def test_factor_one_keeps_everything_and_draws_differ_by_seed_only():
    labels = np.arange(1000) % 10
    assert np.array_equal(long_tail.exponential(labels, 1), np.arange(1000))
    draws = [long_tail.exponential(labels, 50, seed) for seed in (0, 1)]
    assert not np.array_equal(*draws)
    assert np.array_equal(*(np.bincount(labels[kept]) for kept in draws))


def test_one_class_no_images_and_unknown_labels():
    assert len(long_tail.exponential(np.zeros(7, np.int64), 100)) == 7
    assert len(long_tail.exponential(np.zeros(0, np.int64), 100)) == 0
    with pytest.raises(ValueError, match="2 images have none"):
        long_tail.exponential(np.array([0, -1, -1]), 10)
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        long_tail.exponential(np.array([0, 1]), 0.5)


def test_the_embedded_subset_with_a_tail_is_part_of_it_and_its_test_split_is_untouched(monkeypatch):
    monkeypatch.setattr(data, "embedded", functools.cache(data.embedded))
    whole = data.load("cifar10-5k", "train", progress=False)
    images = data.load("cifar10-5k-lt-100", "train", progress=False)
    assert images.name == "cifar10-5k-lt-100" and images.classes == whole.classes
    assert np.bincount(images.labels).tolist() == [400, 239, 143, 86, 51, 30, 18, 11, 6, 4]
    kept = long_tail.exponential(whole.labels, 100, 0)
    assert np.array_equal(images.pixels, whole.pixels[kept]) and np.array_equal(images.labels, whole.labels[kept])
    other = data.load("cifar10-5k-lt-100-seed3", "train", progress=False)
    assert other.fingerprint() != images.fingerprint() and other.name == "cifar10-5k-lt-100-seed3"
    assert data.load("cifar10-5k-lt-100-seed0", "train", progress=False).fingerprint() == images.fingerprint()
    tests = [data.load(name, "test", progress=False) for name in ("cifar10-5k", "cifar10-5k-lt-100-seed3")]
    assert tests[0].fingerprint() == tests[1].fingerprint()
    few = data.load("cifar10-5k-lt-100", "train", limit=60, progress=False)
    assert np.bincount(few.labels).tolist() == [7, 7, 6, 6, 6, 6, 6, 6, 6, 4], "a limit comes after, and is even"


def test_a_folder_gets_a_tail_by_its_name_unless_it_is_called_so(tmp_path):
    for part in ("train", "val"):
        make_folder(tmp_path / "set" / part, classes=("ant", "bee", "cow"), each=9)
    make_folder(tmp_path / "set-lt-9-seed1", each=2)

    def counted(name: str, split: str = "train") -> list[int]:
        return np.bincount(data.load(tmp_path / name, split, root=tmp_path, progress=False).labels).tolist()

    assert counted("set-lt-9") == [9, 3, 1] and counted("set-lt-2.25") == [9, 6, 4]
    assert counted("set-lt-9", "test") == counted("set-lt-9", "val") == [9, 9, 9]
    assert counted("set-lt-9-seed1") == [2, 2]
    images = data.load(tmp_path / "set-lt-9", "train", root=tmp_path, progress=False)
    assert images.name == "set-lt-9" and images.files[-1].startswith("train/cow/")
    assert {name.split("/")[1] for name in images.files[:9]} == {"ant"}


def test_bad_tails_are_one_line(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    for name, words in (
        ("cifar10-lt-0.5", "factor of at least 1"),
        ("cifar10-lt-0", "factor of at least 1"),
        ("cifar10-lt-", "factor of at least 1"),
        ("cifar10-lt-nan", "factor of at least 1"),
        ("cifar10-lt-1e3", "factor of at least 1"),
        ("cifar10-lt-100-seed", "whole seed"),
        ("cifar10-lt-100-seed-1", "whole seed"),
        ("cifar01-lt-100", "did you mean 'cifar10'"),
        ("cifar10-lt-100-lt-10", "neither a known data set"),
        (str(tmp_path / "nowhere-lt-10"), "nowhere is not a folder"),
        (str(tmp_path / "set-lt-many"), "is no folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            data.load(name, "train", root=tmp_path)
        assert "\n" not in str(error.value) and str(error.value).startswith("data: "), name
    for name, words in (("cifar01-lt-100", "did you mean 'cifar10'"), ("cifar10-lt-x", "factor of at least 1")):
        with pytest.raises(ValueError, match=words):
            data.fetch(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="prototypes data cifar10`"):
        data.load("cifar10-lt-100", "train", root=tmp_path)
    with pytest.raises(ValueError, match="splits train, test"):
        data.load("cifar10-5k-lt-10", "unlabeled")


def test_fetching_a_long_tail_fetches_its_data_set(capsys, monkeypatch):
    monkeypatch.setattr(data, "embedded", functools.cache(data.embedded))
    assert data.fetch("cifar10-5k-lt-100") == (
        "cifar10-5k-lt-100 train: 988 images of 10 classes\ncifar10-5k-lt-100 test: 1,000 images of 10 classes"
    )
    assert "license" in capsys.readouterr().out
    assert "-lt-" in data.describe()


# ---------------------------------------------------------------------------------------------- scores


def tailed(factor: float = 50) -> tuple[Features, Features]:
    """Real features with a long-tailed training part: 100 to 2 images a class."""
    train, test = real()
    kept = torch.from_numpy(long_tail.exponential(train.labels.numpy(), factor))
    return Features(train.x[kept], train.labels[kept]), test


def test_scores_are_scikit_learns_and_those_of_loops_over_classes():
    train, test = tailed()
    found = scored(train, test, k=5, progress=False)
    told, truth = predict(train, test.x, 5, progress=False).numpy(), test.labels.numpy()
    assert found.n == 500 and found.classes == 10 and found.counts == (100, 64, 41, 27, 17, 11, 7, 4, 3, 2)
    assert found.accuracy == pytest.approx(100 * (told == truth).mean())
    assert found.balanced == pytest.approx(100 * balanced_accuracy_score(truth, told))
    assert found.macro_f1 == pytest.approx(100 * f1_score(truth, told, average="macro", zero_division=0))
    assert found.recall == pytest.approx(100 * recall_score(truth, told, average=None))
    for name, classes in (("head", []), ("medium", [0, 1, 2, 3]), ("tail", [4, 5, 6, 7, 8, 9])):
        group, each = found.groups[name], []
        for c in classes:
            each.append(100 * sum(t == c for t, y in zip(told, truth, strict=True) if y == c) / sum(truth == c))
        assert group.classes == len(classes) and group.n == 50 * len(classes)
        assert group.accuracy == pytest.approx(sum(each) / len(each), abs=1e-9) if each else math.isnan(group.accuracy)
    assert found.groups["medium"].counts == (27, 100) and found.groups["tail"].counts == (2, 17)
    assert all(map(math.isnan, found.groups["head"].interval)), "exactly 100 images are not head"
    assert "tail" in str(found) and "head" not in str(found)


def test_logistic_regression_is_another_classifier():
    train, test = tailed()
    found = scored(train, test, classifier="logistic", c=0.1, progress=False)
    told = logistic.fit(train, c=0.1).predict(test.x)
    assert found.balanced == pytest.approx(100 * balanced_accuracy_score(test.labels, told))


def test_thirds_are_the_classes_in_order_of_their_counts():
    labels = torch.arange(8).repeat(3)
    counts = torch.tensor([5, 90, 5, 7, 300, 2, 5, 1])
    found = scores(labels, labels, counts, groups="thirds")
    assert [found.groups[name].classes for name in ("head", "medium", "tail")] == [3, 3, 2]
    assert [found.groups[name].counts for name in ("head", "medium", "tail")] == [(7, 300), (5, 5), (1, 2)]
    assert found.balanced == found.macro_f1 == 100 and found.balanced_interval == (100, 100)


def test_an_unbalanced_test_set_and_classes_without_test_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.5, 0.3, 0.0, 0.19, 0.01, 0.0]), 400, True, generator=generator)
    told = torch.where(
        torch.rand(400, generator=generator) < 0.6, labels, torch.randint(6, (400,), generator=generator)
    )
    found = scores(told, labels, torch.tensor([500, 60, 40, 0, 3, 200]), groups=(100, 20))
    here = labels.unique().tolist()
    assert found.classes == len(here) == 4 and math.isnan(found.recall[2]) and math.isnan(found.recall[5])
    assert found.balanced == pytest.approx(100 * recall_score(labels, told, labels=here, average="macro"))
    assert found.macro_f1 == pytest.approx(100 * f1_score(labels, told, labels=here, average="macro"))
    assert [found.groups[name].classes for name in ("head", "medium", "tail")] == [1, 1, 2]
    found = scores(told, labels, torch.tensor([101, 100, 40, 20, 19, 200]), groups=(100, 20))
    assert [found.groups[name].counts for name in ("head", "medium", "tail")] == [(101, 101), (20, 100), (19, 19)]


def test_intervals_are_as_wide_as_the_variance_of_recall_says():
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([3] * 30 + [2, 5, 40, 200])
    labels = torch.repeat_interleave(torch.arange(34), sizes)
    right = torch.rand(len(labels), generator=generator) < 0.6
    found = scores(torch.where(right, labels, (labels + 1) % 34), labels, torch.full((34,), 50), draws=2000)
    p = torch.tensor(found.recall, dtype=torch.float64) / 100
    deviation = 100 * float((p * (1 - p) / (sizes - 1)).sum().sqrt()) / 34  # with n - 1: unbiased for three images
    low, high = found.balanced_interval
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.06)
    assert (high + low) / 2 == pytest.approx(found.balanced, abs=0.2 * deviation)
    assert found.groups["medium"].interval == found.balanced_interval


def test_the_seed_decides_the_intervals_only():
    train, test = tailed()
    a, b, c = (scored(train, test, k=5, seed=seed, progress=False) for seed in (0, 0, 1))
    assert repr(a) == repr(b)
    assert a.balanced_interval == b.balanced_interval != c.balanced_interval and a.balanced == c.balanced


def test_edges_are_right_or_one_clear_line():
    train, test = tailed()
    few = Features(test.x[:3], test.labels[:3])
    assert scored(train, few, k=1, progress=False).n == 3
    constant = Features(torch.ones(20, 4), torch.arange(20) % 2), Features(torch.ones(10, 4), torch.arange(10) % 2)
    assert scored(*constant, k=20, progress=False).balanced == 50
    lacking = Features(train.x[train.labels < 9], train.labels[train.labels < 9])
    assert scored(lacking, test, progress=False).counts[9] == 0
    single = Features(test.x[:9], torch.zeros(9, dtype=torch.long))
    assert scored(single, single, k=3, progress=False).balanced == 100
    nan = Features(torch.full_like(test.x, torch.nan), test.labels)
    for call, words in (
        (lambda: scored(train, nan), "not finite"),
        (lambda: scored(train, test, k=10_000), "k=10000"),
        (lambda: scored(train, test, classifier="svm"), "'knn' or 'logistic'"),
        (lambda: scored(train, test, groups=(20, 100)), "groups"),
        (lambda: scored(train, test, groups="halves"), "groups"),
        (lambda: scored(train, test, draws=1), "at least 2"),
        (lambda: scores(test.labels[:3], test.labels, torch.ones(10).long()), "3 predictions for 500"),
        (lambda: scores(test.labels, test.labels - 1, torch.ones(10).long()), "50 test images have no label"),
        (lambda: scores(test.labels, test.labels, torch.ones(9).long()), "counts are of 9"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
