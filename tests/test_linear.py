import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_features import backbone, images, real

from prototypes_lib.backbones import Backbone
from prototypes_lib.evaluate import Features
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.evaluate.linear import LRS_DINOV2, LRS_IBOT, Heads, linear
from prototypes_lib.views import eval_view


def _alone(train, test, lr, epochs, batch, seed, per_step=False, without=()):
    """A head trained with torch's own layer, loss, optimizer and schedule: the layer, accuracy after each epoch."""
    draw = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(train.x.shape[1], int(train.labels.max()) + 1, dtype=train.x.dtype)
    layer.weight.data = (0.01 * torch.randn(layer.weight.shape, generator=draw)).to(train.x)
    layer.bias.data.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr * batch / 256, momentum=0.9, weight_decay=0)
    steps = epochs * math.ceil(len(train.x) / batch) if per_step else epochs
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    accuracies = []
    for _ in range(epochs):
        for rows in torch.randperm(len(train.x), generator=draw).split(batch):
            rows = rows[~torch.isin(rows, torch.as_tensor(without))]
            loss = F.cross_entropy(layer(train.x[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if per_step:
                scheduler.step()
        if not per_step:
            scheduler.step()
        accuracies.append(100 * float((layer(test.x).argmax(1) == test.labels).double().mean()))
    return layer, accuracies


def _probe(train, test, **options):
    return linear(train, test, progress=False, **options)


@pytest.mark.parametrize(
    ("dtype", "lrs", "tolerance"),
    [(torch.float32, (1e-4, 1e-3, 0.1), 1e-5), (torch.float64, (1e-3, 0.1, 3.0), 1e-11)],
)
def test_heads_trained_as_one_tensor_are_those_trained_alone(dtype, lrs, tolerance):
    train = Features(real()[0].x[:300].to(dtype), real()[0].labels[:300])
    draw = torch.Generator().manual_seed(5)
    heads = Heads(train.labels.unique(), train.x, lrs, 64 / 256, draw)
    for epoch in range(5):
        for rows in torch.randperm(300, generator=draw).split(64):
            factor = 0.5 * (1 + math.cos(math.pi * epoch / 5))
            heads.step(train.x[rows], train.labels[rows], torch.ones(1, len(rows)), factor)
    for place, lr in enumerate(lrs):
        layer, _ = _alone(train, train, lr, 5, 64, seed=5)
        expected = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        assert torch.allclose(heads.weight[:, place], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_a_sweep_is_the_accuracies_of_its_heads_alone(schedule):
    train, test = (Features(f.x.double(), f.labels) for f in real())
    lrs = (1e-3, 0.03, 1.0)
    found = _probe(train, test, lrs=lrs, epochs=6, batch_size=128, schedule=schedule, seed=3, features="D")
    for lr in lrs:
        _, accuracies = _alone(train, test, lr, 6, 128, 3, schedule == "step")
        assert found.last[lr] == pytest.approx(accuracies[-1])
        assert found.best[lr] == pytest.approx(max(accuracies))
    assert found.official == max(found.best.values())
    assert found.accuracy == found.last[found.lr]
    assert found.interval == wilson(round(found.accuracy * 5), 500)
    assert (found.n, found.epochs, found.seed, found.features, found.augmented) == (500, 6, 3, "D", False)


def test_the_learning_rate_is_chosen_by_heads_that_did_not_see_what_they_are_tried_on():
    train, test = (Features(f.x.double(), f.labels) for f in real())
    lrs = (1e-4, 1e-2, 0.3)
    found = _probe(train, test, lrs=lrs, epochs=5, seed=1)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    first = {}
    for row in order.tolist():
        first.setdefault(int(train.labels[row]), row)
    held = [row for row in order.tolist() if row not in first.values()][:100]
    judges = Features(train.x[held], train.labels[held])
    for lr in lrs:
        _, accuracies = _alone(train, judges, lr, 5, 256, 1, without=held)
        assert found.held_out[lr] == pytest.approx(accuracies[-1])
    assert found.lr == max(lrs, key=found.held_out.get)
    by_test = _probe(train, test, lrs=lrs, epochs=5, seed=1, holdout=0)
    assert by_test.held_out == {} and by_test.lr == max(lrs, key=by_test.last.get)
    assert by_test.last == found.last  # a twin changes nothing of the head that is tried on the test images


def test_a_learning_rate_gives_the_same_in_a_sweep_and_alone():
    train, test = real()
    sweep = _probe(train, test, lrs=LRS_IBOT, epochs=2)
    assert np.allclose(list(sweep.last), [n * 10.0**k for k in range(-4, 1) for n in range(1, 10)], rtol=1e-12)
    assert len(_probe(train, test, lrs=LRS_DINOV2, epochs=1, schedule="step").held_out) == 13
    for lr in (1e-3, 0.2):
        assert abs(_probe(train, test, lrs=(lr,), epochs=2).accuracy - sweep.last[lr]) <= 0.4


def test_at_convergence_it_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    train, test = (Features(f.x[:, :16], f.labels) for f in real())  # few dimensions: the optimum is finite and near
    found = _probe(train, test, lrs=(3.0,), epochs=150)
    reference = LogisticRegression(C=1e6, max_iter=5000).fit(train.x.numpy(), train.labels.numpy())
    assert abs(found.accuracy - 100 * reference.score(test.x.numpy(), test.labels.numpy())) < 1.5
    assert found.accuracy > 20


def test_a_head_that_diverges_spoils_itself_only():
    train, test = real()
    calm = _probe(train, test, lrs=(0.01, 0.1), epochs=3)
    found = _probe(train, test, lrs=(0.01, 0.1, 3e38), epochs=3)
    assert {lr: found.last[lr] for lr in calm.last} == calm.last
    assert found.last[3e38] == 0 and found.held_out[3e38] == 0 and found.lr == calm.lr


@pytest.mark.slow
def test_images_are_seen_as_other_crops_in_each_epoch_and_tested_on_the_central_view():
    train, test = (part.subset(slice(0, 200)) for part in images())
    options = {"backbone": backbone(), "lrs": (0.01, 0.3), "epochs": 2, "batch_size": 64}
    found = _probe(train, test, features="D", **options)
    assert found.augmented and found.n == 200 and found.features == "D"
    assert _probe(train, test, features="D", **options) == found  # a seed says it all
    assert _probe(train, test, features="D", **options, seed=1) != found

    seen = []
    network = Backbone("vit_pico_patch8", 32)
    network.load_state_dict(backbone().state_dict())
    network.train()
    original = network.last_blocks
    network.last_blocks = lambda x, *rest: (seen.append(x), original(x, *rest))[1]
    assert _probe(train, test, features="D", **options | {"backbone": network}) == found
    assert network.training  # put back
    views = torch.cat(seen)
    assert len(views) == 200 + 20 + 2 * 200  # test, held out, two epochs
    central = eval_view(torch.from_numpy(np.concatenate([test.pixels, train.pixels])), 32)
    known = {tuple(x) for x in central[:, :, 0, 0].tolist()}
    assert torch.equal(views[:200], central[:200])
    assert sum(tuple(x) in known for x in views[220:, :, 0, 0].tolist()) < 200
    assert len({tuple(x) for x in views[220:].flatten(1)[:, ::97].tolist()}) == 400  # no crop comes twice


@pytest.mark.slow
def test_crops_through_the_backbone_are_learned_from():
    train, test = images()
    found = _probe(train, test, backbone=backbone(), lrs=(0.3,), epochs=5)
    assert found.interval[0] > 15  # chance is 10


def test_odd_sets_work():
    train, test = real()
    few = Features(test.x[:7], test.labels[:7])
    assert _probe(train, few, epochs=2).n == 7
    constant = Features(torch.ones_like(train.x), train.labels)
    assert _probe(constant, Features(torch.ones_like(test.x), test.labels), lrs=(0.01, 1.0), epochs=3).accuracy == 10
    one = Features(train.x[:50], torch.full((50,), 7))
    assert _probe(one, Features(test.x, torch.full((500,), 7)), epochs=1).accuracy == 100
    unseen = Features(test.x, test.labels + 3)  # classes 10, 11, 12 were never learned
    assert _probe(train, unseen, epochs=1).accuracy <= 70
    gaps = Features(train.x, train.labels * 5)
    assert _probe(gaps, Features(test.x, test.labels * 5), epochs=3) == _probe(train, test, epochs=3)
    single = Features(torch.cat([train.x, train.x[:1] + 1]), torch.cat([train.labels, torch.tensor([10])]))
    assert _probe(single, test, lrs=(0.01, 0.1), epochs=2).n == 500


def test_features_of_any_type_have_the_answers_of_their_numbers():
    train, test = (Features((part.x * 4).round().clamp(0, 9).to(torch.uint8), part.labels) for part in real())
    floats = [Features(part.x.float(), part.labels) for part in (train, test)]
    assert _probe(train, test, epochs=2) == _probe(*floats, epochs=2)


def test_features_may_lie_in_a_file(tmp_path):
    train, test = real()
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=tuple(train.x.shape))
    mapped[:] = train.x.numpy()
    assert _probe(Features(torch.from_numpy(mapped), train.labels), test, epochs=2) == _probe(train, test, epochs=2)


def test_wrong_requests_name_themselves():
    train, test = real()
    broken = Features(train.x.clone(), train.labels)
    broken.x[3, 2] = math.nan
    singles = Features(train.x[:3], torch.arange(3))
    unlabeled = images()[0].subset(range(10))
    unlabeled.labels[2] = -1
    for message, change in {
        "not finite": {"train": broken},
        "holdout=0": {"train": singles, "lrs": (0.1, 1.0)},
        "no label": {"train": unlabeled, "test": unlabeled, "backbone": backbone()},
        "Images and Images with a backbone": {"backbone": backbone()},
        "Features and Features": {"train": images()[0]},
        "'C', 'D'": {"train": images()[0], "test": images()[1], "backbone": backbone(), "features": "B"},
        "lrs": {"lrs": (0.1, 0.1)},
        "positive learning": {"lrs": (0.1, math.nan)},
        "epochs=0": {"epochs": 0},
        "batch_size=0": {"batch_size": 0},
        "schedule": {"schedule": "hour"},
        "holdout=1": {"holdout": 1.0},
        "seed=-1 must": {"seed": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            _probe(**{"train": train, "test": test} | change)
