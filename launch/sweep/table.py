"""The trials of a sweep on one screen: live on a terminal, a line for what happens in a log."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.sweep.milestones import Length
from launch.sweep.records import Record, Records
from launch.sweep.space import shown
from pipeline.tracking.files import parse_line
from pipeline.tracking.metrics import METRICS_NAME

_REFRESH_SECONDS = 2.0
_TAIL_BYTES = 16_384
_LOG_WIDTH = 160


class Progress:
    """Shows the trials. Use as a context manager.

    Args:
        records: the trials.
        lengths: of their runs, by name.
    """

    def __init__(self, records: Records, lengths: dict[str, Length]) -> None:
        self._records, self._lengths = records, lengths
        self._console = Console(highlight=False, emoji=False, markup=False)
        if not self._console.is_terminal:
            self._console.width = _LOG_WIDTH
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line, above the table."""
        self._console.print(text, soft_wrap=True)

    def evaluated(self, record: Record) -> None:
        """A line about the newest evaluation, where there is no table."""
        if not self._console.is_terminal:
            figures, metric = record.figures, self._records.config.metric
            speed = figures.get("images_per_second")
            rate = "" if speed is None else f"  {speed:,.0f} img/s"
            epoch = f"epoch {figures['epoch']:.4g} of {self._lengths[record.name].epochs:.4g}"
            self.say(f"{record.name}  {epoch}  {metric} {figures[metric]:.4f}{rate}  on {_nodes(record)}")

    def refresh(self) -> None:
        """Draw the table again, every other second."""
        if self._console.is_terminal and time.monotonic() >= self._next:
            self._live.update(self.table(self._records.all()), refresh=True)
            self._next = time.monotonic() + _REFRESH_SECONDS

    def print_result(self) -> None:
        """The table of all trials, the best first."""
        ranked = self._records.ranked()
        self._console.print(self.table([*ranked, *(r for r in self._records.all() if r not in ranked)]))

    def table(self, records: list[Record]) -> Table:
        """A row for each trial."""
        metric = self._records.config.metric
        over = sum(record.is_over for record in self._records.all())
        title = (
            f"{self._records.folder}: {over} of {len(self._records.all())} trials over, "
            f"{self._records.epochs():.4g} epochs, {self._records.gpu_hours:.3g} GPU-hours"
        )
        table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for column in ("trial", "state", "values", "deaths", "node", "epoch", metric, "best", "img/s", "eta"):
            right = column in ("deaths", "epoch", metric, "best", "img/s", "eta")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for record in records:
            table.add_row(record.name, record.state, shown(record.values), *self._row(record)[3:])
        return table

    def _row(self, record: Record) -> list[str]:
        metric, length = self._records.config.metric, self._lengths.get(record.name)
        line = newest_training(self._records.path(record)) if record.state == "running" else {}
        epoch = max(line.get("epoch", 0.0), record.figures.get("epoch", 0.0))
        speed = line.get("images_per_second") or record.figures.get("images_per_second")
        eta = ""
        if length is not None and record.state == "running" and line.get("step") and speed:
            left = (length.end_step - line["step"]) * line["samples"] / line["step"] / speed
            eta = str(timedelta(seconds=round(left)))
        return [
            record.name,
            record.state,
            shown(record.values),
            str(record.failures or ""),
            _nodes(record),
            f"{epoch:.4g}" + ("" if length is None else f"/{length.epochs:.4g}"),
            _figure(record.figures.get(metric)),
            _figure(record.best),
            "" if speed is None else f"{speed:,.0f}",
            eta,
        ]


def _nodes(record: Record) -> str:
    return ",".join(dict.fromkeys(record.nodes))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def newest_training(run: Path) -> dict[str, Any]:
    """The newest line about training in a run's metrics; empty without one."""
    path = run / METRICS_NAME
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = [parse_line(raw) for raw in file.read().splitlines(keepends=True)]
    return next((line for line in reversed(lines) if line is not None and line.get("kind") == "train"), {})
