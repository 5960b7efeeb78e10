"""`mlflow server` on PostgreSQL with artifacts in S3: sweeps, models, and a training whose server goes away."""

from __future__ import annotations

import csv
import http.client
import json
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.models import create_model
from pipeline.tracking.confusion import Confusion
from pipeline.tracking.files import file_reference
from pipeline.tracking.metrics import MetricsLog
from pipeline.tracking.mlflow_mirror import Mirror
from pipeline.tracking.mlflow_sweep import SWEEP_TAG
from pipeline.tracking.run_dir import RunDir
from pipeline.train.export import load_weights, write_weights
from tests.tracking.conftest import CONFIG, FACTS, SlowProxy, log_steps, logged_points, stored_points, wait_for
from tests.tracking.mlflow_stack import Stack
from tests.tracking.step_cost import Mark
from tests.train.commands import command, environment, run_command
from tests.train.conftest import write_recipe

pytestmark = [pytest.mark.mlflow_server, pytest.mark.s3]

CLASSES = ["three", "eight", "nine"]
MODEL = {"img_size": 16, "in_chans": 1, "num_classes": 3}
SMALL = {"depths": 1, "embed_dims": [16, 32, 48], "num_heads": [1, 2, 3]}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    # `mlflow.pytorch.load_model` takes no address.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.uri)
    return MlflowClient(tracking_uri=stack.uri)


def make_trial(path: Path, seed: int, **tracking: Any) -> Path:
    """A finished run of 90 steps, a little over two epochs, with weights and confusion matrices."""
    config = CONFIG | {"name": path.name, "tracking": {"experiment": "stack", **tracking}}
    run = RunDir.open(path, config, FACTS)
    run.start_session(world_size=1)
    log = MetricsLog(path)
    log_steps(log, 1, 90)
    log.close()
    torch.manual_seed(seed)
    model = create_model("nest_micro", **MODEL, **SMALL)
    described = {
        "model": "nest_micro",
        "overrides": MODEL | SMALL,
        "classes": CLASSES,
        "augment": AugmentConfig().model_dump(),
        "eval_transform": EvalTransformConfig().model_dump(),
        "figures": {"top1": 0.75},
    }
    (path / "best").mkdir()
    write_weights(path / "best", model.state_dict(), described)
    pairs = np.array([0, 0, 0, 1, 4, 5, 5, 8])  # three: 3 of 4 right, eight: 1 of 3, nine: all
    for name in ("confusion.npz", "confusion_best.npz"):
        Confusion.of(3, [pairs]).save(path / name, CLASSES, 90)
    run.write_result({"top1": 0.625, "step": 90})
    run.write_checkpoints({"best": file_reference(path / "best" / "model.safetensors")})
    run.close("finished")
    return path


def test_trials_that_start_at_once_are_children_of_one_sweep(tmp_path: Path, stack: Stack, client: Any) -> None:
    trials = [make_trial(tmp_path / f"trial-{i}", i, sweep="lr-sweep") for i in range(2)]
    mirrors = [Mirror(trial, stack.uri) for trial in trials]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda mirror: mirror.push(), mirrors))
        reports = list(threads.map(lambda mirror: mirror.end_if_over(), mirrors))
    assert [report.notices for report in reports] == [[], []]
    # What the two might have settled late is settled by the next look.
    reports = [Mirror(trial, stack.uri).end_if_over() for trial in trials]
    experiment = client.get_experiment_by_name("stack").experiment_id
    (parent,) = client.search_runs([experiment], f"tags.`{SWEEP_TAG}` = 'lr-sweep'")
    assert (parent.info.run_name, parent.info.status) == ("lr-sweep", "FINISHED")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.info.run_id for child in children} == {report.run_id for report in reports}
    for trial, report in zip(trials, reports, strict=True):
        assert stored_points(client, report.run_id) == logged_points(trial)
    (found,) = client.search_runs([experiment], "params.`model.name` = 'nest_tiny' and attributes.run_name = 'trial-1'")
    assert found.info.run_id == reports[1].run_id
    assert found.data.tags["recipe"] == "configs/nest/tiny.yaml" and found.data.tags["sweep"] == "lr-sweep"


def test_curves_and_pictures(tmp_path: Path, stack: Stack, client: Any) -> None:
    run = make_trial(tmp_path / "curves", 0)
    run_id = Mirror(run, stack.uri).end_if_over().run_id

    def curve(key: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))

    # 40 steps of 16 samples are an epoch; the loss of a step is 1 / step.
    means = [statistics.fmean(1 / step for step in range(first, first + 40)) for first in (1, 41)]
    assert curve("by_epoch/train/loss") == [(1, pytest.approx(means[0])), (2, pytest.approx(means[1]))]
    assert curve("by_samples/train/loss") == [(640, pytest.approx(means[0])), (1280, pytest.approx(means[1]))]
    assert curve("by_epoch/eval/top1") == [(1, 1 - 1 / 40), (2, 1 - 1 / 80)]
    assert curve("by_samples/eval/top1") == [(160 * i, 1 - 1 / (10 * i)) for i in range(1, 10)]

    pictures = Path(client.download_artifacts(run_id, "plots", str(tmp_path)))
    confusions = {f"confusion_{which}.png" for which in ("final", "best")}
    tables = {f"per_class_{which}.csv" for which in ("final", "best")}
    assert {path.name for path in pictures.iterdir()} == {"learning_rate.png", "throughput.png"} | confusions | tables
    for path in pictures.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5_000
    with open(pictures / "per_class_best.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "samples", "correct", "accuracy", "taken_for", "times"],
        ["three", "4", "3", "0.75", "eight", "1"],
        ["eight", "3", "1", str(1 / 3), "nine", "2"],
        ["nine", "1", "1", "1.0", "", "0"],
    ]
    # They lie in the bucket, not on the server.
    bucket = http.client.HTTPConnection("127.0.0.1", stack.s3_port)
    bucket.request("GET", "/bucket?list-type=2&prefix=mlflow/")
    assert f"{run_id}/artifacts/plots/confusion_best.png" in bucket.getresponse().read().decode()


def test_the_best_weights_are_one_version_of_the_model(tmp_path: Path, stack: Stack, client: Any) -> None:
    import mlflow.pytorch

    run = make_trial(tmp_path / "model", 3, register_model="digits")
    first = Mirror(run, stack.uri).end_if_over()
    assert (first.notices, first.versions) == ([], 1)
    again = Mirror(run, stack.uri).end_if_over()
    assert (again.versions, again.artifacts, again.values) == (0, 0, 0)
    # Nor does an upload that was cut off before it was noted make a second one.
    state = json.loads((run / "mlflow.json").read_text())
    state["targets"][stack.uri]["model"] = []
    (run / "mlflow.json").write_text(json.dumps(state))
    Mirror(run, stack.uri).end_if_over()
    (version,) = client.search_model_versions("name = 'digits'")
    assert version.run_id == first.run_id and version.tags["top1"] == "0.75"

    place = f"models:/digits/{version.version}"
    expected, _ = load_weights(run / "best")
    loaded = mlflow.pytorch.load_model(place)
    images = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected.eval()(images), rtol=0, atol=1e-6)
    signature = mlflow.models.get_model_info(place).signature
    assert [(spec.name, spec.shape) for spec in signature.inputs] == [("images", (-1, 1, 16, 16))]
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [("logits", (-1, 3))]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    prepare_splits("digits", out, PrepOptions(workers=1))
    return out


def test_training_does_not_notice_a_slow_server_nor_30_seconds_without_one(
    tmp_path: Path, stack: Stack, client: Any, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = SlowProxy(stack.port, delay=0.0)
    run = tmp_path / "runs" / "run"
    lengths = ("train.epochs=1000000steps", "eval.every=1000000steps", "checkpoint.every=1000000steps")
    rest = ("train.log_every=1steps", "tracking.mlflow=true", f"tracking.uri={proxy.uri}", "tracking.experiment=outage")
    arguments = (write_recipe(digits, tmp_path, augment=False), *lengths, *rest)
    with open(tmp_path / "log", "wb") as log:
        training = subprocess.Popen(
            command("train", *arguments, "--threads", 1), cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )

    def phase(seconds: float) -> float:
        before = Mark.of(run)
        time.sleep(seconds)
        assert training.poll() is None, (tmp_path / "log").read_text()
        return before.step_seconds(Mark.of(run))

    try:
        wait_for(lambda: (run / "mlflow.json").exists() and proxy.received > 5, 300, "the upload to begin")
        usual = phase(6)
        proxy.delay = 2.0
        slow = phase(6)
        stack.stop()
        away = phase(30)
        training.send_signal(signal.SIGINT)
        assert training.wait(60) == 130
    finally:
        training.kill()
        stack.start()
    with capsys.disabled():
        print(f"\nmean step {usual * 1e3:.2f} ms; slow server {slow / usual:.3f}, no server {away / usual:.3f} of it")
    # Loose: cores differ, and so does what shares their caches.
    assert slow < 2 * usual and away < 2 * usual

    proxy.delay = 0.0
    done = run_command(tmp_path, "sync", run)
    proxy.close()
    assert "can't be reached" in (tmp_path / "log").read_text() and " values of " in done.stdout
    (found,) = client.search_runs([client.get_experiment_by_name("outage").experiment_id])
    assert stored_points(client, found.info.run_id) == logged_points(run)
    assert (found.info.status, found.data.tags["state"]) == ("KILLED", "interrupted")
    assert found.data.tags["paper"] == "NesT 2105.12723"
    assert found.data.tags["recipe"] == str(tmp_path / "recipe.yaml")
