"""Views against torchvision, Pillow and SciPy, image by image, and against the distribution of DINO's augmentation."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp

from prototypes_lib import photometric
from prototypes_lib import views as views_module
from prototypes_lib.photometric import Looks, Photometric
from prototypes_lib.resampling import cubic_windows, gaussian_windows
from prototypes_lib.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crops,
    MultiCrop,
    draw_boxes,
    eval_view,
    part_of,
    resized_crops,
)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SMALL = MultiCrop(n_local=3, global_size=32, local_size=16, blur_sigma=(0.1, 1.0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(n, height, width, seed=0):
    """Images with smooth color and some noise, so that hue, contrast and edges all matter; uint8 NHWC."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(n, height, width, 3)), (0, height / 8, width / 8, 0))
    smooth = smooth / smooth.std((1, 2), keepdims=True) * 60 + rng.uniform(60, 190, size=(n, 1, 1, 3))
    noisy = smooth + rng.normal(size=smooth.shape) * 12
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def channels_first(images):
    return images.permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (32, 32, 16), (150, 200, 96), (120, 90, 224)])
def test_a_resized_crop_is_torchvisions_antialiased_bicubic_resized_crop(height, width, size):
    images = channels_first(picture(4, height, width)).float() / 255
    boxes = torch.stack(
        [
            draw_boxes(4, height, width, (0.05, 0.25), seeded(1)),
            draw_boxes(4, height, width, (0.25, 1.0), seeded(2)),
        ]
    )
    boxes[0, 0] = torch.tensor([height - 2, width - 3, 2, 3])  # a tiny crop in the corner
    boxes[1, 0] = torch.tensor([0, 0, height, width])
    flip = torch.rand(2, 4, generator=seeded()) < 0.5
    ours = resized_crops(images, Crops(boxes, flip), size)
    for v in range(2):
        for b in range(4):
            expected = F.resized_crop(
                images[b], *boxes[v, b].tolist(), [size, size], T.InterpolationMode.BICUBIC, antialias=True
            )
            expected = F.hflip(expected) if flip[v, b] else expected
            torch.testing.assert_close(ours[v, b], expected.clamp(0, 1), atol=1e-4, rtol=0)


def cubic_matrix(start, length, size_in, size_out):
    """Keys' kernel, antialiased, as a dense matrix in double precision, pixel by pixel."""
    matrix, scale = np.zeros((size_out, size_in)), length / size_out
    for row in range(size_out):
        for pixel in range(length):
            d = abs(pixel + 0.5 - scale * (row + 0.5)) / max(scale, 1)
            near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            matrix[row, start + pixel] = near if d < 1 else far if d < 2 else 0
    return matrix / matrix.sum(1, keepdims=True)


def dense(windows, size_in):
    """Windows as the matrices they stand for, (n, out, size_in)."""
    first, weights = windows
    pixel = (first[..., None] + torch.arange(weights.shape[2])).clamp(0, size_in - 1)
    return torch.zeros(*first.shape, size_in).scatter_add(2, pixel, weights)


@given(length=st.integers(1, 60), start=st.integers(0, 40), size_out=st.integers(1, 70))
def test_the_windows_of_a_resize_are_keys_kernel_inside_the_crop_and_nothing_outside(length, start, size_out):
    start_, length_ = torch.tensor([start]), torch.tensor([length])
    weights = dense(cubic_windows(start_, length_, size_out), 100)[0]
    np.testing.assert_allclose(weights.numpy(), cubic_matrix(start, length, 100, size_out), atol=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones(size_out), atol=1e-5, rtol=0)
    flipped = dense(cubic_windows(start_, length_, size_out, torch.tensor([True])), 100)[0]
    assert torch.equal(flipped, weights.flip(0))


@given(length=st.integers(1, 60), other=st.integers(1, 100), size_out=st.integers(1, 70))
def test_a_window_is_the_same_bit_for_bit_whatever_else_is_resized_or_blurred(length, other, size_out):
    zeros = torch.zeros(2, dtype=torch.long)
    both = dense(cubic_windows(zeros, torch.tensor([length, other]), size_out), 100)[0]
    assert torch.equal(both, dense(cubic_windows(zeros[:1], torch.tensor([length]), size_out), 100)[0])
    sigma = torch.tensor([length, other]) / 30
    both = dense(gaussian_windows(sigma, 40), 40)[0]
    assert torch.equal(both, dense(gaussian_windows(sigma[:1], 40), 40)[0])


def test_a_crop_of_the_size_of_its_view_copies_the_pixels():
    images = torch.rand(1, 3, 20, 24, generator=seeded())
    crops = Crops(torch.tensor([[[3, 5, 16, 16]]]), torch.tensor([[False]]))
    torch.testing.assert_close(resized_crops(images, crops, 16)[0], images[:, :, 3:19, 5:21], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_operation_is_torchvisions(name):
    x = channels_first(picture(6, 12, 15)).float() / 255
    x[0, :, :3] = 0.5  # gray pixels, whose hue is undefined
    x[1, 0] = x[1, 1]  # ties between channels
    factor = torch.tensor([-0.5, 0.5, 0.07, -0.1, 0.0, 0.3]) + (0 if name == "hue" else 1)
    ours = getattr(photometric, f"adjust_{name}")(x.clone(), factor)
    for i in range(6):
        expected = getattr(F, f"adjust_{name}")(x[i], float(factor[i]))
        torch.testing.assert_close(ours[i], expected, atol=2e-5, rtol=0)


def test_grayscale_is_torchvisions_and_solarize_is_pillows():
    images = picture(2, 9, 11)
    x = channels_first(images).float() / 255
    torch.testing.assert_close(photometric.grayscale(x), F.rgb_to_grayscale(x), atol=1e-6, rtol=0)
    pillow = np.asarray(ImageOps.solarize(Image.fromarray(images[0].numpy())))  # its default threshold is 128
    assert np.array_equal((photometric.solarize(x.clone())[0] * 255).round().numpy().transpose(1, 2, 0), pillow)


@pytest.mark.parametrize("size", [(4, 7), (32, 32), (40, 21)])
def test_blur_is_a_gaussian_filter_that_repeats_the_edge(size):
    x = torch.rand(5, 3, *size, generator=seeded())
    sigma = torch.tensor([0.1, 0.4, 1.0, 1.7, 2.0])
    blurred = photometric.gaussian_blur(x.clone(), sigma)
    for i, s in enumerate(sigma.tolist()):
        expected = gaussian_filter(x[i].double().numpy(), (0, s, s), mode="nearest", truncate=12 / s)
        np.testing.assert_allclose(blurred[i].numpy(), expected, atol=2e-5)


def test_blur_leaves_a_constant_image_constant():
    x = torch.full((3, 3, 6, 6), 0.37)
    blurred = photometric.gaussian_blur(x.clone(), torch.tensor([0.1, 1.0, 5.0]))
    torch.testing.assert_close(blurred, x, atol=1e-6, rtol=0)


def reference_view(image, box, flip, size, looks, mean, std):
    """One view of one image, by torchvision and SciPy, from given parameters."""
    x = F.resized_crop(image, *box.tolist(), [size, size], T.InterpolationMode.BICUBIC, antialias=True)
    x = F.hflip(x.clamp(0, 1)) if flip else x.clamp(0, 1)
    jitter = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for i in looks.order.tolist() if looks.jitter else ():
        x = jitter[i](x, float(looks.factors[i]))
    x = F.rgb_to_grayscale(x, 3) if looks.gray else x
    if s := float(looks.sigma):
        x = torch.from_numpy(gaussian_filter(x.numpy(), (0, s, s), mode="nearest", truncate=10 / s))
    x = F.solarize(x, 0.5) if looks.solarize else x
    return F.normalize(x, mean, std)


def test_every_view_is_the_chain_of_single_image_operations_with_the_drawn_parameters():
    images = channels_first(picture(8, 40, 36))
    crop = dataclasses.replace(SMALL, second=Photometric(blur=0.5, solarize=0.5))
    parameters = crop.draw(8, 40, 36, seeded(3))
    views = iter(crop.make(images, parameters))
    for size, crops, looks in parameters:
        for v in range(len(crops.boxes)):
            ours = next(views)
            for b in range(8):
                own = Looks(*(getattr(looks, f.name)[v, b] for f in dataclasses.fields(Looks)))
                expected = reference_view(
                    images[b] / 255, crops.boxes[v, b], crops.flip[v, b], size, own, crop.mean, crop.std
                )
                # A pixel within rounding of the threshold may be solarized on one side only.
                off = (ours[b] - expected).abs() > 1e-3
                assert off.float().mean() <= (0.01 if own.solarize else 0), (size, v, b)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(224, 224, (0.25, 1.0)), (32, 32, (0.05, 0.25)), (60, 200, (0.25, 1.0))],
)
def test_crop_boxes_have_the_distribution_of_torchvision(height, width, scale):
    n = 4000
    ours = draw_boxes(n, height, width, scale, seeded()).numpy()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (1, 50)])
def test_a_crop_that_never_fits_falls_back_to_the_central_one(height, width):
    ours = draw_boxes(50, height, width, (1.0, 1.0), seeded())
    theirs = T.RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert (ours == torch.tensor(theirs)).all()


def test_random_parameters_have_the_probabilities_and_ranges_of_dino():
    n = 20_000
    (_, crops, looks), (_, _, local) = MultiCrop(n_local=1).draw(n, 64, 64, seeded())

    def near(flags, p):
        return abs(flags.float().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-9

    for view, blur, solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2)):
        assert near(looks.sigma[view] > 0, blur) and near(looks.solarize[view], solarize)
        assert near(looks.jitter[view], 0.8) and near(looks.gray[view], 0.2) and near(crops.flip[view], 0.5)
    assert near(local.sigma[0] > 0, 0.5) and near(local.solarize[0], 0.0)

    low, high = looks.factors.amin((0, 1)), looks.factors.amax((0, 1))
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.8, -0.1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.2, 0.1]), atol=1e-3, rtol=0)
    uniform = np.random.default_rng(0).uniform(0.1, 2.0, n)
    assert ks_2samp(looks.sigma[0].numpy(), uniform).pvalue > 1e-3
    _, frequency = looks.order[0].unique(dim=0, return_counts=True)
    assert len(frequency) == 24 and (frequency - n / 24).abs().max() < 5 * (n / 24) ** 0.5


def dino_view(size, scale, blur, solarize):
    """DINO's augmentation of one Pillow image, as its paper describes it."""

    def gaussian(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(gaussian)], p=blur),
            T.RandomSolarize(128, p=solarize),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


@pytest.mark.slow
def test_pixels_have_the_statistics_of_dinos_pillow_pipeline():
    images, repeats = picture(60, 48, 48, seed=5), 10
    random.seed(0)
    torch.manual_seed(0)
    crop = MultiCrop(n_local=1, global_size=32, local_size=16)
    ours = [crop.views(images, seeded(i)) for i in range(repeats)]
    kinds = ((32, (0.25, 1.0), 1.0, 0.0), (32, (0.25, 1.0), 0.1, 0.2), (16, (0.05, 0.25), 0.5, 0.0))
    for i, kind in enumerate(kinds):
        transform = dino_view(*kind)
        theirs = torch.stack([transform(Image.fromarray(image.numpy())) for _ in range(repeats) for image in images])
        mine = torch.cat([views[i] for views in ours])

        def statistics(x):
            """A row per view: mean, spread, roughness, colorfulness."""
            return torch.stack(
                [
                    x.mean((1, 2, 3)),
                    x.std((1, 2, 3)),
                    x.diff(dim=3).abs().mean((1, 2, 3)),
                    (x[:, 0] - x[:, 2]).abs().mean((1, 2)),
                ],
                1,
            )

        a, b = statistics(mine), statistics(theirs)
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all(), kind
        assert ((a.std(0) / b.std(0)).log().abs() < 0.2).all(), kind


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_the_same_views_bit_for_bit_under_autocast_too_and_on_every_device(device):
    images = picture(6, 32, 32)
    once = SMALL.views(images, seeded(7))
    here = [SMALL.views(images.to(device), seeded(7)) for _ in range(2)]
    with torch.autocast(device, dtype=torch.bfloat16):
        here.append(SMALL.views(images.to(device), seeded(7)))
    other = SMALL.views(images, seeded(8))
    for v, view in enumerate(once):
        assert all(torch.equal(again[v], here[0][v]) for again in here)
        assert ((here[0][v].cpu() - view).abs() > 1e-3).float().mean() < 1e-3
        assert not torch.equal(other[v], view)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("height", "crop"), [(40, SMALL), (50, MultiCrop(n_local=2, global_size=33, local_size=15))])
def test_views_of_a_part_of_the_images_are_those_of_the_whole_bit_for_bit(height, crop, threads):
    images = picture(12, height, height - 3)
    parameters = crop.draw(12, height, height - 3, seeded(3))
    torch.set_num_threads(threads)
    try:
        whole = crop.make(images, parameters)
        for n in (1, 3, 6):
            for start in range(0, 12, n):
                own = slice(start, start + n)
                views = crop.make(images[own], [(size, part_of(c, own), part_of(l, own)) for size, c, l in parameters])
                assert all(torch.equal(a, b[own]) for a, b in zip(views, whole, strict=True))
    finally:
        torch.set_num_threads(1)


def test_images_made_a_few_at_a_time_to_stay_in_the_cache_are_those_made_at_once(monkeypatch):
    images = picture(9, 32, 32)
    once = SMALL.views(images, seeded())
    monkeypatch.setitem(views_module.TOGETHER, True, 1)
    assert all(torch.equal(a, b) for a, b in zip(SMALL.views(images, seeded()), once, strict=True))


def test_images_of_a_batch_get_different_parameters():
    views = SMALL.views(picture(1, 32, 32).expand(16, -1, -1, -1), seeded())
    assert all(len(view.flatten(1).unique(dim=0)) == 16 for view in views)


@pytest.mark.parametrize(("n_global", "n_local"), [(2, 3), (1, 0), (2, 0), (1, 2), (3, 1)])
def test_views_are_ordered_globals_first(n_global, n_local):
    views = dataclasses.replace(SMALL, n_global=n_global, n_local=n_local).views(picture(5, 30, 40), seeded())
    assert [tuple(v.shape) for v in views] == [(5, 3, 32, 32)] * n_global + [(5, 3, 16, 16)] * n_local
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in views)


def test_channels_last_and_channels_first_images_give_the_same_views():
    images = picture(3, 24, 24)
    for a, b in zip(SMALL.views(images, seeded()), SMALL.views(channels_first(images), seeded()), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(eval_view(images, 20), eval_view(channels_first(images), 20))


def test_making_views_leaves_the_images_and_the_global_random_state_alone():
    images = picture(3, 24, 24)
    before, state = images.clone(), torch.get_rng_state()
    SMALL.views(images, seeded())
    eval_view(images, 24)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("height", "width", "size"), [(300, 400, 224), (128, 100, 96), (20, 31, 32), (48, 48, 32)])
def test_the_evaluation_view_is_resize_and_center_crop(height, width, size):
    images = picture(2, height, width)
    reference = T.Compose(
        [
            T.Resize(size * 256 // 224, T.InterpolationMode.BICUBIC, antialias=True),
            T.CenterCrop(size),
            T.Lambda(lambda x: x.clamp(0, 1)),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    expected = reference(channels_first(images).float() / 255)
    torch.testing.assert_close(eval_view(images, size), expected, atol=1e-3, rtol=0)


def test_the_evaluation_view_of_images_of_that_size_only_normalizes():
    images = picture(2, 32, 32)
    expected = F.normalize(channels_first(images).float() / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    ours = eval_view(images, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiCrop(n_global=0), "n_global must be at least 1"),
        (lambda: MultiCrop(n_local=-1), "n_local must be at least 0"),
        (lambda: MultiCrop(local_size=0), "local_size must be at least 1"),
        (lambda: MultiCrop(global_scale=(0.5, 0.4)), "global_scale must satisfy"),
        (lambda: MultiCrop(local_scale=(0.0, 0.4)), "local_scale must satisfy"),
        (lambda: MultiCrop(local_scale=(0.5, 1.4)), "local_scale must satisfy"),
        (lambda: MultiCrop(flip=1.5), "flip must be a probability"),
        (lambda: MultiCrop(blur_sigma=(0.0, 2.0)), "blur_sigma must satisfy"),
        (lambda: MultiCrop(std=(0.2, 0.0, 0.2)), "std must be positive"),
        (lambda: Photometric(gray=-0.1), "gray must be in"),
        (lambda: Photometric(blur=float("nan")), "blur must be in"),
        (lambda: Photometric(hue=0.6), "hue must be in"),
        (lambda: SMALL.views(torch.zeros(2, 8, 8, 3), seeded()), "images must be uint8"),
        (lambda: SMALL.views(torch.zeros(2, 8, 8, 1, dtype=torch.uint8), seeded()), "images must be uint8"),
        (lambda: SMALL.views(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), seeded()), "must not be empty"),
        (lambda: eval_view(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 0), "size must be at least 1"),
    ],
)
def test_bad_settings_and_images_get_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
