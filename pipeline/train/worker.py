"""One training process; torchrun starts it as `python -m pipeline.train.worker CONFIG_JSON`."""

from __future__ import annotations

import sys

from pipeline.config import RunConfig
from pipeline.train.loop import train
from pipeline.train.process import run_process


def run(payload: str, threads: int | None = None) -> int:
    """Train the run that a JSON config describes; returns the exit status."""
    config = RunConfig.model_validate_json(payload)
    return run_process(lambda world: train(config, world), threads)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
