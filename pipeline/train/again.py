"""Starting again after a process has died: what the processes of a node leave for those that follow them.

torchrun starts all processes again when one ends with any other status than 0. A status that a process chose, for a
mistake or a signal, is left in a folder of the launcher, so that those started again end with it at once; and so is
where they began, so that one that dies again without a new checkpoint is not started for ever. Imports no torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

# Environment variables by which the launcher tells its processes the folder, and what to do.
FOLDER = "ROOKERY_AGAIN"
JOB = "ROOKERY_JOB"


def work(module: str) -> int:
    """Run the job of this process, unless one before has ended it; returns the exit status.

    Args:
        module: has `run(job) -> status`. An exception in it makes all processes start again.
    """
    end = _folder() / "status"
    if end.exists():
        return int(end.read_text())
    status = import_module(module).run(os.environ[JOB])
    if status:
        _write(end, status)
    return status


def restarts() -> int:
    """How often the processes of this job have been started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def allowed_restarts() -> int:
    """How often they may be."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def may_start(step: int) -> bool:
    """Whether a process that begins at this step got further than at one of its two starts before, if there were."""
    if FOLDER not in os.environ:
        return True
    path = _folder() / f"start-{os.environ.get('LOCAL_RANK', 0)}"
    starts = [int(line) for line in path.read_text().split()] if path.exists() else []
    _write(path, *starts, step)
    return starts[-2:] != [step, step]


def newest_step(run: Path) -> int:
    """Step of a run's newest committed checkpoint, 0 without one; its hashes are not checked."""
    steps = [0]
    for commit in (run / "checkpoints").glob("step-*/commit.json"):
        with suppress(ValueError):
            steps.append(int(commit.parent.name.removeprefix("step-")))
    return max(steps)


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _write(path: Path, *numbers: int) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("\n".join(map(str, numbers)))
    part.replace(path)
