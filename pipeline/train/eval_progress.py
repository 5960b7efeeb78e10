"""How far an evaluation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_SECONDS = 15.0


def watched(batches: Iterable[T], title: str, per_batch: int, total: int, active: bool) -> Iterator[T]:
    """The batches, reported on standard error while they pass.

    Args:
        per_batch: samples of one batch, over all processes.
        total: samples of the split.
        active: whether this process reports.
    """
    if not active:
        yield from batches
    elif sys.stderr.isatty():
        yield from _with_bar(batches, title, per_batch, total)
    else:
        yield from _with_lines(batches, title, per_batch, total)


def _with_bar(batches: Iterable[T], title: str, per_batch: int, total: int) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")
        for done, rate, batch in _rated(batches, per_batch, total):
            bar.update(task, completed=done, rate=f"{rate:,.0f}/s")
            yield batch


def _with_lines(batches: Iterable[T], title: str, per_batch: int, total: int) -> Iterator[T]:
    last = time.monotonic()
    for done, rate, batch in _rated(batches, per_batch, total):
        yield batch
        if time.monotonic() - last >= LINE_SECONDS and done < total:
            last = time.monotonic()
            left = f", {(total - done) / rate:,.0f} s left" if rate else ""
            print(f"{title}: {done:,}/{total:,} samples, {rate:,.0f}/s{left}", file=sys.stderr, flush=True)


def _rated(batches: Iterable[T], per_batch: int, total: int) -> Iterator[tuple[int, float, T]]:
    """(samples done, samples per second, batch); the start of the loaders is not the rate of the work."""
    began = None
    for i, batch in enumerate(batches):
        began = began or time.monotonic()
        seconds = time.monotonic() - began
        yield min(total, i * per_batch), i * per_batch / seconds if seconds else 0.0, batch
