"""What explanations are drawn with: panels of one picture, heat, boxes and captions, by Pillow alone.

Training draws too, and Pillow is in memory there anyway. Colours are told apart by people who don't see red and green
alike: boxes in those of Okabe & Ito with a black edge, heat from dark blue to yellow, signed heat blue and orange.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.explain.localize import Box

PANEL = 288
MARGIN = 10
_CAPTION = 22
_ALPHA = 0.55
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
# One for each step down the tree, again from the first where there are more.
STEP_COLORS = ((86, 180, 233), (230, 159, 0), (240, 228, 66), (204, 121, 167))
TRUTH_COLOR = (255, 255, 255)
_HEAT = np.array([(0, 34, 78), (65, 77, 107), (124, 123, 120), (188, 175, 111), (254, 232, 56)], float)  # cividis
_SIGNED = np.array([(33, 102, 172), (247, 247, 247), (217, 95, 2)], float)


def panel(image: Image.Image) -> Image.Image:
    """The picture as large as a panel; of small ones the pixels stay visible."""
    resample = Image.Resampling.NEAREST if image.width * 3 <= PANEL else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((PANEL, PANEL), resample)


def heated(image: Image.Image, heat: np.ndarray, signed: bool = False, smooth: bool = True) -> Image.Image:
    """A panel under a map.

    Args:
        image: any size.
        heat: (h, w); its range is spread over the colours, or with `signed` its largest absolute value.
        signed: 0 is white, below it is blue, above it orange.
        smooth: interpolate between the cells.
    """
    if signed:
        part = (heat / max(float(np.abs(heat).max()), 1e-30) + 1) / 2
    else:
        part = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-30)
    colors = _SIGNED if signed else _HEAT
    ticks = np.linspace(0, 1, len(colors))
    rgb = np.stack([np.interp(part, ticks, colors[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    grey = panel(image).convert("L").convert("RGB")  # so that every colour is one of the heat
    return Image.blend(grey, Image.fromarray(rgb).resize((PANEL, PANEL), resample), _ALPHA)


def outline(image: Image.Image, box: Box, color: tuple[int, int, int], width: int) -> None:
    """Draw a box, given in parts of the panel (0 ... 1), inside of its edge, with a black line on both sides."""
    left, top, right, bottom = (round(value * PANEL) for value in box)
    draw = ImageDraw.Draw(image)
    for grow, line, ink in ((0, width + 2, (0, 0, 0)), (1, width, color)):
        # Of a box smaller than its lines a dot is left.
        corner = max(left + grow, right - 1 - grow), max(top + grow, bottom - 1 - grow)
        draw.rectangle((left + grow, top + grow, *corner), outline=ink, width=line)


def mark(image: Image.Image, x: float, y: float, text: str, size: int = 16) -> None:
    """Write in the middle of a place, given in parts of the panel."""
    ImageDraw.Draw(image).text(
        (x * PANEL, y * PANEL), text, fill=_PAPER, font=font(size), anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0)
    )


def page(title: Sequence[str], panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels side by side, each under its caption, below a few lines of text."""
    width = MARGIN + len(panels) * (PANEL + MARGIN)
    head = MARGIN + 20 * len(title)
    sheet = Image.new("RGB", (width, head + _CAPTION + PANEL + MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title):
        fit(draw, (MARGIN, MARGIN // 2 + 20 * number), line, width - 2 * MARGIN, 15)
    for number, (caption, image) in enumerate(panels):
        left = MARGIN + number * (PANEL + MARGIN)
        fit(draw, (left, head + 2), caption, PANEL, 13)
        sheet.paste(image, (left, head + _CAPTION))
    return sheet


def contact_sheet(cells: Sequence[tuple[Sequence[str], Image.Image]], columns: int) -> Image.Image:
    """Panels in rows, each above its lines of text."""
    columns = min(columns, len(cells))
    lines = max(len(text) for text, _ in cells)
    cell = PANEL + 18 * lines + MARGIN
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * (PANEL + MARGIN), MARGIN + rows * cell), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (text, image) in enumerate(cells):
        left, top = MARGIN + number % columns * (PANEL + MARGIN), MARGIN + number // columns * cell
        sheet.paste(image, (left, top))
        for i, line in enumerate(text):
            fit(draw, (left, top + PANEL + 2 + 18 * i), line, PANEL, 13)
    return sheet


def fit(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, size: int) -> None:
    """Write text on one line, cut where it would leave its place."""
    chosen = font(size)
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if draw.textlength(text, font=chosen) > width:
        while text and draw.textlength(text + "...", font=chosen) > width:
            text = text[:-1]
        text += "..."
    draw.text(at, text, fill=_INK, font=chosen)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's, which has the letters of most alphabets; else Pillow's own."""
    package = find_spec("matplotlib")
    file = package and package.origin and Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(file, size) if file and file.is_file() else ImageFont.load_default(size)
