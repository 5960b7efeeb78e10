"""Crops and resizing against timm, torchvision and PyTorch, and the distributions that they should have."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as tvf

from pipeline.data.augment import crop as crop_module
from pipeline.data.augment.crop import (
    CROP_DRAWS,
    Box,
    apply_affine,
    draw_affine,
    draw_resized_crop,
    pad_crop,
    pick_resample,
    resize,
    resize_shorter_side,
)
from pipeline.data.augment.keyed import Stream, sample_key, uniforms
from pipeline.data.augment.settings import AffineConfig, AugmentConfig, PadCrop, RandomResizedCrop
from pipeline.data.augment.transforms import build_train_transform
from pipeline.errors import UserError


@cache
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0])


def draws(i: int, n: int = CROP_DRAWS) -> list[float]:
    return uniforms(sample_key(0, 0, i), Stream.CROP, n).tolist()


class Replay:
    """Feeds given uniform numbers to a library that draws from the `random` module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, u: list[float]) -> None:
        numbers = iter(u)
        monkeypatch.setattr(random, "uniform", lambda a, b: a + (b - a) * next(numbers))
        monkeypatch.setattr(random, "randint", lambda a, b: a + int(next(numbers) * (b - a + 1)))


SHAPES = [(640, 427), (427, 640), (224, 224), (32, 32), (8, 8), (1000, 90), (90, 1000), (3, 2), (1, 1)]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_area_sampler_is_timms(
    size: tuple[int, int], scale: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fed with the same uniform numbers, timm cuts out the same pixels, retries and fallback included."""
    config = RandomResizedCrop(scale=scale)
    image, compared = Image.new("RGB", size), 0
    for i in range(60):
        box = draw_resized_crop(config, *size, draws(i))
        Replay(monkeypatch, as_timm_reads(config, size, draws(i)))
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, config.scale, config.ratio)
        if height == 0 or width == 0:
            continue  # timm would fail on this box; ours tries again
        assert box == Box(top, left, height, width)
        compared += 1
    assert compared >= 20


def as_timm_reads(config: RandomResizedCrop, size: tuple[int, int], u: list[float]) -> list[float]:
    """timm reads two numbers in an attempt that fails and four in the last; ours has four places for each."""
    read: list[float] = []
    low, high = np.log(config.ratio)
    for attempt in range(10):
        mine = u[4 * attempt : 4 * attempt + 4]
        area = (config.scale[0] + (config.scale[1] - config.scale[0]) * mine[0]) * size[0] * size[1]
        ratio = np.exp(low + (high - low) * mine[1])
        fits = round(np.sqrt(area * ratio)) <= size[0] and round(np.sqrt(area / ratio)) <= size[1]
        read += mine if fits else mine[:2]
    return read


@pytest.mark.parametrize("sampler", ["area", "side"])
@pytest.mark.parametrize("size", SHAPES)
def test_boxes_lie_inside_and_keep_their_limits(sampler: Any, size: tuple[int, int]) -> None:
    config = RandomResizedCrop(scale=(0.05, 1.0), ratio=(0.75, 1.33), sampler=sampler)
    for i in range(200):
        box = draw_resized_crop(config, *size, draws(i))
        assert 0 <= box.top <= size[1] - box.height and 0 <= box.left <= size[0] - box.width
        assert box.height > 0 and box.width > 0
        if size == (640, 427):
            assert 0.049 <= box.height * box.width / (640 * 427) <= 1
            assert 0.74 <= box.width / box.height <= 1.34


SIDE_MEAN = (1 - 0.05**1.5) / (3 * (1 - 0.05**0.5))


@pytest.mark.parametrize(
    ("sampler", "mean", "variance"),
    [
        # area: a = U(0.05, 1). side: a = s^2 with s = U(r, 1), r^2 = 0.05.
        ("area", (1 + 0.05) / 2, 0.95**2 / 12),
        ("side", SIDE_MEAN, (1 - 0.05**2.5) / (5 * (1 - 0.05**0.5)) - SIDE_MEAN**2),
    ],
)
def test_mean_area(sampler: Any, mean: float, variance: float) -> None:
    config = RandomResizedCrop(scale=(0.05, 1.0), ratio=(1.0, 1.0), sampler=sampler)
    boxes = [draw_resized_crop(config, 1000, 1000, draws(i)) for i in range(3000)]
    areas = np.array([box.height * box.width for box in boxes]) / 1e6
    assert abs(areas.mean() - mean) < 4 * np.sqrt(variance / len(areas)) + 1e-3
    assert areas.var() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("size", SHAPES)
def test_side_sampler_is_tensorflows(size: tuple[int, int]) -> None:
    """The rules of sample_distorted_bounding_box, step by step: limits of the height, leeway of a pixel, place."""
    config, (width, height) = RandomResizedCrop(scale=(0.05, 1.0), ratio=(0.75, 1.33), sampler="side"), size
    for i in range(300):
        box, u = draw_resized_crop(config, width, height, draws(i)), draws(i)
        expected = Box(0, 0, height, width)
        for attempt in range(10):
            v = u[4 * attempt :]
            ratio = 0.75 + (1.33 - 0.75) * v[0]
            smallest, largest = 0.05 * width * height, 1.0 * width * height
            low, high = round((smallest / ratio) ** 0.5), round((largest / ratio) ** 0.5)
            if round(high * ratio) > width:
                high = int((width + 0.4999999) / ratio)
            high = min(high, height)
            h = min(low, high)
            h += int(v[1] * (high - h + 1))
            if round(h * ratio) * h < smallest:
                h += 1
            if round(h * ratio) * h > largest:
                h -= 1
            w = round(h * ratio)
            if w <= width and h <= height and smallest <= w * h <= largest:
                top, left = int(v[2] * (height - h)), int(v[3] * (width - w))
                expected = Box(top, left, h, w)
                break
        assert box == expected


def test_side_sampler_has_uniform_heights_and_ratios() -> None:
    """TensorFlow: the ratio is uniform, then the height between its limits (not the area)."""
    config = RandomResizedCrop(scale=(0.05, 1.0), ratio=(0.75, 1.33), sampler="side")
    boxes = [draw_resized_crop(config, 2000, 2000, draws(i)) for i in range(4000)]
    ratios = np.array([box.width / box.height for box in boxes])
    low = np.sqrt(0.05 * 2000 * 2000 / ratios)
    high = np.minimum(2000, 2000 / ratios)
    place = (np.array([box.height for box in boxes]) - low) / (high - low)
    for values in ((ratios - 0.75) / (1.33 - 0.75), place):
        counts, _ = np.histogram(values, bins=20, range=(-0.005, 1.005))
        assert ((counts - 200) ** 2 / 200).sum() < 50  # 19 degrees of freedom: 99.99 %


def test_antialiased_crop_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = build_train_transform(AugmentConfig(hflip=0.0, interpolation="bicubic"), 224)
    for i in range(5):
        key = sample_key(0, 0, i)
        Replay(monkeypatch, as_timm_reads(RandomResizedCrop(), photo().size, draws(i)))
        theirs = RandomResizedCropAndInterpolation(224, interpolation="bicubic")(photo())
        np.testing.assert_array_equal(np.asarray(transform.crop(photo(), key)), np.asarray(theirs))


@pytest.mark.parametrize("size", [(224, 224), (96, 64), (700, 500)])
def test_point_sampling_is_that_of_interpolate_cut_to_whole_numbers(size: tuple[int, int]) -> None:
    """NesT: tf.image.resize (bilinear, half-pixel centres, no antialiasing), then a cast to uint8 that cuts."""
    ours = np.asarray(resize(photo(), size, Image.Resampling.BILINEAR, antialias=False)).astype(int)
    pixels = tvf.pil_to_tensor(photo()).double()[None]
    exact = torch.nn.functional.interpolate(pixels, size=size[::-1], mode="bilinear", align_corners=False)[0]
    theirs = exact.permute(1, 2, 0).numpy()
    assert np.abs(ours - np.floor(theirs + 1e-9)).max() <= 1
    assert (ours != np.floor(theirs + 1e-9)).mean() < 1e-3
    antialiased = np.asarray(photo().resize(size, Image.Resampling.BILINEAR)).astype(int)
    if size[0] < 640:
        assert np.abs(ours - antialiased).mean() > 1  # the switch matters


def test_random_interpolation_takes_both_filters_equally() -> None:
    chosen = [pick_resample("random", u) for u in uniforms(1, Stream.CROP, 1000)]
    assert set(chosen) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
    assert abs(chosen.count(Image.Resampling.BICUBIC) - 500) < 4 * np.sqrt(250)


@pytest.mark.parametrize(("side", "expected"), [(16, (23, 16)), (427, (640, 427)), (854, (1280, 854))])
def test_shorter_side(side: int, expected: tuple[int, int]) -> None:
    assert resize_shorter_side(photo(), side, Image.Resampling.BICUBIC, True).size == expected
    assert tvf.resize(photo(), [side]).size == expected


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("fill", ["zero", "reflect"])
def test_pad_crop_reaches_every_place_equally(mode: str, fill: Any) -> None:
    """CIFAR: 2 px on each side give 5 x 5 places; each is drawn, and is the padded picture at that place."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    padded = np.asarray(image)
    widths = [(2, 2), (2, 2), (0, 0)][: padded.ndim]
    padded = np.pad(padded, widths, mode="constant" if fill == "zero" else "reflect")
    places = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(5) for x in range(5)}
    counts = np.zeros((5, 5), int)
    for i in range(2500):
        cropped = pad_crop(image, PadCrop(padding=2, fill=fill), 32, draws(i, 2))
        counts[places[cropped.tobytes()]] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 52  # 24 degrees of freedom: 99.9 %


@pytest.mark.parametrize(
    ("crop", "size", "side"),
    [
        ("none", (8, 8), 16),
        ("center", (640, 15), 16),
        ({"kind": "pad", "padding": 2}, (8, 8), 16),
        ("none", (16, 17), 16),
    ],
)
def test_a_picture_that_does_not_fit_is_refused(crop: Any, size: tuple[int, int], side: int) -> None:
    transform = build_train_transform(AugmentConfig.model_validate({"crop": crop}), side)
    mend = "choose augment.crop=rrc, or center after augment.resize"
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} picture .* {mend}"):
        transform(Image.new("RGB", size), 0, 0, 0)


def test_center_crop() -> None:
    config = AugmentConfig.model_validate({"crop": "center", "resize": 64})
    ours = build_train_transform(config, 64).crop(photo(), key=0)
    theirs = tvf.center_crop(tvf.resize(photo(), [64], tvf.InterpolationMode.BICUBIC), [64, 64])
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_affine_limits_and_identity() -> None:
    config = AffineConfig(degrees=10, translate=0.125, scale=(0.9, 1.1), shear=5)
    drawn = [draw_affine(config, 16, uniforms(i, Stream.AFFINE, crop_module.AFFINE_DRAWS).tolist()) for i in range(500)]
    for values, low, high in (
        ([a.angle for a in drawn], -10, 10),
        ([a.translate[0] for a in drawn], -2, 2),
        ([a.translate[1] for a in drawn], -2, 2),
        ([a.scale for a in drawn], 0.9, 1.1),
        ([a.shear for a in drawn], -5, 5),
    ):
        reach = (high - low) / 2
        assert low <= min(values) < low + 0.05 * reach and high - 0.05 * reach < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 4 * reach / np.sqrt(3 * len(values)) * 1.3
    nothing = draw_affine(AffineConfig(), 16, [0.5] * 5)
    np.testing.assert_array_equal(np.asarray(apply_affine(photo(), nothing)), np.asarray(photo()))
