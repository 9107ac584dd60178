import errno
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from prototypes_lib import data
from prototypes_lib.backbones import Backbone
from prototypes_lib.evaluate import extract, feature_files
from prototypes_lib.evaluate.features import Features, check, kind
from prototypes_lib.views import eval_view

IMAGES = data.load("cifar10-5k", "test", limit=20, progress=False)


def network(name="vit_pico_patch8", **options):
    torch.manual_seed(0)
    backbone = Backbone(name, 32, **options).eval()
    for parameter in next(backbone.children()).norm.parameters() if name.startswith("vit") else ():
        torch.nn.init.normal_(parameter, std=0.5)  # so that the final norm is to be seen
    return backbone


def view(images=IMAGES, size=32):
    return eval_view(torch.from_numpy(images.pixels), size)


def test_features_are_the_class_tokens_of_a_network_in_eval_mode_which_is_put_back():
    backbone = network(drop_path_rate=0.5).train()
    features = extract(backbone, IMAGES, batch_size=8)
    assert backbone.training
    with torch.no_grad():
        expected = backbone.eval()(view())[0]
    assert torch.allclose(features.x, expected, atol=1e-5)
    assert features.labels.tolist() == IMAGES.labels.tolist()


@torch.no_grad()
def timms(backbone, x, n, norm=True):
    """Class tokens and patches of the last n blocks by timm's own method."""
    found = backbone.vit.get_intermediate_layers(x, n=n, norm=norm, return_prefix_tokens=True)
    return [prefix[:, 0] for _, prefix in found], found[-1][0]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("blocks", "pool"), [(1, False), (1, True), (3, False), (4, True)])
def test_blocks_and_mean_patch_are_those_of_timms_intermediate_layers(registers, norm, blocks, pool):
    backbone = network("vit_nano_patch8", reg_tokens=registers)
    found = extract(backbone, IMAGES, blocks=blocks, pool=pool, norm=norm, size=24, batch_size=7).x
    tokens, patches = timms(backbone, view(size=24), blocks, norm)
    expected = torch.cat(tokens + [patches.mean(1)] * pool, 1)
    assert found.shape == (20, 128 * (blocks + pool)) and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    if not norm:
        assert not torch.allclose(found, extract(backbone, IMAGES, blocks=blocks, pool=pool, size=24).x, atol=1e-2)


def test_named_features_are_those_of_the_papers():
    narrow, wide = network("vit_nano_patch8"), network("vit_pico_patch8", embed_dim=448)
    tokens, _ = timms(narrow, view(), 4)
    assert torch.allclose(extract(narrow, IMAGES, **kind(narrow, "D")).x, torch.cat(tokens, 1), atol=1e-5)
    assert torch.allclose(extract(narrow, IMAGES, **kind(narrow, "C")).x, tokens[-1], atol=1e-5)
    assert torch.allclose(extract(narrow, IMAGES, **kind(narrow, "MSN")).x, timms(narrow, view(), 1, False)[0][0])
    (token,), patches = timms(wide, view(), 1)
    found = extract(wide, IMAGES, **kind(wide, "D")).x
    assert torch.allclose(found, torch.cat([token, patches.mean(1)], 1), atol=1e-5)
    assert kind(network(), "D")["blocks"] == 2  # it has no more
    with pytest.raises(ValueError, match=r"'E'.*'C', 'D'"):
        kind(narrow, "E")


def test_a_resnet_has_one_kind_of_features():
    backbone = network("resnet_pico")
    with torch.no_grad():
        expected = backbone(view())[0]
    for name in ("C", "D", "MSN"):
        assert torch.allclose(extract(backbone, IMAGES, **kind(backbone, name)).x, expected, atol=1e-5)
    for options in ({"blocks": 2}, {"pool": True}):
        with pytest.raises(ValueError, match="resnet_pico has one kind of features"):
            extract(backbone, IMAGES, **options)
    with pytest.raises(ValueError, match="last map only"):
        backbone.last_blocks(view(), 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"blocks": 3}, "2 blocks"), ({"blocks": 0}, "2 blocks"), ({"batch_size": 0}, "batch_size"), ({"size": 30}, "30")],
)
def test_a_wrong_request_is_one_line_before_any_work(options, says, monkeypatch):
    backbone = network()
    monkeypatch.setattr(backbone, "last_blocks", None)
    with pytest.raises(ValueError, match=says) as caught:
        extract(backbone, IMAGES, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="1 to 2"):
        network().last_blocks(view(), 3)


def test_numbers_that_are_not_finite_and_no_images_are_no_error_of_extract():
    backbone = network()
    backbone.vit.norm.bias.data[3] = torch.nan
    assert bool(extract(backbone, IMAGES).x[:, 3].isnan().all())
    none = extract(backbone, IMAGES.subset([]), blocks=2)
    assert none.x.shape == (0, 128) and none.labels.shape == (0,)
    for given in ({}, {"in_memory": False}):
        assert extract(backbone, IMAGES.subset([]), **given).x.shape == (0, 64)


# ---- transforms


@dataclass(frozen=True)
class Darker:
    by: int

    def __call__(self, images, indices):
        return images // self.by


def test_a_transform_sees_each_image_with_its_index_before_the_view():
    seen = []

    def mark(images, indices):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        seen.extend(indices.tolist())
        assert torch.equal(images, torch.from_numpy(IMAGES.pixels[indices.numpy()]).permute(0, 3, 1, 2))
        return images // 2

    backbone = network()
    found = extract(backbone, IMAGES, transform=mark, batch_size=6).x
    darker = replace(IMAGES, pixels=IMAGES.pixels // 2)
    assert seen == list(range(20)) and torch.equal(found, extract(backbone, darker, batch_size=6).x)


def test_a_transform_that_returns_no_images_is_refused_and_the_network_put_back():
    backbone = network().train()
    backbone.vit.blocks[0].eval()
    modes = [m.training for m in backbone.modules()]
    with pytest.raises(ValueError, match="transform must return uint8"):
        extract(backbone, IMAGES, transform=lambda images, _: images.float())
    assert [m.training for m in backbone.modules()] == modes and len(set(modes)) == 2


# ---- the cache


def no_work(backbone):
    def fail(*_):
        raise AssertionError("computed again")

    backbone.last_blocks = fail
    return backbone


def stored(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_same_question_is_answered_from_the_cache_whoever_asks(tmp_path):
    first = extract(network(), IMAGES, cache=tmp_path / "deep" / "cache", pool=True, transform=Darker(2))
    again = no_work(network())
    torch.nn.init.normal_(again.mask_token)  # plays no part in features
    relabeled = replace(IMAGES, labels=IMAGES.labels[::-1].copy(), name="another")
    found = extract(
        again, relabeled, cache=str(tmp_path / "deep" / "cache"), pool=True, transform=Darker(2), batch_size=3
    )
    assert torch.equal(found.x, first.x) and found.labels.tolist() == relabeled.labels.tolist()
    (name,) = stored(tmp_path / "deep" / "cache")
    assert np.array_equal(np.load(tmp_path / "deep" / "cache" / name), first.x.numpy())


def test_whatever_changes_features_is_another_entry(tmp_path):
    changed = network()
    changed.vit.blocks[1].mlp.fc1.bias.data[5] += 1e-6
    heads = network(num_heads=2)
    heads.load_state_dict(network().state_dict())
    pixels = IMAGES.pixels.copy()
    pixels[19, 31, 31, 2] ^= 1
    asked = [
        (network(), IMAGES, {}), (changed, IMAGES, {}), (heads, IMAGES, {}),
        (network(interpolation="official"), IMAGES, {}),
        (network(), replace(IMAGES, pixels=pixels), {}), (network(), IMAGES.subset(slice(19)), {}),
        (network(), IMAGES, {"size": 24}), (network(), IMAGES, {"blocks": 2}), (network(), IMAGES, {"pool": True}),
        (network(), IMAGES, {"norm": False}), (network(), IMAGES, {"mean": (0.5, 0.5, 0.5)}),
        (network(), IMAGES, {"std": (0.5, 0.5, 0.5)}), (network(), IMAGES, {"transform": Darker(2)}),
        (network(), IMAGES, {"transform": Darker(3)}),
    ]  # fmt: skip
    for n, (backbone, images, options) in enumerate(asked):
        found = extract(backbone, images, cache=tmp_path, **options)
        assert len(stored(tmp_path)) == n + 1, options
        assert torch.equal(found.x, extract(backbone, images, **options).x)
    with torch.autocast("cpu", torch.bfloat16):
        extract(network(), IMAGES, cache=tmp_path)
    assert len(stored(tmp_path)) == len(asked) + 1


def test_of_many_pixels_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "WHOLE", 1000)
    monkeypatch.setattr(feature_files, "SAMPLES", 10)
    extract(network(), IMAGES, cache=tmp_path)
    extract(no_work(network()), IMAGES, cache=tmp_path)
    extract(network(), IMAGES.subset(slice(19)), cache=tmp_path)
    assert len(stored(tmp_path)) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped", "longer", "empty", "header", "folder"])
def test_a_damaged_entry_is_told_and_made_anew(harm, tmp_path, capsys):
    expected = extract(network(), IMAGES, cache=tmp_path).x
    assert capsys.readouterr() == ("", "")
    (name,) = stored(tmp_path)
    path, content = tmp_path / name, bytearray((tmp_path / name).read_bytes())
    content[{"flipped": 1000, "header": 12}.get(harm, 0)] ^= 1 if harm in ("flipped", "header") else 0
    path.write_bytes({"cut": content[:-5], "longer": content + b"x", "empty": b""}.get(harm, content))
    if harm == "folder":
        path.unlink()
        (path / "x").mkdir(parents=True)
        with pytest.raises(OSError, match="could not be written"):
            extract(network(), IMAGES, cache=tmp_path, in_memory=False)
        return
    for in_memory in (False, True):
        assert torch.equal(extract(network(), IMAGES, cache=tmp_path, in_memory=in_memory).x, expected)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and name in told and "made anew" in told
    assert torch.equal(extract(no_work(network()), IMAGES, cache=tmp_path).x, expected)


def test_a_transform_that_does_not_say_what_it_does_cannot_be_kept(tmp_path):
    big = Darker(torch.arange(2000.0))
    for transform in (lambda images, _: images, big):
        with pytest.raises(ValueError, match="repr") as caught:
            extract(network(), IMAGES, transform=transform, cache=tmp_path)
        assert "\n" not in str(caught.value)
    assert extract(network(), IMAGES, transform=lambda images, _: images).x.shape == (20, 64)


def test_a_cache_that_cannot_be_made_is_one_line_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written") as caught:
        extract(no_work(network()), IMAGES, cache=tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_a_full_disk_does_not_cost_the_work_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_files, "fill", full)
    backbone = network().train()
    found = extract(backbone, IMAGES, cache=tmp_path)
    assert torch.equal(found.x, extract(network(), IMAGES).x) and stored(tmp_path) == []
    told = capsys.readouterr().err
    assert told.startswith("features are not kept") and told.count("\n") == 1 and "free space" in told
    for cache in (tmp_path, None):
        with pytest.raises(OSError, match="free space"):
            extract(backbone, IMAGES, cache=cache, in_memory=False)
    assert backbone.training and stored(tmp_path) == []


def test_what_dies_halfway_leaves_the_old_entry(tmp_path):
    def dies():
        yield torch.zeros(5, 4)
        raise KeyboardInterrupt

    place = tmp_path / "features.npy"
    feature_files.write(place, (10, 4), [torch.ones(10, 4)])
    with pytest.raises(KeyboardInterrupt):
        feature_files.write(place, (10, 4), dies())
    assert torch.equal(feature_files.read(place, (10, 4), True), torch.ones(10, 4)) and stored(tmp_path) == [place.name]


def _write(place, value):
    for _ in range(20):
        feature_files.write(place, (3000, 4), [torch.full((1500, 4), value)] * 2)
    sys.exit(0)


def test_several_processes_at_once_leave_one_whole_entry(tmp_path, capsys):
    place = tmp_path / "features.npy"
    feature_files.write(place, (3000, 4), [torch.zeros(3000, 4)])
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(place, float(value))) for value in (1, 2, 3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for in_memory in (True, False):
            found = feature_files.read(place, (3000, 4), in_memory)
            assert len(found.unique()) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert stored(tmp_path) == [place.name] and capsys.readouterr().err == ""


# ---- larger than memory


@pytest.mark.parametrize("cached", [True, False])
def test_features_can_lie_in_a_file(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    cache = tmp_path / "cache" if cached else None
    expected, held = extract(network(), IMAGES).x, []
    monkeypatch.setattr(feature_files, "mapped", lambda *a, f=feature_files.mapped: held.append(f(*a)) or held[-1])
    found = extract(network(), IMAGES, cache=cache, in_memory=False, batch_size=6).x
    assert found is held[0] and torch.allclose(found, expected, atol=1e-6)
    assert stored(tmp_path / "tmp") == []
    if cached:
        again = extract(no_work(network()), IMAGES, cache=cache, in_memory=False).x
        before = again.clone()
        again.zero_()  # goes to memory only
        assert again is held[1] and torch.equal(before, found)
        assert torch.equal(extract(no_work(network()), IMAGES, cache=cache).x, found)


def test_free_memory_decides_where_features_lie(monkeypatch):
    from prototypes_lib.evaluate import features

    made = []
    monkeypatch.setattr(feature_files, "temporary", lambda *a, f=feature_files.temporary: made.append(1) or f(*a))
    for free, files in ((2 * 20 * 64 * 4, 0), (2 * 20 * 64 * 4 - 1, 1)):
        monkeypatch.setattr(features, "available_memory", lambda free=free: free)
        extract(network(), IMAGES)
        assert len(made) == files


def test_progress_is_text_on_request(capsys):
    extract(network(), IMAGES)
    assert capsys.readouterr() == ("", "")
    extract(network(), IMAGES, progress=True)
    shown = capsys.readouterr()
    assert "features" in shown.out and "20/20" in shown.out and shown.err == ""


# ---- what can be evaluated


def some(n=5, dim=3):
    return Features(torch.randn(n, dim), torch.arange(n) % 2)


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (some(0), some(), "no training images"),
        (some(), some(0), "no test images"),
        (some(), some(dim=4), "3 dimensions and test features 4"),
        (some(), Features(torch.tensor([[1.0, 2, 3], [1, torch.nan, 3]]), torch.arange(2)), "1 test images.*image 1"),
        (Features(torch.full((2, 3), torch.inf), torch.arange(2)), some(), "2 training images.*not finite.*image 0"),
        (
            some(),
            Features(torch.tensor([[1.0, 2, 3], [1, -1e19, 3]]), torch.arange(2)),
            "1 test.*beyond 1e.15.*1",
        ),
        (Features(torch.zeros(3, 3), torch.tensor([0, -1, -1])), some(), r"2 training images have no label"),
    ],
)
def test_features_that_cannot_be_evaluated_are_one_line(train, test, says):
    with pytest.raises(ValueError, match=says) as caught:
        check(train, test)
    assert "\n" not in str(caught.value)


def test_good_features_pass_in_blocks_of_rows():
    check(some(), some())
    x = torch.zeros(7, 3)
    x[5, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 test images.*image 5"):
        check(some(), Features(x, torch.zeros(7, dtype=torch.long)), rows=2)
