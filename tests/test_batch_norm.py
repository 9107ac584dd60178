import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from prototypes_lib.batch_norm import BatchNorm1d, BatchNorm2d, Unremembered, over_ranks
from prototypes_lib.heads import Projector


def rows(n, dim=5):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 2


def network(momentum=0.1):
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.Unflatten(1, (1, 2, 2))
    layers += nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2), nn.BatchNorm1d(2, affine=False)
    return nn.Sequential(*layers).double()


def test_swapping_keeps_the_very_weights_and_names_and_other_modules():
    plain = network()
    ours = over_ranks(copy.deepcopy(plain))
    assert [type(ours[i]) for i in (1, 5, 8)] == [BatchNorm1d, BatchNorm2d, BatchNorm1d]
    assert isinstance(ours[1], nn.BatchNorm1d) and type(ours[0]) is nn.Linear
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))
    assert over_ranks(ours) is ours and type(ours[1]) is BatchNorm1d


@pytest.mark.parametrize("momentum", [0.1, None])
def test_alone_it_is_torchs_to_the_bit(momentum):
    plain = network(momentum)
    ours = over_ranks(copy.deepcopy(plain))
    for n in (6, 9):
        for net in (plain, ours):
            net.zero_grad()
            net(rows(n)).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert torch.equal(plain.eval()(rows(3)), ours.eval()(rows(3)))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers(), strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_its_own_sums_are_torchs_formula(momentum, monkeypatch):
    monkeypatch.setattr("prototypes_lib.ranks.world", lambda: 2)  # of which the other has no rows
    monkeypatch.setattr("prototypes_lib.ranks.total", lambda x: x)
    plain = network(momentum)
    ours = over_ranks(copy.deepcopy(plain))
    for n in (6, 9):
        found = []
        for net in (plain, ours):
            net.zero_grad()
            out = net(rows(n))
            out.square().sum().backward()
            found.append([out, *[p.grad for p in net.parameters()], *net.buffers()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_under_autocast_it_sums_in_float32(monkeypatch):
    monkeypatch.setattr("prototypes_lib.ranks.world", lambda: 2)
    monkeypatch.setattr("prototypes_lib.ranks.total", lambda x: x)
    norm, x = BatchNorm1d(3), torch.randn(4096, 3).bfloat16() + 5
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean(0), rtol=1e-5, atol=1e-6)


def test_a_single_row_gives_the_bias_and_no_row_nothing_and_neither_is_remembered():
    """One masked patch with a head of its own, which torch refuses; without any, torch counts a batch."""
    norm = BatchNorm1d(5).double()
    norm(rows(8))
    nn.init.normal_(norm.bias)
    before = copy.deepcopy(norm.state_dict())
    for n in (1, 0):
        x = rows(n).requires_grad_()
        out = norm(x)
        assert torch.equal(out, norm.bias.expand(n, -1))
        out.sum().backward()
        assert not x.grad.any()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), norm.state_dict().values(), strict=True))
    code = Projector(5, 8, 4, batch_norm=True)(torch.randn(1, 5))
    assert torch.isfinite(code).all()


def test_what_is_computed_again_is_not_remembered_again():
    net = over_ranks(network())
    before = copy.deepcopy(net.state_dict())
    again = Unremembered(net)
    for _ in range(2):
        with again:
            net(rows(6))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    net(rows(6))
    assert not torch.equal(before["1.running_mean"], net[1].running_mean)


def on_a_rank(rank, folder, counts):
    """This rank's rows through the network, and what is left of it: output, gradients over ranks, buffers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=30), rank=rank, world_size=len(counts[0])
    )
    found = {}
    for i, sizes in enumerate(counts):
        start = sum(sizes[:rank])
        found[i] = left_by(rows(sum(sizes))[start : start + sizes[rank]])
        for gradient in found[i]["gradients"]:
            dist.all_reduce(gradient)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def left_by(x):
    """Two calls of a fresh network on x, a sum differentiated: all that comes of it."""
    net, x = over_ranks(network()), x.clone().requires_grad_()
    outs = [net(x), net(x)]
    sum(out.sin().sum() for out in outs).backward()
    gradients = [p.grad for p in net.parameters()]
    return {"rows": [outs[1].detach(), x.grad], "gradients": gradients, "buffers": list(net.buffers())}


@pytest.mark.slow
def test_two_processes_equal_one_also_with_uneven_rows_and_none(tmp_path):
    counts = [(4, 4), (7, 2), (0, 6), (1, 0)]
    mp.spawn(on_a_rank, (tmp_path, counts), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for i, sizes in enumerate(counts):
        whole = left_by(rows(sum(sizes)))
        for place, expected in enumerate(whole["rows"]):
            close(torch.cat([found[i]["rows"][place] for found in ranks]), expected)
        for found in ranks:
            close(found[i]["gradients"], whole["gradients"])
            close(found[i]["buffers"], whole["buffers"])
