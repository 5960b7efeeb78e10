"""Bad samples of a run: which were met, on any process, and how many are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.substitute import Replaced
from pipeline.errors import UserError
from pipeline.resolve import Resolved
from pipeline.tracking.files import append_lines, cut_torn_tail, json_line, read_lines, write_aside
from pipeline.tracking.run_dir import QUARANTINE_NAME
from pipeline.train.distributed import World
from pipeline.train.tasks.base import Source
from pipeline.wording import counted

log = logging.getLogger("rookery")

# Samples that a line names.
_NAMED = 3


def tolerated(max_bad_samples: int | None, samples: int) -> int:
    """`data.max_bad_samples`; left open, the share that `rookery prep` tolerates of a source."""
    return max(10, samples // 1000) if max_bad_samples is None else max_bad_samples


@dataclass
class Quarantine:
    """Keeps `<run>/quarantine.jsonl`, one line for each bad sample that was met; use `Quarantine.open`.

    The lines come with the log and before every checkpoint, so that none is lost which a checkpoint's steps met. A line
    has `shard`, `key`, `sample` (its position in the manifest), `reason`, and of the first time that it was met `step`
    (counted from 1, as in the log), `epoch`, and `replacement` (the key of the sample that stood in for it).

    Attributes:
        path: the file.
        world: this process among the others.
        data: directory of the shards.
        limit: bad samples tolerated.
        steps_per_epoch: to tell the epoch from.
        known: positions of the samples in the list; the same on all processes.
    """

    path: Path
    world: World
    data: str
    limit: int
    steps_per_epoch: int
    known: set[int] = field(default_factory=set)
    _met: dict[int, tuple[int, Replaced]] = field(default_factory=dict)
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _said: int = 0

    @classmethod
    def open(cls, run: Resolved, source: Source, world: World, step: int) -> Quarantine:
        """The list of a run that begins, or goes on after `step` steps; collective.

        What the steps after that had met is taken off the list: they come again.

        Raises:
            UserError: the list is damaged.
        """
        path = Path(run.config.out, run.config.name, QUARANTINE_NAME)

        def on_main() -> list[int]:
            lost = list(source.missing())
            if lost:
                log.warning("%s can't be used, samples of others stand in: %s", counted(len(lost), "shard"), _few(lost))
            return _rewound(path, step)

        known = world.on_main(on_main)
        limit = tolerated(run.config.data.max_bad_samples, run.order.num_samples)
        return cls(path, world, run.config.data.train, limit, run.plan.steps_per_epoch, set(known), _said=len(known))

    def add(self, step: int, replaced: list[Replaced] | None) -> None:
        """Bad samples that this process met in a step, counted from 0."""
        for fault in replaced or ():
            if fault.sample not in self.known:
                self._met.setdefault(fault.sample, (step, fault))

    def collect(self) -> str | None:
        """Put on the list what all processes met since the last call; collective.

        Returns:
            A line for the reader when the list has doubled since the last one, so that there are never many.

        Raises:
            UserError: there are more than tolerated.
        """
        if not self.world.any(bool(self._met)):
            self._write()
            return None
        met = [fault for its in self.world.gather(list(self._met.values())) for fault in its]
        met.sort(key=lambda fault: (fault[0], fault[1].sample))
        self._met = {}
        new: dict[int, tuple[int, Replaced]] = {}
        for step, fault in met:  # several processes may have met the same one, at the turn of an epoch
            new.setdefault(fault.sample, (step, fault))
        self.known |= new.keys()
        if self.world.is_main:
            self._waiting += [self._line(step, fault) for step, fault in new.values()]
            self._write()
        faults = [_named(fault) for _, fault in new.values()]
        if len(self.known) > self.limit:
            self.world.fail(
                f"{counted(len(self.known), 'bad sample')} in {self.data}, "
                f"data.max_bad_samples={self.limit} are tolerated: {_few(faults)}; {self.path} lists all; "
                f"`rookery verify --quarantine {self.path.parent}` tries them again. Restore the shards, or mend them "
                "with `rookery prep --repair`, or tolerate more; the same command goes on from the newest checkpoint"
            )
        if len(self.known) < 2 * self._said:
            return None
        self._said = len(self.known)
        return (
            f"{counted(len(self.known), 'bad sample')} so far, replaced by others: {_few(faults)}; "
            f"listed in {self.path}"
        )

    def _line(self, step: int, fault: Replaced) -> dict[str, Any]:
        return {
            "shard": fault.shard,
            "key": fault.key,
            "sample": fault.sample,
            "reason": fault.reason,
            "step": step + 1,
            "epoch": step // self.steps_per_epoch,
            "replacement": fault.by_key,
        }

    def _write(self) -> None:
        """Write the lines that wait; a full disk costs no run, and the next call tries again."""
        if self._waiting:
            try:
                append_lines(self.path, self._waiting)
                self._waiting = []
            except UserError as error:
                log.warning("%s; its lines wait in memory until it can", error)


def read_quarantine(run_dir: Path) -> list[dict[str, Any]]:
    """The list of a run; empty when it met no bad sample.

    Raises:
        UserError: the file is damaged.
    """
    return read_lines(run_dir / QUARANTINE_NAME)


def _named(fault: Replaced) -> str:
    return f"{fault.shard}: {fault.key or f'sample {fault.sample}'}: {fault.reason}"


def _few(texts: Sequence[str]) -> str:
    return "; ".join(texts[:_NAMED]) + (f"; and {len(texts) - _NAMED} more" if len(texts) > _NAMED else "")


def _rewound(path: Path, step: int) -> list[int]:
    """Take what was met after `step` steps off a list; returns the positions of the samples that stay."""
    cut_torn_tail(path)
    lines = read_lines(path)
    stay = [line for line in lines if line["step"] <= step]
    if len(stay) < len(lines):
        write_aside(path, lambda file: file.writelines(map(json_line, stay)))
    return [line["sample"] for line in stay]
