"""What is trained on where a sample is bad: another, the same on every process, at any world size, after every kill.

The loader asks for a sample by `load(position)`, which gives it decoded or raises `BadSample`; nothing here knows where
samples are kept. The replacement is a function of (seed, epoch, sample, attempt) and of which samples are bad, so it
needs not be told to the other processes, nor saved. It is drawn from the same shard first: that file is open, or in a
cache, already, and shards that are not shuffled hold few classes, so that the classes keep their shares. The draw is
new in every epoch: no sample stands in for the bad one all the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from pipeline.errors import UserError
from pipeline.hashing import hash64

T = TypeVar("T")

# Stream of the counter-based generator; see pipeline.hashing.
_SUBSTITUTE = 103
# Samples tried instead of a bad one: of its shard, then of all. More in a row are bad only where hardly one is not.
NEAR, FAR = 4, 12
# Seconds before each further attempt where the file system fails to read: servers that fail over answer again soon.
_PAUSES = (0.1, 1.0)


class BadSample(UserError):
    """A sample that can't be trained on.

    Args:
        path: the file, or how messages call it.
        reason: what is wrong.
        mend: what to do about it.
        key: key of the sample, where its index can be read.
        lost: nothing of the shard can be read.
        passing: the file system failed, which may pass.
    """

    def __init__(
        self, path: str | Path, reason: str, mend: str, key: str = "", *, lost: bool = False, passing: bool = False
    ) -> None:
        name = f"sample {key}: " if key else ""
        super().__init__(f"{path}: {name}{reason}; {mend}")
        self.path, self.reason, self.mend, self.key = str(path), reason, mend, key
        self.lost, self.passing = lost, passing

    @property
    def file(self) -> str:
        """Name of the file in its directory."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Replaced:
    """A bad sample that a step met, and what was trained on instead.

    Attributes:
        sample: its position in the manifest.
        shard: file name of its shard, or of the shard's index where that is what is wrong.
        key: its key; empty where the index can't be read.
        reason: what is wrong with it.
        by: position of the replacement.
        by_key: key of the replacement.
    """

    sample: int
    shard: str
    key: str
    reason: str
    by: int
    by_key: str


class Retries:
    """Tries again, after a pause, what the file system failed to read; once for every file that stays unreadable."""

    def __init__(self) -> None:
        self._unreadable: set[str] = set()

    def load(self, sample: int, load: Callable[[int], T]) -> T:
        """`load(sample)`.

        Raises:
            BadSample: it raised it, and kept doing so.
        """
        for pause in _PAUSES:
            try:
                return load(sample)
            except BadSample as error:
                if not error.passing or error.path in self._unreadable:
                    raise
                path = error.path
            time.sleep(pause)
        try:
            return load(sample)
        except BadSample:
            self._unreadable.add(path)
            raise


class Substitutes(Generic[T]):
    """Loads samples, and others where they are bad.

    Args:
        shard_samples: samples of each shard.
        seed: of the run.
        replace: False: a bad sample is an error.
    """

    def __init__(self, shard_samples: Sequence[int], seed: int, replace: bool) -> None:
        self._starts = np.cumsum([0, *shard_samples])
        self._seed, self._replace = seed, replace
        self._retries = Retries()

    def load(self, sample: int, epoch: int, load: Callable[[int], T]) -> tuple[int, T, BadSample | None]:
        """The sample, or its replacement in this epoch.

        Returns:
            Position of what was loaded, what `load` gave for it, and what is wrong with the sample itself, if anything.

        Raises:
            UserError: the sample is bad, and so are all that were tried instead; or it may not be replaced.
        """
        try:
            return sample, self._retries.load(sample, load), None
        except BadSample as error:
            if not self._replace:
                raise
            fault = error
        tried = 0
        for other in self.candidates(sample, epoch, fault.lost):
            try:
                return other, self._retries.load(other, load), fault
            except BadSample:
                tried += 1
        raise UserError(f"{fault}; nor could any of the {tried} samples be read that were tried instead") from fault

    def candidates(self, sample: int, epoch: int, lost: bool = False) -> Iterator[int]:
        """What is tried instead of a sample, in order; never the sample itself.

        Args:
            lost: leave its shard alone.
        """
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        own, everything = self._starts[shard : shard + 2].tolist(), (0, int(self._starts[-1]))
        for attempt in range(NEAR + FAR):
            if attempt < NEAR and lost:
                continue
            begin, end = own if attempt < NEAR else everything
            others = end - begin - 1
            if others:
                bits = int(hash64(self._seed, _SUBSTITUTE, epoch, sample, attempt))
                yield begin + (sample - begin + 1 + bits % others) % (end - begin)
