"""The 1,797 hand-written 8x8 digits that ship with scikit-learn: real scans that need no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.images import encode_png
from data_prep.options import PrepOptions
from data_prep.sources.base import Item, Listing

TEST_IMAGES = 360
SPLIT_SEED = 0


class DigitsSource:
    """`load_digits`, split 1,437 / 360 stratified by class."""

    kind = "digits"
    name = "digits"
    unnamed = False

    def __init__(self, path: Path, options: PrepOptions) -> None:
        self.path = path

    @classmethod
    def matches(cls, path: Path) -> bool:
        return str(path) == "digits"

    def splits(self) -> list[str]:
        return ["train", "test"]

    def listing(self, split: str) -> Listing:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = digits.target
        rows = np.arange(len(labels))
        train, test = train_test_split(rows, test_size=TEST_IMAGES, random_state=SPLIT_SEED, stratify=labels)
        chosen = np.sort(train if split == "train" else test)
        return Listing(
            [str(digit) for digit in range(10)],
            [f"load_digits#{row}" for row in chosen],
            labels[chosen].astype(np.int64),
            np.full(len(chosen), 64),
            chosen[:, None],
            DigitsReader(np.rint(digits.images * 255 / 16).astype(np.uint8)),
        )


class DigitsReader:
    """Encodes scans as 8-bit greyscale PNG, their values 0..16 spread to 0..255; `at` is (row,)."""

    def __init__(self, scans: np.ndarray) -> None:
        self.scans = scans  # 115 kB: sent to the workers sooner than scikit-learn is imported there

    def read(self, items: Sequence[Item]) -> Iterator[bytes]:
        for item in items:
            yield encode_png(self.scans[item.at[0]])
