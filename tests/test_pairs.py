"""Every count from one pass over all pairs is that of the plain functions, whoever is crowded, whatever the blocks."""

import json
import math
from unittest import mock

import memory
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components as scipy_components
from test_collapse import CASES, _circle, _clustered, _naive, _random, _unit

from prototypes_lib import collapse
from prototypes_lib.collapse import connected_components, neighbors, pairs, unique_prototypes, unique_range

# _CROWD, _SAMPLE, _ROWS, _COLUMNS, _CELL: as shipped; nearly everybody crowded; some; nobody; small blocks
# that are no multiple of anything
SHIPPED = (128, 4096, 1024, 4096, 64)
SETTINGS = (SHIPPED, (1, 40, 16, 32, 8), (3, 8, 64, 64, 64), (10_000, 10_000, 64, 96, 32), (5, 20, 13, 21, 7))


def _set(values):
    names = ("_CROWD", "_SAMPLE", "_ROWS", "_COLUMNS", "_CELL")
    return mock.patch.multiple(pairs, **dict(zip(names, values, strict=True)))


def _same(found, expected):
    assert found.representatives.tolist() == expected.representatives.tolist()
    assert found.assignment.tolist() == expected.assignment.tolist()
    assert found.redundancy.tolist() == expected.redundancy.tolist()
    assert (found.count, found.eps) == (expected.count, expected.eps)


def _star(k: int = 120, dim: int = 40) -> torch.Tensor:
    """A core of copies, and around it, at angles up to 23 degrees, prototypes that see the core and not each other."""
    angle = torch.linspace(0, 0.6, k, dtype=torch.float64)[:, None].clamp_min(0.2) - 0.2
    away = torch.nn.functional.normalize(_random(k, dim, 3), dim=1)
    w = torch.cos(angle) * torch.eye(dim, dtype=torch.float64)[:1] + torch.sin(angle) * away
    return w[torch.randperm(k, generator=torch.Generator().manual_seed(4))]


def _half(k: int = 160, dim: int = 24) -> torch.Tensor:
    """Half one loose group of copies, half unique, in random order: the kind of DINO ViT-B/16."""
    w = _random(k, dim)
    w[: k // 2] = w[0] + 0.2 * w[: k // 2]
    return w[torch.randperm(k, generator=torch.Generator().manual_seed(1))]


ALL = CASES | {
    "star": _star(),
    "half": _half(),
    "two": _random(2, 3),
    "two copies": torch.ones(2, 3).double(),
    "opposite": _circle([0, 180]),
    "chain": _circle(torch.arange(0, 60, 6.0)),
    "ring": _circle(torch.arange(0, 360, 1.7)),
}


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_curve_range_and_components_are_those_of_the_plain_functions(name, values):
    w = ALL[name]
    with _set(values):
        found = neighbors(w)
        for unique in found.curve():
            _same(unique, unique_prototypes(w, unique.eps))
        for eps in (0.025, 0.1):
            assert found.range(eps, 4, seed=5) == unique_range(w, eps, 4, seed=5)
            assert found.components(eps) == connected_components(w, eps)


@pytest.mark.parametrize("name", ALL)
def test_distances_the_pass_was_not_made_for_are_as_exact(name):
    w = ALL[name]
    with _set((4, 40, 64, 64, 8)):
        found = neighbors(w, [0.01])
        for eps in (1e-6, 0.007, 0.01, 0.3, 1.0, 2.0):
            assert found.unique(eps).assignment.tolist() == _naive(w, eps)[1]
            dense = 1 - _unit(w) @ _unit(w).T < eps
            assert found.components(eps) == scipy_components(dense, directed=False)[0]
        assert found.range(0.3, 3, seed=1) == unique_range(w, 0.3, 3, seed=1)


sets = st.builds(
    lambda k, dim, clusters, spread, copies, seed: torch.cat(
        [_clustered(k, dim, clusters, spread, seed), _random(1, dim, seed).repeat(copies, 1)]
    )[torch.randperm(k + copies, generator=torch.Generator().manual_seed(seed))],
    k=st.integers(1, 60),
    dim=st.integers(2, 12),
    clusters=st.integers(1, 12),
    spread=st.floats(0.01, 2.0),
    copies=st.integers(0, 40),
    seed=st.integers(0, 10_000),
)
sizes = st.tuples(st.integers(1, 20), st.integers(2, 60), st.integers(1, 40), st.integers(1, 6), st.integers(1, 9))


@given(w=sets, eps=st.sampled_from([0.001, 0.025, 0.1, 0.5, 1.3]), size=sizes, seed=st.integers(0, 1000))
def test_any_prototypes_in_any_blocks_give_the_naive_counts(w, eps, size, seed):
    crowd, sample, rows, cells, cell = size
    with _set((crowd, sample, min(rows, cells * cell), cells * cell, cell)):
        found = neighbors(w, (0.025, 0.5))
        assert found.unique(eps).assignment.tolist() == _naive(w, eps)[1]
        generator = torch.Generator().manual_seed(seed)
        counts = [len(_naive(w[torch.randperm(len(w), generator=generator)], eps)[0]) for _ in range(2)]
        assert found.range(eps, 2, seed) == (min(counts), max(counts))
        assert found.components(eps) == scipy_components(1 - _unit(w) @ _unit(w).T < eps, directed=False)[0]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("name", [name for name in ALL if len(ALL[name]) > 1])
def test_nearest_is_the_largest_cosine_to_another(name, values):
    cosine = _unit(ALL[name]) @ _unit(ALL[name]).T - 3 * np.eye(len(ALL[name]))
    with _set(values):
        np.testing.assert_allclose(neighbors(ALL[name]).nearest.numpy(), cosine.max(1), atol=1e-12)


def test_who_is_crowded_is_known_by_the_sample_and_their_pairs_are_not_kept():
    w = _half()
    with _set((8, 160, 64, 64, 8)):
        found = neighbors(w, (0.001, 0.3))
        near = (1 - _unit(w) @ _unit(w).T < 0.3).sum(1)
        assert int((found._reach < 0.3).sum()) == (near > 8).sum() == 80
        assert found._graph.nnz == 0  # the 80 copies are 3160 pairs within 0.3
    with _set(SHIPPED):
        assert neighbors(w, (0.001, 0.3))._graph.nnz == 80 * 79


def test_pairs_of_exact_copies_are_not_kept_though_their_distance_may_round_below_zero():
    w = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    w = torch.cat([w, torch.randn(30, 256, generator=torch.Generator().manual_seed(1)).repeat(40, 1)])
    assert neighbors(w).nearest.max() == 1 and (torch.nn.functional.normalize(w).square().sum(1) > 1).any()
    with _set((8, 1400, 64, 64, 16)):
        assert neighbors(w)._graph.nnz == 0


def test_pairs_kept_are_about_as_many_as_the_crowd_allows():
    w = _clustered(2000, 8, 40, 0.6)
    with _set((8, 500, 256, 512, 64)):
        found = neighbors(w)
        pairs_within = int((1 - _unit(w) @ _unit(w).T < 0.5).sum()) - 2000
        assert 0 < found._graph.nnz < 4 * 8 * 2000 < pairs_within / 5
        for eps in (0.025, 0.1, 0.5):
            _same(found.unique(eps), unique_prototypes(w, eps))
            assert found.components(eps) == connected_components(w, eps)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_the_inequality_is_strict(values):
    with _set(values):
        for eps in ((0.5, 1.0), (1.5,)):  # the loosest distance, or a pair that is kept and asked about at its own
            orthogonal = neighbors(torch.eye(3, dtype=torch.float64), eps)
            assert orthogonal.unique(1.0).count == orthogonal.components(1.0) == 3  # 1 - cos is exactly 1
            above = math.nextafter(1.0, 2.0)
            assert orthogonal.unique(above).count == orthogonal.components(above) == 1
        opposite = neighbors(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), (2.0,))
        assert opposite.unique(2.0).count == opposite.components(2.0) == 2
        triangle = neighbors(torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64), (0.4, 0.5))
        assert [u.count for u in triangle.curve([0.4, math.nextafter(0.4, 1.0), 0.5])] == [2, 1, 1]


@pytest.mark.parametrize("eps", [0.1, 0.025, 0.3])
def test_ties_are_decided_as_by_unique_prototypes(eps):
    """Cosines just around the threshold in float32, where 1 - cos < eps and cos > 1 - eps round differently."""
    for step in range(-10, 10):
        c = 1 - eps + step * 2.0**-24
        pair = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]])
        for values in (SHIPPED, (1, 2, 1, 1, 1)):
            with _set(values):
                found = neighbors(pair)
                counts = found.unique(eps).count, found.components(eps)
            assert counts == (unique_prototypes(pair, eps).count,) * 2, f"cosine {c:.9f}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_copies_are_found_in_every_precision_whose_cosine_may_round_beyond_one(dtype):
    w = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).repeat(5, 1).to(dtype)
    for crowd in (128, 3):
        with _set((crowd, 4096, 64, 64, 16)):
            found = neighbors(w, (1e-5, 0.5))
            assert found.unique(1e-5).count == found.components(1e-5) == 40 and found.range(1e-5, 2) == (40, 40)
            assert found.nearest.max() <= 1 and found.nearest.min() > 1 - 1e-6


def test_counting_is_not_rounded_by_autocast():
    w = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), _set((3, 300, 64, 64, 16)):
        found = neighbors(w)
        assert found.unique(0.2).count == unique_prototypes(w, 0.2).count
        assert found.components(0.2) == connected_components(w, 0.2)


def test_prototypes_that_ask_for_gradients_may_be_counted():
    assert neighbors(_random(5, 3).requires_grad_()).components(0.5) == connected_components(_random(5, 3), 0.5)


def test_one_prototype_has_no_neighbor():
    one = neighbors(_random(1, 4))
    assert one.nearest.isnan().tolist() == [True] and one.components(0.1) == one.unique(0.1).count == 1
    assert one.range(2.0) == (1, 1)


def test_the_curve_holds_both_papers_thresholds_and_any_others_by_request():
    assert {0.025, 0.1} <= set(collapse.CURVE) and list(collapse.CURVE) == sorted(collapse.CURVE)
    found = neighbors(_half(), [0.3, 0.1, 0.3])
    assert found.eps == (0.1, 0.3) and [u.eps for u in found.curve()] == [0.1, 0.3]
    assert [u.eps for u in found.curve((0.2, 0.05))] == [0.2, 0.05]


def test_progress_is_lines_of_text_and_silent_by_default(capsys, monkeypatch):
    neighbors(_random(50, 3)).curve()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(pairs, "_DELAY", 0)
    found = neighbors(_random(50, 3), progress=True)
    found.curve()
    found.range(0.1, 3)
    out, err = capsys.readouterr()
    assert "pairs compared" in out and "curve of M" in out and "orders at 0.1" in out and err == ""


@pytest.mark.parametrize("eps", [0.0, -0.1, 2.1, math.nan])
def test_an_impossible_distance_is_refused_before_and_after_the_pass(eps):
    with pytest.raises(ValueError, match="eps"):
        neighbors(_random(4, 3), (0.1, eps))
    found = neighbors(_random(4, 3))
    for ask in (found.unique, found.range, found.components, lambda e: found.curve([0.1, e])):
        with pytest.raises(ValueError, match="eps"):
            ask(eps)


def test_no_distance_and_no_order_are_refused():
    with pytest.raises(ValueError, match="eps is empty"):
        neighbors(_random(4, 3), ())
    with pytest.raises(ValueError, match="orders=0"):
        neighbors(_random(4, 3)).range(0.1, 0)


@pytest.mark.parametrize(
    "w", [torch.empty(0, 4), torch.zeros(1, 4), torch.tensor([[1.0, 0], [math.nan, 1]]), torch.tensor([[math.inf, 1]])]
)
def test_prototypes_without_direction_are_refused(w):
    with pytest.raises(ValueError, match="non-zero"):
        neighbors(w)


_LARGE = """
import json, sys, time
import torch
from memory import peak
from prototypes_lib.collapse import neighbors

kind, k, dim = sys.argv[1], 32768, 384
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
w = torch.randn(k, dim, generator=generator)
if kind == "961 with copies":
    w = w[torch.randint(961, (k,), generator=generator)] + 0.05 * w
if kind == "half one group":
    w[: k // 2] = w[0] + 0.2 * w[: k // 2]
    w = w[torch.randperm(k, generator=generator)]
start = time.process_time()  # whatever else the machine does
found = neighbors(w)
curve = {u.eps: u.count for u in found.curve()}
ranges = [found.range(eps, 10) for eps in (0.025, 0.1)]
components = [found.components(eps) for eps in (0.025, 0.1)]
seconds = time.process_time() - start
found = {"curve": curve, "ranges": ranges, "components": components, "seconds": seconds, "peak": peak() / 1e3}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "m"), [("all unique", 32768), ("961 with copies", 961), ("half one group", 16385)])
def test_everything_about_32768_prototypes_takes_a_minute_of_cpu_and_two_gigabytes(kind, m):
    found = json.loads(memory.run(_LARGE, kind).stdout)
    assert found["curve"]["0.1"] == found["components"][1] == m and found["ranges"][1] == [m, m], found
    low, high = found["ranges"][0]
    assert found["components"][0] <= low <= high and found["curve"]["0.025"] >= found["components"][0], found
    counts = list(found["curve"].values())
    assert counts[0] == 32768 and counts[-1] == m  # at 0.001 not even copies are near in 384 dimensions
    assert found["peak"] <= 2, found  # the whole process, torch included
    assert found["seconds"] <= 60, found
