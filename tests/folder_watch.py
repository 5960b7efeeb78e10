"""Watching how large a folder gets."""

from __future__ import annotations

import threading
from pathlib import Path


class Watch:
    """Looks at the sum of all sizes in a folder, again and again. Use as a context manager.

    Attributes:
        most: the largest sum seen.
        looks: how often it was looked at.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.looks = folder, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            sizes = []
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            self.most, self.looks = max(self.most, sum(sizes)), self.looks + 1
