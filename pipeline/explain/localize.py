"""Weakly supervised localisation: a box from a map that was never trained on boxes, and how well it fits.

Zhou et al., arXiv 1512.04150, section 3.2: the box around the largest connected part of a thresholded map. The
threshold is a part of the map's range, as in Choe et al., "Evaluating Weakly Supervised Object Localization Methods
Right", CVPR 2020, arXiv 2001.07437, since maps of a LayerNorm have no zero of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Left, top, right, bottom; right and bottom excluded.
Box = tuple[float, float, float, float]

THRESHOLD = 0.2
FOUND = 0.5


def box_of(heat: np.ndarray, threshold: float = THRESHOLD) -> Box:
    """The box around the largest connected part (sides touch) that reaches the threshold.

    Args:
        heat: (H, W).
        threshold: 0 ... 1, between the smallest and the largest value of the map.

    Returns:
        In cells of the map; all of it where the map is constant.
    """
    from scipy import ndimage

    low, high = float(heat.min()), float(heat.max())
    parts, _ = ndimage.label(heat >= low + threshold * (high - low))
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    rows, columns = np.nonzero(parts == largest)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where one of them is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(a) + _area(b) - shared)


def best_iou(box: Box, truths: Iterable[Box]) -> float:
    """With the given box that fits best: an image is found where this is at least `FOUND`."""
    return max(iou(box, truth) for truth in truths)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
