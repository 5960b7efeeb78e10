"""Several trainings by one set of worker processes: starting these takes longer than the trainings."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from launch.workers import Nodes, start_workers
from pipeline.config import RunConfig
from pipeline.train.distributed import World
from pipeline.train.loop import train
from pipeline.train.process import run_process
from tests.train.commands import environment


def run(payload: str, threads: int | None = None) -> int:
    """Train the configs of a JSON list, one after the other."""
    configs = [RunConfig.model_validate(tree) for tree in json.loads(payload)]

    def one_by_one(world: World) -> None:
        for config in configs:
            gc.freeze()  # what imports have left would make every training's first collection of garbage long
            train(config, world)

    return run_process(one_by_one, threads)


def train_all(configs: list[RunConfig], nproc: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train all of them with `nproc` processes."""
    trees = folder / "configs.json"
    trees.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    command = [sys.executable, "-m", __name__, str(trees), str(nproc)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


if __name__ == "__main__":
    os._exit(start_workers("tests.train.many_runs", Path(sys.argv[1]).read_text(), Nodes(int(sys.argv[2]))))
