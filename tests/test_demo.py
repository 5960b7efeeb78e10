"""What `make demo` does after its set-up: scans sharded, a NesT trained by two processes, evaluated and tracked."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from pipeline.tracking.metrics import read_metrics
from tests.train.commands import ROOT, run_command


def test_demo(tmp_path: Path) -> None:
    rookery = partial(run_command, tmp_path)
    rookery("prep", "digits", "shards/digits")
    done = rookery("train", ROOT / "configs" / "demo.yaml", "--nproc", 2, "seed=1", "name=demo-seed1", timeout=1000)
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"run=(\S+) top1=([0-9.]+)", last)
    assert found is not None, last
    run = tmp_path / found[1]
    result = json.loads((run / "result.json").read_text())
    assert result["count"] == 360 and float(found[2]) == round(result["top1"], 4)
    assert result["top1"] >= 0.985

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("rookery").experiment_id])
    assert tracked.info.run_name == "demo-seed1" and tracked.info.status == "FINISHED"
    points = {m.step: m.value for m in client.get_metric_history(tracked.info.run_id, "eval/top1")}
    assert points == {line["step"]: line["top1"] for line in read_metrics(run) if line["kind"] == "eval"}

    table = rookery("compare", "runs").stdout
    assert "demo-seed1" in table
