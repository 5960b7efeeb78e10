"""Items, order, errors and the end of an iterator that a thread drives."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from pipeline.data.take_ahead import take_ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "take-ahead"]


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_the_same_items(n: int) -> None:
    assert list(take_ahead(iter(range(n)))) == list(range(n))
    assert not threads()


def test_the_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for item in take_ahead(items()):
            seen.append(item)
    assert seen == [0, 1, 2] and not threads()


def test_items_are_made_while_the_caller_is_busy() -> None:
    def items() -> Iterator[int]:
        for item in range(8):
            time.sleep(0.05)
            yield item

    started, asked, waited = time.monotonic(), 0.0, 0.0
    for item in take_ahead(items()):
        if item:
            waited += time.monotonic() - asked
        time.sleep(0.05)
        asked = time.monotonic()
    assert waited < 0.2  # of 0.35 without the thread
    assert time.monotonic() - started < 0.7


@pytest.mark.parametrize("after", [0.0, 0.1])
def test_leaving_early_ends_the_thread(after: float) -> None:
    def items() -> Iterator[int]:
        item = 0
        while True:
            yield (item := item + 1)

    ahead = take_ahead(items())
    assert next(ahead) == 1
    time.sleep(after)
    began = time.monotonic()
    ahead.close()  # type: ignore[attr-defined]
    assert not threads() and time.monotonic() - began < 1


def test_nothing_holds_an_item_that_was_given() -> None:
    class Item:
        pass

    ahead = take_ahead(Item() for _ in range(5))
    references = []
    for item in ahead:
        references.append(weakref.ref(item))
        del item
        assert sum(reference() is not None for reference in references) <= 1  # the one that a generator yields
