"""Where the time of some steps goes: a trace of every operation on host and device, and a table of the dearest ones.

Only the steps that `profile` names are slower for it; what is computed stays the same to the bit.
"""

from __future__ import annotations

import gzip
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.config import RunConfig
from pipeline.train.distributed import World

log = logging.getLogger("rookery")

# Lines of the table.
_DEAREST = 40


class StepProfiler:
    """Writes `<run>/profile/step-FIRST-rank<r>.json.gz`, for ui.perfetto.dev, and `.txt`; use `open_profiler`.

    Attributes:
        running: whether there are steps to come that it follows.
    """

    def __init__(self, folder: Path, name: str, after: int, steps: int, device: torch.device) -> None:
        self._folder, self._name, self._device = folder, name, device
        self._left = after + steps
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        # The step before the first one warms the profiler up, which makes its own first step slow.
        warm_up = min(1, after)
        plan = schedule(wait=after - warm_up, warmup=warm_up, active=steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True)
        self._profile.start()

    @property
    def running(self) -> bool:
        return self._left > 0

    def step(self) -> None:
        """A step was done."""
        if self.running:
            self._left -= 1
            self._profile.step()
            if not self.running:
                self._profile.stop()

    def close(self) -> None:
        """The run ends: what was followed so far is written."""
        if self.running:
            self._left = 0
            self._profile.stop()

    def _write(self, done: profile) -> None:
        path = self._folder / self._name
        try:
            self._folder.mkdir(exist_ok=True)
            plain = path.with_suffix(".json")
            done.export_chrome_trace(str(plain))
            with open(plain, "rb") as source, gzip.open(path.with_suffix(".json.gz"), "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)
            plain.unlink()
            by = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            path.with_suffix(".txt").write_text(done.key_averages().table(sort_by=by, row_limit=_DEAREST) + "\n")
        except (OSError, RuntimeError) as error:
            log.warning("the profile of the steps is not written: %s; training goes on", error)


def open_profiler(config: RunConfig, world: World, step: int, after: int, stack: ExitStack) -> StepProfiler | None:
    """This process's profiler of a start of a run, closed by `stack`; None: nothing of it is asked for.

    Args:
        step: steps done.
        after: steps of this start before the first one that is followed.
    """
    if not config.profile.steps or (world.rank and not config.profile.all_processes):
        return None
    name = f"step-{step + after:08d}-rank{world.rank}"
    folder = Path(config.out, config.name, "profile")
    profiler = StepProfiler(folder, name, after, config.profile.steps, world.device)
    stack.callback(profiler.close)
    return profiler
