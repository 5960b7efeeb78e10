"""Python's garbage collector at times of our choosing, the same on all processes.

By itself it would stop one process here and another there, in the middle of a step, and all would wait each time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[Callable[[], None]]:
    """No collection but by the function that it gives; what is alive at the start is never looked at."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()

    def collect() -> None:
        gc.collect(1)  # not the oldest generation, which is large and rarely garbage

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
