"""The program of a training process: `launch` starts it, once per GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.streams import drop_unprintable
from pipeline.train.again import is_stuck, newest_step, note_start
from pipeline.train.distributed import World
from pipeline.train.loop import train
from pipeline.train.process import run_process
from pipeline.train.status import FAILED


def run(payload: str, threads: int | None = None) -> int:
    """Train the run that a JSON config describes; returns the exit status."""
    drop_unprintable()
    config = RunConfig.model_validate_json(payload)
    step = newest_step(Path(config.out, config.name))
    starts = note_start(step)
    ends = is_stuck(starts, step)
    if starts and not ends:
        _say(f"a process died; all start again after step {step}")

    def job(world: World) -> None:
        nonlocal ends
        ends = world.any(ends)
        if ends:
            _say("processes died twice before there was a new checkpoint; mend that, then the same command goes on")
        else:
            train(config, world)

    return run_process(job, threads) or (FAILED if ends else 0)


def _say(text: str) -> None:
    if os.environ.get("RANK") == "0":
        print(f"rookery: {text}", file=sys.stderr, flush=True)
