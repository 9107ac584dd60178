import numpy as np

from prototypes_lib.schedules import cosine, linear_warmup


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
