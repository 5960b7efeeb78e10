"""The confusion matrix of an evaluation, as its entries that aren't 0: `confusion.npz` in the run directory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.tracking.files import write_aside

NEWEST_NAME = "confusion.npz"
BEST_NAME = "confusion_best.npz"


@dataclass(frozen=True)
class Confusion:
    """How often samples of a class were taken for another, or for their own.

    Attributes:
        num_classes: C.
        label, predicted, count: (n,) int64, the entries that aren't 0 in the order of rows.
    """

    num_classes: int
    label: np.ndarray
    predicted: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, num_classes: int, pairs: Iterable[np.ndarray]) -> Confusion:
        """From arrays of `label * C + prediction`, one number per sample."""
        cells, count = np.unique(np.concatenate([np.zeros(0, np.int64), *pairs]), return_counts=True)
        return cls(num_classes, cells // num_classes, cells % num_classes, count.astype(np.int64))

    def dense(self) -> np.ndarray:
        """The matrix (C, C) int64: a row per class, a column per prediction."""
        matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
        matrix[self.label, self.predicted] = self.count
        return matrix

    def per_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Hits and samples of every class, (C,) int64 each."""
        samples = np.bincount(self.label, self.count, self.num_classes).astype(np.int64)
        own = self.label == self.predicted
        hits = np.bincount(self.label[own], self.count[own], self.num_classes).astype(np.int64)
        return hits, samples

    def save(self, path: Path, classes: list[str], step: int) -> None:
        """Write the entries, the names of the classes, and the step that the evaluation followed.

        Raises:
            UserError: no space, no permission.
        """
        entries = {"label": self.label, "predicted": self.predicted, "count": self.count}
        names = np.array(classes, dtype=np.str_)
        write_aside(path, lambda file: np.savez_compressed(file, **entries, classes=names, step=step))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> tuple[Confusion, list[str], int]:
        """What `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with np.load(path) as file:
                classes = [str(name) for name in file["classes"]]
                matrix = cls(len(classes), file["label"], file["predicted"], file["count"])
                return matrix, classes, int(file["step"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} can't be read as a confusion matrix ({error}); delete it") from error
