"""A run killed again and again ends with the bits of one that was left alone. `make chaos` kills 200 times."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from pipeline.tracking.metrics import read_metrics
from pipeline.train.export import WEIGHTS
from pipeline.train.trace import read_trace
from tests.train.conftest import TWO_LEVELS, write_recipe
from tests.train.forked import ForkServer, Job

KILLS = int(os.environ.get("ROOKERY_CHAOS_KILLS", 30))
ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    "zero3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}
# About 4 steps survive a kill.
LENGTH = ("train.epochs=10000steps", f"train.stop_after={5 * KILLS}steps")
OFTEN = ("checkpoint.every=5steps", "eval.every=11steps", "eval.batch_size=20")


@pytest.mark.chaos
@pytest.mark.parametrize("engine", ENGINES)
def test_chaos(engine: str, digits: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    seed = int(os.environ.get("ROOKERY_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    moments = random.Random(seed)
    recipe = write_recipe(digits, tmp_path, augment=False)
    options = (*ENGINES[engine], *TWO_LEVELS, *LENGTH, *OFTEN)
    whole, cut = (tmp_path / "runs" / f"{engine}-{name}" for name in ("whole", "cut"))
    fork_server.train(recipe, *options, f"name={whole.name}", nproc=2)

    hits: Counter[str] = Counter()
    for where in islice(places(moments), KILLS):
        job = fork_server.start(recipe, *options, f"name={cut.name}", nproc=2)
        kill(job, where, cut, moments)
        hits[where] += 1
        assert set(job.wait()) == {-9}, f"ROOKERY_CHAOS_SEED={seed}\n{fork_server.log.read_text()[-5000:]}"
    print(f"ROOKERY_CHAOS_SEED={seed}: {hits.total()} kills, {dict(hits)}")
    fork_server.train(recipe, *options, f"name={cut.name}", nproc=2)

    for weights in ("final", "best"):
        assert (cut / weights / WEIGHTS).read_bytes() == (whole / weights / WEIGHTS).read_bytes(), seed
    assert read_trace(cut) == read_trace(whole)
    assert train_lines(cut) == train_lines(whole)
    results = [json.loads((run / "result.json").read_text()) for run in (cut, whole)]
    assert all(result.pop("wall_seconds") > 0 for result in results)
    assert results[0] == results[1]


def places(moments: random.Random) -> Iterator[str]:
    """Where to kill: in any order, but each of them in every five."""
    while True:
        yield from moments.sample(["start", "step", "step", "evaluation", "save"], 5)


def kill(job: Job, where: str, run: Path, moments: random.Random) -> None:
    """Kill a job while it starts, in a step, in an evaluation or in a save."""
    metrics, parts = run / "metrics.jsonl", run / "checkpoints"
    if where == "start":
        time.sleep(moments.uniform(0, 0.8))
        job.kill()
        return
    before = lines(metrics)
    wanted = moments.randrange(1, 8)

    def reached() -> bool:
        if where == "save":
            return any(parts.glob(".part-*")) and lines(metrics) > before
        done = lines(metrics) - before
        return done >= wanted if where == "step" else done > 0 and last_step(metrics) % 11 == 0

    deadline = time.monotonic() + 60
    while not reached() and time.monotonic() < deadline and job.alive():
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.03))
    job.kill()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_step(path: Path) -> int:
    """Of the last whole line; 1 when there is none."""
    whole = path.read_bytes().split(b"\n")[:-1]
    return json.loads(whole[-1]).get("step", 1) if whole else 1


def train_lines(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run) if line["kind"] == "train"]
