"""What a contender is: it makes batches of training pictures from the same samples; here is the clock around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from launch.bench_loader.scene import Scene


@dataclass(frozen=True)
class Settings:
    """One measurement.

    Attributes:
        scene: the images.
        recipe: `crop` (random resized crop and flip), or `nest` (the recipe of NesT on ImageNet).
        side: of the pictures, pixels.
        batch: samples of a batch.
        workers: loader processes (FFCV: threads).
        prefetch: batches that each worker prepares ahead.
        warmup: batches before the clock starts.
    """

    scene: Scene
    recipe: str
    side: int
    batch: int
    workers: int
    prefetch: int
    warmup: int


@dataclass(frozen=True)
class Contender:
    """A loader to measure.

    Attributes:
        name: of the row.
        package: what must be installed; None: nothing more.
        reads: the form of the images that it reads, an attribute of `Scene`.
        recipes: those it can do.
        epochs: settings to a function that starts an epoch of batches, each a tensor or a tuple that begins with one.
    """

    name: str
    package: str | None
    reads: Literal["own", "tars", "betons", "files", "beton"]
    recipes: tuple[str, ...]
    epochs: Callable[[Settings], Callable[[], Iterator[Any]]]


def timed(batches: Iterator[Any], warmup: int) -> dict[str, float]:
    """Images per second, and CPU seconds per image of this process and its children, after `warmup` batches.

    Both are counted from a moment at which workers are as far ahead as they get, to the last batch: what was prepared
    ahead of the first moment is missing at the end, where nothing is prepared any more.
    """
    for _ in range(warmup):
        next(batches)
    images, start, used = 0, time.perf_counter(), cpu_seconds()
    end, used_at_end = start, used
    for batch in batches:
        images += len(batch[0] if isinstance(batch, tuple | list) else batch)
        end, used_at_end = time.perf_counter(), cpu_seconds()
    return {"images": images, "rate": images / (end - start), "cpu": (used_at_end - used) / images}


def cpu_seconds() -> float:
    """CPU time that this process and all below it have used."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total
