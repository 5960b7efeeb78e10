"""Boxes: from maps, against given ones, and from the model's input back to the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.augment.evaluation import EvalTransform
from pipeline.data.augment.settings import EvalTransformConfig
from pipeline.explain.localize import Box, best_iou, box_of, iou
from pipeline.explain.pictures import in_original


def test_box_is_that_of_the_largest_part() -> None:
    heat = np.zeros((6, 8))
    heat[1:3, 2:6] = 0.5
    heat[5, 0] = 1.0  # higher, but smaller; touches nothing
    assert box_of(heat, 0.4) == (2, 1, 6, 3)
    assert box_of(heat, 0.6) == (0, 5, 1, 6)
    assert box_of(heat - 7.0, 0.4) == (2, 1, 6, 3)
    assert box_of(heat, 0.0) == box_of(np.ones((6, 8))) == (0, 0, 8, 6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 2), (1, 1, 1, 2), 0.0),
    ],
)
def test_iou(a: Box, b: Box, expected: float) -> None:
    assert iou(a, b) == iou(b, a) == pytest.approx(expected)
    assert best_iou(a, [(9, 9, 10, 10), b]) == pytest.approx(expected)


TRANSFORMS = {
    "crop": ({"crop_pct": 0.8}, (90, 60)),
    "point sampled": ({"crop_pct": 0.8, "antialias": False, "interpolation": "bilinear"}, (90, 61)),
    "frame": ({"crop_pct": 1.25}, (60, 75)),
    "resize": ({"resize": "resize_only"}, (90, 60)),
    "as it is": ({"resize": "none"}, (32, 32)),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_boxes_go_back_to_where_they_came_from(case: str) -> None:
    """A bright spot of the picture lies in the box of its pixel of the input."""
    options, (width, height) = TRANSFORMS[case]
    transform = EvalTransform(EvalTransformConfig.model_validate(options), 32, (0.0,), (1.0,))
    for x, y in ((width // 2, height // 2), (width // 3, height // 2 + 5)):
        pixels = np.zeros((height, width), np.uint8)
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
        row, column = divmod(int(torch.argmax(transform(Image.fromarray(pixels))[0])), 32)
        left, top, right, bottom = in_original((column, row, column + 1, row + 1), (width, height), transform)
        assert left - 1 <= x + 0.5 <= right + 1 and top - 1 <= y + 0.5 <= bottom + 1
    whole = in_original((0, 0, 32, 32), (width, height), transform)
    assert 0 <= whole[0] < whole[2] <= width and 0 <= whole[1] < whole[3] <= height
