"""Where Numba keeps what it has compiled, so that only the first program waits for it."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_VARIABLE = "NUMBA_CACHE_DIR"


def find_cache(source: Path) -> None:
    """Name a folder to Numba where it would find none and refuse to compile; call it before a module imports Numba.

    So it is for a user who has no home and may not write to the installation, as in many a container.

    Args:
        source: a file with loops. They are kept beside it, else below the user's home.
    """
    if os.environ.get(_VARIABLE) or _can_be(source.parent / "__pycache__") or _can_be(_at_home()):
        return
    folder = Path(tempfile.gettempdir(), f"rookery-numba-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="rookery-numba-"))  # code in there may be another user's
    os.environ[_VARIABLE] = str(folder)
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(folder)


def _at_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba")  # noqa: PTH111


def _can_be(folder: Path) -> bool:
    """Whether a folder is there, or can be made, and can be written to."""
    if not folder.is_absolute():  # without a home `~` stays, and Numba would make a folder of that name anywhere
        return False
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
