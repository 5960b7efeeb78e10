"""Which CPU cores a process works on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from data_prep.cores import usable_cores

# Environment variable by which `launch` asks for cores of their own for the processes of a node.
BIND = "ROOKERY_BIND_CORES"

_TOPOLOGY = Path("/sys/devices/system/cpu")


def bind_cores() -> None:
    """Keep this process, and all it starts, to its share of the node's cores, where `launch` asked for that.

    Shares are neighbours: processes in the order of their local ranks, cores in the order of sockets. So the first
    half of the GPUs of a usual node with two sockets works with cores of the first socket, where they are attached.
    """
    size = _local_size()
    cores = os.sched_getaffinity(0)
    if os.environ.pop(BIND, None) is None or len(cores) < size:
        return
    global _own
    _own = num_cores()
    os.sched_setaffinity(0, share(in_order(cores), int(os.environ.get("LOCAL_RANK", 0)), size))


def num_cores() -> int:
    """Cores that this process may count as its own; at least 1."""
    return _own or max(1, usable_cores() // _local_size())


def share(cores: list[int], rank: int, size: int) -> list[int]:
    """Part `rank` of `size` equal parts; what is left over belongs to nobody, so that no process is faster."""
    count = len(cores) // size
    return cores[rank * count : (rank + 1) * count]


def in_order(cores: Iterable[int]) -> list[int]:
    """Logical CPUs by socket, then core: both threads of a core are neighbours."""
    return sorted(cores, key=lambda cpu: (_number(cpu, "physical_package_id"), _number(cpu, "core_id"), cpu))


def _number(cpu: int, name: str) -> int:
    try:
        return int((_TOPOLOGY / f"cpu{cpu}" / "topology" / name).read_text())
    except (OSError, ValueError):
        return 0


def _local_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# Once this process keeps to its share: how many those are.
_own: int | None = None
