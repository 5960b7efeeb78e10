"""Opening MLflow quietly, finding an experiment, and saying in one line what was wrong with it."""

from __future__ import annotations

import fcntl
import os
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.mirror_state import sqlite_path
from pipeline.tracking.redact import redact, without_password

# Its own retries would keep a push busy for minutes; ours come later, with everything that has gathered by then.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "GIT_PYTHON_REFRESH": "quiet",
}


def connect(uri: str) -> Any:
    """A client; importing mlflow takes seconds.

    Where runs may start together, `locked`: they would all create the tables of a new SQLite file.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    if database is not None:
        make_whole(database, lambda aside: MlflowClient(tracking_uri=f"sqlite:///{aside}").search_experiments())
    return MlflowClient(tracking_uri=uri)


def make_whole(database: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` make a database, where there is none, that appears as a whole.

    MLflow makes the tables one by one, and can't go on where it was killed: no run could use that file any more.
    """
    if database.exists() or not database.parent.is_dir():
        return
    aside = database.with_name(f".{database.name}.part")
    with suppress(OSError):  # MLflow says it itself
        for rest in (aside, aside.with_name(f"{aside.name}-journal")):
            rest.unlink(missing_ok=True)  # of a process that was killed
        fill(aside)
        aside.rename(database)


def find_experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, which is made where there is none.

    Raises:
        UserError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(uri)
        folder = database and (database.parent / "mlruns" / urllib.parse.quote(name, safe="")).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=folder))
        except MlflowException:
            # Another run created it in between.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {name!r} at {without_password(uri)} is deleted; restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or set another tracking.experiment"
        )
    return str(found.experiment_id)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time through; the others wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def unreachable(error: Exception) -> bool:
    """Whether there was no answer, rather than one that refuses."""
    signs = ("Max retries exceeded", "Connection refused", "Connection aborted", "timed out")
    return any(sign in str(error) for sign in signs)


def reason(error: Exception) -> str:
    """One line about why an upload failed."""
    text = str(error)
    if unreachable(error):
        causes = ("refused", "timed out", "resolve", "unreachable", "reset", "aborted")
        cause = next((word for word in causes if word in text), "")
        return f"can't be reached{f' ({cause})' if cause else ''}"
    if "OperationalError" in text and "already exists" in text:
        return (
            "was not made to its end, as the process that made it was killed: move the file away, and `rookery sync` "
            "uploads everything"
        )
    return f"refused the upload: {type(error).__name__}: {redact(text.strip().splitlines()[0][:300] if text else '')}"
