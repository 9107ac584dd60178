"""The two figures about prototypes: accuracy by precision (vMF, Fig. 2) and data by redundancy (PPC, Fig. 2)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_features import images, real
from scipy import stats
from test_clusters import untrained

from prototypes_lib import checkpoints
from prototypes_lib.collapse import unique_prototypes
from prototypes_lib.evaluate import Features, extract, knn
from prototypes_lib.evaluate.clusters import prototype_assignments, score_of
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.knn import predict
from prototypes_lib.evaluate.precision import (
    by_precision,
    precision,
    precision_of_run,
    redundancy_of_run,
    redundancy_share,
)


@torch.no_grad()
def spread(network) -> None:
    """Prototypes at codes of real images, of lengths 0.5 to 1.5, so that images lie on many of them."""
    few = extract(network.backbone, images()[0].subset(slice(24)))
    network.prototypes.weight_v.copy_(network.projector(few.x))
    network.prototypes.weight_g.copy_(torch.linspace(0.5, 1.5, 24)[:, None])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs"), "dino-vmf", spread)


def test_ranges_of_distinct_precisions_are_the_sorted_images_cut_in_parts():
    train, test = real()
    kappa = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 30
    found = precision(train, test, kappa, k=10, progress=False)
    hit = (predict(train, test.x, 10, progress=False) == test.labels).numpy()
    for i, rows in enumerate(np.array_split(np.argsort(kappa.numpy()), 10)):
        assert found.n[i] == 50 and found.accuracy[i] == pytest.approx(100 * hit[rows].mean())
        assert found.interval[i] == wilson(int(hit[rows].sum()), 50)
        assert found.kappa[i] == pytest.approx((float(kappa[rows].min()), float(kappa[rows].max())))
    assert found.percentiles == pytest.approx([0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100])
    assert found.overall == knn(train, test, 10, progress=False).accuracy[10]
    assert found.trend == pytest.approx(stats.spearmanr(kappa, hit).statistic)
    low, high = found.trend_interval
    assert low < found.trend < high and (high - low) / 2 == pytest.approx(1.96 / 500**0.5, rel=0.15)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=40), st.integers(1, 7))
def test_images_of_one_precision_stay_together_and_every_image_is_in_one_range(rows, bins):
    kappa, hit = torch.tensor([float(k) for k, _ in rows]), torch.tensor([h for _, h in rows])
    found = by_precision(hit, kappa, bins=bins, draws=2)
    assert sum(found.n) == len(rows) and len(found.n) == bins
    middle = stats.rankdata(kappa, method="average")
    for value in set(kappa.tolist()):
        percentile = 100 * (middle[kappa.tolist().index(value)] - 0.5) / len(rows)
        place = min(int(percentile * bins / 100 + 1e-9), bins - 1)
        assert found.kappa[place][0] <= value <= found.kappa[place][1]
    right = sum(a * n / 100 for a, n in zip(found.accuracy, found.n, strict=True) if n)
    assert right == pytest.approx(sum(h for _, h in rows)) and found.overall == pytest.approx(100 * right / len(rows))
    assert all(math.isnan(a) == (n == 0) for a, n in zip(found.accuracy, found.n, strict=True))


def test_a_trend_is_found_where_there_is_one():
    generator = torch.Generator().manual_seed(0)
    kappa = torch.randint(1, 40, (2000,), generator=generator).float()
    hit = torch.rand(2000, generator=generator) < 0.3 + 0.01 * kappa
    up, flat = by_precision(hit, kappa), by_precision(hit[torch.randperm(2000, generator=generator)], kappa)
    assert up.trend_interval[0] > 0.1 and up.accuracy[-1] > up.accuracy[0] + 15
    assert flat.trend_interval[0] < 0 < flat.trend_interval[1]
    assert by_precision(hit, kappa, seed=0) == up and by_precision(hit, kappa, seed=1) != up


def test_unit_prototypes_have_no_trend_whatever_rounding_makes_of_their_lengths():
    w = torch.nn.functional.normalize(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    hit, kappa = torch.arange(300) % 2 == 0, w.norm(dim=1)
    assert len(kappa.unique()) > 1
    found = by_precision(hit, kappa)
    assert found.n == (0, 0, 0, 0, 0, 300, 0, 0, 0, 0) and math.isnan(found.trend) and found.accuracy[5] == 50


def test_bins_may_be_any_edges():
    hit, kappa = torch.ones(100, dtype=torch.bool), torch.arange(100.0)
    assert by_precision(hit, kappa, bins=(0, 25, 90, 100)).n == (25, 65, 10)
    assert by_precision(hit, kappa, bins=1).n == (100,)
    assert math.isnan(by_precision(hit, kappa).trend), "all right: nothing to correlate"
    for bins in (0, (0, 50), (0, 60, 40, 100), (10, 100), (100,)):
        with pytest.raises(ValueError, match="bins="):
            by_precision(hit, kappa, bins=bins)


def test_a_run_is_read_assigned_and_cut_by_the_lengths_of_its_prototypes(run):
    network, parts = checkpoints.load_network(run), [p.subset(slice(300)) for p in images()]
    train_, test = (extract(network.backbone, part) for part in parts)
    found = precision_of_run(run, train_, test, k=5, bins=4, progress=False)
    assigned = prototype_assignments(network, test, score_of(run))
    lengths = checkpoints.load_prototypes(run).norm(dim=1)
    assert len(assigned.unique()) > 5
    assert repr(found) == repr(precision(train_, test, lengths[assigned], k=5, bins=4, progress=False))
    scaled = precision(train_, test, lengths[assigned] / 0.04, k=5, bins=4, progress=False)
    assert (scaled.n, scaled.trend) == (found.n, pytest.approx(found.trend)), "a temperature moves no percentile"
    student = precision_of_run(run, train_, test, network="student", k=5, progress=False)
    assert student.overall == found.overall and math.isnan(student.trend), "whose prototypes are of one length"


def test_the_share_of_data_by_redundancy_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    copies = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 3, 5, 8, 8])
    w = torch.repeat_interleave(centers, copies, dim=0) + 0.01 * torch.randn(37, 16, generator=generator)
    unique = unique_prototypes(w)
    assert unique.redundancy.tolist() == copies.tolist()
    codes = torch.nn.functional.normalize(torch.randn(400, 16, generator=generator), dim=1)
    assigned = (codes @ w[unique.representatives].T).argmax(1)
    found = redundancy_share(assigned, unique)
    assert found.factor == (1, 2, 3, 5, 8) and found.prototypes == (4, 3, 2, 1, 2)
    assert (found.m, found.k, found.n) == (12, 37, 400)
    held = np.bincount(assigned, minlength=12)
    for i, r in enumerate(found.factor):
        members = [m for m in range(12) if copies[m] == r]
        assert found.share[i] == pytest.approx(100 * sum(held[m] for m in members) / 400)
        assert found.average[i] == pytest.approx(np.mean([100 * held[m] / 400 for m in members]))
        low, high = found.interval[i]
        assert low <= found.average[i] <= high and high - low < 10 / len(members)
    assert sum(found.share) == pytest.approx(100)
    assert found.trend == pytest.approx(stats.spearmanr(copies, held).statistic)


def test_redundancy_of_a_run_reassigns_the_data_to_unique_prototypes(run):
    network = checkpoints.load_network(run)
    features = extract(network.backbone, images()[0].subset(slice(200)))
    w = network.prototypes.w.detach()
    eps = float(torch.quantile(1 - torch.cosine_similarity(w[:, None], w[None], dim=-1), 0.1))
    found = redundancy_of_run(run, features, eps=eps)
    unique = unique_prototypes(w, eps)
    assert found.m == unique.count < 24 and found.k == 24 and found.n == 200 and sum(found.share) == pytest.approx(100)
    logits = score_of(run)(network.projector(features.x), w)[:, unique.representatives]
    assert found == redundancy_share(logits.argmax(1), unique)
    whole = redundancy_of_run(run, features, eps=1e-6)  # no copies: one factor, all of the data
    assert whole.factor == (1,) and whole.share == (100,) and whole.m == 24 and math.isnan(whole.trend)


def test_wrong_input_is_one_line(run, tmp_path):
    train_, test = real()
    unique = unique_prototypes(torch.eye(4))
    simdino = untrained(tmp_path, "simdino")
    for call, words in (
        (lambda: precision(train_, test, torch.ones(3)), "3 precisions of 500 test images"),
        (lambda: precision(train_, test, torch.ones(500), k=5000), "k=5000"),
        (lambda: precision(train_, Features(test.x * torch.nan, test.labels), torch.ones(500)), "not finite"),
        (lambda: by_precision(torch.ones(2).bool(), torch.tensor([1.0, torch.nan])), "1 precisions are not finite"),
        (lambda: by_precision(torch.ones(0).bool(), torch.ones(0)), "at least one"),
        (lambda: by_precision(torch.ones(2).bool(), torch.ones(3)), "3 precisions of 2"),
        (lambda: redundancy_share(torch.tensor([0, 4]), unique), "numbered from 0"),
        (lambda: redundancy_share(torch.tensor([0, -1]), unique), "numbered from 0"),
        (lambda: redundancy_share(torch.zeros(0).long(), unique), "0 images"),
        (lambda: precision_of_run(simdino, train_, test), "no prototypes"),
        (lambda: redundancy_of_run(simdino, train_), "no prototypes"),
        (lambda: precision_of_run(run, Features(train_.x[:, :3], train_.labels), test), "dimensions"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        precision_of_run(tmp_path / "nowhere", train_, test)
