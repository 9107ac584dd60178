"""The meters of collapse.py against naive references; `verdict` has a file of its own."""

import json
import math

import memory
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components as scipy_components

from prototypes_lib import collapse
from prototypes_lib.collapse import connected_components, marginal, unique_prototypes, unique_range, void_set


def _unit(w: torch.Tensor) -> np.ndarray:
    w = w.double().numpy()
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def _naive(w: torch.Tensor, eps: float) -> tuple[list[int], list[int]]:
    """The definition as a double loop in float64: representatives, and each prototype's part."""
    x = _unit(w)
    representatives, part = [], []
    for k in range(len(x)):
        for m, i in enumerate(representatives):
            if 1 - float(np.dot(x[i], x[k])) < eps:
                part.append(m)
                break
        else:
            part.append(len(representatives))
            representatives.append(k)
    return representatives, part


def _circle(degrees) -> torch.Tensor:
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def _random(k: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _clustered(k: int, dim: int, clusters: int, spread: float, seed: int = 0) -> torch.Tensor:
    """k prototypes around random unit centers, in random order; cosines to the center of about 1 - spread^2 / 2."""
    centers = torch.nn.functional.normalize(_random(clusters, dim, seed), dim=-1)
    label = torch.randint(clusters, (k,), generator=torch.Generator().manual_seed(seed + 1))
    return centers[label] + spread / math.sqrt(dim) * _random(k, dim, seed + 2)


CASES = {
    "random on the circle": _random(200, 2),
    "random in 16 dimensions": _random(150, 16),
    "tight clusters": _clustered(240, 16, 11, 0.02),
    "clusters near the threshold": _clustered(300, 16, 9, 0.16),
    "duplicates": _random(20, 8).repeat(9, 1),
    "all equal": torch.ones(50, 4, dtype=torch.float64),
    "one": _random(1, 5),
}


# --- unique_prototypes against the definition ---------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
@pytest.mark.parametrize("name", CASES)
def test_unique_prototypes_are_those_of_the_double_loop_whatever_the_block_size(name, block, monkeypatch):
    monkeypatch.setattr(collapse.unique, "_BLOCK", block)
    for eps in (0.001, 0.025, 0.1, 1.0):
        u = unique_prototypes(CASES[name], eps)
        representatives, part = _naive(CASES[name], eps)
        assert u.representatives.tolist() == representatives
        assert u.assignment.tolist() == part
        assert u.redundancy.tolist() == np.bincount(part).tolist()
        assert (u.count, u.eps, u.share) == (len(representatives), eps, len(representatives) / len(part))


def test_the_search_over_many_kept_representatives_crosses_its_own_blocks(monkeypatch):
    monkeypatch.setattr(collapse.unique, "_BLOCK", 4)  # kept representatives are searched 64 at a time
    w = torch.cat([_random(300, 32), 1.5 * _random(300, 32).flip(0)])
    u = unique_prototypes(w)
    assert u.count == 300 and u.assignment[300:].tolist() == list(range(299, -1, -1))


def test_tight_clusters_count_as_many_prototypes_as_there_are_clusters():
    w = CASES["tight clusters"]
    assert unique_prototypes(w).count == connected_components(w) == 11
    assert unique_range(w) == (11, 11)


def test_exact_duplicates_count_once_in_float32_too():
    w = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    u = unique_prototypes(w.repeat(5, 1), eps=1e-5)
    assert u.count == 40 and u.redundancy.tolist() == [5] * 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prototypes_are_compared_in_float32(dtype):
    w = _clustered(200, 32, 13, 0.02).to(dtype)
    assert unique_prototypes(w).assignment.tolist() == unique_prototypes(w.double()).assignment.tolist()


@pytest.mark.parametrize("block", [1, 1024])
def test_the_inequality_is_strict(block, monkeypatch):
    monkeypatch.setattr(collapse.unique, "_BLOCK", block)
    orthogonal = torch.eye(3, dtype=torch.float64)
    assert unique_prototypes(orthogonal, eps=1.0).count == 3  # 1 - cos is exactly 1
    assert unique_prototypes(orthogonal, eps=math.nextafter(1.0, 2.0)).count == 1
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert unique_prototypes(opposite, eps=2.0).count == 2
    triangle = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)  # 1 - 0.6 is exactly the double 0.4
    assert unique_prototypes(triangle, eps=0.4).count == 2
    assert unique_prototypes(triangle, eps=math.nextafter(0.4, 1.0)).count == 1


@pytest.mark.parametrize("eps", [0.1, 0.025, 0.3])
def test_ties_are_decided_alike_inside_a_block_and_between_blocks(eps, monkeypatch):
    """Cosines just around the threshold in float32, where 1 - cos < eps and cos > 1 - eps round differently."""
    for step in range(-10, 10):
        c = 1 - eps + step * 2.0**-24
        pair = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]])
        counts = []
        for block in (1, 1024):
            monkeypatch.setattr(collapse.unique, "_BLOCK", block)
            counts.append(unique_prototypes(pair, eps).count)
        assert counts[0] == counts[1], f"cosine {c:.9f}"


def test_a_prototype_joins_the_first_representative_in_reach_not_the_nearest():
    u = unique_prototypes(_circle([0, 20, 11]))  # 11 is nearer to 20 but in reach of both (12.8 degrees)
    assert u.assignment.tolist() == [0, 1, 0]


def test_a_member_reaches_its_representative_not_other_members():
    u = unique_prototypes(_circle([0, 10, 20]))  # 20 is near 10, but 10 represents nobody
    assert u.representatives.tolist() == [0, 2] and u.redundancy.tolist() == [2, 1]


def test_index_order_decides_who_represents():
    w = _circle([10, 0, 20])
    assert unique_prototypes(w).count == 1 and unique_prototypes(w[[1, 0, 2]]).count == 2


def test_a_prototypes_sign_matters_and_its_length_does_not():
    v = _random(1, 8)
    assert unique_prototypes(torch.cat([v, 1e-3 * v, 1e3 * v])).count == 1
    assert unique_prototypes(torch.cat([v, -v])).count == 2


# --- properties ---------------------------------------------------------------------------------------------------

sets = st.builds(
    lambda k, dim, clusters, spread, seed: _clustered(k, dim, clusters, spread, seed),
    k=st.integers(1, 60),
    dim=st.integers(2, 12),
    clusters=st.integers(1, 12),
    spread=st.floats(0.01, 2.0),
    seed=st.integers(0, 10_000),
)
distances = st.sampled_from([0.001, 0.025, 0.1, 0.5, 1.3])


@given(w=sets, eps=distances)
def test_parts_satisfy_the_definition(w, eps):
    u, x = unique_prototypes(w, eps), _unit(w)
    v = x[u.representatives.numpy()]
    assert 1 <= u.count <= len(w) and u.count == len(u.representatives) == len(u.redundancy)
    assert int(u.redundancy.sum()) == len(w) and int(u.redundancy.min()) >= 1
    members = 1 - (x * v[u.assignment.numpy()]).sum(1)
    assert (members < eps + 1e-12).all()  # each within eps of its representative
    apart = 1 - v @ v.T + 3 * np.eye(u.count)
    assert (apart >= eps - 1e-12).all()  # no two representatives within eps
    assert u.assignment[u.representatives].tolist() == list(range(u.count))  # a representative is in its own part
    assert u.representatives.tolist() == sorted(u.representatives.tolist())


@given(w=sets, eps=distances, seed=st.integers(0, 1000))
def test_lengths_do_not_change_the_parts(w, eps, seed):
    powers = torch.randint(-20, 20, (len(w), 1), generator=torch.Generator().manual_seed(seed))
    scaled = unique_prototypes(w * 2.0**powers, eps)  # powers of two: the directions stay the same to the bit
    assert scaled.assignment.tolist() == unique_prototypes(w, eps).assignment.tolist()


@given(w=sets, eps=distances)
def test_components_are_those_of_the_dense_graph_and_at_most_m(w, eps):
    x = _unit(w)
    dense = scipy_components(1 - x @ x.T < eps, directed=False)[0]
    assert connected_components(w, eps) == dense <= unique_prototypes(w, eps).count


@given(w=sets, eps=distances, seed=st.integers(0, 100))
def test_components_ignore_the_order(w, eps, seed):
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    assert connected_components(w[order], eps) == connected_components(w, eps)


# --- order and components -----------------------------------------------------------------------------------------


def test_the_range_over_orders_holds_the_counts_of_its_orders_and_is_reproducible():
    w = CASES["clusters near the threshold"]
    low, high = unique_range(w, orders=20, seed=3)
    generator = torch.Generator().manual_seed(3)
    counts = [len(_naive(w[torch.randperm(len(w), generator=generator)], 0.025)[0]) for _ in range(20)]
    assert (low, high) == (min(counts), max(counts)) == unique_range(w, orders=20, seed=3)
    assert low < high  # near the threshold the order matters
    assert connected_components(w) < low


def test_more_orders_widen_the_range():
    w = CASES["clusters near the threshold"]
    (low, high), (lower, higher) = unique_range(w, orders=3, seed=0), unique_range(w, orders=12, seed=0)
    assert lower <= low <= high <= higher


def test_a_chain_of_near_copies_is_one_component_and_several_unique_prototypes():
    chain = _circle(torch.arange(0, 60, 6.0))
    assert connected_components(chain) == 1
    assert unique_prototypes(chain).count == 4  # representatives 18 degrees apart: 0, 18, 36, 54
    low, high = unique_range(chain, orders=50)
    assert low < high == 4  # the luckiest orders start inside the chain


@pytest.mark.parametrize("block", [1, 16, 1024])
@pytest.mark.parametrize("name", CASES)
def test_components_do_not_depend_on_the_block_size(name, block, monkeypatch):
    x = _unit(CASES[name])
    dense = scipy_components(1 - x @ x.T < 0.025, directed=False)[0]
    monkeypatch.setattr(collapse.unique, "_BLOCK", block)
    assert connected_components(CASES[name]) == dense


# --- marginal -----------------------------------------------------------------------------------------------------


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def test_the_marginal_is_the_mean_softmax_over_all_and_over_the_unique_prototypes():
    w, y = CASES["clusters near the threshold"], _random(90, 16, seed=5)
    scores = y @ w.T
    u = unique_prototypes(w)
    m = marginal(scores, u)
    p = _softmax(scores.numpy()).mean(0)
    alone = _softmax(scores.numpy()[:, u.representatives.numpy()]).mean(0)
    by_part = np.array([p[u.assignment.numpy() == i].sum() for i in range(u.count)])
    np.testing.assert_allclose(m.p.numpy(), p, rtol=1e-12)
    np.testing.assert_allclose(m.unique_p.numpy(), alone, rtol=1e-12)
    np.testing.assert_allclose(m.by_part.numpy(), by_part, rtol=1e-12)
    assert m.entropy == pytest.approx(_entropy(p), rel=1e-12)
    assert m.unique_entropy == pytest.approx(_entropy(alone), rel=1e-12)
    assert m.perplexity == pytest.approx(math.exp(_entropy(p)), rel=1e-12)


def test_without_unique_prototypes_only_the_marginal_over_all_is_given():
    m = marginal(_random(10, 6))
    assert m.unique_p is None and m.unique_entropy is None and m.by_part is None
    assert m.p.shape == (6,) and float(m.p.sum()) == pytest.approx(1)


def test_copies_make_an_uneven_marginal_look_uniform():
    """The shortcut (PPC, section 4): three of four samples on one direction, with three copies of its prototype."""
    e = torch.eye(2, dtype=torch.float64)
    w, y = 200 * e[[0, 0, 0, 1]], e[[0, 0, 0, 1]]
    m = marginal(y @ w.T, unique_prototypes(w))
    assert m.entropy == pytest.approx(math.log(4)) and m.perplexity == pytest.approx(4)
    assert m.unique_p.tolist() == pytest.approx([0.75, 0.25]) and m.by_part.tolist() == pytest.approx([0.75, 0.25])
    assert m.unique_entropy == pytest.approx(_entropy(np.array([0.75, 0.25])))


def test_removing_copies_is_not_summing_them():
    """Of two prototypes in reach, copies raise a direction's share: by_part keeps that, unique_p does not."""
    e = torch.eye(2, dtype=torch.float64)
    m = marginal(torch.zeros(1, 4, dtype=torch.float64), unique_prototypes(e[[0, 0, 0, 1]]))
    assert m.by_part.tolist() == pytest.approx([0.75, 0.25]) and m.unique_p.tolist() == pytest.approx([0.5, 0.5])


def test_the_marginal_is_finite_where_the_exponential_is_not():
    m = marginal(torch.tensor([[1e4, -1e4, 0.0]]).half())
    assert m.p.tolist() == [1, 0, 0] and m.entropy == 0 and m.perplexity == 1


# --- void set -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_void_set_is_what_points_away_from_the_mean_code(dtype):
    codes = torch.nn.functional.normalize(_random(200, 8) + 2, dim=-1).float()
    mean = torch.nn.functional.normalize(codes.mean(0, keepdim=True), dim=-1)
    away = -mean * torch.tensor([[0.1], [1.0], [30.0]])
    used = codes[:5]
    sideways = torch.nn.functional.normalize(away[:1], dim=-1) + 0.4 * torch.eye(8)[:1]
    v = void_set(torch.cat([used, away, sideways]).to(dtype), codes)
    assert v.count == 3 and v.mask.tolist() == [False] * 5 + [True] * 3 + [False]
    assert v.cosine[5:8].tolist() == pytest.approx([-1] * 3, abs=1e-6)
    expected = _unit(torch.cat([used, away, sideways])) @ _unit(mean)[0]
    np.testing.assert_allclose(v.cosine.numpy(), expected, atol=1e-6)
    assert void_set(torch.cat([used, away, sideways]).to(dtype), codes, eps=2.1).count == 9


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, -0.1, 2.1, math.nan])
@pytest.mark.parametrize("meter", [unique_prototypes, unique_range, connected_components])
def test_an_impossible_distance_is_refused(meter, eps):
    with pytest.raises(ValueError, match="eps"):
        meter(_random(4, 3), eps)


@pytest.mark.parametrize("meter", [unique_prototypes, connected_components])
@pytest.mark.parametrize(
    "w", [torch.empty(0, 4), torch.zeros(1, 4), torch.tensor([[1.0, 0], [math.nan, 1]]), torch.tensor([[math.inf, 1]])]
)
def test_prototypes_without_direction_are_refused(meter, w):
    with pytest.raises(ValueError, match="non-zero"):
        meter(w)


def test_a_range_over_no_order_is_refused():
    with pytest.raises(ValueError, match="orders=0"):
        unique_range(_random(4, 3), orders=0)


def test_scores_and_unique_prototypes_of_different_k_are_refused():
    with pytest.raises(ValueError, match="7 scores a sample, but 5 prototypes"):
        marginal(_random(3, 7), unique_prototypes(_random(5, 2)))


def test_codes_that_average_to_zero_have_no_void_set():
    with pytest.raises(ValueError, match="average to zero"):
        void_set(_random(4, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


# --- size ---------------------------------------------------------------------------------------------------------

_LARGE = """
import json, sys, time
import torch
from memory import peak
from prototypes_lib.collapse import connected_components, unique_prototypes

kind, k, dim = sys.argv[1], 65536, 256
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
w = torch.randn(k, dim, generator=generator)  # all unique: the dearest case
if kind == "collapsed":
    w = w[torch.randint(1000, (k,), generator=generator)] + 0.03 * w
start = time.process_time()  # whatever else the machine does
u = unique_prototypes(w)
seconds = time.process_time() - start
components = connected_components(w) if kind == "collapsed" else None
print(json.dumps({"m": u.count, "total": int(u.redundancy.sum()), "components": components, "seconds": seconds,
                  "peak_gb": peak() / 1e3}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "m"), [("all unique", 65536), ("collapsed", 1000)])
def test_65536_prototypes_of_256_dimensions_fit_in_a_minute_and_two_gigabytes(kind, m):
    found = json.loads(memory.run(_LARGE, kind).stdout)
    assert found["m"] == m and found["total"] == 65536 and found["components"] in (None, m)
    assert found["peak_gb"] <= 2, found  # the whole process, torch included
    assert found["seconds"] <= 120, found  # of two threads together


def test_counting_is_not_rounded_by_autocast():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(300, 16, generator=g)
    alone = unique_prototypes(w, 0.2).count, connected_components(w, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (unique_prototypes(w, 0.2).count, connected_components(w, 0.2)) == alone
    assert unique_prototypes(1e-13 * torch.ones(10, 8)).count == 1
