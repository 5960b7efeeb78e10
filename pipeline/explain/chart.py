"""The chart of token similarity by depth. matplotlib is imported when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np


def draw_similarity(similarities: np.ndarray, title: str, file: BinaryIO, texts: Mapping[str, str]) -> None:
    """The mean over the images, and the range from the lowest to the highest.

    Args:
        similarities: (images, layers).
        file: gets a PNG.
        texts: what is written into it as well.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    layers = np.arange(1, similarities.shape[1] + 1)
    axes.fill_between(layers, similarities.min(0), similarities.max(0), alpha=0.25, label="lowest to highest")
    axes.plot(layers, similarities.mean(0), marker=".", label="mean over the images")
    axes.set(xlabel="after layer", ylabel="mean cosine of two tokens", title=title)
    axes.set_ylim(min(0.0, float(np.nanmin(similarities))), 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, format="png", metadata=dict(texts))
