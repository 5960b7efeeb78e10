"""Shards for the tests of this room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.options import PrepOptions
from data_prep.prepare import prepare, prepare_splits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards of 200 samples: `train` (1,437) and `test` (360)."""
    out = tmp_path_factory.mktemp("digits")
    prepare_splits("digits", out, PrepOptions(shard_samples=200, workers=1))
    return out


@pytest.fixture(scope="session")
def cifar_test(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 10,000 test images of CIFAR-10 as shards."""
    out = tmp_path_factory.mktemp("cifar10")
    prepare(real_data / "cifar10" / "test.parquet", out, PrepOptions(shard_samples=1500, workers=2), "test")
    return out / "test"


@pytest.fixture
def damage(digits: Path, tmp_path: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Copies the test split, does something to one of its files and returns the copy."""

    def copy(file: str, do: Callable[[Path], object]) -> Path:
        split = tmp_path / "test"
        shutil.copytree(digits / "test", split)
        do(split / file)
        return split

    return copy
