"""Long-tailed data sets by name: what is kept of each class, and of which data set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import make_folder

from prototypes_lib import data
from prototypes_lib.data import long_tail

CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # as printed with Cao et al.'s code


@pytest.fixture(autouse=True)
def writable_catalog(monkeypatch):
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))


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


def test_the_embedded_subset_with_a_tail_is_part_of_it_and_its_test_split_is_untouched():
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


def test_fetching_a_long_tail_fetches_its_data_set(capsys):
    assert data.fetch("cifar10-5k-lt-100") == (
        "cifar10-5k-lt-100 train: 988 images of 10 classes\ncifar10-5k-lt-100 test: 1,000 images of 10 classes"
    )
    assert "license" in capsys.readouterr().out
    assert "-lt-" in data.describe()
