"""Numba finds a folder for compiled loops where neither the installation nor a home can be written to."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from data_prep.compiled import find_cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation and a home that can't be written to, whoever asks; the rest of the folder can."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    for name in ("installed", "home"):
        (tmp_path / name).mkdir()
    locked = {tmp_path / "installed", tmp_path / "home"}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in locked)
    return tmp_path


def found(source: Path) -> str | None:
    find_cache(source)
    return os.environ.get("NUMBA_CACHE_DIR")


def test_numba_is_left_alone_where_it_finds_one_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(place / "writable" / "loops.py") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "other home"))
    assert found(place / "installed" / "loops.py") is None
    monkeypatch.setenv("NUMBA_CACHE_DIR", "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "home"))
    assert found(place / "installed" / "loops.py") == "mine"


@pytest.mark.parametrize("home", ["home", None])
def test_a_folder_of_this_user_alone(home: str | None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` that stands for nothing is no folder to make."""
    if home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    folder = place / f"rookery-numba-{os.getuid()}"
    for _ in range(2):
        assert found(place / "installed" / "loops.py") == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        monkeypatch.delenv("NUMBA_CACHE_DIR")
    folder.chmod(0o777)  # anybody may have put code there
    other = Path(found(place / "installed" / "loops.py") or "")
    assert other != folder and other.stat().st_mode & 0o777 == 0o700
