"""Pictures and tables of a run for MLflow: learning rate, throughput, confusion, accuracy of every class.

matplotlib is imported by what uploads, never by what trains.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pipeline.tracking.confusion import BEST_NAME, NEWEST_NAME, Confusion
from pipeline.tracking.files import file_sha256
from pipeline.tracking.metrics import METRICS_NAME, read_metrics

# Names of classes are written on the axes up to so many.
_NAMED_CLASSES = 30
_MATRICES = {NEWEST_NAME: "final", BEST_NAME: "best"}


def sources(run: Path) -> dict[str, str]:
    """The files that `draw` reads, with their sha256: the same files give the same pictures."""
    names = (METRICS_NAME, *_MATRICES)
    return {name: file_sha256(run / name) for name in names if (run / name).exists()}


def draw(run: Path, folder: Path) -> list[Path]:
    """Draw what the run directory has figures for.

    Returns:
        The files, of `learning_rate.png`, `throughput.png` and for the final and the best evaluation
        `confusion_<which>.png` and `per_class_<which>.csv`.

    Raises:
        UserError: a file of the run is damaged.
    """
    train = [line for line in read_metrics(run) if line["kind"] == "train"]
    drawn = [
        _curve(train, "lr", "learning rate", folder / "learning_rate.png"),
        _curve(train, "images_per_second", "images per second", folder / "throughput.png", from_zero=True),
    ]
    for name, which in _MATRICES.items():
        if (run / name).exists():
            matrix, classes, step = Confusion.load(run / name)
            drawn.append(_table(matrix, classes, folder / f"per_class_{which}.csv"))
            drawn.append(_picture(matrix, classes, f"{which}: step {step}", folder / f"confusion_{which}.png"))
    return [path for path in drawn if path is not None]


def _curve(lines: list[dict[str, Any]], key: str, label: str, path: Path, from_zero: bool = False) -> Path | None:
    """One value over the epochs, with the samples on the upper edge."""
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    if not points:
        return None
    figure, axes = _figure(7, 4)
    axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 3 else None)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    if from_zero:
        axes.set_ylim(bottom=0)
    last = lines[-1]
    if last["epoch"]:
        per_epoch = last["samples"] / last["epoch"]
        top = axes.secondary_xaxis("top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch))
        top.set_xlabel("samples")
    figure.savefig(path, dpi=120)
    return path


def _picture(matrix: Confusion, classes: list[str], title: str, path: Path) -> Path:
    """The matrix, each row as parts of its class."""
    import numpy as np

    dense = matrix.dense()
    parts = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure(8, 7)
    picture = axes.imshow(parts, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="class", title=title)
    figure.colorbar(picture, label="part of the class")
    if len(classes) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(matrix.label, matrix.predicted, strict=True):
            color = "white" if parts[row, column] > 0.5 else "black"
            axes.text(column, row, dense[row, column], ha="center", va="center", color=color, fontsize=7)
    figure.savefig(path, dpi=120)
    return path


def _table(matrix: Confusion, classes: list[str], path: Path) -> Path:
    """A row per class: its samples, how many were right, and as what the others were taken most often."""
    hits, samples = matrix.per_class()
    worst: dict[int, tuple[int, int]] = {}
    for row, column, count in zip(matrix.label, matrix.predicted, matrix.count, strict=True):
        if row != column and count > worst.get(row, (0, 0))[0]:
            worst[row] = (int(count), int(column))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "samples", "correct", "accuracy", "taken_for", "times"])
        for i, name in enumerate(classes):
            times, other = worst.get(i, (0, -1))
            accuracy = hits[i] / samples[i] if samples[i] else ""
            writer.writerow([name, samples[i], hits[i], accuracy, classes[other] if times else "", times])
    return path


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Without pyplot there is no window system to choose, and no figure that stays in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
