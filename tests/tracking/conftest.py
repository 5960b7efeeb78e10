"""Made runs, a real MLflow server, and a proxy that makes it slow."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.metrics import MetricsLog, read_metrics
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.run_dir import RunDir
from tests.conftest import missing

CONFIG: dict[str, Any] = {
    "name": "first",
    "out": "runs",
    "seed": 0,
    "model": {"name": "nest_tiny", "num_classes": 10},
    "train": {"epochs": "10ep", "global_batch_size": 16},
    "optim": {"lr": 0.1, "betas": [0.9, 0.999]},
    "tracking": {"experiment": "tests"},
}
FACTS: dict[str, Any] = {
    "datasets": {"train": {"path": "shards/train", "fingerprint": "f00d", "samples": 640, "classes": 10}},
    "model_params": 17_100_000,
    "total_steps": 400,
    "total_epochs": 10.0,
    "tags": {"recipe": "configs/nest/tiny.yaml"},
}


def log_steps(log: MetricsLog, first: int, last: int, factor: float = 1.0) -> None:
    """Training lines of steps first..last and an evaluation every tenth; 40 steps of 16 samples are an epoch."""
    for step in range(first, last + 1):
        position = {"samples": 16 * step, "epoch": step / 40}
        log.log("train", step, **position, loss=factor / step, lr=0.1, images_per_second=100.0 + step)
        if step % 10 == 0:
            log.log("eval", step, **position, top1=1 - 1 / step, loss=factor)


def make_run(
    path: Path,
    config: dict[str, Any] = CONFIG,
    facts: dict[str, Any] = FACTS,
    steps: int = 20,
    status: Any = "finished",
) -> Path:
    """A run directory as training leaves it; `status` None leaves the session without an end, as a kill does."""
    run = RunDir.open(path, config, facts)
    run.start_session(world_size=2)
    log = MetricsLog(path)
    log_steps(log, 1, steps)
    log.close()
    if status is None:
        run._unlock()
    run.close(status)
    return path


def logged_points(run: Path) -> list[tuple[str, int, int, str]]:
    """What MLflow must hold: (key, step, milliseconds, value) of every number in metrics.jsonl.

    Two lines of one step and millisecond give the same epoch twice; MLflow keeps equal points once.
    """
    prefixes = {"train": "train/", "eval": "eval/", "system": "system/"}
    points = []
    for line in read_metrics(run):
        if line["kind"] == "event":
            continue
        left_out = {"kind", "step", "time"} | ({"samples", "epoch"} if line["kind"] == "system" else set())
        for key in line.keys() - left_out:
            points.append(
                (prefixes[line["kind"]] + key, line["step"], int(line["time"] * 1000), repr(float(line[key])))
            )
    return sorted(set(points))


# Computed from the lines: closing figures, and curves over other axes.
DERIVED = ("final/", "best/", "by_epoch/", "by_samples/")


def stored_points(client: Any, run_id: str) -> list[tuple[str, int, int, str]]:
    """What MLflow holds, apart from what is computed from the lines."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith(DERIVED)]
    return sorted(
        (key, metric.step, metric.timestamp, repr(float(metric.value)))
        for key in keys
        for metric in client.get_metric_history(run_id, key)
    )


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until `condition` is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """A real `mlflow ui` process in a folder, on its default `mlflow.db` there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mlflow", "ui", "--port", str(self.port), "--workers", "1"]

    def environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        return environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def start(self) -> None:
        if self._process is not None:
            return
        with open(self.folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=self.environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for(self._answers, 300, f"the MLflow server; see {self.folder / 'server.log'}")
        except AssertionError as error:
            missing(str(error))

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class SlowProxy:
    """Forwards TCP to a port of this machine, `delay` seconds late; counts what clients sent.

    Attributes:
        delay: may be changed at any time.
        refuses: whether connections are closed at once, the open ones with their next request.
    """

    def __init__(self, port: int, delay: float) -> None:
        self.delay = delay
        self.refuses = False
        self.received = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.refuses:
                    raise ConnectionRefusedError
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, request: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if request:
                    self.received += 1
                    time.sleep(self.delay)
                    if self.refuses:
                        raise ConnectionResetError
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite file for all tests: making its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    connect(uri).search_experiments()
    return uri


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, sqlite_uri: str) -> Iterator[MlflowServer]:
    """A server that isn't running yet, on a copy of the tables."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    shutil.copy(sqlite_uri.removeprefix("sqlite:///"), server.folder / "mlflow.db")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
