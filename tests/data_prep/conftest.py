"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_prep.helpers import make_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three class folders of five images."""
    return make_folder(tmp_path / "source")
