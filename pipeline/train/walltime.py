"""When a run in a Slurm job has to save and leave, so that the time limit takes nothing from it."""

from __future__ import annotations

import os
import subprocess

# A job shorter than this many margins gives up this part of its time instead.
_LARGEST_PART = 0.1
_ASK_SECONDS = 30


def leave_at(margin: float, may_ask: bool) -> float | None:
    """Unix time at which the run is to save and end with status 75; None outside Slurm and without a time limit.

    Args:
        margin: seconds before the job's end; a tenth of the job's time where that is less.
        may_ask: ask Slurm where the environment doesn't tell, as before its version 23.02. One process is enough.
    """
    times = _from_environment() or (_from_slurm() if may_ask else None)
    if times is None:
        return None
    start, end = times
    return end - min(margin, _LARGEST_PART * max(0.0, end - start))


def job_here() -> str | None:
    """The Slurm job around this process, as Slurm's commands take it; None outside of one.

    Of an array's tasks one has the number of the whole array: what is asked of that number, all tasks do.
    """
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ.get("SLURM_JOB_ID") if array is None or index is None else f"{array}_{index}"


def _from_environment() -> tuple[float, float] | None:
    return _numbers(os.environ.get("SLURM_JOB_START_TIME"), os.environ.get("SLURM_JOB_END_TIME"))


def _from_slurm() -> tuple[float, float] | None:
    job = job_here()
    if job is None:
        return None
    ask = ["squeue", "--noheader", f"--jobs={job}", "--format=%S %e"]
    seconds = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(ask, env=seconds, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    start, _, end = done.stdout.strip().partition(" ")
    return _numbers(start, end)


def _numbers(start: str | None, end: str | None) -> tuple[float, float] | None:
    """Both times, None when one is missing or no number, as the end of a job without a limit."""
    try:
        return float(start or ""), float(end or "")
    except ValueError:
        return None
