"""The number of processes changes nothing: every method's losses, gradients and memories, to 1e-10 in float64.

Three steps with moving centers, a full queue, BatchNorm and stochastic depth over ranks, uneven masks and a rank
without any masked patch. And runs that change their number of processes on the way.
"""

import dataclasses
from functools import cache

import pytest
import torch
from gloo import together

from prototypes_lib import checkpoints, distributed, ranks, stochastic_depth
from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Learner, Network
from prototypes_lib.methods import METHODS, Patch, Queue, Sinkhorn, Views
from prototypes_lib.train import Run, train

N, STEPS = 8, 3
# the recipes, and what none of them has: memories under both ways of grouping views, one target with a queue
VARIANTS = {name: {} for name in METHODS} | {
    "swav": {"queue": Queue(5)},
    "dino with a queue": {"base": "dino", "queue": Queue(7), "targets": (Sinkhorn,)},
    "swav with masked patches": {"base": "swav", "queue": None, "patch": Patch(shape="rand")},
}


def compose(name: str):
    changes = dict(VARIANTS[name])
    method = METHODS[changes.pop("base", name)]
    views = dataclasses.replace(method.views, n_global=2, n_local=2)
    return method.but(**({"n_prototypes": 12 if method.n_prototypes else 0, "views": views} | changes))


def learner_of(method) -> Learner:
    torch.manual_seed(0)
    backbone = Backbone("vit_pico_patch8", 32, depth=1, drop_path_rate=0.3)
    share = method.patch.head if method.patch else "shared"
    prototypes = lambda: Prototypes(12, 6, method.free_norms, plain=method.renormalize) if method.n_prototypes else None
    projector = lambda: Projector(backbone.dim, 16, 6, batch_norm=True)
    network = Network(
        backbone, projector(), prototypes(),
        projector() if share == "own" else None, prototypes() if share != "shared" else None,
    )  # fmt: skip
    return Learner(method, network).double()


def batch_of(method, step: int):
    g = torch.Generator().manual_seed(step)
    sizes = [32] * method.views.n_global + [16] * method.views.n_local
    views = [torch.randn(N, 3, s, s, generator=g, dtype=torch.float64) for s in sizes]
    if method.mask_student:
        return views, torch.rand(4, 4, generator=g) < 0.4
    masks = torch.rand(method.views.n_global, N, 4, 4, generator=g) < 0.4
    masks[:, :2] = False  # of four ranks, the first has no masked patch at all
    return views, masks if method.patch else None


def trained(rank: int, name: str):
    """Losses and parts of the steps, the last gradients, and every weight and memory at the end."""
    method, world = compose(name), ranks.world()
    learner = learner_of(method)
    model = distributed.wrap(learner)
    own = slice(rank * N // world, (rank + 1) * N // world)
    told = []
    for step in range(STEPS):
        views, masks = batch_of(method, step)
        if masks is not None and masks.ndim == 4:
            masks = masks[:, own].flatten(0, 1)
        learner.zero_grad()
        with stochastic_depth.at(step, N):
            out = model([view[own] for view in views], masks, 0.05, progress=0.5)
        out.loss.backward()
        means = {k: ranks.total(v.detach().double()) / world for k, v in ({"loss": out.loss} | out.parts).items()}
        told.append(means | out.meters)
        with torch.no_grad():
            for parameter in learner.student.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
        learner.update_teacher(0.9)
    grads = {n: p.grad for n, p in learner.student.named_parameters() if p.grad is not None}
    return told, grads, learner.state_dict()


@cache
def everything(world: int, names: tuple[str, ...] = tuple(VARIANTS)):
    """Of each method, what every rank has found."""
    if world == 1:
        return {name: [trained(0, name)] for name in names}
    by_rank = together(world, all_of_them, names, timeout=300)
    return {name: [results[name] for results in by_rank] for name in names}


def all_of_them(rank: int, names: tuple[str, ...]):
    return {name: trained(rank, name) for name in names}


def largest_difference(a, b) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


def same_as_one_process(name: str, world: int, names: tuple[str, ...]) -> None:
    ((told, grads, state),) = everything(1, names)[name]
    assert all(bool(row["loss"].isfinite()) for row in told) and grads
    for others_told, others_grads, others_state in everything(world, names)[name]:
        for row, other in zip(told, others_told, strict=True):
            assert largest_difference(row, other) <= 1e-10
        assert largest_difference(grads, others_grads) <= 1e-10
        assert largest_difference(state, others_state) <= 1e-10


FEW = ("ibot", "ibot-vmf", "dinov2", "swav", "pmsn")  # each way of making targets, without and with a memory


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_losses_gradients_and_memories_of_two_processes_are_those_of_one(name):
    same_as_one_process(name, 2, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_gradients_and_memories_are_those_of_one_process(name, world):
    same_as_one_process(name, world, tuple(VARIANTS))


@pytest.mark.slow
def test_a_run_may_change_its_number_of_processes_at_every_stop(tmp_path):
    method = METHODS["dinov2"].but(n_prototypes=16, views=Views(2, 1))
    run = Run.small(
        limit=64, batch_size=16, epochs=2.0, warmup_epochs=0.5, hidden=16, bottleneck=8, monitor_steps=1, drop_path=0.2,
        accumulate=2, out=tmp_path / "one", progress=False,
    )  # fmt: skip
    alone = train(method, run, "x")
    run = run.but(out=tmp_path / "many")
    for world, stop in ((1, 2), (2, 4), (4, 6)):
        train(method, run, "x", stop_after=stop, ranks=world)
    many = train(method, run, "x")
    assert [row["step"] for row in many.metrics] == [row["step"] for row in alone.metrics] == list(range(1, 9))
    for row, other in zip(alone.metrics, many.metrics, strict=True):
        assert abs(row["loss"] - other["loss"]) <= 1e-5 * abs(row["loss"])
    w, other = (checkpoints.load_prototypes(result.folder) for result in (alone, many))
    assert float((w - other).abs().max()) < 1e-4
