"""What is drawn of an explanation: a page for every image, and a panel for the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.explain.draw import STEP_COLORS, TRUTH_COLOR, heated, mark, outline, page, panel
from pipeline.explain.localize import Box

# What sizes are measured in: the side of the panel.
_FULL: Box = (0.0, 0.0, 1.0, 1.0)


def block_box(row: int, column: int, depth: int) -> Box:
    """Where the block of a depth lies, in parts of the image."""
    n = 2**depth
    return column / n, row / n, (column + 1) / n, (row + 1) / n


def nested(image: Image.Image, blocks: Sequence[Sequence[int]]) -> Image.Image:
    """The boxes of a path inside each other, the leaf in the thickest line.

    Args:
        image: the model's input.
        blocks: row and column at the depths 1, 2, ...
    """
    drawn = panel(image)
    for depth, (row, column) in enumerate(blocks, 1):
        outline(drawn, block_box(row, column, depth), STEP_COLORS[(depth - 1) % len(STEP_COLORS)], 1 + depth)
    return drawn


def gradcat_page(
    image: Image.Image, title: Sequence[str], kind: str, scores: np.ndarray, blocks: Sequence[Sequence[int]]
) -> Image.Image:
    """The path, and for every step the part that it divides, large, with the score of each quadrant.

    Args:
        image: the model's input.
        title: lines of text.
        kind: what the scores are.
        scores: (D, 4).
        blocks: row and column at the depths 1 ... D.
    """
    panels = [(f"input, path from the root to block {tuple(blocks[-1])}", nested(image, blocks))]
    part = _FULL
    levels = len(blocks) + 1
    for depth, (four, (row, column)) in enumerate(zip(scores, blocks, strict=True), 1):
        left, top, right, bottom = (edge * image.width for edge in part)
        cut = image.resize(image.size, Image.Resampling.NEAREST, box=(left, top, right, bottom))
        drawn = heated(cut, four.reshape(2, 2), signed=True, smooth=False)
        for i, score in enumerate(four):
            mark(drawn, 0.25 + 0.5 * (i % 2), 0.25 + 0.5 * (i // 2), f"{score:+.2g}")
        outline(drawn, block_box(row % 2, column % 2, 1), STEP_COLORS[(depth - 1) % len(STEP_COLORS)], 1 + depth)
        panels.append((f"step {depth}: level {levels - depth + 1} to {levels - depth}, {kind}", drawn))
        part = block_box(row, column, depth)
    return page(title, panels)


def heat_page(
    image: Image.Image,
    title: Sequence[str],
    maps: Sequence[tuple[str, np.ndarray]],
    box: Box | None = None,
    truths: Sequence[Box] = (),
) -> Image.Image:
    """The input beside maps of any sides.

    Args:
        image: the model's input.
        title: lines of text.
        maps: captions and maps (h, w).
        box: found by the map, in parts of the image.
        truths: given boxes, likewise.
    """
    panels = [("input", panel(image))]
    panels += [(caption, heated(image, heat)) for caption, heat in maps]
    for _, drawn in panels:
        boxed(drawn, box, truths)
    return page(title, panels)


def boxed(drawn: Image.Image, box: Box | None, truths: Sequence[Box] = ()) -> Image.Image:
    """A panel with the given boxes (white) and the one that was found (orange)."""
    for truth in truths:
        outline(drawn, truth, TRUTH_COLOR, 2)
    if box is not None:
        outline(drawn, box, STEP_COLORS[1], 3)
    return drawn
