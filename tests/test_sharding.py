"""A learner spread over processes by FSDP2 steps like one that is not, and its checkpoints are the same files."""

import pytest
import torch
from gloo import together
from test_learner import batch, make, small

from prototypes_lib import checkpoints, distributed, ranks
from prototypes_lib.backbones import Backbone
from prototypes_lib.distributed import sharding
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Learner, Network
from prototypes_lib.optimizers import clip_gradients, make_optimizer
from prototypes_lib.settings import Run

pytestmark = pytest.mark.slow  # a second each

N = 8


def start(name: str, shard: bool, seed: int = 0):
    learner = make(small(name), seed).double()
    model = distributed.wrap(learner, shard)
    return learner, model, make_optimizer(learner.student, Run.small(clip_grad=0.3, clip="module"))


def go_on(learner, model, optimizer, first: int, last: int) -> list[float]:
    method, world, losses = learner.method, ranks.world(), []
    for step in range(first, last):
        views, masks = batch(method, N, seed=step)
        rows = torch.arange(N).view(world, -1)[ranks.rank()]
        if masks is not None and masks.ndim == 3:
            masks = masks.unflatten(0, (-1, N))[:, rows].flatten(0, 1)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3, 0.04
        optimizer.zero_grad()
        out = model([v[rows].double() for v in views], masks, 0.04)
        out.loss.backward()
        clip_gradients(learner.student, Run.small(clip_grad=0.3, clip="module"))
        optimizer.step()
        learner.update_teacher(0.9)
        losses.append(float(ranks.total(out.loss.detach())) / world)
    return losses


def stepped(rank, name, shard):
    learner, model, optimizer = start(name, shard, seed=rank)  # the wrapper gives all rank 0's weights
    losses = go_on(learner, model, optimizer, 0, 3)
    spread = {type(p).__name__ for p in learner.parameters()}
    w = learner.teacher.prototypes and sharding.whole(learner.teacher.prototypes.w)
    return losses, {k: sharding.whole(v) for k, v in learner.state_dict().items()}, spread, w


@pytest.mark.parametrize("name", ["dino-vmf", "ibot", "swav", "simdino"])
def test_steps_of_a_spread_learner_are_those_of_a_copied_one(name):
    (copied, *_), spread = together(2, stepped, name, False), together(2, stepped, name, True)
    for losses, state, kinds, w in spread:
        assert kinds == {"DTensor"}
        torch.testing.assert_close(losses, copied[0], rtol=0.0, atol=1e-12)
        torch.testing.assert_close(state, copied[1], rtol=0.0, atol=1e-12)
        torch.testing.assert_close(w, copied[3], rtol=0.0, atol=1e-12)


def saved(rank, name, shard, folder):
    """Three steps, a checkpoint, two more."""
    learner, model, optimizer = start(name, shard)
    go_on(learner, model, optimizer, 0, 3)
    model_, optimizer_ = sharding.to_save(learner, optimizer)
    if rank == 0:
        checkpoints.save(folder, model_, optimizer_, {"step": 3})
    distributed.barrier()
    return go_on(learner, model, optimizer, 3, 5)


def loaded(rank, name, shard, folder):
    learner, model, optimizer = start(name, shard, seed=7)
    assert checkpoints.load(folder, 3, *sharding.to_load(learner, optimizer)) == {"step": 3}
    return go_on(learner, model, optimizer, 3, 5)


@pytest.mark.parametrize("name", ["dino-vmf", "simdino"])
def test_a_checkpoint_is_the_same_spread_or_not_and_any_number_of_processes_goes_on_from_it(name, tmp_path):
    spread, copied = tmp_path / "spread", tmp_path / "copied"
    wanted = together(2, saved, name, True, spread)[0]
    together(2, saved, name, False, copied)
    one, other = (sorted(p.name for p in (f / "checkpoints/step-00000003").iterdir()) for f in (spread, copied))
    assert one == other
    size = [(f / "checkpoints/step-00000003/model.safetensors").stat().st_size for f in (spread, copied)]
    assert size[0] == size[1]
    for folder, world, shard in ((spread, 1, False), (spread, 4, True), (copied, 2, True)):
        for losses in together(world, loaded, name, shard, folder):
            torch.testing.assert_close(losses, wanted, rtol=0.0, atol=1e-10)


def resnet(rank, shard):
    method = small("dino")
    torch.manual_seed(0)
    backbone = Backbone("resnet_pico", 32)
    learner = Learner(method, Network(backbone, Projector(128, 32, 8), Prototypes(24, 8, False))).double()
    model = distributed.wrap(learner, shard)
    return go_on(learner, model, make_optimizer(learner.student, Run.small()), 0, 2)


def test_a_resnet_with_batch_norm_over_ranks_is_spread_too():
    torch.testing.assert_close(together(2, resnet, True), together(2, resnet, False), rtol=0.0, atol=1e-12)


def accumulated(rank, shard):
    """Gradients of two parts."""
    learner, model, _ = start("dino", shard)
    for part in range(2):
        views, _ = batch(learner.method, 4, seed=10 * part + rank)
        with distributed.part(model, last=part == 1):
            model([v.double() for v in views], None, 0.04).loss.backward()
    return {k: sharding.whole(p.grad) for k, p in learner.student.named_parameters() if p.requires_grad}


def test_accumulated_gradients_are_the_same_spread_or_not():
    torch.testing.assert_close(
        together(2, accumulated, True)[0], together(2, accumulated, False)[0], rtol=0.0, atol=1e-12
    )
