"""Each corruption against another computation: scipy, Pillow, colorsys, plain loops, statistics."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from prototypes_lib import data
from prototypes_lib.evaluate.corruptions import (
    CORRUPTIONS,
    GROUPS,
    TABLE,
    Corruption,
    blur,
    corrupt,
    digital,
    noise,
    weather,
)
from prototypes_lib.views import eval_view

SMALL = torch.from_numpy(data.load("cifar10-5k", "test", limit=16, progress=False).pixels).permute(0, 3, 1, 2)
_FILES = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
PHOTOS = torch.from_numpy(np.stack([np.array(one.resize((224, 224))) for one in _FILES])).permute(0, 3, 1, 2)


def seeds(n, start=0):
    return [torch.Generator().manual_seed(start + i) for i in range(n)]


def gray(value, n=4, side=64):
    return torch.full((n, 3, side, side), value / 255)


def numbers(images):
    return torch.arange(len(images))


def channels(x, change):
    """`change` of each channel of each image (batch, 3, h, w), as numpy arrays."""
    return np.stack([[change(plane) for plane in image] for image in np.asarray(x, np.float64)])


def close(ours, theirs, levels=0.05):
    """Within so many 8-bit levels."""
    assert np.abs(np.asarray(ours, np.float64) - np.asarray(theirs)).max() * 255 < levels


def test_there_are_fifteen_of_four_kinds_at_five_severities():
    assert [len(names) for names in GROUPS.values()] == [3, 4, 4, 4] and len(CORRUPTIONS) == 15
    assert sum(GROUPS.values(), ()) == CORRUPTIONS
    assert all(len(kind.imagenet) == len(kind.cifar) == 5 for kind in TABLE.values())


def test_gaussian_noise_has_the_published_deviation():
    for c in TABLE["gaussian_noise"].imagenet:
        residual = noise.gaussian_noise(gray(128), c, seeds(4)) - gray(128)
        assert abs(float(residual.mean())) < 0.02 * c and abs(float(residual.std()) / c - 1) < 0.02


def test_shot_noise_is_poisson_light():
    for c in TABLE["shot_noise"].imagenet:
        for value in (51, 204):
            counts = noise.shot_noise(gray(value), c, seeds(4)) * c
            rate = c * value / 255
            assert (counts - counts.round()).abs().max() < 1e-4
            assert abs(float(counts.mean()) / rate - 1) < 0.05 and abs(float(counts.var()) / rate - 1) < 0.05


def test_impulse_noise_turns_a_share_of_the_values_black_or_white_each_channel_alone():
    for c in TABLE["impulse_noise"].imagenet:
        x = noise.impulse_noise(gray(100, 8), c, seeds(8))
        white, black = (x == 1).double(), (x == 0).double()
        assert torch.equal(x[(white + black) == 0], gray(100, 8)[(white + black) == 0])
        assert abs(float(white.mean()) - c / 2) < 0.005 and abs(float(black.mean()) - c / 2) < 0.005
        both = ((white + black)[:, 0] * (white + black)[:, 1]).mean()
        assert abs(float(both) - c * c) < 0.01


@pytest.mark.parametrize("c", TABLE["defocus_blur"].imagenet + TABLE["defocus_blur"].cifar)
def test_defocus_blur_is_scipys_convolution_with_a_disk(c):
    half, reach = (8, 1) if c[0] <= 8 else (10, 2)
    square = np.arange(-half, half + 1)
    kernel = (square[:, None] ** 2 + square**2 <= c[0] ** 2).astype(float)
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * c[1] ** 2))
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, taps / taps.sum(), axis, mode="mirror")
    kernel /= (square[:, None] ** 2 + square**2 <= c[0] ** 2).sum()
    x = SMALL[:2] / 255
    close(blur.defocus_blur(x, c, []), channels(x, lambda plane: ndimage.convolve(plane, kernel, mode="mirror")))
    assert 1 - 1e-6 < kernel.sum() < 1.02


def test_glass_moves_pixels_as_the_official_loop_which_copies_where_it_means_to_swap():
    height, width = 19, 23
    for delta, times in {c[1:] for c in TABLE["glass_blur"].imagenet + TABLE["glass_blur"].cifar}:
        came = blur.shuffled(height, width, delta, times, seeds(3)).view(3, height, width)
        for image, g in zip(came, seeds(3), strict=True):
            x = np.stack(np.divmod(np.arange(height * width).reshape(height, width), width), -1)
            for _ in range(times):
                steps = torch.randint(-delta, delta, (2, height * width), generator=g).view(2, height, width).numpy()
                for h in range(height - delta, delta, -1):
                    for w in range(width - delta, delta, -1):
                        to = h + steps[0, h, w], w + steps[1, h, w]
                        x[h, w], x[to] = x[to], x[h, w]
            assert np.array_equal(image, x[..., 0] * width + x[..., 1])


def test_glass_blurs_before_and_after_with_scipys_gaussian():
    x, c = PHOTOS[:1, :, :60, :50] / 255, (1.1, 3, 2)
    came = blur.shuffled(60, 50, 3, 2, seeds(1))[0].numpy()

    def change(plane):
        once = ndimage.gaussian_filter(plane, 1.1, mode="nearest")
        return ndimage.gaussian_filter(once.reshape(-1)[came].reshape(plane.shape), 1.1, mode="nearest")

    close(blur.glass_blur(x, c, seeds(1)), channels(x, change), 0.1)


def swept(plane, radius, sigma, degrees):
    """Motion blur by ImageMagick's description, a pixel at a time."""
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    out, (height, width), angle = np.zeros_like(plane), plane.shape, math.radians(degrees)
    for y, x in np.ndindex(plane.shape):
        for i, weight in enumerate(weights):
            row = min(max(y + math.ceil(i * math.sin(angle) - 0.5), 0), height - 1)
            column = min(max(x + math.ceil(i * math.cos(angle) - 0.5), 0), width - 1)
            out[y, x] += weight / sum(weights) * plane[row, column]
    return out


@pytest.mark.parametrize("degrees", [0.0, 30.0, -45.0, -90.0, -135.0])
def test_motion_blur_sweeps_along_a_line(degrees):
    x = SMALL[:1, :, :17, :21] / 255
    ours = blur.swept(x, 6, 2.0, torch.tensor([degrees]))
    close(ours, channels(x, lambda plane: swept(plane, 6, 2.0, degrees)))


def test_motion_blur_draws_its_angle_within_45_degrees_of_the_horizontal():
    dot = torch.zeros(200, 3, 33, 33)
    dot[:, :, 16, 16] = 1
    y, x = blur.motion_blur(dot, (6, 3), seeds(200))[:, 0].flatten(1).gt(0).float().unsqueeze(-1).mul(
        torch.stack(torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij"), -1).view(-1, 2)
    ).sum(1).unbind(1)  # fmt: skip
    assert (x < 0).all() and (y.abs() <= 1.001 * x.abs()).all() and (y > 0).any() and (y < 0).any()


def zoomed(plane, factor):
    side = len(plane)
    kept = math.ceil(side / factor)
    top = (side - kept) // 2
    large = ndimage.zoom(plane[top : top + kept, top : top + kept], factor, order=1, mode="nearest")
    trim = (len(large) - side) // 2
    return large[trim : trim + side, trim : trim + side]


@pytest.mark.parametrize("c", [TABLE["zoom_blur"].imagenet[4], TABLE["zoom_blur"].cifar[1]])
def test_zoom_blur_is_the_mean_of_scipys_zooms(c):
    x = SMALL[:2] / 255
    factors = np.arange(1, *c)

    def change(plane):
        return (plane + sum(zoomed(plane, factor) for factor in factors)) / (len(factors) + 1)

    close(blur.zoom_blur(x, c, []), channels(x, change))
    assert [len(np.arange(1, *p)) for p in TABLE["zoom_blur"].imagenet] == [12, 16, 11, 13, 11]


@pytest.mark.parametrize("c", [TABLE["snow"].imagenet[2], TABLE["snow"].cifar[0], TABLE["snow"].cifar[4]])
def test_snow_falls_as_described(c):
    x, (mean, deviation, zoom, threshold, radius, sigma, kept) = SMALL[:2] / 255, c
    theirs, falling = [], seeds(2)
    for image, g in zip(x.double().numpy(), falling, strict=True):
        flakes = zoomed(mean + deviation * torch.randn(1, 32, 32, generator=g)[0].double().numpy(), zoom)
        flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
        flakes = swept(flakes, radius, sigma, -135 + 90 * float(torch.rand((), generator=g)))
        white = np.tensordot([0.299, 0.587, 0.114], image, 1) * 1.5 + 0.5
        theirs.append(kept * image + (1 - kept) * np.maximum(image, white) + flakes + flakes[::-1, ::-1])
    close(weather.snow(x, c, seeds(2)), np.stack(theirs))


def test_frost_lays_bright_crystals_of_many_shapes_over_the_image():
    for side in (32, 224):
        ice = weather.crystals(seeds(4), side, side)
        assert ice.min() >= 0 and ice.max() <= 1 and 0.35 < ice.mean() < 0.65 and 0.1 < ice.std() < 0.3
        assert (ice[0] - ice[1]).abs().mean() > 0.1
        assert (ice[:, 2] >= ice[:, 0]).all()  # bluish
        x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
        assert torch.equal(weather.frost(x, (0.7, 0.6), seeds(4)), 0.7 * x + 0.6 * ice)


def clouds(side, decay, noise):
    """Diamonds and squares, a point at a time."""
    height, step, size = np.zeros((side, side)), side, 1e4
    while step > 1:
        half = step // 2
        for y in range(half, side, step):
            for x in range(half, side, step):
                corners = [height[(y + a) % side, (x + b) % side] for a in (-half, half) for b in (-half, half)]
                height[y, x] = np.mean(corners) + size * noise[y, x]
        new = height.copy()
        for y in range(0, side, half):
            for x in range((y // half + 1) % 2 * half, side, step):
                around = [
                    height[(y + a) % side, (x + b) % side] for a, b in ((-half, 0), (half, 0), (0, -half), (0, half))
                ]
                new[y, x] = np.mean(around) + size * noise[y, x]
        height, step, size = new, half, size / decay**2
    return (height - height.min()) / (height.max() - height.min())


def test_fog_is_a_plasma_fractal():
    for decay in (1.4, 3.0):
        u = torch.rand(16, 16, generator=seeds(1)[0])
        theirs = clouds(16, decay, 2 * u.double().numpy() - 1)
        close(weather.plasma(seeds(1), 13, decay)[0], theirs, 0.01)
        x = SMALL[:1, :, :13, :16] / 255
        top = float(x.max())
        expected = (x + 1.5 * torch.from_numpy(theirs)[:13]) * top / (top + 1.5)
        close(weather.fog(x, (1.5, decay), seeds(1)), expected, 0.01)
    assert weather.plasma(seeds(2), 224, 2.0).shape == (2, 256, 256)


def test_brightness_is_the_value_of_colorsys():
    x = torch.cat([SMALL[:1] / 255, gray(0, 1, 32), gray(77, 1, 32)])
    for c in TABLE["brightness"].imagenet:
        theirs = np.empty_like(x.double())
        for n, row, column in np.ndindex(3, 32, 32):
            h, s, v = colorsys.rgb_to_hsv(*x[n, :, row, column].tolist())
            theirs[n, :, row, column] = colorsys.hsv_to_rgb(h, s, min(1, v + c))
        close(weather.brightness(x, c, []), theirs, 0.01)


def test_contrast_shrinks_each_channel_to_its_mean():
    x = PHOTOS / 255
    mean = x.double().mean((2, 3), keepdim=True)
    for c in TABLE["contrast"].imagenet:
        close(digital.contrast(x, c, []), (x - mean) * c + mean)


@pytest.mark.parametrize(
    "c", [TABLE["elastic_transform"].imagenet[i] for i in (1, 4)] + [(0.08, 0.06, 0.06), (0, 0, 0.08)]
)
def test_elastic_transform_moves_pixels_as_scipy_does(c):
    height, width = 37, 45
    x, side = PHOTOS[:1, :, 60 : 60 + height, 80 : 80 + width] / 255, 37
    g = seeds(1)[0]
    moves = c[2] * side * (2 * torch.rand(3, 2, generator=g).double().numpy() - 1)
    fields = [2 * torch.rand(height, width, generator=g).double().numpy() - 1 for _ in range(2)]
    down, right = (c[0] * side * ndimage.gaussian_filter(f, c[1] * side, mode="reflect", truncate=3) for f in fields)
    center, third = np.array([width // 2, height // 2]), side // 3
    points = center + third * np.array([[1, 1], [1, -1], [-1, -1]])
    there = np.linalg.solve(np.c_[points, np.ones(3)], points + moves).T  # 2 x 3, of (x, y, 1)
    back = np.linalg.inv(there[:, :2])
    y, xs = np.mgrid[:height, :width].astype(float)
    column, row = np.tensordot(back, np.stack([xs - there[0, 2], y - there[1, 2]]), 1)

    def change(plane):
        turned = ndimage.map_coordinates(plane, [row, column], order=1, mode="mirror")
        return ndimage.map_coordinates(turned, [y + down, xs + right], order=1, mode="reflect")

    close(digital.elastic_transform(x, c, seeds(1)), channels(x, change))


@pytest.mark.parametrize("c", TABLE["pixelate"].imagenet + TABLE["pixelate"].cifar)
def test_pixelate_is_pillows_box_filter(c):
    for images in (SMALL[:3], PHOTOS, PHOTOS[:, :, :91, :117]):
        ours = (digital.pixelate(images / 255, c, []) * 255).numpy()
        for image, found in zip(images, ours, strict=True):
            width, height = image.shape[2], image.shape[1]
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            picture = picture.resize((int(width * c), int(height * c)), Image.Resampling.BOX)
            theirs = np.asarray(picture.resize((width, height), Image.Resampling.BOX), float).transpose(2, 0, 1)
            assert np.abs(found - theirs).max() < 1.01  # Pillow rounds after each of two passes


def test_jpeg_is_a_round_trip_through_pillow():
    for images, qualities in ((SMALL[:3], (80, 65, 58, 50, 40)), (PHOTOS, (25, 18, 15, 10, 7))):
        for severity, quality in enumerate(qualities, 1):
            for image, found in zip(
                images, corrupt(images, "jpeg_compression", severity, numbers(images)), strict=True
            ):
                file = io.BytesIO()
                Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
                assert np.array_equal(found.permute(1, 2, 0), Image.open(file))


ORDERED = (
    *GROUPS["noise"],
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    *GROUPS["digital"][2:],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_lies_further_from_the_clean_image(name):
    """In pixels, where the published parameters grow; those of the other five trade one harm for another."""
    for images in (PHOTOS, SMALL):
        far = [
            float((corrupt(images, name, s, numbers(images)).double() - images).square().mean()) for s in range(1, 6)
        ]
        assert min(far) > 1, f"{far}: hardly a corruption"
        assert name == "elastic_transform" or far[4] > far[0], far
        assert name not in ORDERED or sorted(set(far)) == far, far


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_alone_in_a_batch_and_in_any_order(name):
    for images in (SMALL, SMALL[:3, :, :31, :27], PHOTOS[:, :, :101, :120]):
        index = 5 + numbers(images)
        whole = corrupt(images, name, 3, index)
        assert whole.shape == images.shape and whole.dtype == torch.uint8
        turned = corrupt(images.flip(0), name, 3, index.flip(0))
        assert torch.equal(turned.flip(0), whole)
        assert torch.equal(corrupt(images[1:2], name, 3, index[1:2]), whole[1:2])


SURE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in SURE])
def test_chance_comes_from_seed_and_image_number_alone(name):
    x = SMALL[:1]
    first = corrupt(x, name, 5, torch.tensor([3]))
    torch.manual_seed(123)
    assert torch.equal(corrupt(x, name, 5, torch.tensor([3])), first)
    assert not torch.equal(corrupt(x, name, 5, torch.tensor([4])), first)
    assert not torch.equal(corrupt(x, name, 5, torch.tensor([3]), seed=1), first)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(8, 8), (9, 14), (64, 64), (85, 97)])
def test_any_size_works(name, shape):
    images = torch.cat([SMALL[:1].repeat(1, 1, 4, 4)[:, :, : shape[0], : shape[1]], torch.zeros(1, 3, *shape).byte()])
    for severity in (1, 5):
        made = corrupt(images, name, severity, torch.arange(2))
        assert made.shape == images.shape and made.dtype == torch.uint8


@pytest.mark.parametrize("side", [32, 96])
def test_what_only_moves_or_mixes_pixels_leaves_a_plain_image_plain(side):
    plain = torch.full((1, 3, side, side), 90, dtype=torch.uint8)
    for name in ("glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"):
        assert torch.equal(corrupt(plain, name, 5, torch.arange(1)), plain), name


def test_the_parameters_are_those_of_the_nearer_published_size():
    for side, kind in ((84, "cifar"), (85, "imagenet")):
        plain = torch.full((1, 3, side, side), 100, dtype=torch.uint8)
        lit = corrupt(plain, "brightness", 5, torch.arange(1))
        assert ((lit - (100 + 255 * getattr(TABLE["brightness"], kind)[4])).abs() <= 0.5).all()


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        half = corrupt(SMALL[:2], "elastic_transform", 4, torch.arange(2))
    assert torch.equal(half, corrupt(SMALL[:2], "elastic_transform", 4, torch.arange(2)))


def test_a_view_comes_before_its_corruption():
    made = Corruption("contrast", 2, size=32)(PHOTOS, torch.arange(2))
    view = (eval_view(PHOTOS, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) * 255).round().byte()
    assert torch.equal(made, corrupt(view, "contrast", 2, torch.arange(2)))
    assert torch.equal(
        Corruption("contrast", 2, size=32)(SMALL, numbers(SMALL)), corrupt(SMALL, "contrast", 2, numbers(SMALL))
    )
    assert "contrast" in repr(Corruption("contrast", 2)) and repr(Corruption("contrast", 2)) != repr(
        Corruption("contrast", 3)
    )


def test_wrong_requests_name_themselves_in_one_line():
    x, i = SMALL[:2], torch.arange(2)
    for call, word in (
        (lambda: corrupt(x, "gausian_noise", 1, i), "did you mean 'gaussian_noise'"),
        (lambda: corrupt(x, "rain", 1, i), "no corruption 'rain'"),
        (lambda: corrupt(x, "fog", 6, i), "severity 6 of fog"),
        (lambda: corrupt(x, "fog", 0, i), "severity 0 of fog"),
        (lambda: corrupt(x.float(), "fog", 1, i), "uint8"),
        (lambda: corrupt(x.permute(0, 2, 3, 1), "fog", 1, i), "uint8"),
        (lambda: corrupt(x[:, :, :7], "fog", 1, i), "8 pixels"),
        (lambda: corrupt(x, "fog", 1, torch.arange(3)), "each of 2 images"),
        (lambda: corrupt(x, "fog", 1, i.float()), "each of 2 images"),
        (lambda: Corruption("fog", 1, size=4), "8 pixels"),
        (lambda: Corruption("frog", 1), "did you mean"),
    ):
        with pytest.raises(ValueError, match=word) as error:
            call()
        assert "\n" not in str(error.value)
