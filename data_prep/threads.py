"""Calls in threads that keep no process from ending: the threads of `concurrent.futures` are waited for at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call, or TimeoutError; the call itself can't be ended, and is left to its thread."""
    answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def in_parallel(call: Callable[[int], T], items: Sequence[int], count: int) -> Iterator[tuple[int, T]]:
    """Every item with what `call` makes of it, in the order in which they are done.

    `count` threads work ahead of the caller; they keep no process from ending.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    for item in items:
        waiting.put(item)
    done: SimpleQueue[tuple[int, T | None, BaseException | None]] = SimpleQueue()
    free, stop = threading.Semaphore(count), threading.Event()

    def run() -> None:
        while free.acquire() and not stop.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((item, call(item), None))
            except BaseException as error:
                done.put((item, None, error))

    for _ in range(min(count, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]
            free.release()
    finally:
        stop.set()
        free.release(count)
