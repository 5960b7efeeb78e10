"""One training process."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.train.loop import train
from pipeline.train.process import run_process


def run(payload: str, threads: int | None = None) -> int:
    """Train the run that a JSON config describes; returns the exit status."""
    config = RunConfig.model_validate_json(payload)
    return run_process(lambda world: train(config, world), threads)
