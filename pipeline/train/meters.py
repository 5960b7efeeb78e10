"""What a run measures about itself: losses, skipped steps, speed, waiting, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from typing import NamedTuple

import psutil
import torch

from pipeline.train.distributed import World
from pipeline.train.step import StepResult

# Dense bf16/fp16 peak of a device in TFLOP/s, from its data sheet; the first name that is part of the device's counts.
PEAK_TFLOPS = {
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_tflops(device: torch.device) -> float | None:
    """Data-sheet peak of a GPU, None where unknown (and on CPUs, whose clocks vary too much for a fixed figure)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class BadStep(NamedTuple):
    """A step without an update.

    Attributes:
        step: counted from 0.
        causes: keys of the samples of every process whose own loss was NaN or infinite, by its rank; nobody when the
            losses were fine and a gradient was not.
    """

    step: int
    causes: dict[int, list[str]]


@dataclass
class StepMeter:
    """Collects a window of steps without asking the device anything; `read` asks once for all of them.

    Args:
        world: this process among the others.
        batch: global batch size.
        macs: multiply-accumulates of one forward per image; a training step costs 3 times as many, 2 FLOP each.
    """

    world: World
    batch: int
    macs: int
    _results: list[StepResult] = field(default_factory=list)
    _samples: list[torch.Tensor] = field(default_factory=list)
    _wait: float = 0.0
    _busy: float = 0.0
    _started: bool = False
    _mark: float = field(default_factory=time.perf_counter)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of a batch: the loop stands still for data."""
        began = time.perf_counter()
        yield
        now = time.perf_counter()
        if self._started:
            self._wait += now - began
        else:  # the first batch waits for the loaders to start, which says nothing about their rate
            self._started, self._mark = True, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving, which do not count as training."""
        self._lap()
        yield
        self._mark = time.perf_counter()

    def add(self, result: StepResult, samples: torch.Tensor) -> None:
        """One step's results, still being computed, and the samples (b,) that this process trained on."""
        self._results.append(result)
        self._samples.append(samples)

    def read(self, step: int, keys: Callable[[list[int]], list[str]]) -> tuple[dict[str, float], list[BadStep]]:
        """Figures of the window that ends after `step` steps, then empty it; collective.

        Args:
            step: steps done.
            keys: gives samples their names.

        Returns:
            The figures, and the steps of the window that were skipped.
        """
        names = ["loss", *self._results[-1].parts]
        losses = torch.stack([torch.stack([result.loss, *result.parts.values()]) for result in self._results])
        finite = torch.isfinite(losses[:, 0])
        losses = self.world.sum(losses) / self.world.size
        skipped = torch.stack([result.skipped for result in self._results]).tolist()
        good = [row for row, skip in zip(losses.tolist(), skipped, strict=True) if not skip]
        norm = float(self._results[-1].norm)
        self._lap()
        steps = len(skipped)
        images = steps * self.batch / self._busy
        figures = {
            **{name: sum(row[i] for row in good) / len(good) if good else nan for i, name in enumerate(names)},
            "grad_norm": norm,
            "images_per_second": images,
            "step_seconds": self._busy / steps,
            "data_wait": self._wait / self._busy,
            "memory_gb": _memory_gb(self.world.device),
            "tflops_per_process": 6 * self.macs * images / self.world.size / 1e12,
        }
        peak = peak_tflops(self.world.device)
        if peak is not None:
            figures["mfu"] = figures["tflops_per_process"] / peak
        bad = self._blame(step - steps, [i for i, skip in enumerate(skipped) if skip], finite, keys)
        self._results, self._samples, self._wait, self._busy = [], [], 0.0, 0.0
        return figures, bad

    def _blame(
        self, first: int, skipped: list[int], finite: torch.Tensor, keys: Callable[[list[int]], list[str]]
    ) -> list[BadStep]:
        """Whose losses made these steps of the window bad; collective where there are any."""
        if not skipped:
            return []
        fine = finite.tolist()
        own = {i: keys(self._samples[i].tolist()) for i in skipped if not fine[i]}
        everybody = self.world.gather(own)
        causes = ({rank: found[i] for rank, found in enumerate(everybody) if i in found} for i in skipped)
        return [BadStep(first + i, cause) for i, cause in zip(skipped, causes, strict=True)]

    def _lap(self) -> None:
        now = time.perf_counter()
        self._busy += now - self._mark
        self._mark = now


def _memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
