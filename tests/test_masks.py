"""Block masks against a plain loop over images and blocks."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from prototypes_lib.masks import block_masks, dropped, mask_ratios


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_block_mask(height, width, quota, rng):
    """BEiT's block-wise masking of one image in plain Python."""
    mask = np.zeros((height, width), bool)
    least = max((min(height, width) // 3) ** 2, 1)
    while mask.sum() < quota:
        remaining = quota - mask.sum()
        for _ in range(10):
            area = rng.uniform(least, remaining)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            new = h * w - mask[top : top + h, left : left + w].sum()
            if 0 < new <= remaining:
                mask[top : top + h, left : left + w] = True
                break
        else:
            return mask
    return mask


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.3), ((14, 14), 0.5), ((8, 8), 0.4), ((4, 6), 0.5)])
def test_block_masks_have_the_distribution_of_the_plain_loop(grid, ratio):
    n, rng = 1500, random.Random(0)
    ours = block_masks(n, grid, ratio, generator=seeded()).numpy()
    theirs = np.stack([naive_block_mask(*grid, ratio * math.prod(grid), rng) for _ in range(n)])

    def edges(m):
        return (m[:, 1:] != m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] != m[:, :, :-1]).sum((1, 2))

    for statistic in (lambda m: m.sum((1, 2)), edges, lambda m: m.any(2).sum(1), lambda m: m[:, 0].sum(1)):
        a, b = statistic(ours), statistic(theirs)
        assert ks_2samp(a, b).pvalue > 1e-3
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / n) + 1e-9
    where = np.abs(ours.mean(0) - theirs.mean(0))
    assert where.max() < 5 * math.sqrt(0.5 / n)


def test_ibot_masks_half_of_the_images_with_ratios_from_a_tenth_to_a_half():
    n = 4000
    ratios = mask_ratios(n, generator=seeded())
    masked = ratios[ratios > 0].numpy()
    assert abs(len(masked) / n - 0.5) < 4 * 0.5 / math.sqrt(n)
    assert ks_2samp(masked, np.random.default_rng(0).uniform(0.1, 0.5, n)).pvalue > 1e-3
    hidden = block_masks(n, (14, 14), generator=seeded()).sum((1, 2))
    assert torch.equal(hidden > 0, ratios > 0)
    assert (hidden <= 196 * ratios + 1e-3).all() and abs(hidden.float().mean() / 196 - 0.15) < 0.01


@given(n=st.integers(1, 40), masked=st.sampled_from([0.0, 0.3, 0.5, 1.0]), seed=st.integers(0, 1000))
def test_stratified_ratios_fill_each_part_of_the_interval_once(n, masked, seed):
    ratios = mask_ratios(n, (0.1, 0.5), generator=seeded(seed), masked=masked, stratified=True)
    chosen, edges = ratios[ratios > 0].sort().values, torch.linspace(0.1, 0.5, int(n * masked) + 1)
    assert len(chosen) == int(n * masked)
    assert (chosen >= edges[:-1] - 1e-6).all() and (chosen <= edges[1:] + 1e-6).all()


def test_stratified_ratios_are_shuffled():
    first = mask_ratios(200, generator=seeded(), stratified=True)[:100]
    assert 25 < (first > 0).sum() < 75


@given(
    height=st.integers(2, 16),
    width=st.integers(2, 16),
    ratio=st.floats(0, 1),
    shape=st.sampled_from(["block", "rand"]),
    seed=st.integers(0, 1000),
)
def test_a_mask_never_exceeds_its_quota_and_random_patches_reach_it(height, width, ratio, shape, seed):
    masks = block_masks(5, (height, width), ratio, generator=seeded(seed), shape=shape)
    assert masks.shape == (5, height, width) and masks.dtype == torch.bool
    hidden, quota = masks.sum((1, 2)), math.floor(ratio * height * width + 1e-4)
    assert (hidden <= quota).all()
    if shape == "rand":
        assert (hidden == quota).all()
    elif quota >= max((min(height, width) // 3) ** 2, 1) * 2:
        assert (hidden > 0).any()


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_ratio_zero_masks_nothing_and_ratio_one_nearly_all(shape):
    assert not block_masks(20, (4, 4), 0.0, generator=seeded(), shape=shape).any()
    full = block_masks(20, (4, 4), 1.0, generator=seeded(), shape=shape)
    assert full.float().mean() > (0.7 if shape == "block" else 0.999)
    assert not block_masks(20, (4, 4), (0.1, 0.5), generator=seeded(), shape=shape, masked=0.0).any()
    assert block_masks(0, (4, 4), generator=seeded(), shape=shape).shape == (0, 4, 4)


def test_random_patches_are_masked_alike_everywhere():
    share = block_masks(4000, (4, 5), 0.3, generator=seeded(), shape="rand").float().mean(0)
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.21 / 4000)


def test_a_seed_gives_the_same_masks():
    once, again, other = (block_masks(64, (8, 8), generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_a_smaller_least_area_fills_the_quota_better():
    coarse, fine = (block_masks(300, (14, 14), 0.3, generator=seeded(), min_area=a).sum() for a in (16, 4))
    assert coarse < fine <= 300 * 58


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.2}, "mask ratios must satisfy"),
        ({"ratio": (0.5, 0.1)}, "mask ratios must satisfy"),
        ({"masked": -0.1}, "mask ratios must satisfy"),
        ({"shape": "circle"}, 'mask shape must be "block" or "rand"'),
        ({"grid": (1, 9)}, "too small"),
    ],
)
def test_bad_settings_get_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        block_masks(**{"n": 3, "grid": (4, 4), "generator": seeded()} | arguments)
    assert "\n" not in str(error.value)


@given(
    height=st.integers(1, 16), width=st.integers(1, 16), share=st.floats(0, 0.99), seed=st.integers(0, 1000)
)  # fmt: skip
def test_dropping_keeps_the_floor_of_the_share_that_stays(height, width, share, seed):
    gone = dropped((height, width), share, generator=seeded(seed))
    assert gone.shape == (height, width) and gone.dtype == torch.bool
    assert int((~gone).sum()) == math.floor(height * width * (1 - share) + 1e-9)


def test_dropping_a_tenth_of_ten_keeps_nine_whatever_binary_fractions_say():
    for tenths in range(1, 10):
        assert int((~dropped((2, 5), tenths / 10, generator=seeded())).sum()) == 10 - tenths


def test_msns_shares_leave_what_the_released_runs_leave():
    for share, kept in ((0.15, 166), (0.3, 137), (0.7, 58)):
        assert int((~dropped((14, 14), share, generator=seeded())).sum()) == kept


def test_any_patch_may_be_dropped_and_a_seed_drops_the_same():
    share = torch.stack([dropped((4, 5), 0.3, generator=seeded(s)) for s in range(2000)]).float().mean(0)
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.21 / 2000)
    assert torch.equal(dropped((4, 5), 0.3, generator=seeded(1)), dropped((4, 5), 0.3, generator=seeded(1)))


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_dropping_everything_is_refused(share):
    with pytest.raises(ValueError, match="share="):
        dropped((4, 4), share, generator=seeded())
