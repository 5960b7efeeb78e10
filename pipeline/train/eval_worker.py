"""One evaluating process."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import Batches, EvalDataset
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.train.distributed import World
from pipeline.train.engines.base import PRECISIONS
from pipeline.train.evaluate import evaluate
from pipeline.train.export import load_weights
from pipeline.train.process import run_process


@dataclass(frozen=True)
class EvalJob:
    """What to evaluate.

    Attributes:
        weights: directory with `model.safetensors` and `config.json`.
        data: directory of the split.
        batch_size: samples per process and forward.
        workers: loader processes of each process.
        precision: `fp32`, `bf16` or `fp16`.
        output: file that gets the JSON result too; empty for none.
    """

    weights: str
    data: str
    batch_size: int = 64
    workers: int = 2
    precision: str = "fp32"
    output: str = ""


def run_job(job: EvalJob, world: World) -> dict[str, float | str]:
    """Evaluate; collective. Rank 0 prints the result as one line of JSON.

    Raises:
        UserError: no such weights or data, or the classes differ.
    """
    model, described = load_weights(Path(job.weights))
    shards = ShardSet(job.data)
    if described["classes"] != shards.manifest.classes:
        world.fail(
            f"{job.weights} tells other classes apart ({_few(described['classes'])}) than {job.data} has "
            f"({_few(shards.manifest.classes)}); evaluate on a split that belongs to the training data"
        )
    channels = described["overrides"]["in_chans"]
    augment = AugmentConfig.model_validate(described["augment"])
    settings = EvalTransformConfig.model_validate(described["eval_transform"])
    transform = build_eval_transform(settings, augment, described["overrides"]["img_size"], channels)
    dataset = EvalDataset(shards, transform, channels, job.batch_size, world.rank, world.size)
    batches = Batches(dataset, range(len(dataset)), job.workers, 4, world.device)
    dtype = PRECISIONS[job.precision]
    autocast = nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)
    figures = evaluate(model.to(world.device), batches, autocast, world)
    result = {"weights": job.weights, "data": job.data, **figures, "model": described["model"]}
    if world.is_main:
        print(json.dumps(result), flush=True)
        if job.output:
            _write(Path(job.output), result)
    return result


def _few(classes: list[str]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"


def _write(path: Path, result: dict[str, float | str]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); choose another --output") from error


def payload(job: EvalJob) -> str:
    return json.dumps(asdict(job))


def run(text: str, threads: int | None = None) -> int:
    """Run the job that a JSON text describes; returns the exit status."""
    job = EvalJob(**json.loads(text))
    return run_process(lambda world: run_job(job, world), threads)
