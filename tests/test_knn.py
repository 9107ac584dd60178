import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_features import real
from sklearn.neighbors import KNeighborsClassifier

from prototypes_lib import evaluate
from prototypes_lib.evaluate import Features, nearest
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.knn import neighbors, predict
from prototypes_lib.evaluate.knn_protocols import PROTOCOLS, Protocol, Vote, explore


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_features_of_any_type_have_the_answers_of_their_numbers(dtype):
    made = [Features((f.x * 4).round().clamp(0, 9).to(dtype), f.labels) for f in (_features(60), _features(25, seed=1))]
    floats = [Features(f.x.float(), f.labels) for f in made]
    for options in ({}, {"normalize": False, "metric": "euclidean"}):
        of_type, of_floats = (predict(f[0], f[1].x, 5, **options) for f in (made, floats))
        assert torch.equal(of_type, of_floats)


def test_numbers_of_numpy_are_numbers_of_neighbors():
    train, test = _features(60), _features(25, seed=1)
    expected = evaluate.knn(train, test, (5, 7))
    assert evaluate.knn(train, test, list(np.array([5, 7]))) == expected
    (k,) = evaluate.knn(train, test, np.int64(5)).accuracy
    assert type(k) is int and k == 5


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


def _by_hand(train, test_x, k, temperature, weights, normalize, metric):
    """Votes in float64, a loop over everything."""
    x, q = train.x.double(), test_x.double()
    if normalize == "centered":
        x, q = x - x.mean(0), q - x.mean(0)
    if normalize:
        x, q = F.normalize(x, dim=-1), F.normalize(q, dim=-1)
    elected = []
    for row in q:
        score = x @ row if metric == "dot" else -(x - row).norm(dim=-1)
        score, order = score.sort(descending=True)
        votes = torch.zeros(int(train.labels.max()) + 1, dtype=torch.float64)
        for s, label in zip((score - score[0] * (weights != "inverse"))[:k], train.labels[order][:k], strict=True):
            power = {"exp": s / temperature, "softmax": s / temperature}.get(weights, torch.zeros(()))
            votes[label] += 1 / (1e-5 - s) if weights == "inverse" else power.exp()
        elected.append(int(votes.argmax()))
    return torch.tensor(elected)


@pytest.mark.parametrize("normalize", [True, False, "centered"])
@pytest.mark.parametrize(
    ("metric", "weights"),
    [("dot", "exp"), ("dot", "softmax"), ("dot", "uniform"), ("euclidean", "inverse"), ("euclidean", "exp")],
)
def test_every_variant_votes_as_a_loop_does_on_real_features(normalize, metric, weights):
    train, test = real()
    x = test.x[:60]
    found = predict(train, x, 15, 0.1, weights=weights, normalize=normalize, metric=metric)
    assert torch.equal(found, _by_hand(train, x, 15, 0.1, weights, normalize, metric))


def test_it_is_scikit_learns_classifier_on_real_features():
    train, test = real()
    for k in (1, 5, 40):
        peer = KNeighborsClassifier(k).fit(train.x.numpy(), train.labels.numpy())
        mine = predict(train, test.x, k, weights="uniform", normalize=False, metric="euclidean")
        assert (torch.from_numpy(peer.predict(test.x.numpy())) == mine).float().mean() > 0.99  # equally near, rarely
        peer = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / 0.07))
        peer.fit(train.x.numpy(), train.labels.numpy())
        assert (torch.from_numpy(peer.predict(test.x.numpy())) == predict(train, test.x, k)).float().mean() > 0.995


def test_predictions_have_the_accuracy_and_every_k_its_own():
    train, test = real()
    found = evaluate.knn(train, test, (1, 20, 200))
    for k, accuracy in found.accuracy.items():
        assert accuracy == pytest.approx(100 * float((predict(train, test.x, k) == test.labels).double().mean()))
        assert found.interval[k] == wilson(round(accuracy * 5), 500)
    assert found.accuracy == evaluate.knn(train, test, (1, 20, 200), weights="softmax").accuracy  # DINOv2's


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("normalize", [True, "centered"])
@pytest.mark.parametrize("rows", [13, 333, 999])
def test_a_bank_in_parts_has_the_same_neighbors(rows, metric, normalize, tmp_path):
    train, test = real()
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=tuple(train.x.shape))
    x[:] = train.x.numpy()
    mapped, queries = Features(torch.from_numpy(x), train.labels), test.x[:50]
    options = {"metric": metric, "normalize": normalize}
    held = {"held": rows * 64 * 4}
    assert torch.equal(predict(mapped, queries, 20, **options, **held), predict(train, queries, 20, **options))
    parts = list(nearest.search(queries, mapped.x, 20, **options, **held))
    ((_, score, places),) = nearest.search(queries, train.x, 20, **options)
    assert torch.allclose(torch.cat([s for _, s, _ in parts]), score, atol=1e-6)
    assert (torch.cat([p for _, _, p in parts]) == places).float().mean() > 0.99


def test_no_more_of_a_bank_is_held_than_said(monkeypatch):
    train, test = real()
    seen = []
    monkeypatch.setattr(nearest, "directions", lambda x: seen.append(len(x)) or F.normalize(x, dim=-1))
    predict(train, test.x, 20, held=100 * 64 * 4, block=100 * 50)
    assert max(seen) == 100 and sum(seen) == 1000 + 10 * 500


def test_labels_may_be_any_numbers_and_a_class_may_be_missing_or_single():
    train, test = real()
    far = Features(train.x, train.labels * 10**9)  # a table of votes with a column each would not fit
    assert torch.equal(predict(far, test.x), predict(train, test.x) * 10**9)
    without = Features(train.x[train.labels != 3], train.labels[train.labels != 3])
    found = predict(without, test.x)
    assert 3 not in found and evaluate.knn(without, test, 20).accuracy[20] == pytest.approx(
        100 * float((found == test.labels).double().mean())
    )
    only = Features(train.x[train.labels == 3], train.labels[train.labels == 3])
    assert evaluate.knn(only, test, 20).accuracy[20] == 10.0
    single = Features(torch.cat([without.x, only.x[:1]]), torch.cat([without.labels, only.labels[:1]]))
    assert 0 < evaluate.knn(single, test, 20).accuracy[20] < 100


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_features_are_at_chance(value):
    train, test = (Features(torch.full_like(f.x, value), f.labels) for f in real())
    for options in ({}, {"normalize": "centered"}, {"normalize": False, "metric": "euclidean", "weights": "inverse"}):
        assert evaluate.knn(train, test, (1, 20), **options).accuracy == {1: 10.0, 20: 10.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "linear"}, "weights='linear': choose one of 'exp', "),
        ({"normalize": "centred"}, "normalize='centred': choose"),
        ({"metric": "cosine"}, "metric='cosine': choose"),
        ({"weights": "inverse"}, "metric='euclidean'"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"k": ()}, "at least one number"),
        ({"k": (5, 0)}, "k=0 must lie between 1 and the 1000 training images"),
    ],
)
def test_a_choice_that_is_none_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        evaluate.knn(*real(), **options)
    if not isinstance(options.get("k"), tuple):
        with pytest.raises(ValueError, match=says):
            predict(real()[0], real()[1].x, **options)


def test_features_that_are_not_finite_are_refused_before_work():
    train, test = real()
    broken = Features(test.x.clone().index_fill_(0, torch.tensor([7]), math.nan), test.labels)
    for work in (evaluate.knn, explore):
        with pytest.raises(ValueError, match=r"1 test images are not finite.*7"):
            work(train, broken)


def test_the_explorer_agrees_with_knn_protocol_by_protocol():
    train, test = real()
    found = explore(train, test)
    assert [row.protocol for row in found.rows] == list(PROTOCOLS) and not found.left_out and found.n == 500
    for row in found.rows:
        p = row.protocol
        options = {"temperature": p.vote.temperature, "weights": p.vote.weights}
        alone = evaluate.knn(train, test, p.vote.k, **options, normalize=p.normalize, metric=p.metric)
        assert (row.accuracy, row.interval) == (alone.accuracy[p.vote.k], alone.interval[p.vote.k])
    accuracies = [row.accuracy for row in found.rows]
    assert found.spread == max(accuracies) - min(accuracies) > 2  # points, on the very same features
    assert len({p.name for p in PROTOCOLS}) == len(PROTOCOLS) and all(p.source for p in PROTOCOLS)


def test_the_explorer_leaves_out_what_a_small_training_set_cannot_hold():
    train, test = real()
    few = Features(train.x[:50], train.labels[:50])
    found = explore(few, test)
    assert found.left_out == ("DINO, k = 100", "DINO, k = 200") and len(found.rows) == len(PROTOCOLS) - 2
    with pytest.raises(ValueError, match="none of 1 protocols can do with 50 training images"):
        explore(few, test, [Protocol("large", Vote(51))])


def test_gains_are_taken_under_the_same_protocol():
    train, test = real()
    better = [Features(f.x + 0.5 * F.one_hot(f.labels, 64), f.labels) for f in (train, test)]  # told a little
    base, told = explore(train, test), explore(*better, PROTOCOLS[:3])
    gains = told.gains(base)
    assert list(gains) == [p.name for p in PROTOCOLS[:3]] and all(gain > 0 for gain in gains.values())
    assert gains["DINO, k = 20"] == told.rows[1].accuracy - base.rows[1].accuracy
    with pytest.raises(ValueError, match="no protocol in common"):
        told.gains(explore(train, test, PROTOCOLS[3:4]))
