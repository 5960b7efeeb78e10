"""Colour jitter against colorsys and PyTorch, random erasing against timm and the arithmetic of NesT's code."""

from __future__ import annotations

import colorsys
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from pipeline.data.augment.color import (
    COLOR_JITTER_DRAWS,
    ColorJitter,
    adjust_contrast,
    adjust_saturation,
    apply_color_jitter,
    draw_color_jitter,
)
from pipeline.data.augment.crop import Box
from pipeline.data.augment.erasing import ERASING_DRAWS, draw_erasing
from pipeline.data.augment.keyed import Stream, sample_key, uniforms
from pipeline.data.augment.settings import ColorJitterConfig, RandomErasingConfig


def colors() -> torch.Tensor:
    """(3, 24, 25) in [0, 1]: random colours, and greys, black, white and pure colours."""
    pixels = torch.rand(3, 24, 25, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    pixels[:, 0, : len(special)] = special.T
    return pixels


def per_pixel(image: torch.Tensor, function: object) -> torch.Tensor:
    flat = [function(*pixel) for pixel in image.double().flatten(1).T.tolist()]  # type: ignore[operator]
    return torch.tensor(flat).T.reshape(image.shape)


@pytest.mark.parametrize("factor", [0.0, 0.76, 1.0, 1.24, 3.0])
def test_saturation_scales_s_of_hsv(factor: float) -> None:
    def reference(r: float, g: float, b: float) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb(h, min(s * factor, 1.0), v)

    torch.testing.assert_close(adjust_saturation(colors(), factor), per_pixel(colors(), reference), atol=1e-6, rtol=0)


@pytest.mark.parametrize("turns", [-0.06, -0.01, 0.0, 0.03, 0.06])
def test_hue_turns_h_of_hsv(turns: float) -> None:
    def reference(r: float, g: float, b: float) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb((h + turns) % 1, s, v)

    ours = apply_color_jitter(colors(), ColorJitter((("hue", turns),), gray=False))
    torch.testing.assert_close(ours, per_pixel(colors(), reference), atol=2e-6, rtol=0)


@pytest.mark.parametrize("factor", [0.76, 1.0, 1.24])
def test_contrast_and_brightness(factor: float) -> None:
    """Contrast about each channel's own mean (tf.image.adjust_contrast), not about the mean grey."""
    image = colors()
    expected = torch.stack([(c - c.mean()) * factor + c.mean() for c in image]).clamp(0, 1)
    torch.testing.assert_close(adjust_contrast(image, factor), expected, atol=1e-6, rtol=0)
    bright = apply_color_jitter(image, ColorJitter((("brightness", factor),), gray=False))
    torch.testing.assert_close(bright, (image * factor).clamp(0, 1), atol=1e-6, rtol=0)


def test_gray_comes_last_and_order_matters() -> None:
    image = colors()
    gray = apply_color_jitter(image, ColorJitter((("brightness", 1.2),), gray=True))
    luma = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    expected = ((image * 1.2).clamp(0, 1) * luma).sum(0, keepdim=True).expand(3, -1, -1)
    torch.testing.assert_close(gray, expected, atol=1e-6, rtol=0)
    first, second = (("brightness", 1.24), ("contrast", 1.24)), (("contrast", 1.24), ("brightness", 1.24))
    apart = apply_color_jitter(image, ColorJitter(first, False)) - apply_color_jitter(image, ColorJitter(second, False))
    assert apart.abs().max() > 0.005


def test_jitter_keeps_the_range_and_one_channel_has_no_colour() -> None:
    config = ColorJitterConfig(strength=1.0)
    single = colors()[:1]
    for i in range(60):
        jitter = draw_color_jitter(config, uniforms(sample_key(0, 0, i), Stream.COLOR_JITTER, 7).tolist())
        jittered = apply_color_jitter(colors(), jitter)
        assert jittered.min() >= 0 and jittered.max() <= 1
        plain = ColorJitter(tuple(a for a in jitter.adjustments if a[0] in ("brightness", "contrast")), gray=False)
        assert torch.equal(apply_color_jitter(single, jitter), apply_color_jitter(single, plain))


def test_jitter_draws() -> None:
    """NesT on ImageNet, strength 0.3: probability 0.8, factors 1 +- 0.24, hue +- 0.06, grey 0.2, any order."""
    n = 6000
    drawn = [
        draw_color_jitter(ColorJitterConfig(), uniforms(sample_key(1, 0, i), Stream.COLOR_JITTER, COLOR_JITTER_DRAWS))
        for i in range(n)
    ]
    jittered = [d for d in drawn if d.adjustments]
    assert abs(len(jittered) / n - 0.8) < 4 * math.sqrt(0.16 / n)
    assert abs(np.mean([d.gray for d in drawn]) - 0.2) < 4 * math.sqrt(0.16 / n)
    assert abs(np.mean([d.gray for d in jittered]) - 0.2) < 4 * math.sqrt(0.16 / len(jittered))  # independent
    for name, middle, reach in (
        ("brightness", 1, 0.24),
        ("contrast", 1, 0.24),
        ("saturation", 1, 0.24),
        ("hue", 0, 0.06),
    ):
        amounts = np.array([dict(d.adjustments)[name] for d in jittered])
        counts, _ = np.histogram(amounts, bins=20, range=(middle - reach, middle + reach))
        each = len(jittered) / 20
        assert counts.sum() == len(jittered)
        assert ((counts - each) ** 2 / each).sum() < 50  # 19 degrees of freedom: 99.99 %
    orders = Counter(tuple(name for name, _ in d.adjustments) for d in jittered)
    each = len(jittered) / 24
    assert len(orders) == 24
    assert sum((count - each) ** 2 / each for count in orders.values()) < 49.7  # 23 degrees of freedom: 99.9 %


# random erasing


def erasing_draws(i: int) -> list[float]:
    return uniforms(sample_key(2, 0, i), Stream.RANDOM_ERASING, ERASING_DRAWS).tolist()


def erased_box(image: torch.Tensor) -> Box | None:
    ys, xs = torch.nonzero(image[0], as_tuple=True)
    if not len(ys):
        return None
    top, left = int(ys.min()), int(xs.min())
    return Box(top, left, int(ys.max()) - top + 1, int(xs.max()) - left + 1)


@pytest.mark.parametrize("side", [16, 32, 97])
@pytest.mark.parametrize("max_area", [1 / 3, 1.0])
def test_inside_boxes_are_timms(side: int, max_area: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed with the same uniform numbers, timm erases the same box, retries included."""
    config = RandomErasingConfig(prob=0.5, max_area=max_area)
    theirs = RandomErasing(0.5, max_area=max_area, mode="pixel", device="cpu")
    erased = 0
    for i in range(150):
        u = erasing_draws(i)
        spent = u[:1]
        for attempt in range(10):
            mine = u[1 + 4 * attempt : 5 + 4 * attempt]
            area = (0.02 + (max_area - 0.02) * mine[0]) * side * side
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * mine[1])
            fits = max(round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))) < side
            spent += mine if fits else mine[:2]
        take = iter(spent).__next__
        monkeypatch.setattr(random, "random", take)
        monkeypatch.setattr(random, "uniform", lambda a, b, take=take: a + (b - a) * take())
        monkeypatch.setattr(random, "randint", lambda a, b, take=take: a + int(take() * (b - a + 1)))
        box = draw_erasing(config, side, u)
        assert box == erased_box(theirs(torch.zeros(3, side, side)))
        erased += box is not None
    assert abs(erased - 75) < 4 * math.sqrt(150 / 4)


@pytest.mark.parametrize("side", [16, 32, 224])
def test_clipped_boxes_are_nests(side: int) -> None:
    """augment_ops.py: index i is erased where |i - middle| < half the side, on both axes; the border cuts."""
    config = RandomErasingConfig(prob=1.0, placement="clipped")
    index = np.arange(side)
    cut = 0
    for i in range(300):
        u = erasing_draws(i)
        area = (0.02 + (1 / 3 - 0.02) * u[1]) * side * side
        aspect = math.exp(math.log(0.3) * (1 - 2 * u[2]))
        height, width = math.sqrt(area * aspect), math.sqrt(area / aspect)
        rows = (index > u[3] * side - height / 2) & (index < u[3] * side + height / 2)
        columns = (index > u[4] * side - width / 2) & (index < u[4] * side + width / 2)
        box = draw_erasing(config, side, u)
        assert box is not None
        mask = np.zeros((side, side), bool)
        mask[box.top : box.top + box.height, box.left : box.left + box.width] = True
        np.testing.assert_array_equal(mask, np.outer(rows, columns))
        cut += box.height < height - 1 or box.width < width - 1
    assert cut > 50  # the border does cut


def test_erasing_probability_and_area() -> None:
    n = 8000
    boxes = [draw_erasing(RandomErasingConfig(), 224, erasing_draws(i)) for i in range(n)]
    areas = np.array([b.height * b.width for b in boxes if b is not None]) / 224**2
    assert abs(len(areas) / n - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    assert areas.min() > 0.019 and areas.max() < 0.336
    # Uniform in 0.02..1/3 but for boxes that were too long and drawn again, which takes a little off the largest.
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.012)
