"""One training process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.train.again import allowed_restarts, may_start, newest_step, restarts
from pipeline.train.loop import train
from pipeline.train.process import run_process


def run(payload: str, threads: int | None = None) -> int:
    """Train the run that a JSON config describes; returns the exit status."""
    config = RunConfig.model_validate_json(payload)
    step = newest_step(Path(config.out, config.name))
    if not may_start(step):
        _say("a process died twice before there was a new checkpoint; mend that, then the same command goes on")
        return 1
    if restarts():
        _say(f"a process died; all start again after step {step} (restart {restarts()} of {allowed_restarts()})")
    return run_process(lambda world: train(config, world), threads)


def _say(text: str) -> None:
    if os.environ.get("RANK") == "0":
        print(f"rookery: {text}", file=sys.stderr, flush=True)
