"""Sums, log-sums, maxima and rows over processes equal those of one process with all rows, gradients too.

In float64 to 1e-12, with 2 and 4 processes, rows shared out unevenly and one process without any.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import together
from scipy.special import logsumexp

from prototypes_lib import ranks

EXACT = {"rtol": 0.0, "atol": 1e-12}
WORLDS = (2, 4)
SIZES = {2: (3, 0), 4: (2, 0, 5, 1)}  # rows of each rank


def data(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all ranks, and a weight for each of the losses that ranks make of them."""
    g = torch.Generator().manual_seed(world)
    n = sum(SIZES[world])
    return torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randn(world, n, 3, generator=g).double()


def mine(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.split(SIZES[dist.get_world_size()])[rank]


def summed(rank, x, weights):
    x = mine(x, rank).clone().requires_grad_()
    value = ranks.total((x**2).sum(0))
    (weights[rank, 0] * value.sin()).sum().backward()  # a loss of this rank's own
    return value.detach(), x.grad


@pytest.mark.parametrize("world", WORLDS)
def test_a_total_and_its_gradient_are_those_of_one_process(world):
    x, weights = data(world)
    found = together(world, summed, x, weights)
    whole = x.clone().requires_grad_()
    value = (whole**2).sum(0)
    (weights[:, 0] * value.sin()).sum().backward()  # the sum of the ranks' losses
    for total, _ in found:
        torch.testing.assert_close(total, value.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([grad for _, grad in found]), whole.grad, **EXACT)


def gathered(rank, x, weights):
    x = mine(x, rank).clone().requires_grad_()
    all_rows = ranks.rows(x.exp())
    (weights[rank] * all_rows**2).sum().backward()
    return all_rows.detach(), x.grad, ranks.count(len(x))


@pytest.mark.parametrize("world", WORLDS)
def test_uneven_rows_come_back_in_order_with_the_gradients_of_every_rank(world):
    x, weights = data(world)
    found = together(world, gathered, x, weights)
    whole = x.clone().requires_grad_()
    (weights * whole.exp() ** 2).sum().backward()
    for rows, _, n in found:
        assert torch.equal(rows, x.exp()) and n == len(x)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in found]), whole.grad, **EXACT)


def gathered_kinds(rank):
    n = rank + 1
    strided = torch.arange(6.0 * n).view(3, 2 * n).T[::2] + 100 * rank
    empty = ranks.rows(torch.zeros(0, 2, requires_grad=True))
    return (
        ranks.rows(torch.full((n,), rank)),
        ranks.rows(torch.full((n, 2), rank == 0)),
        ranks.rows(strided),
        tuple(empty.shape),
        ranks.count(0),
    )


def test_rows_are_of_any_type_layout_and_number():
    for numbers, flags, strided, empty, none in together(2, gathered_kinds):
        assert numbers.tolist() == [0, 1, 1]
        assert flags.tolist() == [[True, True], [False, False], [False, False]]
        assert strided.tolist() == [[0, 2, 4], [100, 104, 108], [102, 106, 110]]
        assert empty == (0, 2) and none == 0


def log_summed(rank, x):
    return ranks.log_total(x[rank]), ranks.largest(x[rank])


@pytest.mark.parametrize("world", WORLDS)
def test_log_totals_hold_for_any_magnitude_and_where_all_are_empty(world):
    g = torch.Generator().manual_seed(0)
    x = 300 * torch.randn(world, 50, generator=g, dtype=torch.float64)
    x[:, 1:4] += torch.tensor([1e6, -1e6, 1e300])
    x[0, 5:8] = -math.inf  # on one rank
    x[:, 8] = -math.inf  # on all
    x[0, 9] = math.inf
    with np.errstate(divide="ignore"):
        wanted = torch.from_numpy(logsumexp(x.numpy(), axis=0))
    for found, largest in together(world, log_summed, x):
        torch.testing.assert_close(found, wanted, rtol=1e-15, atol=1e-12)
        assert torch.equal(largest, x.max(0).values)
    assert wanted[8] == -math.inf and wanted[9] == math.inf


def spoiled(rank):
    x = torch.tensor([1.0, math.nan if rank == 1 else 2.0])
    return ranks.log_total(x).tolist(), ranks.total(x).tolist()


def test_a_nan_of_one_rank_reaches_all():
    for found in together(2, spoiled):
        assert all(math.isfinite(value) and math.isnan(bad) for value, bad in found)


def by_itself(rank, x):
    """Every function inside `alone`, and the two that name the place outside and inside."""
    with ranks.alone():
        inside = ranks.world(), ranks.rank(), ranks.total(x), ranks.rows(x), ranks.log_total(x), ranks.count(3)
    return inside, (ranks.world(), ranks.rank())


@pytest.mark.parametrize("world", [1, 2])
def test_inside_alone_a_rank_is_by_itself(world):
    x = torch.randn(3, 2)
    for rank, (inside, outside) in enumerate(together(world, by_itself, x)):
        assert inside[:2] == (1, 0) and inside[-1] == 3 and outside == (world, rank)
        assert all(torch.equal(value, x) for value in inside[2:-1])


def test_without_a_group_every_function_is_the_identity():
    x = torch.randn(4, 3, requires_grad=True)
    assert ranks.world() == 1 and ranks.rank() == 0 and ranks.count(4) == 4
    assert all(f(x) is x for f in (ranks.total, ranks.rows, ranks.log_total, ranks.largest))


def second(rank, x):
    x = mine(x, rank).clone().requires_grad_()
    (first,) = torch.autograd.grad((ranks.total((x**3).sum()) ** 2), x, create_graph=True)
    (first**2).sum().backward()
    return x.grad


def test_a_total_can_be_differentiated_twice():
    x, _ = data(2)
    found = torch.cat(together(2, second, x))
    whole = x.clone().requires_grad_()
    # each of the two ranks has the square as its loss
    (first,) = torch.autograd.grad(2 * (whole**3).sum() ** 2, whole, create_graph=True)
    (first**2).sum().backward()
    torch.testing.assert_close(found, whole.grad, rtol=1e-12, atol=1e-12)
