"""Finds run directories and says what became of each. Writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import UserError
from pipeline.tracking.files import read_lines
from pipeline.tracking.metrics import METRICS_NAME
from pipeline.tracking.run_dir import CONFIG_NAME, RESULT_NAME, SESSIONS_NAME, EndStatus, is_locked

RunState = EndStatus | Literal["running", "killed", "unknown"]
_MARKERS = (CONFIG_NAME, SESSIONS_NAME, METRICS_NAME)
_SEARCH_DEPTH = 3


def is_run(path: Path) -> bool:
    """Whether a directory is a run directory."""
    return path.is_dir() and any((path / name).exists() for name in _MARKERS)


def find_runs(paths: list[Path]) -> list[Path]:
    """Run directories among `paths` and in the folders among them (three levels deep), each once, in order.

    Raises:
        UserError: a path is neither a run directory nor a folder with some.
    """
    found: list[Path] = []
    for path in paths:
        if not exists(path):
            raise UserError(f"{path} doesn't exist; name a run directory (runs/<name>) or a folder of them")
        runs = _search(path, _SEARCH_DEPTH)
        if not runs:
            raise UserError(
                f"{path} is no run directory ({', '.join(_MARKERS)} are missing), and there are none in it; "
                "name one (runs/<name>) or a folder of them"
            )
        found += runs
    return list({run.resolve(): run for run in reversed(found)}.values())[::-1]


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name too long for one, too, says that there is none."""
    try:
        return path.exists()
    except OSError:
        return False


def _search(path: Path, depth: int) -> list[Path]:
    if is_run(path):
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    return [run for child in sorted(path.iterdir()) for run in _search(child, depth - 1)]


def run_state(path: Path) -> RunState:
    """What became of a run, from its lock and its last session.

    Raises:
        UserError: the sessions are damaged.
    """
    if is_locked(path):
        return "running"
    sessions = read_lines(path / SESSIONS_NAME)
    if sessions:
        try:
            return sessions[-1]["status"] if sessions[-1]["event"] == "end" else "killed"
        except KeyError as error:
            raise UserError(f"{path / SESSIONS_NAME} holds what no run wrote (no {error}); restore it") from error
    return "finished" if (path / RESULT_NAME).exists() else "unknown"
