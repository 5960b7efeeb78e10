"""One evaluating process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.cache_room import CacheOptions
from pipeline.tracking.files import encode_floats, write_text
from pipeline.tracking.redact import redact
from pipeline.train.determinism import use_deterministic_kernels
from pipeline.train.distributed import World
from pipeline.train.process import run_process
from pipeline.train.tasks import task_class


@dataclass(frozen=True)
class EvalJob:
    """What to evaluate.

    Attributes:
        weights: directory with `model.safetensors` and `config.json`, or with `step` a checkpoint.
        data: directory of the split.
        run: run directory of the checkpoint.
        step: where the checkpoint was made; None for exported weights.
        batch_size: samples per process and forward.
        workers: loader processes of each process.
        precision: `fp32`, `bf16` or `fp16`.
        output: file that gets the JSON result too; empty for none.
        predictions: file that gets a line for every sample; empty for none.
        crop_pct: crop ratio; None leaves the run's own evaluation as it is.
        aux_weight: of the logits of a model's aux head; None: the model's own.
        ratios: crop ratios to choose the best of; empty for a single evaluation.
        holdout: part of the samples that the choice is not made on.
        cache: of the node, for a split that has an address.
        task: kind of the run.
        deterministic: whether by kernels that give the same numbers each time, as the run evaluates itself; else half
            precision takes other ones for attention.
    """

    weights: str
    data: str
    run: str = ""
    step: int | None = None
    batch_size: int = 64
    workers: int = 2
    precision: str = "fp32"
    output: str = ""
    predictions: str = ""
    crop_pct: float | None = None
    aux_weight: float | None = None
    ratios: list[float] = field(default_factory=list)
    holdout: float = 0.5
    cache: CacheOptions = field(default_factory=CacheOptions)
    task: str = "classify"
    deterministic: bool = True


def run_job(job: EvalJob, world: World) -> dict[str, Any]:
    """Evaluate; collective. Rank 0 prints the result as one line of JSON, what is no number as "NaN" or "Infinity".

    Raises:
        UserError: no such weights or data, the classes differ, a crop ratio can't be used, there is no aux head, or a
            file can't be written.
    """
    result: dict[str, Any] = {"weights": job.weights, "data": redact(job.data)}
    if job.step is not None:
        result["step"] = job.step
    figures, predictions = task_class(job.task).evaluate_saved(job, world)
    result |= figures
    if world.is_main:
        # Before any file: a full disk does not cost the figures.
        print(json.dumps(encode_floats(result)), flush=True)
    if predictions is not None:
        table = predictions
        world.on_main(lambda: table.write(Path(job.predictions)))
    if world.is_main and job.output:
        write_text(Path(job.output), json.dumps(encode_floats(result), indent=1) + "\n")
    return result


def payload(job: EvalJob) -> str:
    return json.dumps(asdict(job))


def run(text: str, threads: int | None = None) -> int:
    """Run the job that a JSON text describes; returns the exit status."""
    values = json.loads(text)
    job = EvalJob(**values | {"cache": CacheOptions(**values["cache"])})
    use_deterministic_kernels(job.deterministic)
    return run_process(lambda world: run_job(job, world), threads)
