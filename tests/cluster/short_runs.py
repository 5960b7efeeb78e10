"""Runs that take a second and keep the files of real ones, and sweeps that are killed at a point that a test names.

A run's weights are a hash of all that it was trained with: of the weights before the step, the learning rate and the
step. So they tell whether every step was taken once, from the weights that it should be, and under the right values.
Everything around a run is the real thing: `stand_in` has Python call this instead of `rookery train`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

STAND_IN = Path(__file__).parent / "stand_in"
# Names a file; as JSON in it the `points` that kill, the first that is reached, and the `pid` of the sweep.
KILL = "ROOKERY_TEST_KILL"
BEGIN = "0"
_STEP_SECONDS = 0.01


def trained(weights: str, lr: float, step: int) -> str:
    """The weights after a step."""
    return hashlib.sha256(f"{weights} {lr} {step}".encode()).hexdigest()[:16]


def loss(weights: str, lr: float, step: int) -> float:
    """What an evaluation measures: it falls, the faster the nearer the rate is to 1e-3, with noise of the weights."""
    return 10 - step / (1 + abs(lr - 1e-3) * 1e3) + int(weights, 16) % 1000 / 1000


def reached(file: Path) -> Path:
    """Where the point is noted that has killed; nothing passes a point while it is there."""
    return file.with_suffix(".reached")


def reach(point: str) -> None:
    """Kill the sweep, and stop here, if this is where a test wants it to die."""
    file = Path(os.environ[KILL])
    wanted = json.loads(file.read_text()) if file.exists() else {"points": []}
    if point in wanted["points"]:
        with suppress(FileExistsError), open(reached(file), "x") as note:
            note.write(point)
            note.flush()
            os.kill(wanted["pid"], signal.SIGKILL)
    while reached(file).exists():  # what is left of the sweep ends with it
        time.sleep(0.1)


def watch_files() -> None:
    """Make points of the moments before a take-over and after a round is written down."""
    import pipeline.tracking.files as files

    append_line = files.append_line

    def append(path: Path, entry: dict[str, Any]) -> None:
        if path.name == "taken_over.jsonl":
            reach(f"{path.parent.name} {entry['step']} takes over")
        append_line(path, entry)
        if path.name == "rounds.jsonl":
            reach(f"round {entry['round']}")

    files.append_line = append


def main(arguments: list[str]) -> NoReturn:
    """The run that arguments of `rookery train` ask for."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with who has started it
    distributed = ModuleType("pipeline.train.distributed")  # which would import torch
    distributed.World = object  # type: ignore[attr-defined]
    sys.modules[distributed.__name__] = distributed
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    os._exit(_Run(options).train())


class _Run:
    def __init__(self, options: dict[str, str]) -> None:
        from pipeline.tracking.metrics import MetricsLog
        from pipeline.tracking.run_dir import _lock
        from pipeline.train.checkpoint import CheckpointStore

        def steps(key: str) -> int:
            return int(options[key].removesuffix("steps"))

        self.path = Path(options["out"], options["name"])
        self.path.mkdir(parents=True, exist_ok=True)
        _lock(self.path, 3.0)
        self.lr = float(options["optim.lr"])
        self.end = steps("train.stop_after" if "train.stop_after" in options else "train.epochs")
        self.evaluates, self.saves = steps("eval.every"), steps("checkpoint.every")
        self.asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: self.asked.append(number))
        self.store = CheckpointStore(self.path / "checkpoints")
        newest = self.store.newest()
        self.step, self.weights = 0, BEGIN
        if newest is not None:
            self.step, self.weights = newest.step, (newest.path / "weights").read_text()
        self.metrics = MetricsLog(self.path)
        self.metrics.rewind(self.step)

    def train(self) -> int:
        """Train; returns the exit status."""
        from pipeline.tracking.files import append_line, write_json

        append_line(self.path / "sessions.jsonl", {"event": "start", "resumed_from": self.step or None})
        while self.step < self.end:
            time.sleep(_STEP_SECONDS)
            self.step += 1
            self.weights = trained(self.weights, self.lr, self.step)
            self._log("train", lr=self.lr, weights=self.weights)
            is_end = self.step == self.end
            if is_end or self.step % self.evaluates == 0:
                self._log("eval", loss=loss(self.weights, self.lr, self.step))
            self._reach("evaluated")
            if is_end or self.asked or self.step % self.saves == 0:
                self._save()
                self._reach("saved")
            if self.asked and not is_end:
                return 130
        write_json(self.path / "result.json", {"step": self.step})
        self._reach("ended")
        return 0

    def _log(self, kind: Any, **figures: Any) -> None:
        self.metrics.log(kind, self.step, samples=self.step, epoch=self.step / 29, **figures)

    def _reach(self, point: str) -> None:
        reach(f"{self.path.name} {self.step} {point}")

    def _save(self) -> None:
        class Alone:
            is_main = True

            def any(self, flag: bool) -> bool:
                return flag

        def write(folder: Path) -> None:
            (folder / "weights").write_text(self.weights)

        progress = {"step": self.step, "best": None, "seconds": 0.0}
        self.store.save(self.step, progress, write, Alone())  # type: ignore[arg-type]
