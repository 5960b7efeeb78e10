"""The upload to a real MLflow server that is down, comes up, goes away and is slow."""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.tracking.background import BackgroundMirror
from pipeline.tracking.metrics import MetricsLog
from pipeline.tracking.mlflow_mirror import Mirror
from pipeline.tracking.run_dir import RunDir
from tests.tracking.conftest import (
    CONFIG,
    FACTS,
    MlflowServer,
    SlowProxy,
    log_steps,
    logged_points,
    make_run,
    stored_points,
    wait_for,
)

pytestmark = pytest.mark.mlflow_server


@pytest.fixture
def live(server: MlflowServer) -> Iterator[MlflowServer]:
    server.start()
    yield server


def client_of(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


def test_down_at_the_start_then_up_loses_nothing(tmp_path: Path, server: MlflowServer) -> None:
    run = make_run(tmp_path / "r", steps=20, status=None)
    mirror = Mirror(run, server.uri)
    for _ in range(2):
        with pytest.raises(UserError, match=r"can't be reached \(refused\)"):
            mirror.push()
    log_steps(MetricsLog(run), 21, 30)
    server.start()
    report = mirror.push()
    assert report.lines == 30 + 3
    assert stored_points(client_of(server), report.run_id) == logged_points(run)


def test_stopped_in_the_middle_and_started_again_loses_and_doubles_nothing(tmp_path: Path, live: MlflowServer) -> None:
    run = make_run(tmp_path / "r", steps=20, status=None)
    log = MetricsLog(run)
    mirror = Mirror(run, live.uri)
    first = mirror.push()
    live.stop()
    log_steps(log, 21, 30)
    with pytest.raises(UserError, match="can't be reached"):
        mirror.push()
    log_steps(log, 31, 40)
    live.start()
    report = mirror.end_if_over()
    client = client_of(live)
    assert report.run_id == first.run_id and report.lines == 20 + 2
    assert stored_points(client, report.run_id) == logged_points(run)
    assert client.get_run(report.run_id).info.status == "KILLED"
    copy = client.download_artifacts(report.run_id, "config.yaml", str(tmp_path))
    assert Path(copy).read_bytes() == (run / "config.yaml").read_bytes()


def test_a_run_on_the_default_file_shows_up_in_mlflow_ui(
    tmp_path: Path, live: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow ui`, started without options in the folder where the training ran."""
    monkeypatch.chdir(live.folder)
    run = make_run(tmp_path / "offline")
    report = Mirror(run, experiment="offline").end_if_over()
    assert report.uri == f"sqlite:///{live.folder}/mlflow.db"
    client = client_of(live)
    (found,) = client.search_runs([client.get_experiment_by_name("offline").experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (report.run_id, "offline", "FINISHED")
    assert stored_points(client, report.run_id) == logged_points(run)
    with urllib.request.urlopen(f"{live.uri}/get-artifact?path=config.yaml&run_uuid={report.run_id}") as answer:
        assert answer.read() == (run / "config.yaml").read_bytes()


def test_files_that_the_store_refuses_hold_up_nothing_else(tmp_path: Path, live: MlflowServer) -> None:
    """An experiment made through a server keeps its files behind that server, out of reach of its bare database."""
    Mirror(make_run(tmp_path / "online", steps=1), live.uri, experiment="mixed").push()
    run = make_run(tmp_path / "bare")
    report = Mirror(run, f"sqlite:///{live.folder}/mlflow.db", experiment="mixed").end_if_over()
    assert report.artifacts == 0
    assert len(report.notices) == 1 and report.notices[0].startswith(
        f"the run's files stay in {run} only: MLflow refused"
    )
    client = client_of(live)
    assert stored_points(client, report.run_id) == logged_points(run)
    assert client.get_run(report.run_id).info.status == "FINISHED"


def test_a_slow_server_costs_the_training_nothing(tmp_path: Path, live: MlflowServer) -> None:
    proxy = SlowProxy(live.port, delay=2.0)
    warnings: list[str] = []
    with RunDir.open(tmp_path / "r", CONFIG, FACTS) as run:
        run.start_session(world_size=1)
        mirror = BackgroundMirror(run.path, proxy.uri, interval=0.1, warn=warnings.append)
        log = MetricsLog(run.path)
        wait_for(lambda: proxy.received, 120, "the first request")
        seconds = []
        for step in range(1, 201):
            started = time.perf_counter()
            log.log("train", step, samples=16 * step, epoch=step / 40, loss=1 / step)
            seconds.append(time.perf_counter() - started)
            time.sleep(0.015)
        assert statistics.median(seconds) < 0.001
        assert sorted(seconds)[-5] < 0.005
        started = time.monotonic()
        complete = mirror.close("finished", timeout=0.5)
        assert time.monotonic() - started < 2.5
    assert not complete
    assert warnings == [f"MLflow doesn't have all of this run yet; `rookery sync {run.path}` uploads the rest"]
    proxy.delay = 0.0
    report = Mirror(run.path, proxy.uri).end_if_over()
    client = client_of(live)
    assert stored_points(client, report.run_id) == logged_points(run.path)
    assert client.get_run(report.run_id).info.status == "FINISHED"
    proxy.close()
