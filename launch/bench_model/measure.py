"""One run of `rookery bench model`: build the contenders, choose batches, let them take turns, collect the figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from launch.bench_model.batch import largest
from launch.bench_model.contender import Contender, contender
from launch.bench_model.count import count
from launch.bench_model.peaks import PEAKS, peak_of
from launch.bench_model.rounds import Plan, rows, take_turns
from launch.bench_model.runner import DTYPES, Phase, fits
from pipeline.errors import UserError
from pipeline.tracking.environment import device_name, key_versions
from pipeline.train.determinism import use_whole_float32

# Kinds of operations that are told of a model, those that move most.
_KINDS = 16


def bench_model(
    names: Sequence[str],
    against: str | None,
    phases: Sequence[Phase],
    batch: int | None,
    precision: str,
    compiled: bool,
    side: int | None,
    repeats: int,
    seconds: float,
    peak: float | None,
    command: str,
) -> dict[str, Any]:
    """The report.

    Args:
        names: of the models, see `contender`.
        against: one of them, which the others are compared with.
        phases: of `train` and `infer`, in the order of measuring.
        batch: images of a step; None: for each model the largest that fits on the GPU.
        precision: `fp32`, `bf16` or `fp16`.
        compiled: whether through torch.compile.
        side: of the pictures, pixels; None: of each model its own.
        repeats: turns of each model.
        seconds: of a turn at least.
        peak: TFLOP/s of the device; None: by its name, if known.
        command: for the report.

    Raises:
        UserError: models or options that don't fit together.
    """
    use_whole_float32()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check(names, against, precision, batch, device)
    contenders = [contender(model, side) for model in names]
    if device.type == "cpu" and any(name.endswith("+triton") for name in names):
        tell("+triton is for a GPU: on this CPU PyTorch computes in its place")
    plan = Plan(repeats, seconds, precision, compiled, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device_name()
    limits = peak_of(name)
    peak = peak or (limits.tflops(precision) if limits else None)
    table = []
    for phase in phases:
        able = [one for one in contenders if one.trains or phase == "infer"]
        sizes = {one: batch or _largest(one, phase, precision, device) for one in able}
        counts = {one.name: count(one.build, one.side, size or 1, one.trains) for one, size in sizes.items()}
        torch._dynamo.reset()  # its limit of compilations is per function, and models share theirs
        found = take_turns({one: size for one, size in sizes.items() if size}, phase, plan, tell)
        table += rows(found, counts, phase, limits, peak, against)
        table += [{"name": one.name, "phase": phase, "failed": "no batch fits"} for one in able if not sizes[one]]
    return {
        "command": command,
        "precision": precision,
        "compile": compiled,
        "against": against,
        "repeats": repeats,
        "seconds": seconds,
        "device": name,
        "threads": torch.get_num_threads(),
        "peak_tflops": peak,
        "versions": key_versions(),
        "models": table,
    }


def count_models(names: Sequence[str], batch: int, side: int | None, command: str) -> dict[str, Any]:
    """What the models do with a batch in half precision, counted, and what GPUs could make of it without fusion.

    Raises:
        UserError: no such model, or it can't be built for this side.
    """
    _check_names(names)
    table = []
    for one in (contender(name, side) for name in names):
        tell(f"counting {one.name}")
        counts = count(one.build, one.side, batch, one.trains)
        row: dict[str, Any] = {"name": one.name, "params": counts.params}
        for phase in ("infer", "train") if one.trains else ("infer",):
            row[phase] = {
                "gflops_per_image": counts.flops * (3 if phase == "train" else 1) / 1e9,
                "unfused_megabytes_per_image": counts.bytes(phase) / 1e6,
                "megabytes_by_operation": {
                    kind: moved / counts.batch / 1e6 for kind, moved in list(counts.kinds[phase].items())[:_KINDS]
                },
                "unfused_bound_images_per_second": {gpu: counts.bound(phase, peak) for gpu, peak in PEAKS.items()},
                "arithmetic_bound_images_per_second": {
                    gpu: 1e12 * peak.half / (counts.flops * (3 if phase == "train" else 1))
                    for gpu, peak in PEAKS.items()
                },
            }
        table.append(row)
    return {"command": command, "batch": batch, "versions": key_versions(), "models": table}


def _check(names: Sequence[str], against: str | None, precision: str, batch: int | None, device: torch.device) -> None:
    _check_names(names)
    if against is not None and against not in names:
        raise UserError(f"--against {against}: it must be one of the models that are measured: {', '.join(names)}")
    if precision not in DTYPES:
        raise UserError(f"--precision {precision}: there is {', '.join(DTYPES)}")
    if batch is None and device.type != "cuda":
        raise UserError("--batch auto looks for the largest batch that fits on a GPU, and there is none; give a number")


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise UserError("bench model: name one model at least, such as nest_tiny or timm:nest_tiny_jx")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice")


def _largest(one: Contender, phase: Phase, precision: str, device: torch.device) -> int:
    tell(f"{phase}: looking for the largest batch of {one.name}")
    return largest(lambda batch: fits(one, phase, batch, precision, device))


def tell(text: str) -> None:
    """Say on stderr what is going on."""
    print(f"bench model: {text}", file=sys.stderr, flush=True)
