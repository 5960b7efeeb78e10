"""Figures that the papers published, for the data sets that a run can be recognised to be trained on.

`published.json` has a row per figure with its source. Parameters and multiply-adds are those of the models here,
counted as everywhere in the house. `recalled` marks figures that nobody compared with the paper. The papers give no
speed of training; `images_per_second` is timm's measurement, see `speeds` there.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

# Classes and training samples.
_DATASETS = {"ImageNet-1k": (1000, 1_281_167), "CIFAR-10": (10, 50_000), "CIFAR-100": (100, 50_000)}
_SAMPLES_MISSING = 0.01
_SPLITS = {"train", "training", "val", "test"}


def dataset_name(split: dict[str, Any] | None) -> str | None:
    """Name of a data set: one that papers use, by its classes and samples, else that of its folder.

    Args:
        split: the training split in a run's `facts.json`. Up to a hundredth of the samples may be missing, as damaged
            files do.
    """
    if split is None:
        return None
    for name, (classes, samples) in _DATASETS.items():
        if split.get("classes") == classes and (1 - _SAMPLES_MISSING) * samples <= split["samples"] <= samples:
            return name
    path = PurePosixPath(split["path"])
    return (path.parent.name if path.name in _SPLITS else path.name) or None


@cache
def _file() -> dict[str, Any]:
    return json.loads(resources.files("pipeline.tracking").joinpath("published.json").read_text())


def published_points(datasets: set[str]) -> list[dict[str, Any]]:
    """Rows of `published.json` for these data sets; accuracies are fractions of 1."""
    return [row for row in _file()["points"] if row["dataset"] in datasets]


def speeds_source() -> str:
    """Where the speeds of the rows were measured."""
    return _file()["speeds"]
