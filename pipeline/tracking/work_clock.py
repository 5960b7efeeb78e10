"""How long a run was worked on: its sessions without the pauses between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkClock:
    """Turns times of day into hours of work.

    Attributes:
        spans: (start, end, processes) of each session, in seconds since 1970 and in order; `processes` is None where
            the session doesn't say.
    """

    spans: list[tuple[float, float, int | None]]

    @classmethod
    def of(cls, sessions: list[dict[str, Any]], lines: list[dict[str, Any]]) -> WorkClock:
        """Every session lasts from its start to its end, or to the last sign of life before the next one.

        Args:
            sessions: lines of `sessions.jsonl`.
            lines: lines of `metrics.jsonl`.
        """
        starts = [entry for entry in sessions if entry["event"] == "start"]
        # A rewind takes lines away, but its event says when the last of them was written.
        alive = [line["time"] for line in lines] + [line["last_time"] for line in lines if "last_time" in line]
        alive += [entry["time"] for entry in sessions]
        following = [*(entry["time"] for entry in starts[1:]), float("inf")]
        return cls(
            [
                (start["time"], max(time for time in alive if start["time"] <= time < limit), start.get("world_size"))
                for start, limit in zip(starts, following, strict=False)
            ]
        )

    @property
    def hours(self) -> float | None:
        """All sessions together; None without any."""
        return sum(end - start for start, end, _ in self.spans) / 3600 if self.spans else None

    @property
    def process_hours(self) -> float | None:
        """Hours times processes; None where a session doesn't say how many there were."""
        if not self.spans or any(processes is None for _, _, processes in self.spans):
            return None
        return sum((end - start) * (processes or 0) for start, end, processes in self.spans) / 3600

    def at(self, time: float) -> float | None:
        """Hours of work before a time of day; None without any session."""
        if not self.spans:
            return None
        return sum(max(0.0, min(time, end) - start) for start, end, _ in self.spans) / 3600
