"""An iterator driven by a thread, one item ahead of who asks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

# How long the end waits for an item that the thread is waiting for.
_END_SECONDS = 5.0


def take_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items and, in its place, the same error; the next one is taken while the caller is busy with the last.

    Closing it stops the thread after the item that it is waiting for. `items` is not closed.
    """
    handed: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def take() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                handed.put((item, None))
                del item  # its memory is wanted again
                if stopped.is_set():
                    return
        except BaseException as error:  # whatever it is, it belongs to the caller
            end = error
        handed.put((None, end or StopIteration()))

    thread = threading.Thread(target=take, name="take-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = handed.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # there is one where there is no error
            del item
    finally:
        stopped.set()
        deadline = time.monotonic() + _END_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):  # room for what it may be about to hand over
                handed.get_nowait()
            thread.join(0.01)
