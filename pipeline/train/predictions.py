"""What a model answered to every sample of a split, in the order of the split: a .csv, .tsv or .jsonl file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.tracking.files import json_line, write_aside
from pipeline.train.distributed import World

SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Predictions:
    """A table, whose rows are made when it is written: only one of the processes needs them.

    Attributes:
        columns: their names.
        rows: makes the rows, in the order of the split; None in a cell that is empty.
    """

    columns: tuple[str, ...]
    rows: Callable[[], Iterable[Sequence[Any]]]

    def write(self, path: Path) -> None:
        """Write the table aside and rename it; the ending of the name chooses how.

        Raises:
            UserError: no space, no permission.
        """
        lines = self._objects() if path.suffix == ".jsonl" else self._cells("\t" if path.suffix == ".tsv" else ",")
        write_aside(path, lambda file: file.writelines(lines))

    def _objects(self) -> Iterable[bytes]:
        return (json_line(dict(zip(self.columns, row, strict=True))) for row in self.rows())

    def _cells(self, separator: str) -> Iterable[bytes]:
        # With this end of a line the writer puts quotes around a lone carriage return too.
        writer = csv.writer(_Line(), delimiter=separator, lineterminator="\r\n")
        yield writer.writerow(self.columns)  # what `_Line.write` returns
        yield from map(writer.writerow, self.rows())


class _Line:
    """The file of a `csv.writer` that hands a line back."""

    def write(self, text: str) -> bytes:
        # Names of folders need not be text.
        return text.removesuffix("\r\n").encode("utf-8", "backslashreplace") + b"\n"


def short(value: float) -> float:
    """A float32 as the number of fewest digits that is read as it."""
    return float(str(np.float32(value)))


class Answers:
    """Labels, predictions and probabilities of the batches of an evaluation; the device is asked once, at the end."""

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, labels: torch.Tensor, predicted: torch.Tensor, logits: torch.Tensor) -> None:
        """One batch: (b,), (b,) and (b, K)."""
        probabilities = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
        self._batches.append((labels, predicted, probabilities))

    def read(self, world: World, samples: int) -> list[np.ndarray]:
        """Labels, predictions and probabilities, (samples,) each, in the order of the split; collective.

        Processes take the split's batches in turn, as `EvalDataset` deals them out, and all as many; what lies behind
        the last sample is padding.
        """
        own = [torch.stack(column).cpu().numpy() for column in zip(*self._batches, strict=True)]
        columns = zip(*world.gather(own), strict=True)
        return [np.stack(parts, axis=1).reshape(-1)[:samples] for parts in columns]
