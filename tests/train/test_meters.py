"""Who made a step bad is named: step, rank and samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf, isnan, nan

import pytest
import torch

from launch.workers import Nodes, start_workers
from pipeline.train.distributed import World
from pipeline.train.meters import BadStep, StepMeter
from pipeline.train.process import run_process
from pipeline.train.recorder import _skipped
from pipeline.train.step import StepResult
from tests.train.commands import ROOT, environment

# loss by rank and step of a window that ends after step 10
LOSSES = [[1.0, nan, 2.0, inf, 3.0], [1.0, 5.0, 4.0, -inf, 3.0]]
SKIPPED = [0.0, 1.0, 0.0, 1.0, 1.0]


def read_window(world: World) -> tuple[dict[str, float], list[BadStep]]:
    meter = StepMeter(world, batch=4, macs=1)
    with meter.waiting():
        pass
    for step, (loss, skipped) in enumerate(zip(LOSSES[world.rank], SKIPPED, strict=True)):
        result = StepResult(torch.tensor(loss), torch.tensor(1.0), torch.tensor(skipped), {})
        meter.add(result, torch.tensor([10 * step, 10 * step + 1]) + 100 * world.rank)
    return meter.read(10, lambda samples: [f"s{sample}" for sample in samples])


def test_one_process() -> None:
    figures, bad = read_window(World(0, 1, 0, torch.device("cpu")))
    assert figures["loss"] == 1.5
    assert bad == [BadStep(6, {0: ["s10", "s11"]}), BadStep(8, {0: ["s30", "s31"]}), BadStep(9, {})]


def test_the_rank_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = {rank: (loss, bad) for rank, loss, bad in map(json.loads, done.stdout.splitlines())}
    expected = [[6, {"0": ["s10", "s11"]}], [8, {"0": ["s30", "s31"], "1": ["s130", "s131"]}], [9, {}]]
    assert found == dict.fromkeys((0, 1), (2.0, expected))


@pytest.mark.parametrize(
    ("causes", "said"),
    [
        ({}, "skipped step 7: a gradient was NaN or infinite, the losses were not"),
        (
            {1: ["a", "b"]},
            "skipped step 7: the loss was NaN or infinite on rank 1 (a, b); metrics.jsonl names all samples",
        ),
        ({0: list("abcde"), 2: ["x"]}, "on rank 0 (a, b, c and 2 more), rank 2 (x);"),
    ],
)
def test_what_is_said(causes: dict[int, list[str]], said: str) -> None:
    assert said in _skipped(7, causes)


def test_a_window_without_a_good_step() -> None:
    meter = StepMeter(World(0, 1, 0, torch.device("cpu")), batch=4, macs=1)
    meter.add(StepResult(torch.tensor(nan), torch.tensor(nan), torch.tensor(1.0), {}), torch.tensor([3]))
    figures, bad = meter.read(1, lambda samples: list(map(str, samples)))
    assert isnan(figures["loss"]) and bad == [BadStep(0, {0: ["3"]})]


def _report(world: World) -> None:
    figures, bad = read_window(world)
    # In one piece: both processes write to the same pipe.
    os.write(1, (json.dumps([world.rank, figures["loss"], bad]) + "\n").encode())


def run(payload: str, threads: int | None = None) -> int:
    """What the worker processes of `test_the_rank_is_named` do."""
    return run_process(_report, threads)


if __name__ == "__main__":
    os._exit(start_workers("tests.train.test_meters", "", Nodes(2)))
