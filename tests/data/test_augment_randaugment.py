"""RandAugment: every operation against its reference, and the draws against the distributions of the recipes.

The references: timm itself for `timm-inc`; for `nest`, the pixel arithmetic of the TensorFlow operations that NesT's
code calls, written out here in NumPy.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, AugmentOp, rand_augment_transform

from pipeline.data.augment.keyed import Stream, sample_key, uniforms
from pipeline.data.augment.randaugment import (
    POLICIES,
    DrawnOp,
    draw_ops,
    fill_color,
    nest_translate_pixels,
    posterize,
    rand_augment_draws,
)
from pipeline.data.augment.settings import RandAugmentConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)


@cache
def pictures() -> dict[str, Image.Image]:
    """A photograph, noise, and a picture of few colours."""
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[1]).resize((96, 80))
    noise = np.random.default_rng(0).integers(0, 256, (80, 96, 3)).astype(np.uint8)
    ramp = np.full((80, 96, 3), 77, np.uint8)
    ramp[..., 0] = np.arange(96) // 2 + 60
    return {"photo": photo, "noise": Image.fromarray(noise), "ramp": Image.fromarray(ramp)}


def apply(policy: str, name: str, level: float, sign: int, image: Image.Image, fill: Any, resample: Any) -> Image.Image:
    op = POLICIES[policy][name]
    arg = None if op.to_arg is None else op.to_arg(level, sign, image.width)
    return DrawnOp(name, op, arg, resample).apply(image, fill)


# timm-inc against timm


def test_timm_policy_has_timms_operations_in_timms_order() -> None:
    assert set(POLICIES["timm-inc"]) == set(_RAND_INCREASING_TRANSFORMS)
    assert len(POLICIES["timm-inc"]) == 15 and len(POLICIES["nest"]) == 16


@pytest.mark.parametrize("picture", ["photo", "noise", "ramp"])
@pytest.mark.parametrize("name", POLICIES["timm-inc"])
def test_timm_operation_is_timms(name: str, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, fill = pictures()[picture], fill_color("timm-inc", IMAGENET_MEAN)
    for magnitude in (0.0, 2.5, 6.0, 8.7, 9.0, 9.49):
        for sign, u in ((1, 0.1), (-1, 0.9)):
            monkeypatch.setattr(random, "random", lambda u=u: u)
            for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
                hparams = {"img_mean": fill, "interpolation": resample}
                theirs = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(image)
                ours = apply("timm-inc", name, magnitude / 10, sign, image, fill, resample)
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("bits", range(9))
def test_posterize_masks_low_bits(bits: int, mode: str) -> None:
    image = pictures()["noise"].convert(mode)
    expected = np.asarray(image) & (0xFF << (8 - bits) & 0xFF)
    np.testing.assert_array_equal(np.asarray(posterize(image, bits)), expected)


def test_full_magnitude_posterizes_to_black() -> None:
    """Magnitude 10 leaves 0 bits. The papers' Pillow gave black; today's refuses, and timm passes the error on."""
    black = apply("timm-inc", "PosterizeIncreasing", 1.0, 1, pictures()["photo"], 0, Image.Resampling.BICUBIC)
    assert not np.asarray(black).any()


def test_fill_color_is_timms() -> None:
    hparams = {"img_mean": tuple(min(255, round(255 * m)) for m in IMAGENET_MEAN)}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams).ops[0].kwargs["fillcolor"]
    assert fill_color("timm-inc", IMAGENET_MEAN) == theirs == (124, 116, 104)
    assert fill_color("timm-inc", (0.5,)) == 128
    assert fill_color("nest", IMAGENET_MEAN) == (128, 128, 128)


# nest against TensorFlow's arithmetic


def to_uint8(values: np.ndarray) -> np.ndarray:
    """tf.saturate_cast: clip, then cut the fraction."""
    return np.clip(values, 0, 255).astype(np.uint8)


def blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    low, high = degenerate.astype(np.float32), image.astype(np.float32)
    return to_uint8(low + np.float32(factor) * (high - low))


def gray(image: np.ndarray) -> np.ndarray:
    """tf.image.rgb_to_grayscale on uint8: in floats of 0..1, and back by the factor 255.5."""
    luma = (image.astype(np.float32) / 255) @ np.array([0.2989, 0.587, 0.114], np.float32)
    return (luma * 255.5).astype(np.uint8)[..., None].repeat(3, axis=-1)


def warp(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """tfa.image.transform: output (x, y) takes input (a0 x + a1 y + a2, b0 x + b1 y + b2), rounded; 128 outside."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    a0, a1, a2, b0, b1, b2 = matrix
    from_x = np.floor(a0 * x + a1 * y + a2 + 0.5).astype(int)
    from_y = np.floor(b0 * x + b1 * y + b2 + 0.5).astype(int)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    result = np.full_like(image, 128)
    result[inside] = image[from_y[inside], from_x[inside]]
    return result


def ref_rotate(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    angle = math.radians(30 * level * sign)
    c, s = math.cos(angle), math.sin(angle)
    h, w = image.shape[0] - 1, image.shape[1] - 1
    return warp(image, (c, -s, (w - (c * w - s * h)) / 2, s, c, (h - (s * w + c * h)) / 2))


def ref_autocontrast(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        low, high = np.float32(channel.min()), np.float32(channel.max())
        scale = np.float32(255) / (high - low) if high > low else np.float32(1)
        channels.append(to_uint8(channel.astype(np.float32) * scale - low * scale) if high > low else channel)
    return np.stack(channels, axis=-1)


def ref_equalize(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        counts = np.bincount(channel.reshape(-1), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = np.concatenate([[0], ((np.cumsum(counts) + step // 2) // max(step, 1))[:-1]]).clip(0, 255)
        channels.append(table[channel].astype(np.uint8) if step else channel)
    return np.stack(channels, axis=-1)


def ref_sharpness(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    height, width = image.shape[:2]
    smooth = sum(
        kernel[dy, dx] * image[dy : height - 2 + dy, dx : width - 2 + dx].astype(np.float32)
        for dy in range(3)
        for dx in range(3)
    )
    degenerate = image.copy()
    degenerate[1:-1, 1:-1] = to_uint8(np.asarray(smooth))
    return blend(degenerate, image, 1.8 * level + 0.1)


def ref_contrast(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    mean = to_uint8(gray(image).astype(np.float32).mean() + 0.5)
    return blend(np.full_like(image, mean), image, 1.8 * level + 0.1)


def ref_solarize_add(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    added = np.minimum(image.astype(int) + int(110 * level), 255).astype(np.uint8)
    return np.where(image < 128, added, image)


def ref_solarize(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    return np.where(image < min(int(256 * level), 255), image, 255 - image)


def ref_posterize(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    shift = 8 - int(4 * level)
    return (image.astype(int) >> shift << shift).astype(np.uint8)


Reference = Callable[[np.ndarray, float, int], np.ndarray]
# Largest difference of a value in grey levels, and the part of the values that may differ more. PIL makes positions
# fixed-point numbers, so where one lies half-way between two pixels it may take the other one.
NEST_REFERENCES: dict[str, tuple[Reference, int, float]] = {
    "AutoContrast": (ref_autocontrast, 1, 0.0),
    "Equalize": (ref_equalize, 0, 0.0),
    "Rotate": (ref_rotate, 0, 0.002),
    "Posterize": (ref_posterize, 0, 0.0),
    "Solarize": (ref_solarize, 0, 0.0),
    "Color": (lambda im, lv, s: blend(gray(im), im, 1.8 * lv + 0.1), 1, 0.0),
    "Contrast": (ref_contrast, 1, 0.0),
    "Brightness": (lambda im, lv, s: blend(np.zeros_like(im), im, 1.8 * lv + 0.1), 0, 0.0),
    "Sharpness": (ref_sharpness, 1, 0.0),
    "ShearX": (lambda im, lv, s: warp(im, (1, 0.3 * lv * s, 0, 0, 1, 0)), 0, 0.0),
    "ShearY": (lambda im, lv, s: warp(im, (1, 0, 0, 0.3 * lv * s, 1, 0)), 0, 0.0),
    "TranslateX": (lambda im, lv, s: warp(im, (1, 0, 30 * lv * s, 0, 1, 0)), 0, 0.0),
    "TranslateY": (lambda im, lv, s: warp(im, (1, 0, 0, 0, 1, 30 * lv * s)), 0, 0.0),
    "Identity": (lambda im, lv, s: im, 0, 0.0),
    "SolarizeAdd": (ref_solarize_add, 0, 0.0),
    "Invert": (lambda im, lv, s: 255 - im, 0, 0.0),
}


@pytest.mark.parametrize("picture", ["photo", "noise", "ramp"])
@pytest.mark.parametrize("name", POLICIES["nest"])
def test_nest_operation_is_tensorflows(name: str, picture: str) -> None:
    image = pictures()[picture]  # 96 px wide, where the table of NesT's code shifts by 30 px
    reference, tolerance, may_differ = NEST_REFERENCES[name]
    # Shear at round levels puts whole rows half-way between two pixels.
    levels = (0.317, 0.623, 0.831, 0.901, 0.937) + (() if name.startswith("Shear") else (0.3, 0.9, 1.0))
    for level in levels:
        for sign in (1, -1):
            ours = np.asarray(apply("nest", name, level, sign, image, (128,) * 3, Image.Resampling.NEAREST)).astype(int)
            theirs = reference(np.asarray(image), level, sign).astype(int)
            different = np.abs(ours - theirs) > tolerance
            assert different.mean() <= may_differ, (level, sign, np.abs(ours - theirs).max())


@pytest.mark.parametrize(("side", "pixels"), [(224, 100), (128, 40), (96, 30), (32, 10), (64, 19), (384, 115)])
def test_nest_translation(side: int, pixels: int) -> None:
    assert nest_translate_pixels(side) == pixels


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_take_greyscale(policy: str) -> None:
    """A grey RGB picture and the same in one channel come out alike."""
    single = pictures()["photo"].convert("L")
    for name in POLICIES[policy]:
        for resample in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR):
            one = apply(policy, name, 0.9, 1, single, 128, resample)
            three = apply(policy, name, 0.9, 1, single.convert("RGB"), (128,) * 3, resample)
            assert one.mode == "L"
            assert np.abs(np.asarray(one).astype(int)[..., None] - np.asarray(three)).max() <= 1


# the draws


def draw_many(config: RandAugmentConfig, n: int, interpolation: Any = "bicubic") -> list[tuple[DrawnOp, ...]]:
    wanted = rand_augment_draws(config)
    keys = (sample_key(7, 0, i) for i in range(n))
    return [draw_ops(config, 224, interpolation, uniforms(k, Stream.RAND_AUGMENT, wanted).tolist()) for k in keys]


@pytest.mark.parametrize("policy", POLICIES)
def test_frequencies(policy: Any) -> None:
    """2 layers, each applied with probability 1/2, all operations equally often, layers independent."""
    samples = draw_many(RandAugmentConfig(policy=policy), 12_000)
    applied = Counter(len(ops) for ops in samples)
    expected = {0: 3000, 1: 6000, 2: 3000}
    assert sum((applied[k] - e) ** 2 / e for k, e in expected.items()) < 13.8  # 2 degrees of freedom: 99.9 %
    names = Counter(op.name for ops in samples for op in ops)
    each = sum(names.values()) / len(POLICIES[policy])
    assert sum((names[n] - each) ** 2 / each for n in POLICIES[policy]) < 37.7  # 15 degrees of freedom: 99.9 %
    twice = [ops[0].name == ops[1].name for ops in samples if len(ops) == 2]
    assert np.mean(twice) == pytest.approx(1 / len(POLICIES[policy]), abs=0.02)  # with replacement


def test_magnitude_and_sign() -> None:
    """Level ~ N(0.9, 0.05) clipped at 1, which 2.3 % reach; half the signs negative."""
    config = RandAugmentConfig(policy="nest", layers=1, prob=1.0)
    degrees = np.array([ops[0].arg for ops in draw_many(config, 20_000) if ops[0].name == "Rotate"])
    levels, n = np.abs(degrees) / 30, len(degrees)
    assert n > 1000
    assert abs(levels.mean() - 0.8996) < 4 * 0.05 / math.sqrt(n)
    assert levels.std() == pytest.approx(0.0486, rel=0.08)
    assert abs((levels == 1).mean() - 0.0228) < 4 * math.sqrt(0.0228 / n)
    assert abs((degrees > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_posterize_bits_at_magnitude_9() -> None:
    """nest keeps int(4 level) bits: 3, seldom 4. timm-inc keeps 4 minus that: 1, seldom 0 (black)."""
    for policy, name, usual, seldom in (("nest", "Posterize", 3, 4), ("timm-inc", "PosterizeIncreasing", 1, 0)):
        config = RandAugmentConfig.model_validate({"policy": policy, "layers": 1, "prob": 1.0})
        bits = Counter(ops[0].arg for ops in draw_many(config, 12_000) if ops[0].name == name)
        assert set(bits) <= {usual, seldom, usual + (usual - seldom)}
        assert 0.008 < bits[seldom] / sum(bits.values()) < 0.045


def test_std_zero_gives_the_magnitude_itself() -> None:
    config = RandAugmentConfig(policy="nest", std=0.0, layers=1, prob=1.0)
    brightness = [ops[0].arg for ops in draw_many(config, 500) if ops[0].name == "Brightness"]
    assert brightness and all(factor == pytest.approx(1.72) for factor in brightness)


def test_filters() -> None:
    nest = {op.resample for ops in draw_many(RandAugmentConfig(policy="nest"), 200) for op in ops}
    timm = Counter(op.resample for ops in draw_many(RandAugmentConfig(), 2000, "random") for op in ops)
    assert nest == {Image.Resampling.NEAREST}
    assert set(timm) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
    assert timm[Image.Resampling.BILINEAR] / timm.total() == pytest.approx(0.5, abs=0.05)
