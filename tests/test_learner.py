"""One step of every recipe: finite loss, gradients where they belong, who sees what, and what is remembered.

That the loss is the papers' is the business of test_faithful.py.
"""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn

from prototypes_lib import regularizers, scores
from prototypes_lib.assignment import Sinkhorn
from prototypes_lib.backbones import Backbone
from prototypes_lib.heads import Projector, Prototypes
from prototypes_lib.learner import Learner, Network
from prototypes_lib.methods import METHODS, Cosine, Method, Patch, Queue, Views


def make(method: Method, seed: int = 0, **head) -> Learner:
    torch.manual_seed(seed)
    backbone, share = Backbone("vit_pico_patch8", 32), method.patch.head if method.patch else "shared"

    def prototypes():
        k = method.n_prototypes
        return Prototypes(k, 8, method.free_norms, plain=method.renormalize) if k else None

    def projector():
        return Projector(backbone.dim, 32, 8, **head)

    network = Network(
        backbone, projector(), prototypes(),
        projector() if share == "own" else None, prototypes() if share != "shared" else None,
    )  # fmt: skip
    learner = Learner(method, network)
    with torch.no_grad():  # a teacher apart from its student, and mask tokens that matter
        for p in learner.student.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return learner


def small(name: str, **changes) -> Method:
    method = METHODS[name]
    views = dataclasses.replace(method.views, n_global=2, n_local=3)
    return method.but(**({"n_prototypes": 24 if method.n_prototypes else 0, "views": views} | changes))


def batch(method: Method, n: int = 6, seed: int = 1):
    """Views, and masks of the shape the method asks for."""
    g = torch.Generator().manual_seed(seed)
    sizes = [32] * method.views.n_global + [16] * method.views.n_local
    views = [torch.randn(n, 3, s, s, generator=g) for s in sizes]
    if method.mask_student:
        return views, torch.rand(4, 4, generator=g) < 0.4
    if method.patch is None:
        return views, None
    masks = torch.rand(method.views.n_global * n, 4, 4, generator=g) < 0.4
    masks[1] = False  # an image without any masked patch
    return views, masks


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_finite_and_every_trainable_parameter_learns(name):
    method = small(name)
    learner = make(method)
    step = learner(*batch(method), 0.04)
    step.loss.backward()
    assert torch.isfinite(step.loss)
    for where, p in learner.student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all() and float(p.grad.abs().max()) > 0, where
    own = {id(p) for p in learner.student.parameters()}  # shared prototypes, or the student itself
    assert all(p.grad is None and not p.requires_grad for p in learner.teacher.parameters() if id(p) not in own)


def test_the_teacher_follows_by_ema_and_keeps_its_buffers():
    learner = make(small("dino-vmf"), batch_norm=True)
    before = copy.deepcopy(learner.teacher.state_dict())
    learner.update_teacher(0.9)
    student = learner.student.state_dict()
    for name, tensor in learner.teacher.named_parameters():
        assert torch.allclose(tensor, 0.9 * before[name] + 0.1 * student[name], atol=1e-6), name
    assert all(torch.equal(b, before[n]) for n, b in learner.teacher.named_buffers())


def test_without_ema_the_student_is_its_own_teacher():
    method = small("simdino", ema=None)
    learner = make(method)
    assert learner.teacher is learner.student
    step = learner(*batch(method), 0.04)
    step.loss.backward()
    assert torch.isfinite(step.loss)


@pytest.mark.parametrize("name", ["simdino", "simdinov2"])
def test_without_a_teacher_no_gradient_flows_through_the_targets(name):
    """The student's gradient is that beside a frozen copy of itself, for crops and for patches."""
    alone, apart = make(small(name, ema=None)), make(small(name))
    apart.student.load_state_dict(alone.student.state_dict())
    apart.teacher.load_state_dict(alone.student.state_dict())
    views, masks = batch(alone.method)
    for each in (alone, apart):
        each(views, masks, 0.05).loss.backward()
    for (where, p), q in zip(alone.student.named_parameters(), apart.student.parameters(), strict=True):
        assert not p.requires_grad or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), where


def test_the_teacher_has_no_stochastic_depth():
    method = small("dino")
    backbone = Backbone("vit_pico_patch8", 32, drop_path_rate=0.5)
    learner = Learner(method, Network(backbone, Projector(64, 32, 8), Prototypes(24, 8, False)))
    drops = lambda net: [m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")]
    assert max(drops(learner.student)) == 0.5 and max(drops(learner.teacher)) == 0.0


def test_masked_places_alone_carry_the_patch_term():
    method = small("ibot", patch=Patch(weight=1.0))
    learner = make(method)
    views, masks = batch(method)
    full = learner(views, masks, 0.04).parts["patch"]
    none = learner(views, torch.zeros_like(masks), 0.04).parts["patch"]
    assert float(none) == 0.0 and float(full) > 0


def test_a_new_method_is_a_recipe_and_nothing_else():
    """A toy nobody wrote: dot scores, no centering, entropy of the student's marginal enlarged."""
    toy = (
        METHODS["dino"]
        .but(n_prototypes=24, views=Views(2, 0), score=scores.dot, targets=(), regularizers=())
        .plus(-1.0, regularizers.mean_entropy, on="probabilities")
    )
    learner = make(toy)
    step = learner(*batch(toy), 0.05)
    step.loss.backward()
    assert torch.isfinite(step.loss) and "mean_entropy on probabilities" in step.parts
    assert dataclasses.replace(toy) == toy


def test_another_new_method_on_patches_with_coefficients_over_the_run_is_a_recipe_too():
    """A toy nobody wrote either: three whole target crops balanced alone, a patch prior that fades in."""
    law = partial(regularizers.power_law_matching, exponent=Cosine(2.0, 0.0))
    toy = METHODS["ibot-vmf"].but(
        n_prototypes=24, views=Views(3, 1), targets=(Sinkhorn,), joint_targets=False, ema=None,
        patch=Patch(head="prototypes", weight=Cosine(0.0, 2.0)), image_weight=Cosine(1.0, 0.5),
    ).plus(Cosine(0.0, 1.0), law, on="patch probabilities")  # fmt: skip
    learner = make(toy)
    views, masks = batch(toy)
    for progress, image, patch, prior in ((0.0, 1.0, 0.0, 0.0), (0.5, 0.75, 1.0, 0.5), (1.0, 0.5, 2.0, 1.0)):
        step = learner(views, masks, 0.05, progress=progress)
        expected = image * step.parts["image"] + patch * step.parts["patch"]
        expected = expected + prior * step.parts["power_law_matching on patch probabilities"]
        assert float(step.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    step.loss.backward()
    assert float(learner.student.patch_prototypes.weight_g.grad.abs().max()) > 0


def test_targets_use_the_center_of_the_steps_before():
    method = small("dino")
    learner = make(method)
    views, _ = batch(method)
    first = learner(views, None, 0.04)
    second = learner(views, None, 0.04)
    assert first.loss.item() != second.loss.item()
    learner.eval()
    third, fourth = learner(views, None, 0.04), learner(views, None, 0.04)
    assert third.loss.item() == fourth.loss.item()


def test_batch_norm_in_the_projector_takes_one_masked_patch():
    method = small("ibot")
    learner = make(method, batch_norm=True)
    views, masks = batch(method)
    masks = torch.zeros_like(masks)
    masks[0, 0, 0] = True
    assert torch.isfinite(learner(views, masks, 0.04).loss)


def test_without_a_teacher_the_network_runs_once_on_each_crop():
    method = small("swav")
    learner = make(method, batch_norm=True)
    learner(*batch(method), 0.05)
    (first, _) = [m for m in learner.student.projector.mlp if isinstance(m, nn.BatchNorm1d)]
    assert int(first.num_batches_tracked) == 1
    seen = []
    learner.student.backbone.register_forward_hook(lambda net, args, out: seen.append(args[0].shape))
    learner(*batch(method), 0.05)
    assert [tuple(s) for s in seen] == [(12, 3, 32, 32), (18, 3, 16, 16)]


@pytest.mark.parametrize("name", ["swav", "msn", "pmsn"])
def test_shared_prototypes_learn_from_the_student_alone(name):
    """Their gradient is that of a loss whose targets come from a frozen copy of them."""
    method = small(name)
    learner = make(method)
    assert learner.teacher.prototypes is learner.student.prototypes
    views, masks = batch(method)
    learner.student.prototypes.renormalize()  # SwAV's, which a copy would not get
    apart = copy.deepcopy(learner)
    if method.ema is not None:
        apart.teacher.prototypes = copy.deepcopy(apart.student.prototypes).requires_grad_(False)
    else:
        apart.teacher = copy.deepcopy(apart.student).requires_grad_(False)
    for each in (learner, apart):
        each(views, masks, 0.05).loss.backward()
    ours, theirs = (each.student.prototypes.weight_v.grad for each in (learner, apart))
    assert float(ours.abs().max()) > 0 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_shared_prototypes_move_with_the_student_and_not_by_ema():
    learner = make(small("msn"))
    with torch.no_grad():
        learner.student.prototypes.weight_v.mul_(2.0)
    before = learner.student.prototypes.weight_v.clone()
    learner.update_teacher(0.5)
    assert torch.equal(learner.teacher.prototypes.weight_v, before)


def test_msns_target_crop_is_not_seen_by_its_student():
    method = small("msn", targets=(), regularizers=())
    learner = make(method)
    views, masks = batch(method)
    seen = []
    learner.student.backbone.register_forward_hook(lambda net, args, out: seen.append(args[0]))
    base = learner(views, masks, 0.025)
    other = learner([views[0] + torch.randn_like(views[0]), *views[1:]], masks, 0.025)
    assert len(seen) == 4 and torch.equal(seen[0], views[1]) and torch.equal(seen[2], views[1])
    assert base.meters["teacher_entropy"].item() != other.meters["teacher_entropy"].item()
    constant = METHODS["msn"].but(n_prototypes=24, views=method.views).plus(1.0, _first_of, on="probabilities")
    learner = make(constant)
    parts = [learner([x, *views[1:]], masks, 0.025).parts for x in (views[0], -views[0])]
    name = "_first_of on probabilities"
    assert torch.equal(parts[0][name], parts[1][name]) and not torch.equal(parts[0]["image"], parts[1]["image"])


def _first_of(p):
    return p[:, 0].mean()


def test_dropped_patches_do_not_reach_the_student():
    method = small("msn")
    learner = make(method)
    views, masks = batch(method)
    pixels = masks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    # the stem of this small network looks a pixel beyond a patch: change what lies further inside
    inside = pixels & ~(torch.nn.functional.max_pool2d((~pixels).float()[None], 5, 1, 2)[0] > 0)
    assert inside.any()
    learner.student.backbone.vit.patch_embed.norm = nn.Identity()  # which normalizes over the whole crop
    changed = [views[0], torch.where(inside, torch.randn_like(views[1]), views[1]), *views[2:]]
    losses = [float(learner(v, masks, 0.025).loss.detach()) for v in (views, changed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    shown = [float(learner(v, torch.zeros_like(masks), 0.025).loss.detach()) for v in (views, changed)]
    assert abs(shown[0] - shown[1]) > 1e-4


def test_the_queue_survives_a_checkpoint():
    method = small("swav", queue=Queue(8))
    learner, fresh = make(method), make(method, seed=5)
    for seed in range(3):
        learner(*batch(method, seed=seed), 0.05)
    fresh.load_state_dict(copy.deepcopy(learner.state_dict()))
    losses = [float(each(*batch(method, seed=9), 0.05).loss.detach()) for each in (learner, fresh)]
    assert losses[0] == losses[1]
    empty = make(method, seed=5)
    empty.student.load_state_dict(learner.student.state_dict())
    assert float(empty(*batch(method, seed=9), 0.05).loss.detach()) != losses[0]


def test_the_queue_is_used_in_eval_mode_and_stays():
    method = small("swav", queue=Queue(8))
    learner = make(method)
    for seed in range(3):
        learner(*batch(method, seed=seed), 0.05)
    before = copy.deepcopy(learner.queue.state_dict())
    learner.eval()
    with_queue = float(learner(*batch(method), 0.05).loss.detach())
    assert all(torch.equal(before[k], v) for k, v in learner.queue.state_dict().items())
    assert float(learner(*batch(method), 0.05, epoch=-1.0).loss.detach()) != with_queue, "before its epoch it is not"


def test_the_queue_holds_the_newest_codes_of_its_view_and_fills_from_its_epoch_on():
    method = small("swav", queue=Queue(8, epoch=2.0))
    learner = make(method)
    codes = []
    learner.student.projector.register_forward_hook(lambda net, args, out: codes.append(out.detach()))
    for seed in range(3):
        learner(*batch(method, seed=seed), 0.05, epoch=1.99)
    assert not learner.queue.codes.any() and not learner.queue.filled.any()
    for seed in range(3):
        learner(*batch(method, seed=seed), 0.05, epoch=2.0)
    for view in range(2):
        newest = torch.cat([c[6 * view : 6 * view + 6] for c in reversed(codes)])[:8]
        assert torch.equal(learner.queue.codes[view], newest)


def test_plain_prototypes_are_unit_after_a_forward():
    method = small("swav")
    learner = make(method)
    prototypes = learner.student.prototypes
    assert float((prototypes.w.detach().norm(dim=-1) - 1).abs().max()) > 1e-3
    learner(*batch(method), 0.05)
    assert torch.allclose(prototypes.w.norm(dim=-1), torch.ones(24), atol=1e-6)


def test_the_patch_term_without_prototypes_has_a_gradient():
    method = small("simdinov2", image_weight=0.0, regularizers=())
    learner = make(method)
    learner(*batch(method), 0.04).loss.backward()
    assert float(learner.student.backbone.mask_token.grad.abs().max()) > 0
    assert float(learner.student.projector.mlp[0].weight.grad.abs().max()) > 0


def test_a_single_target_without_a_teacher_comes_from_its_own_crop():
    """The student does not see that crop, so its codes for the others cannot be the targets."""
    method = small("msn", ema=None, mask_student=0.0)
    learner = make(method)
    views, _ = batch(method)
    losses = [float(learner([x, *views[1:]], None, 0.025).loss.detach()) for x in (views[0], -views[0])]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.n_prototypes])
def test_the_meters_are_nats_of_the_targets(name):
    method = small(name)
    step = make(method)(*batch(method), 0.05)
    entropy, marginal = (float(step.meters[m]) for m in ("teacher_entropy", "marginal_entropy"))
    assert 0 <= entropy <= marginal + 1e-5 <= math.log(24) + 1e-4
    assert float(step.meters["kl"]) == pytest.approx(float(step.parts["image"]) - entropy, abs=1e-5)


def test_a_network_without_what_the_method_needs_is_refused():
    backbone = Backbone("vit_pico_patch8", 32)
    for name, lacks in (("dino", "prototypes"), ("dinov2", "patch_prototypes")):
        prototypes = Prototypes(24, 8, True) if name == "dinov2" else None
        with pytest.raises(ValueError, match=f"needs {lacks}"):
            Learner(small(name), Network(backbone, Projector(64, 32, 8), prototypes))


def test_msn_projects_crops_of_each_size_apart_and_the_others_together():
    """BatchNorm in the projector normalizes MSN's large anchor without the small ones, as its code does."""
    views, masks = batch(small("msn"))
    apart, joint = (make(small("msn", joint_projector=joint), batch_norm=True) for joint in (False, True))
    alone = apart.student.projector.mlp[1]
    seen = []
    alone.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    losses = [learner(views, masks, 0.025).loss for learner in (apart, joint)]
    assert seen == [len(views[0]), 3 * len(views[0])] and not torch.isclose(*losses, atol=1e-6)
