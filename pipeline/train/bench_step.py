"""The worker of `rookery bench step`: training steps on made batches, with and without the other processes.

Two engines hold the same model. One is the run's; the other is the same kind of engine in a world of this process
alone, whose steps compute the same and send nothing. They take turns, in blocks of steps that all processes begin
together. What the first takes longer is communication: what backward does not hide of it. With `fsdp` the second one
updates all weights and not a part of them, so that communication is rather more than the figure says.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.data.augment.mixing import draw_mix
from pipeline.data.loader import TrainBatch
from pipeline.hashing import seed64
from pipeline.models import num_drop_paths
from pipeline.train.determinism import use_deterministic_kernels
from pipeline.train.distributed import World
from pipeline.train.engines import Engine, make_engine
from pipeline.train.objective import Objective
from pipeline.train.process import run_process
from pipeline.train.setup import initial_model
from pipeline.train.step import seed_step, train_step

_BATCH_STREAM = 110
_BATCHES = 2


@dataclass(frozen=True)
class BenchJob:
    """What to measure.

    Attributes:
        config: of the run, as JSON, with classes, image size and lanes filled in for this number of processes.
        steps: in a block.
        warmup: steps before the first block.
        repeats: blocks of each kind.
        output: file for rank 0's result.
    """

    config: str
    steps: int
    warmup: int
    repeats: int
    output: str


def run(payload: str, threads: int | None = None) -> int:
    """Measure what a JSON `BenchJob` describes; returns the exit status."""
    job = BenchJob(**json.loads(payload))

    def work(world: World) -> None:
        result = measure(job, world)
        if world.is_main:
            Path(job.output).write_text(json.dumps(result))

    return run_process(work, threads)


def payload(job: BenchJob) -> str:
    """The job for `run`."""
    return json.dumps(asdict(job))


def measure(job: BenchJob, world: World) -> dict[str, Any]:
    """Time the blocks; collective.

    Returns:
        `seconds`: of each block of the whole, until the last process was done; `alone`: of each block of each process
        by itself, repeats x processes; empty with one process. `memory_gb`: peak of every process.
    """
    config = RunConfig.model_validate_json(job.config)
    use_deterministic_kernels(config.train.deterministic)
    together = _stepper(config, world, make_engine(initial_model(config, world), config, world))
    _block(together, job.warmup, world)
    memory = world.gather(_peak_gb(world.device))
    alone = None
    if world.size > 1:
        alone = _stepper(config, world, _engine_alone(config, world))
        _block(alone, job.warmup, world)
    seconds, own = [], []
    for _ in range(job.repeats):
        seconds.append(max(world.gather(_block(together, job.steps, world))))
        if alone is not None:
            own.append(world.gather(_block(alone, job.steps, world)))
    return {"seconds": seconds, "alone": own, "memory_gb": memory}


def figures(measured: dict[str, Any], processes: int, batch: int, steps: int) -> dict[str, Any]:
    """Rates, communication and the slowest process, from what `measure` returns.

    Args:
        processes: number of them.
        batch: samples of each in a step.
        steps: in a block.
    """
    rates = [steps * batch * processes / seconds for seconds in measured["seconds"]]
    by_rank = [median(seconds) / steps for seconds in zip(*measured["alone"], strict=True)]
    # A block beside the block of the same turn: a machine that slows down does so for both.
    pairs = zip(measured["seconds"], measured["alone"], strict=False)
    shares = [max(0.0, 1 - max(own) / seconds) for seconds, own in pairs]
    slowest = max(range(len(by_rank)), key=by_rank.__getitem__, default=0)
    return {
        "processes": processes,
        "images_per_second": _spread(rates),
        "images_per_second_per_process": _spread([rate / processes for rate in rates]),
        "communication": _spread(shares or [0.0]),
        "own_step_seconds": by_rank,
        "slowest_rank": slowest,
        "slowest_by": by_rank[slowest] / median(by_rank) - 1 if by_rank else 0.0,
        "memory_gb": max(measured["memory_gb"]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _stepper(config: RunConfig, world: World, engine: Engine) -> Callable[[int], None]:
    """A function that trains one step."""
    classes = config.model.num_classes
    assert classes is not None, "the command fills in the classes"
    objective = Objective(config.objective, classes)
    batches = [_made_batch(config, classes, num_drop_paths(engine.plain), world, i) for i in range(_BATCHES)]
    lr = config.optim.peak_lr(config.train.global_batch_size)

    def step(number: int) -> None:
        seed_step(config.seed, number, world.rank)
        train_step(engine, batches[number % _BATCHES], lr, config.train.accumulate, objective, world.device)

    return step


def _block(step: Callable[[int], None], steps: int, world: World) -> float:
    """Seconds that this process needs for some steps; all begin together."""
    _wait(world)
    world.barrier()
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    _wait(world)
    return time.perf_counter() - began


def _peak_gb(device: torch.device) -> float:
    """Most memory so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _engine_alone(config: RunConfig, world: World) -> Engine:
    """The same kind of engine in a world of this process alone."""
    model = initial_model(config, world)
    alone = World(0, 1, world.local_rank, world.device)
    if config.engine.name == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh

        from pipeline.train.engines.fsdp import FsdpEngine

        grid = init_device_mesh(world.device.type, (world.size, 1), mesh_dim_names=("all", "own"))
        return FsdpEngine(model, config, alone, grid["own"])
    return make_engine(model, config, alone)


def _made_batch(config: RunConfig, classes: int, drop_paths: int, world: World, number: int) -> TrainBatch:
    """A batch as the loader gives it, of noise; a function of the seed, the process and the number."""
    lanes, batch, size = config.data.lanes, config.train.global_batch_size, config.model.img_size
    assert lanes is not None and size is not None, "the command fills in lanes and image size"
    own, rng = batch // world.size, torch.Generator()
    rng.manual_seed(seed64(config.seed, _BATCH_STREAM, world.rank, number))
    its_lanes = range(world.rank, lanes, world.size)
    return TrainBatch(
        torch.randn(own, config.model.in_chans, size, size, generator=rng),
        torch.randint(classes, (own,), generator=rng),
        torch.arange(own),
        torch.rand(own, drop_paths, generator=rng),
        draw_mix(config.mix, config.seed, number, its_lanes, batch // lanes, size),
    )
