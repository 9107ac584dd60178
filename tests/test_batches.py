"""A batch is a function of (seed, step) and of the place in it; reading ahead changes only when images come."""

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from prototypes_lib import batches, ranks
from prototypes_lib.batches import Batches, multicrop
from prototypes_lib.data import Images
from prototypes_lib.masks import block_masks, dropped
from prototypes_lib.methods import METHODS, Views
from prototypes_lib.settings import Run

GRID = (4, 4)
N = 40


def method(name="ibot"):
    return METHODS[name].but(views=Views(2, 2) if name != "msn" else Views(2, 2, n_targets=1))


def images(tmp_path=None, n=N, size=32) -> Images:
    """Every image is told from the others by its pixels; a memory map where a folder is given."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    if tmp_path is not None:
        stored = np.memmap(tmp_path / "pixels", np.uint8, "w+", shape=pixels.shape)
        stored[:] = pixels
        pixels = stored
    return Images(pixels, np.zeros(n, np.int64), ("all",), "noise")


def run(**changes) -> Run:
    return Run.small(**({"batch_size": 8, "epochs": 3.0, "seed": 3} | changes))


def made(settings=None, of=None, name="ibot") -> Batches:
    return Batches(of or images(), settings or run(), method(name), GRID, "cpu")


def seed_of(*key) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def written_out(name, step):
    """The formula of recorded runs, once more: order, crops and masks of a step, for one process and one part."""
    settings, them, of = run(), images(), method(name)
    seeded = lambda *key: torch.Generator().manual_seed(seed_of(settings.seed, *key))
    epoch, place = divmod(step, N // 8)
    rows = torch.randperm(N, generator=seeded("order", epoch))[place * 8 : (place + 1) * 8]
    numbers = seeded("views", step)
    views = multicrop(of, settings).views(torch.from_numpy(them.pixels[rows.numpy()]), numbers)
    if of.mask_student:
        return rows, views, dropped(GRID, of.mask_student, generator=numbers)
    if of.patch is None:
        return rows, views, None
    patch = of.patch
    masks = block_masks(
        16, GRID, patch.ratio, generator=numbers, masked=patch.probability, shape=patch.shape,
        stratified=patch.stratified, min_area=patch.min_area,
    )  # fmt: skip
    return rows, views, masks


def equal(one, other) -> bool:
    return one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["ibot", "dinov2", "msn", "dino"])
def test_views_and_masks_are_those_of_recorded_runs(name):
    batches_ = made(name=name)
    for step in (0, 4, 5, 13):
        rows, views, masks = written_out(name, step)
        ours, hidden = batches_.batch(step)
        assert torch.equal(batches_.rows(step), rows)
        assert len(ours) == 4 and all(torch.equal(a, b) for a, b in zip(ours, views, strict=True))
        assert equal(hidden, masks)


def test_random_streams_are_those_of_the_first_release():
    """Digests of what is drawn: a change here makes every recorded run another one."""
    batches_ = made()
    parameters, masks = batches_._parameters(2)
    drawn = [c.boxes for _, c, _ in parameters] + [l.order for _, _, l in parameters] + [masks.long()]
    drawn += [(l.factors * 1000).long() for _, _, l in parameters] + [batches_.rows(2)]
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in drawn)).hexdigest()
    assert digest[:16] == "8faaaadd22ba3eb3"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ibot", "msn", "dino"])
@pytest.mark.parametrize(("world", "parts"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_slices_over_processes_and_parts_are_the_batch_bit_for_bit(monkeypatch, name, world, parts):
    whole, hidden = made(name=name).batch(7)
    views, masks = [], []
    for part in range(parts):
        for rank in range(world):
            monkeypatch.setattr(ranks, "world", lambda: world)
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            own, own_masks = made(run(accumulate=parts), name=name).batch(7, part)
            assert all(len(view) == 8 // world // parts for view in own)
            views.append(own)
            masks.append(own_masks)
    assert all(torch.equal(torch.cat(own), view) for own, view in zip(zip(*views, strict=True), whole, strict=True))
    if hidden is None:
        assert masks == [None] * len(masks)
    elif name == "msn":
        assert all(torch.equal(own, hidden) for own in masks)
    else:
        joined = torch.cat([own.unflatten(0, (2, -1)) for own in masks], 1).flatten(0, 1)
        assert torch.equal(joined, hidden)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_memory_map_gives_the_batches_of_an_array_in_any_order_of_steps(tmp_path, workers):
    resident = made(run(accumulate=2))
    with made(run(accumulate=2, workers=workers), images(tmp_path)) as mapped:
        assert resident.resident is not None and mapped.resident is None
        places = [(0, 0), (0, 1), (1, 0), (1, 1), (9, 0), (9, 0), (9, 1), (2, 1), (14, 0), (14, 1), (16, 1)]
        for step, part in places:  # a resumed run, a repeated step, a step back, the last ones and one beyond
            expected, masks = resident.batch(step, part)
            views, hidden = mapped.batch(step, part)
            assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True)) and equal(hidden, masks)


def test_parts_are_read_ahead_in_order_and_no_more_than_are_wanted(tmp_path, monkeypatch):
    asked, read = [], Batches._read
    monkeypatch.setattr(Batches, "_read", lambda self, step, part: asked.append(step) or read(self, step, part))
    with made(run(workers=2), images(tmp_path)) as batches_:
        for step in range(batches_.steps):
            batches_.batch(step)
            assert len(batches_._coming) <= 2
        assert sorted(asked) == list(range(batches_.steps)), "each step once, none beyond the end"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_what_comes_next_is_read_while_the_network_computes(tmp_path, monkeypatch):
    readers, read = [], Batches._read
    reading = lambda self, step, part: readers.append(threading.current_thread().name) or read(self, step, part)
    monkeypatch.setattr(Batches, "_read", reading)
    for workers in (0, 2):
        readers.clear()
        with made(run(workers=workers), images(tmp_path)) as batches_:
            batches_.batch(0)
            assert batches_.waited() > 0 and batches_.waited() == 0
            for future in batches_._coming.values():  # the network's turn
                future.result(timeout=30)
            before = len(readers)
            batches_.batch(1)
            assert before == 1 + workers, "as many parts ahead as there are threads"
        assert all(name.startswith("reader") == bool(workers) for name in readers)


def test_an_error_of_a_thread_comes_out_at_its_step_and_the_rest_goes_on(tmp_path, monkeypatch):
    read = Batches._read

    def failing(self, step, part):
        if step == 2:
            raise OSError("Input/output error")
        return read(self, step, part)

    monkeypatch.setattr(Batches, "_read", failing)
    with made(run(workers=2), images(tmp_path)) as batches_:
        batches_.batch(0)
        batches_.batch(1)
        with pytest.raises(OSError, match=r"images of step 2 could not be read: Input/output error"):
            batches_.batch(2)
        batches_.batch(3)


def test_an_interrupt_leaves_no_thread(tmp_path, monkeypatch):
    def interrupted(self, step, part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), made(run(workers=2), images(tmp_path)) as batches_:
        batches_.batch(0)
        monkeypatch.setattr(Batches, "_pixels", interrupted)
        batches_.batch(1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_a_batch_that_does_not_divide_is_one_clear_line_before_any_work(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(ValueError, match=r"batch_size=8 .* 2 processes x accumulate=3 .* multiple of 6") as error:
        made(run(accumulate=3))
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="fewer than one batch"):
        made(run(batch_size=41))
    with pytest.raises(ValueError, match="part=1 of a step in accumulate=1"):
        made().batch(0, 1)


def test_an_epoch_has_every_image_once_and_epochs_and_seeds_have_orders_of_their_own():
    one, other = made(), made(run(seed=4))
    epochs = [
        torch.cat([of.rows(step) for step in range(start, start + 5)]) for of, start in ((one, 0), (one, 5), (other, 0))
    ]
    assert all(torch.equal(epoch.sort().values, torch.arange(N)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert one.steps == 15 and one.steps_per_epoch == 5


def test_views_change_with_the_step_even_of_the_same_image():
    batches_ = made()
    batches_.resident = batches_.resident[:1].expand_as(batches_.resident)
    assert not torch.equal(batches_.batch(0)[0][0], batches_.batch(1)[0][0])


def test_masks_are_drawn_as_the_method_says():
    ibot = method("ibot")

    def hidden(**patch):
        of = ibot.but(patch=replace(ibot.patch, **patch))
        drawn = Batches(images(), run(), of, GRID, "cpu")
        return torch.stack([drawn.batch(step)[1].sum((1, 2)) for step in range(4)])  # 16 crops of 16 patches a step

    all_of_them = hidden(probability=1.0, ratio=(0.3, 0.5), shape="rand")
    assert int(all_of_them.min()) == 4 and int(all_of_them.max()) <= 8
    assert ((hidden(stratified=True, shape="rand", ratio=(0.3, 0.5)) > 0).sum(1) == 8).all()
    assert not torch.equal(hidden(min_area=1), hidden(min_area=4))


def test_small_crops_are_blurred_less():
    assert multicrop(method(), Run()).blur_sigma == (0.1, 2.0)
    assert multicrop(method(), run()).blur_sigma == pytest.approx((0.1 / 7, 2 / 7))
    assert batches.number(1, "views", 2) == seed_of(1, "views", 2)
