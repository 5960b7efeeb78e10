"""Progress of long work: a bar with rate and remaining time on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

LINE_SECONDS = 5.0

Advance = Callable[[int], None]


class Progress(Protocol):
    """Where long work reports to."""

    def say(self, text: str) -> None:
        """Print one line."""
        ...

    def task(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Report a task of `total` images, of which `done` were finished earlier; call the result with each advance."""
        ...


class SilentProgress:
    """Reports nothing."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        yield lambda images: None


class LineProgress:
    """One line every few seconds, and one at the end."""

    def __init__(self, stream: TextIO, seconds: float = LINE_SECONDS) -> None:
        self._stream = stream
        self._seconds = seconds

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        rate = _Rate()
        current = done
        last = time.monotonic()

        def line() -> None:
            left = f", {_clock((total - current) / rate.value)} left" if rate.value and current < total else ""
            self.say(f"{title}: {current:,}/{total:,} images{rate.text(', ')}{left}")

        def advance(images: int) -> None:
            nonlocal current, last
            current += images
            rate.add(images)
            if time.monotonic() - last >= self._seconds:
                last = time.monotonic()
                line()

        yield advance
        line()


class BarProgress:
    """A bar by rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        from rich import progress

        rate = _Rate()
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self._console) as bar:
            task = bar.add_task(title, total=total, completed=done, rate="")

            def advance(images: int) -> None:
                rate.add(images)
                bar.update(task, advance=images, rate=rate.text())

            yield advance


class _Rate:
    """Images per second since the first report: the start of the workers is not the rate of the work.

    While there was no second report, since the beginning: all that is known then.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._start: float | None = None
        self._first = self._images = 0

    def add(self, images: int) -> None:
        if self._start is None:
            self._start, self._first = time.monotonic(), images
        else:
            self._images += images

    @property
    def value(self) -> float:
        if self._start is not None and self._images:
            return self._images / max(time.monotonic() - self._start, 1e-9)
        return self._first / max(time.monotonic() - self._begun, 1e-9)

    def text(self, before: str = "") -> str:
        """The rate, after `before`; nothing where nothing was done."""
        return f"{before}{self.value:,.0f} img/s" if self.value else ""


def make_progress(stream: TextIO | None = None) -> Progress:
    """A bar if `stream` (standard error by default) is a terminal, lines otherwise."""
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
