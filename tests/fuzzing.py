"""What the fuzz tests share: damage drawn from a seed, and a watch over time, memory and files."""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEED = int(os.environ.get("ROOKERY_FUZZ_SEED", 0))
# One input may take so much: the largest picture that is let through has 100 million pixels.
CPU_SECONDS = 10
MEGABYTES = 1000


def generator(name: str) -> random.Random:
    """Of one input: another one more or less leaves the others as they are."""
    return random.Random(f"{SEED} {name}")


def damaged(data: bytes, how: str, draw: random.Random) -> bytes:
    """Bytes `cut` short, with bits `flipped`, with a run `zeroed`, `spliced` with another part of themselves."""
    size = len(data)
    if how == "cut":
        return data[: draw.randrange(size)]
    changed = bytearray(data)
    while changed == data:  # zeros may meet zeros
        if how == "flipped":
            for _ in range(draw.choice((1, 2, 5, 20))):
                changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
            continue
        length = draw.randint(1, max(1, size // 4))
        start, other = (draw.randrange(size - length + 1) for _ in range(2))
        if how == "zeroed":
            changed[start : start + length] = bytes(length)
        else:
            assert how == "spliced"
            changed[start:start] = data[other : other + length]
    return bytes(changed)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail when what is done here takes too much time or memory; blocked for ever, the test's time limit ends it.

    Memory that nothing could give is refused by the system, as in a job with a limit.
    """
    _reset_peak()
    before, began = _status("VmRSS"), time.process_time()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * _status("VmSize") + 4 * MEGABYTES * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    seconds, megabytes = time.process_time() - began, (_status("VmHWM") - before) / 1024
    assert seconds < CPU_SECONDS, f"{seconds:.1f} s of computing"
    assert megabytes < MEGABYTES, f"{megabytes:.0f} MB"


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A figure of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def tree(folder: Path, without: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of change of everything below a folder but `without`."""
    found, waiting = {}, [os.fspath(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if Path(entry.path) == without:
                    continue
                status = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    found[entry.path] = (status.st_mode, 0, 0)
                    waiting.append(entry.path)
                else:
                    found[entry.path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


_OPENED: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _OPENED.append(os.fsdecode(arguments[0]))


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files that Python opens meanwhile."""
    global _OPENED
    if not hasattr(_note, "installed"):
        sys.addaudithook(_note)  # for good: hooks can't be removed
        _note.installed = True  # type: ignore[attr-defined]
    _OPENED = []
    try:
        yield _OPENED
    finally:
        _OPENED = None
