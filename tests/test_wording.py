"""Counts in messages."""

from __future__ import annotations

import pytest

from pipeline.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (0, "sample", "0 samples"),
        (1, "sample", "1 sample"),
        (1437, "sample", "1,437 samples"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (3, "class", "3 classes"),
        (2, "micro-batch", "2 micro-batches"),
    ],
)
def test_counted(number: int, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected
