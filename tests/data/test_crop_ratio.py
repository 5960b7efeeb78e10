"""The evaluation crop at ratios above and below 1, against a reference in NumPy that places the picture by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int) -> Image.Image:
    """Noise without a black pixel, so that a frame can't be mistaken for content."""
    pixels = np.random.default_rng(width * 1000 + height).integers(60, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def placed(image: Image.Image, side: int, resized: int) -> np.ndarray:
    """(side, side, 3) 8-bit: the picture with shorter side `resized`, in the middle of a black square."""
    shorter = min(image.size)
    size = tuple(resized if length == shorter else int(resized * length / shorter) for length in image.size)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    canvas = np.zeros((side, side, 3), dtype=np.uint8)
    into, out = [], []
    for length in pixels.shape[:2]:
        if length < side:  # a frame; where it can't be even, the thicker side comes last
            before = (side - length) // 2
            into.append(slice(before, before + length))
            out.append(slice(0, length))
        else:
            first = round((length - side) / 2)
            into.append(slice(0, side))
            out.append(slice(first, first + side))
    canvas[into[0], into[1]] = pixels[out[0], out[1]]
    return canvas


@pytest.mark.parametrize("shape", [(640, 427), (427, 640), (333, 333), (91, 77)])
@pytest.mark.parametrize(
    ("side", "crop_pct", "resized"),
    [(448, 1.13, 396), (224, 1.1, 203), (33, 1.13, 29), (31, 1.25, 24), (32, 2.0, 16), (33, 1.0, 33), (224, 0.95, 235),
     (31, 0.875, 35), (33, 0.9, 36)],
)  # fmt: skip
def test_placed_and_padded(shape: tuple[int, int], side: int, crop_pct: float, resized: int) -> None:
    image = picture(*shape)
    ours = build_eval_transform(EvalTransformConfig(crop_pct=crop_pct), AugmentConfig(), side)(image)
    expected = (placed(image, side, resized) / 255.0 - MEAN) / STD
    np.testing.assert_allclose(ours.permute(1, 2, 0), expected, atol=1e-5)


def test_448_at_1_13_has_a_black_frame_of_26() -> None:
    """Black before normalisation, as the official evaluation pads (Refiner's 448 checkpoint)."""
    pixels = build_eval_transform(EvalTransformConfig(crop_pct=1.13), AugmentConfig(), 448)(picture(333, 333))
    black = (-torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)
    is_black = torch.isclose(pixels, black, atol=1e-6).all(0)
    inside = torch.zeros(448, 448, dtype=torch.bool)
    inside[26:422, 26:422] = True
    assert torch.equal(is_black, ~inside)
