"""How many CPU cores there are for this process: fewer than the machine has, in a Slurm job or a container."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("sys/fs/cgroup")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on, and no more than its share of time is worth, rounded up; at least 1.

    Args:
        root: where the system's files are looked for.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    quota = _quota(root)
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(root: Path) -> float | None:
    """The least limit of the control groups around this process, in cores: `docker --cpus`, systemd's CPUQuota."""
    limits = [limit for group in _groups(root) if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders that may hold a limit: of the process's group and all above it.

    In a container the files may name the host's group, which isn't there; its own is then at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    yield root / _CGROUPS
    yield root / _CGROUPS / "cpu"
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        parts = Path(path.lstrip("/")).parts
        if (controllers and "cpu" not in controllers.split(",")) or ".." in parts:
            continue
        group = root / _CGROUPS / ("cpu" if controllers else "")  # the second version has all in one place
        for part in parts:
            group /= part
            yield group


def _limit(group: Path) -> float | None:
    """Cores that a group has the time of; None without a limit."""
    quota, period = _words(group / "cpu.max")
    if quota is None:
        (quota, _), (period, _) = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    try:
        limit = float(quota or "") / float(period or "")
    except (ValueError, ZeroDivisionError):  # max: none
        return None
    return limit if 0 < limit < math.inf else None  # -1: none


def _words(file: Path) -> tuple[str | None, str | None]:
    """The first two words of a file; None for what is missing."""
    try:
        first, second, *_ = [*file.read_text().split(), None, None]
    except (OSError, UnicodeDecodeError):
        return None, None
    return first, second
