"""The recipe of fine-tuning against timm's own groups, a naive loop and the arithmetic of mixtures, on real images."""

import functools
import importlib
import random

import numpy as np
import pytest
import real_features
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch.utils.data import default_collate

from prototypes_lib import data
from prototypes_lib.backbones import Backbone
from prototypes_lib.evaluate.augmented import _Augmented, _posterize, batches, mix, random_state, reseed
from prototypes_lib.evaluate.fine_tune import (
    CPU,
    PRESETS,
    SMALL_SETS,
    VIT_B,
    VIT_S,
    Classifier,
    FineTune,
    drop_paths,
    epochs,
    fine_tune,
    parameter_groups,
    predict,
)
from prototypes_lib.evaluate.intervals import wilson
from prototypes_lib.schedules import cosine
from prototypes_lib.views import IMAGENET_MEAN, IMAGENET_STD, eval_view

fine_tuning = importlib.import_module("prototypes_lib.evaluate.fine_tune")  # the package has a function of that name
# all that is drawn at random, in a second
FULL = VIT_S.but(lrs=(1e-3,), epochs=2, batch_size=16, accumulate=2, warmup_epochs=1, drop_path=0.3, init_scale=1.0)


@functools.lru_cache
def images(n_train: int = 48, n_test: int = 20) -> tuple[data.Images, data.Images]:
    """Spread over ten classes."""
    return tuple(
        data.load("cifar10-5k", split, limit=n, progress=False) for split, n in (("train", n_train), ("test", n_test))
    )


def global_states() -> list:
    return [random.getstate(), [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()],  # noqa: NPY002
            torch.get_rng_state().tolist()]  # fmt: skip


# what is published


def test_recipes_are_the_official_ones():
    assert (VIT_S.epochs, VIT_S.layer_decay, VIT_S.drop_path) == (200, 0.75, 0.1)
    assert (VIT_B.epochs, VIT_B.layer_decay, VIT_B.drop_path) == (100, 0.65, 0.2)
    for recipe in (VIT_S, VIT_B):
        assert recipe.lrs == (8e-4, 9e-4, 1e-3, 2e-3) and recipe.batch_size // recipe.accumulate == 128
        assert (recipe.warmup_epochs, recipe.weight_decay, recipe.init_scale, recipe.min_lr) == (20, 0.05, 0.001, 1e-6)
    for recipe in (VIT_S, VIT_B, SMALL_SETS, PRESETS["inat-b"], PRESETS["inat-s"]):
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing) == (0.8, 1.0, 0.1)
        assert recipe.rand_augment == "rand-m9-mstd0.5-inc1" and recipe.accumulate == 8
    assert (SMALL_SETS.lrs, SMALL_SETS.epochs, SMALL_SETS.batch_size, SMALL_SETS.repeats) == ((7.5e-6,), 1000, 768, 3)
    assert SMALL_SETS.peak(7.5e-6) == pytest.approx(7.5e-6 * 768 / 512) and VIT_S.peak(8e-4) == 8e-4
    assert (PRESETS["inat-b"].epochs, PRESETS["inat-b"].erase, PRESETS["inat-b"].lrs, PRESETS["inat-s"].lrs) == (
        360,
        0.1,
        (7.5e-6,),
        (5e-5,),
    )
    assert PRESETS["vit-b"] is VIT_B and PRESETS["cpu"] is CPU


def test_images_have_the_colors_that_the_backbone_was_trained_with():
    train, test = images()
    colors = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}
    plain = FULL.but(augment=False, rand_augment="", erase=0.0)
    for settings in (plain, FULL.but(rand_augment="", erase=0.0)):
        (mine, _), (usual, _) = (next(iter(batches(train, settings, 32, 3, 0, **c))) for c in (colors, {}))
        shown = [
            x * torch.tensor(c["std"]).view(3, 1, 1) + torch.tensor(c["mean"]).view(3, 1, 1)
            for x, c in ((mine, colors), (usual, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}))
        ]
        torch.testing.assert_close(*shown, atol=1e-5, rtol=0)
        assert not torch.allclose(mine, usual)

    class Seen(Classifier):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    seen, network = [], Seen(Backbone("vit_pico_patch8", 32), 10, CPU, seed=0)
    predict(network, test, 32, torch.device("cpu"), **colors)
    assert torch.equal(seen[0], eval_view(torch.from_numpy(test.pixels), 32, **colors))


def test_fine_tuning_takes_the_colors_for_training_and_test(monkeypatch):
    seen, train = [], images()[0]

    def spied(name, function):
        def spy(*args, **colors):
            seen.append((name, colors))
            return function(*args, **colors)

        return spy

    for name in ("batches", "predict"):
        monkeypatch.setattr(fine_tuning, name, spied(name, getattr(fine_tuning, name)))
    colors = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}
    short = CPU.but(epochs=2, batch_size=16)
    fine_tune(Backbone("vit_pico_patch8", 32), train, images()[1], settings=short, progress=False, **colors)
    assert seen == [("batches", colors), ("predict", colors), ("predict", colors)]


# the network and its groups


def by_name(model: torch.nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_layers_of_a_transformer_learn_at_timms_rates_and_the_final_norm_like_the_head():
    name, settings = "vit_tiny_patch16_224", VIT_S.but(layer_decay=0.65)
    network = Classifier(Backbone(name, 32), 7, settings, seed=0)
    ours = {
        key.removeprefix("backbone.vit."): value
        for key, value in by_name(network, parameter_groups(network, settings)).items()
    }
    peer = timm.create_model(name, img_size=32, num_classes=7)
    theirs = by_name(peer, param_groups_layer_decay(peer, 0.05, peer.no_weight_decay(), layer_decay=0.65))
    assert theirs.pop("norm.weight") == theirs.pop("norm.bias") == (0.65, 0)  # with the last block
    assert ours.pop("norm.weight") == ours.pop("norm.bias") == (1, 0)  # BEiT
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-12), key


def test_layers_of_a_resnet_are_timms_stages():
    network = Classifier(Backbone("resnet18", 32), 7, VIT_S, seed=0)
    ours = by_name(network, parameter_groups(network, VIT_S))
    peer = timm.create_model("resnet18", num_classes=7)
    layers = group_parameters(peer, peer.group_matcher(coarse=True), reverse=True)
    assert max(layers.values()) == 5
    for name, parameter in peer.named_parameters():
        own = name.replace("fc.", "head.") if name.startswith("fc.") else f"backbone.cnn.{name}"
        assert ours.pop(own) == pytest.approx((0.75 ** (5 - layers[name]), 0.05 * (parameter.ndim > 1)))
    assert not ours


@pytest.mark.parametrize("name", ["vit_nano_patch8", "resnet_pico", "resnet18"])
def test_a_backbone_gets_the_dropped_paths_it_would_have_been_made_with(name):
    found, expected = Backbone(name, 32, drop_path_rate=0.1), Backbone(name, 32, drop_path_rate=0.3)
    drop_paths(found, 0.3)
    rates = [
        [m.drop_prob for m in net.modules() if isinstance(m, DropPath) and m.drop_prob] for net in (found, expected)
    ]
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) >= 3
    expected.load_state_dict(found.state_dict())
    x, outputs = torch.randn(4, 3, 32, 32), []
    for net in (found, expected):
        torch.manual_seed(0)
        outputs.append(net.train()(x)[0])
    assert torch.equal(*outputs)


def test_a_frozen_teachers_copy_learns_and_its_head_is_a_function_of_the_seed():
    backbone = Backbone("vit_pico_patch8", 32).requires_grad_(False).eval()
    one, same, other = (Classifier(backbone, 10, VIT_S, seed) for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, same.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    assert one.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.2) and not one.head.bias.any()
    assert [n for n, p in one.named_parameters() if not p.requires_grad] == ["backbone.mask_token"]
    assert not any(p.requires_grad for p in backbone.parameters())


# the images


def test_targets_of_mixup_are_distributions_and_tell_how_the_images_were_mixed():
    x, labels = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    cpu = torch.device("cpu")
    for seed in range(20):
        with random_state(cpu):
            reseed(seed)
            mixed, targets = mix(x, labels, 10, VIT_S.but(cutmix=0.0))
            cut, cut_targets = mix(x, labels, 10, VIT_S.but(mixup=0.0))
        for t in (targets, cut_targets):
            assert torch.allclose(t.sum(1), torch.ones(8)) and t.min() >= 0.1 / 10 - 1e-7
            assert torch.allclose(t[:, 8:], torch.tensor(0.01))  # classes that are in neither image
        share = (targets[0, 0] - 0.01) / 0.9
        assert torch.allclose(mixed, share * x + (1 - share) * x.flip(0), atol=1e-6)
        kept = (cut == x).all(1)
        assert ((cut == x.flip(0)).all(1) | kept).all()  # every pixel is of one of the two images
        assert torch.allclose(kept.float().mean((1, 2)), (cut_targets.diagonal() - 0.01) / 0.9, atol=1e-6)


def test_without_mixtures_the_loss_is_cross_entropy_with_smoothed_labels():
    scores, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    x = torch.zeros(6, 3, 4, 4)
    unmixed, targets = mix(x, labels, 5, CPU)
    assert unmixed is x
    assert torch.allclose(F.cross_entropy(scores, targets), F.cross_entropy(scores, labels, label_smoothing=0.1))


def test_every_image_is_in_an_epoch_once_and_repeated_ones_lie_in_different_parts():
    train, _ = images(48)
    rows = {train.pixels[i].tobytes(): i for i in range(48)}
    plain = eval_view(torch.from_numpy(train.pixels), 32)
    for repeats, distinct in ((1, 48), (2, 24)):
        settings = CPU.but(epochs=2, batch_size=16, accumulate=2, repeats=repeats)
        parts = list(batches(train, settings, 32, seed=3, workers=0))
        assert len(parts) == 2 * 3 * 2 and len(rows) == 48
        found = [[int((plain == x).flatten(1).all(1).int().argmax()) for x in part] for part, _ in parts]
        assert all((train.labels[rows] == labels.numpy()).all() for rows, (_, labels) in zip(found, parts, strict=True))
        assert all(len(set(part)) == 8 for part in found)
        for epoch in (found[:6], found[6:]):
            assert len({row for part in epoch for row in part}) == distinct
        assert found[:6] != found[6:]


def test_augmented_images_are_functions_of_seed_step_and_place_and_differ():
    train, _ = images(4)
    augmented = _Augmented(train, FULL, 32, seed=0)
    first, again = (augmented.__getitems__([(0, 0, 1), (0, 1, 1), (1, 0, 1)]) for _ in range(2))
    alone = augmented.__getitems__([(0, 1, 1)])[0][0]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert torch.equal(first[1][0], alone)  # whatever else is made with it
    assert not torch.equal(first[0][0], first[1][0]) and not torch.equal(first[0][0], first[2][0])
    assert not torch.equal(first[0][0], _Augmented(train, FULL, 32, seed=1).__getitems__([(0, 0, 1)])[0][0])


def test_small_images_are_padded_and_cropped_and_others_resized():
    small, large = real_features.images()[0].subset(slice(4)), data.Images(
        np.zeros((4, 40, 48, 3), np.uint8), np.arange(4), tuple("abcd"), "large"
    )  # fmt: skip
    name = lambda part, size: type(_Augmented(part, FULL, size, 0).transform.transforms[0]).__name__
    assert name(small, 32) == "RandomCrop"
    assert name(small, 64) == name(large, 32) == "RandomResizedCropAndInterpolation"
    made = _Augmented(large, FULL.but(erase=0.0), 32, 0).__getitems__([(0, i, i) for i in range(4)])
    assert default_collate(made)[0].shape == (4, 3, 32, 32)


def test_randaugment_survives_its_strongest_posterization_which_leaves_a_black_image():
    train, _ = images(8)
    augmented = _Augmented(train, FULL.but(rand_augment="rand-m10-n4-p1-inc1", erase=0.0), 32, seed=0)
    made = torch.stack([x for x, _ in augmented.__getitems__([(0, i, i % 8) for i in range(200)])])
    assert made.isfinite().all()
    picture = Image.fromarray(train.pixels[0])
    assert not np.asarray(_posterize(picture, 0)).any()
    assert np.array_equal(np.asarray(_posterize(picture, 3)), train.pixels[0] & 0b11100000)


# training


@pytest.mark.parametrize("name", ["vit_pico_patch8", "resnet_pico"])
def test_steps_are_those_of_a_naive_loop(name):
    (train, _), settings = images(32), CPU.but(
        epochs=5, batch_size=32, accumulate=2, warmup_epochs=2, layer_decay=0.6, init_scale=0.5
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = Backbone(name, 32)
    network, peer = (Classifier(backbone, 10, settings, seed=5) for _ in range(2))
    losses = list(epochs(network, train, 3e-3, settings, size=32, seed=5))

    decay = lambda n, p: 0.0 if p.ndim < 2 or n.endswith(("cls_token", "pos_embed")) else 0.05
    named = [(n, p) for n, p in peer.named_parameters() if p.requires_grad]
    one_by_one = [{"params": [p], "weight_decay": decay(n, p), "name": n} for n, p in named]
    optimizer = torch.optim.AdamW(one_by_one, lr=1.0, foreach=False)
    top = backbone.n_layers + 1
    rates = [0.0, 3e-3, *cosine(3e-3, 1e-6, 3)]
    order = iter(batches(train, settings, 32, 5, 0))
    for loss, rate in zip(losses, rates, strict=True):
        peer.train()
        halves = [next(order) for _ in range(2)]
        expected = sum(F.cross_entropy(peer(x), y, label_smoothing=0.1) for x, y in halves) / 2
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        optimizer.zero_grad()
        expected.backward()
        for group in optimizer.param_groups:
            inside = group["name"].removeprefix("backbone.")
            layer = top if group["name"].startswith("head") else backbone.layer_of(inside)
            group["lr"] = rate * 0.6 ** (top - layer)
        optimizer.step()
    assert losses[0] - losses[-1] > 0.1
    start = Classifier(backbone, 10, settings, seed=5)
    for (key, a), b, c in zip(network.named_parameters(), peer.parameters(), start.parameters(), strict=True):
        if key.endswith("qkv.bias"):  # a bias of the keys changes no softmax: its gradient is rounding
            a, b, c = (x.detach().unflatten(0, (3, -1))[[0, 2]] for x in (a, b, c))
        assert key == "backbone.mask_token" or (a - c).norm() > 0, key
        assert (a - b).norm() <= 1e-3 * (a - c).norm(), key


@pytest.mark.slow
def test_a_result_is_a_function_of_its_arguments_and_leaves_backbone_and_global_states_alone():
    train, test = images()
    backbone = Backbone("vit_pico_patch8", 32).train()
    before = {name: p.clone() for name, p in backbone.state_dict().items()}
    results = []
    for number, workers in ((1, 0), (2, 0), (3, 2)):
        random.seed(number), np.random.seed(number), torch.manual_seed(number)  # noqa: NPY002
        states = global_states()
        results.append(fine_tune(backbone, train, test, settings=FULL, seed=4, workers=workers, progress=False))
        assert global_states() == states
    assert results[0] == results[1] == results[2]
    assert fine_tune(backbone, train, test, settings=FULL, seed=5, progress=False).losses != results[0].losses
    assert backbone.training and all(p.requires_grad and p.grad is None for p in backbone.parameters())
    assert all(torch.equal(before[name], p) for name, p in backbone.state_dict().items())


@pytest.mark.slow
def test_a_sweep_reports_every_rate_and_the_numbers_of_the_best(capsys):
    train, test = images(40, 30)
    test = test.subset(np.flatnonzero(test.labels != 3))  # one class without test images
    settings = CPU.but(lrs=(1e-5, 4e-3), epochs=3, batch_size=20)
    backbone = real_features.backbone()
    found = fine_tune(backbone, train, test, settings=settings)
    assert "fine-tuning" in capsys.readouterr().out
    assert isinstance(found, FineTune) and found.n == len(test) and found.seed == 0
    for lr in settings.lrs:  # each as if alone
        alone = fine_tune(backbone, train, test, settings=settings.but(lrs=(lr,)), progress=False)
        assert (
            found.curves[lr] == alone.curves[lr] and found.losses[lr] == alone.losses[lr] and len(alone.losses[lr]) == 3
        )
    assert found.accuracy == max(curve[-1] for curve in found.curves.values()) == found.curves[found.lr][-1]
    assert found.interval == wilson(round(found.accuracy * found.n / 100), found.n)
    lr, epoch, highest = found.best
    assert highest == max(max(curve) for curve in found.curves.values()) == found.curves[lr][epoch - 1]
    network = Classifier(backbone, 10, settings, 0)
    list(epochs(network, train, found.lr, settings, size=32, seed=0))
    with torch.no_grad():
        right = network.eval()(eval_view(torch.from_numpy(test.pixels), 32)).argmax(1).numpy() == test.labels
    assert found.accuracy == pytest.approx(100 * right.mean())
    assert found.per_class == pytest.approx(100 * np.mean([right[test.labels == c].mean() for c in set(test.labels)]))


def test_real_images_are_learned_above_chance():
    train, test = real_features.images()
    animals = [part.subset(np.flatnonzero(np.isin(part.labels, (0, 4)))) for part in (train, test)]  # plane, deer
    found = fine_tune(real_features.backbone(), *animals, settings=CPU.but(epochs=5, batch_size=50), progress=False)
    assert len(animals[0]) == 200 and found.interval[0] > 60  # of two classes


def test_other_sizes_and_resnets_work():
    train, test = images(16, 7)
    settings = FULL.but(epochs=1, warmup_epochs=0)
    for name, size in (("vit_pico_patch8", 40), ("resnet_pico", 48)):
        assert fine_tune(Backbone(name, 32), train, test, settings=settings, size=size, progress=False).n == 7


# what cannot work


def test_wrong_requests_name_themselves_before_any_work():
    train, test = images()
    backbone, settings = real_features.backbone(), CPU.but(batch_size=16)

    def refused(match, backbone=backbone, train=train, test=test, settings=settings, **options):
        with pytest.raises(ValueError, match=match) as error:
            fine_tune(backbone, train, test, settings=settings, progress=False, **options)
        assert "\n" not in str(error.value)

    refused("batch size to at most 48", settings=settings.but(batch_size=64))
    refused("cut into patches", size=36)
    refused("one class", train=one(train))
    unknown = data.Images(train.pixels, np.full(48, -1), train.classes, "unknown")
    refused("48 training images have no label", train=unknown)
    refused("20 test images have no label", test=data.Images(test.pixels, np.full(20, -1), test.classes, "unknown"))
    refused("no test images", test=test.subset([]))
    refused("no training images", train=train.subset([]))
    refused("classes", test=data.Images(test.pixels, test.labels, tuple("abcdefghij"), "others"))
    broken = Backbone("vit_pico_patch8", 32)
    broken.vit.cls_token.data[..., 0] = float("nan")
    refused("not finite", backbone=broken)


def one(images: data.Images) -> data.Images:
    return data.Images(images.pixels, np.full(len(images), 2), images.classes, "one")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 5}, "warmup_epochs=20 must be fewer than epochs=5"),
        ({"batch_size": 1020}, "accumulate=8"),
        ({"batch_size": 8}, "even ones for mixup"),
        ({"lrs": ()}, "lrs"),
        ({"lrs": (1e-3, 1e-3)}, "lrs"),
        ({"lrs": (1e-7,)}, "min_lr"),
        ({"lrs": (float("nan"),)}, "lr=nan"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"erase": 1.1}, "erase"),
        ({"mixup": -1.0}, "mixup"),
        ({"lr_batch_size": 0}, "lr_batch_size"),
        ({"rand_augment": "strong"}, "rand_augment='strong'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        VIT_S.but(**changes)
    assert VIT_S.but(erase=1.0, layer_decay=1.0, rand_augment="", drop_path=0.0)


def test_a_loss_that_is_not_finite_ends_with_one_clear_line():
    train, test = images()
    settings = CPU.but(lrs=(1e30,), epochs=3, batch_size=16, warmup_epochs=0)
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d.*lr=1e\+30.*smaller lrs") as error:
        fine_tune(real_features.backbone(), train, test, settings=settings, progress=False)
    assert "\n" not in str(error.value)


def test_one_test_image_and_a_test_class_that_training_lacks_are_counted():
    train, test = images()
    known = train.subset(np.flatnonzero(train.labels < 4))
    settings = CPU.but(epochs=2, batch_size=8, warmup_epochs=0)
    unseen = test.subset(np.flatnonzero(test.labels == 9)[:1])
    found = fine_tune(real_features.backbone(), known, unseen, settings=settings, progress=False)
    assert (found.n, found.accuracy, found.per_class) == (1, 0.0, 0.0) and found.interval[0] == 0
