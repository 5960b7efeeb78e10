"""What is told when a run goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.tracking.metrics import MetricsLog
from pipeline.train.distributed import World
from pipeline.train.recorder import Recorder


@pytest.mark.parametrize(
    ("step", "logged", "told"),
    [(6, [], True), (6, [2, 4, 6], False), (6, [8], True), (2, [], True), (1, [], False), (0, [], False)],
)
def test_a_record_that_is_gone(
    step: int, logged: list[int], told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line every other step is written; lines of steps that are taken again don't count."""
    metrics = MetricsLog(tmp_path)
    for number in logged:
        metrics.log("train", number, samples=8 * number, epoch=0.1 * number, loss=1.0)
    config = SimpleNamespace(out=str(tmp_path), name="run", model=SimpleNamespace(options={}))
    plan, task = SimpleNamespace(log_every=2, end_step=10), SimpleNamespace(unit="img")
    run: Any = SimpleNamespace(config=config, plan=plan, task=task)
    run_dir: Any = SimpleNamespace(start_session=lambda **_: None)
    state: Any = SimpleNamespace(step=step, seconds=0.0)
    Recorder(run, run_dir, metrics).start(state, World(0, 1, 0, torch.device("cpu")))
    metrics.close()
    said = capsys.readouterr()
    assert ((said.out + said.err).count(f"metrics.jsonl has nothing about the {step} steps so far; ") == 1) is told
