"""What a step of a running training takes, whatever else the machine does."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.tracking.files import parse_line


@dataclass(frozen=True)
class Mark:
    """A moment of a training.

    Attributes:
        seconds: on a clock that stands still while the training's main thread could run and has no core to run on.
        step: steps done.
    """

    seconds: float
    step: int

    @classmethod
    def of(cls, run: Path) -> Mark:
        """Now, for a run of one process that logs every step."""
        pid = json.loads((run / ".lock").read_text())["pid"]
        # Nanoseconds on a core, nanoseconds waiting for one, times on one.
        waited = int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
        return cls(time.monotonic() - waited, newest_step(run / "metrics.jsonl"))

    def step_seconds(self, later: Mark) -> float:
        """Mean length of the steps up to a later moment; what a step waits for, a server say, is in it."""
        return (later.seconds - self.seconds) / (later.step - self.step)


def newest_step(path: Path) -> int:
    """The last step that a metrics file tells of."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [parse_line(line) for line in file.readlines()]
    return int(next(line["step"] for line in reversed(lines) if line is not None))
