"""The uploading process beside a training that is killed, resumed, or has no server at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.background import BackgroundMirror
from pipeline.tracking.files import read_json
from pipeline.tracking.metrics import read_metrics
from tests.tracking.conftest import free_port, logged_points, make_run, stored_points, wait_for

ROOT = Path(__file__).parents[2]
_TRAINING = """
import sys, time
from pathlib import Path
from pipeline.tracking.background import BackgroundMirror
from pipeline.tracking.metrics import MetricsLog
from pipeline.tracking.run_dir import RunDir
from tests.tracking.conftest import CONFIG, log_steps

path, resumed, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run = RunDir.open(path, CONFIG)
run.start_session(world_size=1, resumed_from=resumed)
log = MetricsLog(path)
log.rewind(resumed)
mirror = BackgroundMirror(path, sys.argv[4], interval=0.2)
print(mirror._child.pid, flush=True)
for step in range(resumed + 1, last + 1):
    log_steps(log, step, step)
    time.sleep(0.01)
log.close()
run.write_result({"top1": 0.9, "step": last})
run.close("finished")
assert "mlflow" not in sys.modules
assert mirror.close("finished", timeout=100)
"""


def train(path: Path, resumed: int, last: int, uri: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _TRAINING, str(path), str(resumed), str(last), uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # wherever this process is
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def target(path: Path, uri: str) -> dict[str, Any]:
    return ((read_json(path / "mlflow.json") or {}).get("targets", {})).get(uri, {})


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


@pytest.mark.chaos
def test_killed_and_resumed_it_is_one_run_with_every_step_once(tmp_path: Path, sqlite_uri: str) -> None:
    from mlflow import MlflowClient

    path = tmp_path / "r"
    process = train(path, 0, 100_000, sqlite_uri)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    wait_for(lambda: target(path, sqlite_uri).get("tail", {}).get("lines", 0) > 30, 120, "the first upload")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    # The uploading process sends what the killed one left, says so, and goes.
    wait_for(lambda: gone(child), 60, "the uploading process to end")
    client = MlflowClient(tracking_uri=sqlite_uri)
    run_id = target(path, sqlite_uri)["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    assert stored_points(client, run_id) == logged_points(path)

    reached = max(line["step"] for line in read_metrics(path))
    resumed = reached - 15
    process = train(path, resumed, reached + 20, sqlite_uri)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert target(path, sqlite_uri)["run_id"] == run_id
    stored = client.get_run(run_id)
    assert (stored.info.status, stored.data.metrics["final/top1"]) == ("FINISHED", 0.9)
    steps = sorted(metric.step for metric in client.get_metric_history(run_id, "train/loss"))
    assert steps == list(range(1, reached + 21))


def test_without_a_server_training_gets_one_warning_and_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    warnings: list[str] = []
    mirror = BackgroundMirror(run, f"http://127.0.0.1:{free_port()}", interval=0.05, warn=warnings.append)
    wait_for(lambda: warnings, 120, "the warning")
    time.sleep(1.0)
    assert len(warnings) == 1 and "can't be reached (refused); training goes on" in warnings[0]
    assert not mirror.close("finished", timeout=30)
    assert [text for text in warnings[1:] if "rookery sync" not in text] == []


def test_a_damaged_state_is_told_rather_than_raised(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=1)
    (run / "mlflow.json").write_text("{")
    warnings: list[str] = []
    mirror = BackgroundMirror(run, warn=warnings.append)
    assert not mirror.close(timeout=60)
    assert "mlflow.json can't be read as JSON" in warnings[0]
