"""One step of a run: what is drawn for it, and in which order things move."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gloo import together
from test_train import method, run, trainer


def test_views_change_with_the_step_and_the_order_of_images_with_epoch_and_seed(tmp_path):
    settings = run(tmp_path)
    made, other = trainer(settings).batches, trainer(settings.but(seed=5)).batches
    same = copy.copy(made)
    same.resident = made.resident[:1].expand_as(made.resident)
    assert not torch.equal(same.batch(0)[0][0], same.batch(1)[0][0])
    first, second, another = (
        torch.cat([of.resident[of.rows(step)] for step in range(start, start + 6)]).flatten(1)
        for of, start in ((made, 0), (made, 6), (other, 0))
    )
    for epoch in (first, second, another):
        assert torch.equal(epoch.unique(dim=0), made.resident.flatten(1).unique(dim=0)), "every image once"
    assert not torch.equal(first, second) and not torch.equal(first, another)


@pytest.mark.slow
def test_masks_are_drawn_as_the_method_says(tmp_path):
    ibot = method("ibot")

    def hidden(**patch):
        made = trainer(run(tmp_path), ibot.but(patch=replace(ibot.patch, **patch)))
        return torch.stack([made.batches.batch(step)[1].sum((1, 2)) for step in range(4)])  # 32 crops of 16 patches

    all_of_them = hidden(probability=1.0, ratio=(0.3, 0.5), shape="rand")
    assert int(all_of_them.min()) == 4 and int(all_of_them.max()) <= 8
    assert ((hidden(stratified=True, shape="rand", ratio=(0.3, 0.5)) > 0).sum(1) == 16).all()
    assert not torch.equal(hidden(min_area=1), hidden(min_area=4))


def test_a_step_moves_the_student_and_then_the_teacher_towards_it(tmp_path):
    made = trainer(run(tmp_path, lr=0.1, warmup_epochs=0.0, freeze_last_layer=0.0), method().but(ema=0.5))
    before = copy.deepcopy(made.learner.teacher)
    made.step(0)
    pairs = list(
        zip(made.learner.teacher.parameters(), before.parameters(), made.learner.student.parameters(), strict=True)
    )
    assert any(not torch.equal(old, student) for _, old, student in pairs)
    assert all(torch.allclose(new, 0.5 * (old + student), atol=1e-6) for new, old, student in pairs)


def test_a_step_clips_gradients_and_gives_every_group_its_share_of_rate_and_decay(tmp_path):
    factors = {"prototype_lr_factor": 3.0, "prototype_weight_decay": 0.5, "layer_decay": 0.5}
    made = trainer(run(tmp_path, clip="global", clip_grad=1e-3, warmup_epochs=0.0, freeze_last_layer=0.0, **factors))
    made.step(2)
    gradients = [p.grad for p in made.learner.student.parameters() if p.grad is not None]
    assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(1e-3, rel=1e-2)
    groups = made.optimizer.param_groups
    assert {group["lr_factor"] for group in groups} > {1.0, 3.0} and {g["decays"] for g in groups} == {0.0, 0.5, 1.0}
    for group in groups:
        assert group["lr"] == made.lr[2] * group["lr_factor"]
        assert group["weight_decay"] == made.weight_decay[2] * group["decays"]


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    """Where nothing looks at the batch: no centers, no BatchNorm."""
    found = []
    for parts in (1, 2, 4):
        made = trainer(run(tmp_path, accumulate=parts, drop_path=0.0, clip_grad=0.0), method("dino").but(targets=()))
        made.step(0)
        found.append([p.grad.clone() for p in made.learner.student.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found[0], other, strict=True))


def test_stochastic_depth_is_drawn_for_each_step_and_only_for_it(tmp_path):
    found = {}
    for rate in (0.0, 0.5):
        made = trainer(run(tmp_path / str(rate), drop_path=rate), method("dino").but(targets=()))
        made.temperature = [0.04] * len(made.temperature)  # nothing else differs between steps
        views, masks = made.batches.batch(0)
        found[rate] = [made.forward(views, masks, step, epoch=0).loss.item() for step in (0, 0, 1)]
    assert len(set(found[0.0])) == 1
    first, again, other = found[0.5]
    assert first == again != other


def test_a_step_without_a_finite_loss_leaves_everything_as_it_was(tmp_path):
    made = trainer(run(tmp_path, lr=0.1, warmup_epochs=0.0))
    before = copy.deepcopy(made.learner.state_dict())
    views, masks = made.batches.batch(0)
    made.batches.batch = lambda step, part=0: ([view * float("nan") for view in views], masks)
    made.step(0)
    assert (made.done, made.bad, made.skipped) == (1, 1, 1) and (tmp_path / "skipped" / "step-00000001.json").is_file()
    after = made.learner.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def agreed(rank, folder):
    made = trainer(run(folder / str(rank)))
    for parameter in made.learner.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return made._agree([SimpleNamespace(loss=torch.tensor(math.inf if rank == 1 else 1.0))], asked=rank == 0)


@pytest.mark.slow
def test_ranks_skip_and_stop_where_one_of_them_must(tmp_path):
    """An infinite loss may have finite gradients, which say nothing to the others."""
    assert together(2, agreed, tmp_path) == [(True, True), (True, True)]
