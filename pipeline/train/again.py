"""Starting again after a process has died: what the processes of a node leave for their launcher and each other.

Its agent starts all processes of all nodes again when one ends with any other status than 0, unless that was chosen,
for a mistake or a signal: then it is in a folder of the launcher. So is where processes began, so that a run which dies
again and again without a new checkpoint comes to an end. Imports no torch.
"""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from pipeline.train.status import FAILED, INTERRUPTED, MISTAKE, RESUBMIT

# Environment variables by which the launcher tells its processes the folder, and what to do.
FOLDER = "ROOKERY_AGAIN"
JOB = "ROOKERY_JOB"
# And who started them.
AGENT_PID = "ROOKERY_AGENT_PID"

_ALONE = "alone"

_may_pass = False
_is_alone = False


def work(module: str) -> int:
    """Run the job of this process, and leave its exit status for the launcher.

    Args:
        module: has `run(job) -> status`. An exception in it makes all processes start again.
    """
    try:
        status = import_module(module).run(os.environ[JOB])
    except Exception:
        # Told here: at the interpreter's own end NCCL would wait for the other processes, and these for this one.
        traceback.print_exc()
        return FAILED
    if status and not _may_pass:
        if _is_alone:
            _write(_folder() / _ALONE)
        _write(_status_file(), status)
    return status


def hope() -> None:
    """Why this process ends may pass: unlike a status of its own choice, that is a reason to start all again."""
    global _may_pass
    _may_pass = True


def leave_alone() -> None:
    """The other processes don't know that this one ends by its own choice, and may wait for it, deaf to signals."""
    global _is_alone
    _is_alone = True


def has_left_alone() -> bool:
    """Whether a process of this node has ended so."""
    return FOLDER in os.environ and (_folder() / _ALONE).exists()


def chosen_status() -> int | None:
    """The status with which a process of this node has ended the run before, None when none did."""
    if FOLDER not in os.environ or not _status_file().exists():
        return None
    return int(_status_file().read_text())


def note_start(step: int) -> list[int]:
    """Note at which step this process begins; returns where those in its place began before."""
    if FOLDER not in os.environ:
        return []
    path = _folder() / f"start-{os.environ.get('LOCAL_RANK', 0)}"
    starts = [int(line) for line in path.read_text().split()] if path.exists() else []
    _write(path, *starts, step)
    return starts


def has_begun() -> bool:
    """Whether a process of this node has got as far as to note a start."""
    return FOLDER in os.environ and any(_folder().glob("start-*"))


def is_stuck(starts: list[int], step: int) -> bool:
    """Whether a start at this step is the third in a row there."""
    return starts[-2:] == [step, step]


def most_telling(statuses: list[int], otherwise: int) -> int:
    """Of the exit statuses of several processes, the chosen one that says most about why they ended."""
    return next((status for status in (MISTAKE, RESUBMIT, INTERRUPTED) if status in statuses), otherwise)


def newest_step(run: Path) -> int:
    """Step of a run's newest committed checkpoint, 0 without one; its hashes are not checked."""
    steps = [0]
    for commit in (run / "checkpoints").glob("step-*/commit.json"):
        with suppress(ValueError):
            steps.append(int(commit.parent.name.removeprefix("step-")))
    return max(steps)


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _status_file() -> Path:
    return _folder() / "status"


def _write(path: Path, *numbers: int) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("\n".join(map(str, numbers)))
    part.replace(path)
