"""Worker of `test_forecast`: trains a step with every engine and writes down the bytes that each process then holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.shards import ShardSet
from pipeline.resolve import resolve
from pipeline.train.distributed import World
from pipeline.train.engines import Engine, make_engine
from pipeline.train.engines.average import all_tensors
from pipeline.train.process import run_process
from pipeline.train.setup import initial_model, train_batches


def run(payload: str, threads: int | None = None) -> int:
    """Measure the configs of {"configs": {name: config}, "out": folder}, one after the other."""
    job = json.loads(payload)

    def measure(world: World) -> None:
        kept = {name: measured(RunConfig.model_validate(tree), world) for name, tree in job["configs"].items()}
        Path(job["out"], f"{world.rank}.json").write_text(json.dumps(kept))

    return run_process(measure, threads)


def measured(config: RunConfig, world: World) -> dict[str, int]:
    """Bytes of this process by kind, after a real backward pass and update."""
    resolved = resolve(config, world.size)
    config = resolved.config
    engine = make_engine(initial_model(config, world), config, world)
    for _ in range(2):  # DeepSpeed makes some of its buffers in the first step
        batch = next(iter(train_batches(resolved, ShardSet(config.data.train), world, 0)))
        engine.backward(engine.model(batch.images).square().mean())
        gradients = gradient_bytes(engine)
        engine.step(1e-3)
    return {**states(engine), "gradients": gradients}


def gradient_bytes(engine: Engine) -> int:
    if getattr(engine, "stage", 0) == 3:
        return size([engine.optimizer.grad_partitions_flat_buffer])  # type: ignore[attr-defined]
    parts = [p.grad for p in engine.plain.parameters() if p.grad is not None]
    if getattr(engine, "stage", 0):
        averaged = engine.optimizer.averaged_gradients.values()  # type: ignore[attr-defined]
        parts += [g for group in averaged if group is not None for g in group]
    return size(parts)


def states(engine: Any) -> dict[str, int]:
    model = [*engine.plain.parameters(), *engine.plain.buffers()]
    stage = getattr(engine, "stage", 0)
    if stage == 3:
        model = [p.ds_tensor for p in engine.plain.parameters()]
        model += [p for p in engine.plain.parameters() if p.numel()]
        model += engine.optimizer.fp32_partitioned_groups_flat
    elif stage:
        model += engine.optimizer.single_partition_of_fp32_groups
    optimizer = engine.optimizer.optimizer if stage else engine.optimizer
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return {"weights": size(model), "moments": size(moments), "average": average(engine)}


def average(engine: Any) -> int:
    holder = engine.average
    return size(all_tensors(holder.module) if hasattr(holder, "module") else holder.values.values())


def size(tensors: Any) -> int:
    own = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values())


if __name__ == "__main__":
    import os
    import sys

    from launch.workers import Nodes, start_workers

    os._exit(start_workers("tests.train.kept_bytes", Path(sys.argv[1]).read_text(), Nodes(int(sys.argv[2]))))
