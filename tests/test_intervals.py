import math

import numpy as np
import pytest
import torch
from scipy import stats

from prototypes_lib.evaluate.intervals import bootstrap, check_seed, over_seeds, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (3, 7), (50, 100), (9_999, 10_000)])
def test_a_proportion_has_scipys_wilson_interval(hits, n):
    theirs = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=2e-3), "95 % without asking"
    assert wilson(hits, n, 1.959964) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-4)


def test_no_hit_and_no_miss_end_an_interval_exactly():
    ends = {end for n in range(1, 3000) for end in (wilson(0, n)[0], wilson(n, n)[1])}
    assert ends == {0.0, 100.0}
    for n in range(1, 60):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= 100 * hits / n <= high <= 100


def test_a_bootstrap_of_hits_agrees_with_the_binomial():
    hits = (torch.arange(400) < 300).float()
    low, high = bootstrap(hits, draws=4000)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_a_bootstrap_is_of_any_statistic_and_the_same_for_a_seed():
    pairs = torch.stack([torch.arange(50.0), torch.arange(50.0) ** 2], 1)

    def correlation(x):
        return float(torch.corrcoef(x.T)[0, 1])

    low, high = bootstrap(pairs, correlation, draws=200, seed=1)
    assert low < correlation(pairs) < high <= 1
    assert bootstrap(pairs, correlation, draws=200, seed=1) == (low, high)
    assert bootstrap(pairs, correlation, draws=200, seed=2) != (low, high)


def test_an_interval_over_seeds_is_students():
    values = [31.0, 33.5, 30.2]
    mean, half = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_seed_has_no_interval_and_none_has_no_mean():
    mean, half = over_seeds([5.0])
    assert mean == 5 and math.isnan(half)
    assert all(map(math.isnan, over_seeds([])))


@pytest.mark.parametrize("wrong", [{"values": torch.zeros(0)}, {"draws": 1}, {"level": 1.0}])
def test_a_bootstrap_of_nothing_is_refused_in_a_line(wrong):
    with pytest.raises(ValueError, match="a bootstrap needs images") as error:
        bootstrap(**{"values": torch.ones(3), **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_not_every_generator_takes_is_named(seed):
    check_seed(0), check_seed(2**63 - 1)
    for work in (check_seed, lambda seed: bootstrap(torch.ones(3), seed=seed)):
        with pytest.raises(ValueError, match=f"seed={seed} must"):
            work(seed)
