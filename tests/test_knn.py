import math

import pytest
import torch
import torch.nn.functional as F

from prototypes_lib import evaluate
from prototypes_lib.evaluate import Features
from prototypes_lib.evaluate.knn import neighbors, wilson


def _features(n, dim=6, classes=4, seed=0, noise=0.6):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return Features(centers[labels] + noise * torch.randn(n, dim, generator=g), labels)


def test_votes_are_those_of_the_official_script():
    train, test = _features(60), _features(25, seed=1)
    x, q = F.normalize(train.x, dim=-1), F.normalize(test.x, dim=-1)
    for k in (1, 5, 20):
        right = 0
        for i in range(len(q)):
            cos = x @ q[i]
            votes = [0.0] * 4
            for j in sorted(range(60), key=lambda j: -float(cos[j]))[:k]:
                votes[int(train.labels[j])] += math.exp(float(cos[j]) / 0.07)
            right += votes.index(max(votes)) == int(test.labels[i])
        assert evaluate.knn(train, test, (k,)).accuracy[k] == 100 * right / 25


def test_blocks_change_nothing():
    train, test = _features(60), _features(25, seed=1)
    whole = evaluate.knn(train, test, (1, 7))
    assert evaluate.knn(train, test, (1, 7), block=61) == whole


@pytest.mark.parametrize("n", [1, 3, 99, 101])
def test_any_number_of_test_images_works(n):
    assert evaluate.knn(_features(40), _features(n, seed=2), (5,)).n == n


def test_the_interval_is_wilsons_and_holds_the_accuracy():
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 100
    low, high = wilson(30, 100)
    assert abs(low - 21.89) < 0.01 and abs(high - 39.58) < 0.01


def test_wrong_requests_name_themselves():
    train, test = _features(10), _features(5)
    with pytest.raises(ValueError, match="10 training images"):
        evaluate.knn(train, test, (20,))
    with pytest.raises(ValueError, match="temperature"):
        evaluate.knn(train, test, (2,), temperature=0.0)
    with pytest.raises(ValueError, match="test image"):
        evaluate.knn(train, Features(test.x[:0], test.labels[:0]), (2,))


def test_features_of_any_precision_and_a_tiny_temperature_vote():
    train, test = _features(60), _features(25, seed=1)
    expected = evaluate.knn(train, test, 5).accuracy
    for dtype in (torch.float64, torch.bfloat16):
        cast = [
            Features(f.x.to(dtype).float() if dtype == torch.bfloat16 else f.x.to(dtype), f.labels)
            for f in (train, test)
        ]
        assert abs(evaluate.knn(*cast, 5).accuracy[5] - expected[5]) <= 8
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate.knn(train, test, 5).accuracy == expected
    sharp = evaluate.knn(train, test, (5,), temperature=1e-4).accuracy[5]
    assert sharp == evaluate.knn(train, test, 1).accuracy[1]  # the nearest alone decides


@pytest.mark.parametrize("n", [1, 7, 64, 403])
@pytest.mark.parametrize("k", [1, 3, 7, 50])
@pytest.mark.parametrize("block", [1, 1000, 2**26])
def test_neighbors_are_those_of_the_sorted_cosines(n, k, block):
    g = torch.Generator().manual_seed(n)
    bank, queries = torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randn(9, 5, generator=g).double()
    if k > n:
        with pytest.raises(ValueError, match=f"k={k}"):
            neighbors(queries, bank, k, block)
        return
    cosines, order = (F.normalize(queries, dim=-1) @ F.normalize(bank, dim=-1).T).sort(dim=1, descending=True)
    similarity, places = neighbors(queries, bank, k, block)
    assert torch.equal(places, order[:, :k])
    assert torch.allclose(similarity, cosines[:, :k], rtol=0, atol=1e-14)


def test_no_query_has_no_neighbor():
    similarity, places = neighbors(torch.empty(0, 4), torch.randn(6, 4), 3)
    assert similarity.shape == places.shape == (0, 3)


def test_copies_in_the_bank_are_neighbors_each_once():
    bank = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    similarity, places = neighbors(bank[:5], bank, 40)
    assert torch.allclose(similarity, torch.ones(5, 40), atol=1e-6)
    assert all(sorted(row.tolist()) == list(range(i, 200, 5)) for i, row in enumerate(places))
