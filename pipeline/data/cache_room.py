"""Where the node's cache lies, how much it may hold, and what it holds."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

_ENTRY = re.compile(r"[0-9a-f]{64}(?P<part>\.part)?")
# Without a limit of its own the cache leaves this part of the disk free.
_RESERVE = 0.1


@dataclass(frozen=True)
class CacheOptions:
    """Where files from stores are kept on this node, and how much of them.

    Attributes:
        directory: None: below `$SLURM_TMPDIR`, `$TMPDIR` or `~/.cache`, whichever is there first.
        gigabytes: 1e9 bytes; None: until a tenth of the disk is left free.
    """

    directory: str | None = None
    gigabytes: float | None = None

    @property
    def path(self) -> Path:
        """The folder on this node."""
        if self.directory is not None:
            return Path(self.directory)
        for variable in ("SLURM_TMPDIR", "TMPDIR"):
            if os.environ.get(variable):
                return Path(os.environ[variable], f"rookery-cache-{os.getuid()}")
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "rookery")


@dataclass(frozen=True)
class Entry:
    """A file of a cache.

    Attributes:
        used: when it was used last, in nanoseconds.
        is_part: on its way, or left behind by a kill.
    """

    path: Path
    size: int
    used: int
    is_part: bool


def room_for(options: CacheOptions) -> int:
    """Bytes that the cache may hold on this machine; nothing is made there.

    Raises:
        UserError: the folder can't be looked at.
    """
    if options.gigabytes is not None:
        return int(options.gigabytes * 1e9)
    folder = options.path
    try:
        held = sum(entry.size for entry in entries(folder)) if folder.is_dir() else 0
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
        return free_limit(there, held)
    except OSError as error:
        raise UserError(f"{folder}: can't be used as cache ({error.strerror or error}); set data.cache") from error


def free_limit(folder: Path, held: int) -> int:
    """A limit that leaves a part of the disk free."""
    disk = shutil.disk_usage(folder)
    return max(0, held + disk.free - int(_RESERVE * disk.total))


def entries(folder: Path) -> Iterator[Entry]:
    """The files of a cache; others in its folder are none of its business."""
    with os.scandir(folder) as found:
        for each in found:
            match = _ENTRY.fullmatch(each.name)
            if match:
                with suppress(FileNotFoundError):
                    seen = each.stat()
                    if stat.S_ISREG(seen.st_mode):
                        yield Entry(Path(each.path), seen.st_size, seen.st_mtime_ns, match["part"] is not None)
