"""Two training steps, a snapshot and an evaluation of recipes on the GPU that this process sees, which may be idle.

    python -m tests.train.walk_on_idle_gpu < {"name": ["recipe.yaml", "override", ...], ...}

Prints a line of JSON for every recipe: `name`, `error` (null if all went well), `step_gb` (most memory that the steps
took), `launches` (kernels of the second step).
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.idle_gpu.build import launches
from pipeline.config_load import load_config
from pipeline.resolve import resolve
from pipeline.train.determinism import use_deterministic_kernels
from pipeline.train.distributed import World
from pipeline.train.evaluate import _tally
from pipeline.train.step import seed_step
from pipeline.train.tasks.classify import ClassifyWork

GPU = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))


def walk(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """`step_gb` and `launches` of one recipe.

    Raises:
        RuntimeError: among others: the second step waits for the device. DeepSpeed's do, so that they may.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = resolve(load_config(Path(recipe), overrides), 1)
    config = run.config
    use_deterministic_kernels(config.train.deterministic)
    engine, work = run.task.make_engine(GPU), run.task.begin(run, GPU)
    batches = work.train_batches(0)
    before = 0
    for step in range(2):
        seed_step(config.seed, step, 0)
        # The first step brings constants to the device.
        with waiting(step == 0 or config.engine.name == "deepspeed"):
            batch = next(batches)
            before = launches()
            work.step(engine, batch, run.schedule.lr(step))
    found = {"step_gb": torch.cuda.max_memory_allocated() / 1e9, "launches": launches() - before}
    engine.snapshot()
    validation = work.eval_batches()
    if isinstance(work, ClassifyWork) and validation is not None:
        model = engine.eval_model(config.eval.weights)
        with waiting(False):
            _tally(model, ((batch, None) for batch in islice(validation, 2)), 1, engine.autocast(), GPU)
    return found


@contextmanager
def waiting(allowed: bool) -> Iterator[None]:
    """Unless it is allowed, what makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("default" if allowed else "error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    for name, (recipe, *overrides) in json.load(sys.stdin).items():
        try:
            found = {"error": None, **walk(recipe, overrides)}
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main()
