"""Counted facts of the architectures, kept between calls: counting takes some tenths of a second per model.

The file lives in the user's cache directory (`XDG_CACHE_HOME`, else `~/.cache`) under a name made of the source of
`pipeline.models` and of torch's version, so that a change of either starts a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tracking.files import write_json


class FactsCache:
    """Parameters and multiply-adds by model name and image size; use it as a context, which saves what was added."""

    def __init__(self) -> None:
        import torch

        import pipeline.models

        digest = hashlib.sha256(torch.__version__.encode())
        for file in sorted(Path(str(pipeline.models.__file__)).parent.glob("*.py")):
            digest.update(file.read_bytes())
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = Path(folder) / "rookery" / f"facts-{digest.hexdigest()[:16]}.json"
        self._facts: dict[str, list[int]] = self._read()
        self._changed = False

    def __enter__(self) -> FactsCache:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._changed:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._facts)
        except (OSError, UserError):
            return  # a cache that can't be written costs the next call its time, nothing else

    def facts(self, name: str, img_size: int | None) -> tuple[int, int]:
        """Parameters and multiply-adds of a registered model at its own or at another image size."""
        key = name if img_size is None else f"{name}@{img_size}"
        if key not in self._facts:
            from pipeline.models.facts import model_facts

            counted = model_facts(name, img_size=img_size)
            self._facts[key], self._changed = [counted.params, counted.macs], True
        params, macs = self._facts[key]
        return params, macs

    def _read(self) -> dict[str, list[int]]:
        try:
            return json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
