import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from real_features import backbone, images, real
from scipy.special import logsumexp
from scipy.stats import t
from sklearn.linear_model import LogisticRegression

from prototypes_lib.data import Images
from prototypes_lib.evaluate import Features, extract, logistic
from prototypes_lib.evaluate.features import kind
from prototypes_lib.evaluate.few_shot import draw_split, few_shot, prepared, read_split
from prototypes_lib.evaluate.intervals import wilson


def _few_shot(train, test, **options):
    return few_shot(train, test, progress=False, **options)


def _by_hand(x):
    """Centering and normalization image by image, as cyanure documents preprocess(centering, normalize, rows)."""
    rows = []
    for row in x.double().numpy():
        row = row - row.sum() / len(row)
        rows.append(row / math.sqrt((row * row).sum()))
    return np.array(rows)


def _msn():
    return tuple(extract(backbone(), part, **kind(backbone(), "MSN")) for part in images())


@pytest.mark.parametrize("lambd", [0.075, 0.00025])
def test_the_classifier_is_scikit_learns_and_has_msns_objective(lambd):
    train, test = _msn()
    split = draw_split(train.labels, 5)
    z, y, z_test = _by_hand(train.x[split]), train.labels[split].numpy(), _by_hand(test.x)
    reference = LogisticRegression(C=1 / lambd, fit_intercept=False, tol=1e-8, max_iter=20_000).fit(z, y)

    def objective(w):
        scores = z @ w.T
        return (logsumexp(scores, 1) - scores[range(50), y]).mean() + lambd / 50 / 2 * (w**2).sum()

    ours = logistic.fit(Features(prepared(train.x[split]), train.labels[split]), c=1 / lambd, intercept=False)
    assert objective(ours.weight.numpy()) == pytest.approx(objective(reference.coef_), rel=1e-6)
    assert not ours.bias.any()
    found = _few_shot(train, test, images=5, splits=[split], lambd=lambd)
    assert found.values == {"5": (pytest.approx(100 * reference.score(z_test, test.labels.numpy()), abs=0.21),)}
    assert found.lambd == lambd and found.n == 500


def test_each_number_of_images_has_its_splits_mean_deviation_and_interval():
    train, test = real()
    found = _few_shot(train, test, share=0.01, seed=4)
    assert list(found.values) == ["1", "2", "5", "1%"]
    for images_a_class in (1, 2, 5):
        expected = []
        for split in range(3):
            rows = draw_split(train.labels, images_a_class, split, seed=4)
            classifier = LogisticRegression(C=1 / 0.075, fit_intercept=False, tol=1e-8, max_iter=20_000)
            classifier.fit(_by_hand(train.x[rows]), train.labels[rows])
            expected.append(100 * classifier.score(_by_hand(test.x), test.labels))
        values = found.values[str(images_a_class)]
        assert values == pytest.approx(expected, abs=0.21)
        mean = sum(values) / 3
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        assert found.mean[str(images_a_class)] == pytest.approx(mean)
        assert found.deviation[str(images_a_class)] == pytest.approx(deviation)
        half = t.ppf(0.975, 2) * deviation / math.sqrt(3)
        assert found.interval[str(images_a_class)] == pytest.approx((max(mean - half, 0), mean + half))
    assert len(found.values["1%"]) == 1 and math.isnan(found.deviation["1%"])
    assert found.interval["1%"] == wilson(round(found.mean["1%"] * 5), 500)
    assert found.mean["5"] > 12  # chance is 10


def test_features_are_prepared_image_by_image_and_zero_where_an_image_is_constant():
    x = _msn()[0].x[:20]
    assert np.allclose(prepared(x).numpy(), _by_hand(x), atol=1e-6)
    assert torch.equal(prepared(x)[3:4], prepared(x[3:4]))
    flat = torch.tensor([[0.1] * 7, [-1e30] * 7, [0.0] * 7])
    assert torch.equal(prepared(flat), torch.zeros(3, 7))
    assert torch.allclose(prepared(1e30 * x), prepared(x), atol=1e-6)


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 1000))
def test_a_split_is_a_function_of_seed_split_and_images(count, split, seed):
    labels = torch.tensor([3, 7, 3, 9, 7] * 20)
    rows = draw_split(labels, count, split, seed)
    assert np.array_equal(rows, draw_split(labels, count, split, seed))
    assert len(np.unique(rows)) == 3 * count and (np.bincount(labels[rows].numpy())[[3, 7, 9]] == count).all()


def test_splits_and_seeds_are_different_draws():
    labels = real()[0].labels
    drawn = [tuple(draw_split(labels, n, split, seed)) for n in (1, 2, 5) for split in range(3) for seed in range(3)]
    assert len(set(drawn)) == 27
    ones = set(drawn[0])
    assert not ones <= set(drawn[9])  # two images a class are no extension of one
    shared = draw_split(labels, 0.013)
    assert np.bincount(labels[shared].numpy()).tolist() == [1] * 10  # 1.3 of 100, rounded
    assert len(draw_split(labels, 0.001)) == 10  # at least one of each


def _listed(tmp_path, text):
    path = tmp_path / "split.txt"
    path.write_text(text)
    return path


@pytest.fixture
def named():
    """Eight images of two classes with files, two of which have the same name in different folders."""
    own = [[f"{folder}/{folder}_{i}.JPEG" for i in range(3)] + [f"{folder}/x.JPEG"] for folder in ("n01", "n02")]
    files = tuple(own[0] + own[1])
    pixels = np.zeros((8, 4, 4, 3), np.uint8)
    return Images(pixels, np.array([0] * 4 + [1] * 4), ("n01", "n02"), "two", files=files)


def test_published_lists_are_read_by_file_name(tmp_path, named):
    assert read_split(_listed(tmp_path, "n02_1.JPEG\nn01_0.JPEG\n"), named).tolist() == [5, 0]
    assert read_split(_listed(tmp_path, "train/n02/n02_1.JPEG\r\n\nn01_0.JPEG"), named).tolist() == [5, 0]
    assert read_split(_listed(tmp_path, "n02/x.JPEG\nn01/x.JPEG\n"), named).tolist() == [7, 3]
    assert read_split(_listed(tmp_path, "5\n0\n"), named).tolist() == [5, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("n02_1.JPEG\nn09_1.JPEG\n", "'n09_1.JPEG' names none of the 8 images of two"),
        ("x.JPEG\nn02_1.JPEG\n", "'x.JPEG' names 2 of the 8 images of two"),
        ("1\n8\n", "there is no image 8"),
        (f"1\n{2**64}\n", f"there is no image {2**64}; the 8 images end before"),
        ("1\n4\n1\n", "image 1 is listed 2 times"),
        ("4\n5\n", "no image of 'n01' .1 of 2 classes"),
    ],
)
def test_a_list_that_is_no_split_says_why(tmp_path, named, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_split(_listed(tmp_path, text), named)
    assert "split.txt" in str(error.value) and "\n" not in str(error.value)


def test_lists_are_utf_8_with_or_without_a_byte_order_mark(tmp_path, named):
    path = tmp_path / "split.txt"
    path.write_bytes("n02_1.JPEG\nn01_0.JPEG\n".encode("utf-8-sig"))
    assert read_split(path, named).tolist() == [5, 0]
    path.write_bytes("n02_1.JPEG\nGrün.JPEG\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"split\.txt is no UTF-8 text \(byte 13\)"):
        read_split(path, named)


def test_missing_lists_and_images_without_names_say_so(tmp_path, named):
    with pytest.raises(FileNotFoundError, match=r"few-shot split .*absent\.txt: no such file"):
        read_split(tmp_path / "absent.txt", named)
    with pytest.raises(ValueError, match="without file names"):
        read_split(_listed(tmp_path, "n01_0.JPEG"), replace(named, files=()))


def test_given_splits_are_grouped_by_what_they_are():
    train, test = real()
    drawn = [draw_split(train.labels, n, split) for n in (2, 1) for split in range(2)]
    uneven = np.concatenate([drawn[0], np.setdiff1d(draw_split(train.labels, 1, 9), drawn[0])[:3]])
    found = _few_shot(train, test, splits=[*drawn, torch.from_numpy(uneven)])
    assert {name: len(values) for name, values in found.values.items()} == {"2": 2, "1": 2, "2.3%": 1}
    assert found.values["2"] == _few_shot(train, test, images=2, splits=2).values["2"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_features_of_any_type_have_the_answers_of_their_numbers(dtype):
    made = [Features((part.x * 4).round().clamp(0, 9).to(dtype), part.labels) for part in real()]
    floats = [Features(part.x.float(), part.labels) for part in made]
    assert torch.equal(prepared(made[0].x), prepared(floats[0].x))
    assert _few_shot(*made, images=2, splits=1) == _few_shot(*floats, images=2, splits=1)


def test_numbers_of_numpy_are_numbers():
    found = _few_shot(*real(), images=np.int64(2), splits=np.int64(1))
    assert found == _few_shot(*real(), images=[np.int64(2)], splits=1) == _few_shot(*real(), images=2, splits=1)
    assert np.array_equal(draw_split(real()[0].labels, np.int64(2)), draw_split(real()[0].labels, 2))


def test_odd_sets_work_or_say_why():
    train, test = real()
    few = Features(test.x[:7], test.labels[:7])
    assert _few_shot(train, few, images=2).n == 7
    constant = [Features(torch.ones_like(part.x), part.labels) for part in (train, test)]
    constant = _few_shot(*constant)
    assert set(constant.mean.values()) == {10.0}
    assert _few_shot(train, Features(test.x, test.labels + 3), images=1).mean["1"] <= 70
    gaps = _few_shot(Features(train.x, train.labels * 5), Features(test.x, test.labels * 5), images=1)
    assert gaps == _few_shot(train, test, images=1)
    for message, change in {
        "class 10 has fewer training images .1. than the 2": {
            "train": Features(torch.cat([train.x, train.x[:1]]), torch.cat([train.labels, torch.tensor([10])])),
            "images": 2,
        },
        "two classes": {"train": Features(train.x[:9], torch.full((9,), 2))},
        "not finite": {"test": Features(test.x * math.nan, test.labels)},
        "lambd=0": {"lambd": 0},
        "seed=-1 must": {"seed": -1},
        "images=0": {"images": 0},
        "images=1.5": {"share": 1.5},
        "splits=0": {"splits": 0},
        "images=\\(\\)": {"images": ()},
        "at least one split": {"splits": []},
        "split 1: no image of 1, 2, 3, 4, 5 .9 of 10": {"splits": [range(1000), train.labels.eq(0).nonzero()[:, 0]]},
        "split 0: there is no image -1": {"splits": [range(-1, 999)]},
    }.items():
        with pytest.raises(ValueError, match=message):
            _few_shot(**{"train": train, "test": test} | change)
