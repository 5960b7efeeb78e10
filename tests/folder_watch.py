"""Watching how large a cache gets."""

from __future__ import annotations

import fcntl
import threading
from contextlib import suppress
from pathlib import Path

# Held during a look. Who forks takes it: a child that inherited the open lock file would keep the lock while it lives.
LOOKING = threading.Lock()


class Watch:
    """Looks at the sum of all sizes in a cache's folder, again and again. Use as a context manager.

    A look takes the cache's lock, under which files come and grow: without it, a file that goes and the one that takes
    its room could both be counted.

    Attributes:
        most: the largest sum seen.
        looks: how often it was looked at.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.looks = folder, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            with suppress(FileNotFoundError), LOOKING:
                with open(self.folder / ".lock", "rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    self.most = max(self.most, self._size())
                self.looks += 1

    def _size(self) -> int:
        found = {}
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a file may get another name meanwhile
                seen = path.stat()
                found[seen.st_ino] = seen.st_size
        return sum(found.values())
