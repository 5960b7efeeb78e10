"""What is known of each trial, in `sweep.json`: the sweep's memory between starts, and its result."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.sweep.config import SweepConfig
from launch.sweep.space import TRIALS, Values, hidden, revealed
from pipeline.errors import UserError
from pipeline.tracking.files import read_json, read_lines, write_json
from pipeline.tracking.redact import redact

FILE = "sweep.json"
TAKEN_OVER = "taken_over.jsonl"

# A trial that is over is never started again; a failed one is, when the sweep is.
State = Literal["waiting", "running", "paused", "interrupted", "finished", "stopped", "failed"]
OVER: tuple[State, ...] = ("finished", "stopped")


@dataclass
class Record:
    """A trial.

    Attributes:
        name: of its run directory.
        values: what was drawn for it; with population based training those of its newest round.
        state: stopped: by the scheduler; interrupted: saved, to go on when the sweep does.
        figures: of the newest evaluation, with `step` and `epoch`; empty before the first.
        best: the best value of the metric.
        nodes: where it ran last.
        failures: how often it, or a node of it, has died.
        fault: why it failed.
    """

    name: str
    values: Values
    state: State = "waiting"
    figures: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    nodes: list[str] = field(default_factory=list)
    failures: int = 0
    fault: str | None = None

    @property
    def is_over(self) -> bool:
        return self.state in OVER


class Records:
    """All trials of a sweep, in order.

    Args:
        config: the sweep; its folder is created with the first save.

    Attributes:
        gpu_hours: hours of all processes so far.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self.folder = config.folder
        self.gpu_hours = 0.0
        self._by_name: dict[str, Record] = {}
        saved = read_json(self.folder / FILE)
        self._read = repr(saved)
        if saved is not None:
            try:
                self._take(saved)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise UserError(
                    f"{self.folder / FILE} is not what a sweep wrote ({type(error).__name__}: {error}); restore it, or "
                    "choose another name=..."
                ) from error

    def _take(self, saved: dict[str, Any]) -> None:
        now, then = redact(self.config.model_dump(mode="json")), redact(saved["sweep"])
        differing = [key for key in ("recipe", "overrides", "space", "metric", "goal") if then[key] != now[key]]
        if differing:
            raise UserError(
                f"{self.folder} holds a sweep with another {' and '.join(differing)}; "
                "choose another name=..., or go on with that sweep as it was"
            )
        if (self.config.trials or len(saved["trials"])) < len(saved["trials"]):
            raise UserError(
                f"trials={self.config.trials}: {self.folder} has {len(saved['trials'])} trials already; write at least "
                "as many, or let name=... begin another sweep"
            )
        self.gpu_hours = saved["gpu_hours"]
        for fields in saved["trials"]:
            record = Record(**fields)
            if not record.is_over:
                record.state = "waiting"
            taken = read_lines(self.path(record) / TAKEN_OVER)
            record.values = revealed(self.config, taken[-1]["values"] if taken else record.values)
            self._by_name[record.name] = record

    def all(self) -> list[Record]:
        return list(self._by_name.values())

    def get(self, name: str) -> Record:
        return self._by_name[name]

    def path(self, record: Record) -> Path:
        """Its run directory."""
        return self.folder / TRIALS / record.name

    def add(self, values: Values) -> Record:
        """The next trial."""
        record = Record(f"{self.config.name}-{len(self._by_name):03d}", values)
        self._by_name[record.name] = record
        return record

    def note(self, record: Record, figures: dict[str, float]) -> None:
        """Keep the figures of an evaluation."""
        record.figures = figures
        value = figures[self.config.metric]
        if record.best is None or (value > record.best if self.config.is_max else value < record.best):
            record.best = value

    def ranked(self) -> list[Record]:
        """The trials that were evaluated, the best newest evaluation first; of equals the first trial."""
        sign = -1 if self.config.is_max else 1
        seen = [record for record in self.all() if self.config.metric in record.figures]
        return sorted(seen, key=lambda record: sign * record.figures[self.config.metric])

    def best(self) -> Record | None:
        """The best of those that ran to their end; None before there is one."""
        return next((record for record in self.ranked() if record.state == "finished"), None)

    def epochs(self) -> float:
        """Epochs of all trials together."""
        return sum(record.figures.get("epoch", 0.0) for record in self.all())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps out of the folder, until the block or this process ends.

        Raises:
            UserError: one is running there, or the folder can't be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise UserError(f"{self.folder} can't be written to ({error.strerror}); choose another out=...") from error
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.folder}: this sweep is running already; name=... begins another one") from error
            yield

    def is_outdated(self) -> bool:
        """Whether another process has written `sweep.json` since it was read here; ask before the first `save`."""
        return repr(read_json(self.folder / FILE)) != self._read

    def save(self) -> None:
        """Write `sweep.json`, in one rename and without credentials."""
        best = self.best()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / FILE,
            {
                "sweep": redact(self.config.model_dump(mode="json")),
                "best": None if best is None else best.name,
                "epochs": self.epochs(),
                "gpu_hours": self.gpu_hours,
                "trials": [asdict(record) | {"values": hidden(record.values)} for record in self.all()],
            },
        )
