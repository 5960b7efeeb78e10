"""Notes in a node's cache of what the store has lost or damaged.

Such a file is not asked for again for each of its samples, by each process of the node, but now and then: it may be
mended.
"""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from pipeline.errors import DamagedFile

# How long a note counts.
_SECONDS = 300.0


class Faults:
    """The notes in a folder, one for each file, under its hash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, sha256: str, fault: list[str]) -> None:
        """For all processes of the node; while the file is locked.

        Args:
            fault: reason and mend of a `DamagedFile`; empty: the file isn't there.
        """
        with suppress(OSError):
            self._path(sha256).write_text(json.dumps(fault))

    def noted(self, sha256: str, name: str) -> FileNotFoundError | DamagedFile | None:
        """What was noted a few minutes ago at most, about a file of this name; of a note half written nothing."""
        path = self._path(sha256)
        try:
            if not -1 < time.time() - path.stat().st_mtime < _SECONDS:
                return None
            fault = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        if not fault:
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return DamagedFile(name, *fault)

    def forget(self, sha256: str) -> None:
        """The file was fetched."""
        with suppress(OSError):
            self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.fault"
