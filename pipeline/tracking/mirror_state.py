"""`mlflow.json`: for every MLflow address, which run there mirrors this one and how far the upload is."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.files import read_json, write_json
from pipeline.tracking.redact import without_password
from pipeline.tracking.tail import TailState

STATE_NAME = "mlflow.json"


@dataclass
class MirrorState:
    """The upload to one address.

    Attributes:
        experiment, run_name: what the MLflow run is called.
        uid: tag that finds a run whose creation was answered too late.
        run_id: MLflow's id, None until there is a run.
        tail: how far `metrics.jsonl` was uploaded.
        artifacts: sha256 of every file uploaded.
        summary: the closing figures uploaded.
        pictures: what the pictures uploaded were drawn from, by sha256.
        model: name and sha256 of the weights registered.
        folder: the run directory; a copy of it has this one in its state.
    """

    experiment: str = ""
    run_name: str = ""
    uid: str | None = None
    run_id: str | None = None
    tail: TailState = field(default_factory=TailState)
    artifacts: dict[str, str] = field(default_factory=dict)
    summary: list[Any] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    model: list[str] = field(default_factory=list)
    folder: str = ""

    def forget_run(self) -> None:
        """Start from nothing: the server no longer has the run."""
        self.__init__(self.experiment, self.run_name)  # type: ignore[misc]

    def copied_from(self, run: Path, uri: str) -> Path | None:
        """The run directory of which `run`, with this state, is a copy; None where it is none, or was moved."""
        other = Path(self.folder)
        if not self.folder or self.uid is None or not other.is_dir() or other.samefile(run):
            return None
        try:
            return other if MirrorState.load(other, uri).uid == self.uid else None
        except (UserError, OSError):
            return None

    @classmethod
    def load(cls, run: Path, uri: str) -> MirrorState:
        """The state for `uri`, a fresh one where there is none."""
        saved = _targets(run).get(without_password(uri))
        try:
            return cls(**{**saved, "tail": TailState.of(saved["tail"])}) if saved else cls()
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(run) from error

    def save(self, run: Path, uri: str, reached: bool = True) -> None:
        """Replace the entry of `uri`, leave the others, and make it the address that a later `sync` uses.

        Args:
            reached: whether a server has answered there; if not, an earlier address stays the one to use.
        """
        key = without_password(uri)
        targets = {**_targets(run), key: asdict(self)}
        current = key if reached else _read(run).get("current", key)
        write_json(run / STATE_NAME, {"current": current, "targets": targets})


@dataclass
class PushReport:
    """What one push did: lines of `metrics.jsonl`, values in them, parameters, files and versions sent, notices."""

    uri: str
    experiment: str = ""
    run_id: str = ""
    lines: int = 0
    values: int = 0
    params: int = 0
    artifacts: int = 0
    versions: int = 0
    notices: list[str] = field(default_factory=list)


def _read(run: Path) -> dict[str, Any]:
    saved = read_json(run / STATE_NAME)
    if not isinstance(saved, dict | None):
        raise _damaged(run)
    return saved or {}


def _targets(run: Path) -> dict[str, Any]:
    targets = _read(run).get("targets", {})
    if not isinstance(targets, dict):
        raise _damaged(run)
    return targets


def _damaged(run: Path) -> UserError:
    return UserError(
        f"{run / STATE_NAME} is damaged: restore it, or delete it, after which `rookery sync` uploads the run anew"
    )


def resolve_uri(run: Path, uri: str | None = None) -> str:
    """The MLflow address: `uri`, else MLFLOW_TRACKING_URI, else the one used before, else `mlflow.db` here."""
    saved = _read(run).get("current")
    if saved is not None and not isinstance(saved, str):
        raise _damaged(run)
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or saved or "sqlite:///mlflow.db"
    path = sqlite_path(chosen)
    return chosen if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of the file behind an `sqlite:///` address, None for other addresses."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path.cwd() / uri.removeprefix("sqlite:///")).resolve()
