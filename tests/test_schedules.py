import numpy as np
import pytest

from prototypes_lib.schedules import cosine, linear, linear_warmup
from prototypes_lib.settings import Run


def test_cosine_is_dinos_formula():
    steps, warmup = 50, 10
    got = cosine(1e-3, 1e-6, steps, warmup_steps=warmup)
    i = np.arange(steps - warmup)
    expected = np.concatenate(
        [np.linspace(0, 1e-3, warmup), 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * i / len(i)))]
    )
    assert np.allclose(got, expected, rtol=1e-14)


def test_momentum_rises_and_never_reaches_one():
    m = cosine(0.996, 1.0, 200)
    assert m[0] == 0.996 and (np.diff(m) > 0).all() and m[-1] < 1


def test_a_warmup_longer_than_the_run_is_cut():
    assert len(cosine(1.0, 0.0, 5, warmup_steps=9)) == 5
    assert len(linear_warmup(0.04, 0.07, 5, 9)) == 5


def test_temperature_rises_to_its_end_and_stays():
    t = linear_warmup(0.04, 0.07, 20, 6)
    assert np.allclose(t[:6], np.linspace(0.04, 0.07, 6)) and (t[5:] == 0.07).all()
    assert (linear_warmup(0.04, 0.07, 4, 0) == 0.07).all()


def test_a_stretched_schedule_is_the_start_of_a_longer_one():
    assert np.array_equal(
        cosine(1.0, 0.1, 80, warmup_steps=7, stretch=1.25), cosine(1.0, 0.1, 100, warmup_steps=7)[:80]
    )
    assert np.array_equal(linear(0.2, 1.0, 80, stretch=1.25), linear(0.2, 1.0, 100)[:80])


def test_linear_rises_evenly_and_stops_short_of_its_end():
    m = linear(0.996, 1.0, 40)
    assert m[0] == 0.996 and np.allclose(np.diff(m), 1e-4) and m[-1] < 1


RECIPES = {  # settings of the learning rate, its peak, and its value at the first step
    "DINO, ViT-S/16": ({"batch_size": 1024}, 2e-3, 0.0),
    "DINO, ViT-B/16": ({"batch_size": 1024, "lr": 7.5e-4, "min_lr": 2e-6}, 3e-3, 0.0),
    "SimDINO": ({"batch_size": 512}, 1e-3, 0.0),
    "DINOv2": ({"batch_size": 2048, "lr": 4e-3, "lr_scaling": "sqrt", "lr_batch_size": 1024}, 4e-3 * 2**0.5, 0.0),
    "SimDINOv2": (
        {"batch_size": 512, "lr": 4e-3, "lr_scaling": "sqrt", "lr_batch_size": 1024, "warmup_lr": 1e-6},
        4e-3 * 0.5**0.5,
        1e-6,
    ),
    "MSN": ({"batch_size": 1024, "lr": 1e-3, "lr_scaling": "none", "warmup_lr": 2e-4}, 1e-3, 2e-4),
    "SwAV": ({"batch_size": 4096, "lr": 4.8, "lr_scaling": "none", "warmup_lr": 0.3, "min_lr": 0.0048}, 4.8, 0.3),
}


@pytest.mark.parametrize(("settings", "peak", "first"), RECIPES.values(), ids=RECIPES)
def test_the_settings_of_a_published_recipe_give_its_learning_rates(settings, peak, first):
    run = Run(**settings)
    rate = cosine(run.peak_lr, run.min_lr, 1000, warmup_steps=100, warmup_from=run.warmup_lr)
    assert np.isclose(rate.max(), peak, rtol=1e-12) and rate.argmax() in (99, 100) and rate[0] == first
    assert run.min_lr < rate[-1] < run.min_lr + 1e-5 * peak
