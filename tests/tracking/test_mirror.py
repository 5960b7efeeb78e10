"""The upload to an SQLite file, read back through MLflow's own client."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from launch.sync_cli import sync
from pipeline.errors import UserError
from pipeline.tracking.metrics import MetricsLog
from pipeline.tracking.mirror_state import resolve_uri
from pipeline.tracking.mlflow_client import make_whole
from pipeline.tracking.mlflow_mirror import Mirror
from pipeline.tracking.mlflow_sweep import MAKER_TAG, SWEEP_TAG
from pipeline.tracking.run_dir import RunDir
from tests.tracking.conftest import CONFIG, FACTS, free_port, log_steps, logged_points, make_run, stored_points


@pytest.fixture
def client(sqlite_uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=sqlite_uri)


def cli(*args: str) -> Any:
    app = typer.Typer()
    app.command()(sync)
    return CliRunner().invoke(app, list(args))


def test_all_of_a_finished_run_is_there(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = RunDir.open(tmp_path / "first", CONFIG, FACTS)
    run.start_session(world_size=2)
    log = MetricsLog(run.path)
    log_steps(log, 1, 300)
    log.log("system", cpu_percent=12.5)
    log.log("eval", 300, loss=math.nan)
    run.write_result(
        {"top1": 0.9, "step": 300, "samples": 4800, "best": {"top1": 0.95, "step": 280}, "params": 17_100_000}
    )
    run.write_checkpoints({"final": {"path": "/w/model.safetensors", "sha256": "abc"}})
    run.close("finished")
    report = Mirror(run.path, sqlite_uri).end_if_over()

    stored = client.get_run(report.run_id)
    assert stored_points(client, report.run_id) == logged_points(run.path)
    assert report.lines == 300 + 30 + 1 + 1
    assert report.values > 1500
    closing = {k: v for k, v in stored.data.metrics.items() if k.startswith(("final/", "best/"))}
    assert closing == {"final/top1": 0.9, "final/params": 17_100_000, "best/top1": 0.95, "best/step": 280}
    assert stored.data.params == {
        "name": "first",
        "out": "runs",
        "seed": "0",
        "model.name": "nest_tiny",
        "model.num_classes": "10",
        "train.epochs": "10ep",
        "train.global_batch_size": "16",
        "optim.lr": "0.1",
        "optim.betas": "[0.9, 0.999]",
        "tracking.experiment": "tests",
    }
    tags = stored.data.tags
    assert tags["model"] == "nest_tiny" and tags["recipe"] == "configs/nest/tiny.yaml" and tags["starts"] == "1"
    assert tags["dataset.train.fingerprint"] == "f00d"
    assert (tags["checkpoint.final.path"], tags["checkpoint.final.sha256"]) == ("/w/model.safetensors", "abc")
    assert client.get_experiment(stored.info.experiment_id).name == "tests"
    assert (stored.info.run_name, stored.info.status) == ("first", "FINISHED")
    files = ("checkpoints.json", "config.yaml", "facts.json", "result.json", "sessions.jsonl")
    for name in files:
        copy = client.download_artifacts(report.run_id, name, str(tmp_path))
        assert Path(copy).read_bytes() == (run.path / name).read_bytes()
    # The checkout that the tests run in may have local changes.
    assert {file.path for file in client.list_artifacts(report.run_id)} - {"git.diff"} == {*files, "plots"}
    pictures = {file.path for file in client.list_artifacts(report.run_id, "plots")}
    assert pictures == {"plots/learning_rate.png", "plots/throughput.png"}


@pytest.mark.parametrize("status", ["failed", "interrupted", None])
def test_the_end_of_a_run_is_told(tmp_path: Path, sqlite_uri: str, client: Any, status: str | None) -> None:
    report = Mirror(make_run(tmp_path / "r", status=status), sqlite_uri).end_if_over()
    info = client.get_run(report.run_id).info
    assert info.status == ("FAILED" if status == "failed" else "KILLED")
    assert (info.end_time is not None) and info.start_time <= info.end_time


def test_pushing_again_sends_nothing(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "r")
    first = Mirror(run, sqlite_uri).end_if_over()
    again = Mirror(run, sqlite_uri).end_if_over()
    assert again.run_id == first.run_id
    assert (again.lines, again.values, again.params, again.artifacts) == (0, 0, 0, 0)
    assert stored_points(client, first.run_id) == logged_points(run)


def test_explanations_are_sent_once(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "first", status=None)
    (run / "explain").mkdir()
    for step in (10, 20):
        (run / "explain" / f"step-{step:08d}.png").write_bytes(b"picture %d" % step)
        report = Mirror(run, sqlite_uri).push()
        sent = [file.path for file in client.list_artifacts(report.run_id, "explain")]
        assert sent == [f"explain/step-{n:08d}.png" for n in range(10, step + 1, 10)]
    assert Mirror(run, sqlite_uri).push().artifacts == 0


def test_pages_of_generators_are_sent_once(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "first", status=None)
    (run / "samples").mkdir()
    for name in ("interpolations", "samples"):
        (run / "samples" / f"{name}-00000010.png").write_bytes(b"picture")
    report = Mirror(run, sqlite_uri).push()
    sent = sorted(file.path for file in client.list_artifacts(report.run_id, "samples"))
    assert sent == ["samples/interpolations-00000010.png", "samples/samples-00000010.png"]
    assert Mirror(run, sqlite_uri).push().artifacts == 0


def test_a_crash_between_upload_and_note_doubles_nothing(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "r", steps=10, status="failed")
    Mirror(run, sqlite_uri).push()
    shutil.copy(run / "mlflow.json", tmp_path / "old.json")
    log_steps(MetricsLog(run), 11, 20)
    report = Mirror(run, sqlite_uri).push()
    shutil.copy(tmp_path / "old.json", run / "mlflow.json")
    repeated = Mirror(run, sqlite_uri).push()
    assert repeated.values == report.values > 0
    assert stored_points(client, report.run_id) == logged_points(run)


def test_a_run_whose_creation_was_answered_too_late_is_found(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "r")
    first = Mirror(run, sqlite_uri).push()
    state = json.loads((run / "mlflow.json").read_text())
    state["targets"][sqlite_uri] |= {"run_id": None}
    (run / "mlflow.json").write_text(json.dumps(state))
    assert Mirror(run, sqlite_uri).push().run_id == first.run_id


def test_a_resumed_run_continues_the_same_run(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    path = make_run(tmp_path / "r", steps=25, status=None)
    first = Mirror(path, sqlite_uri).end_if_over()
    assert client.get_run(first.run_id).info.status == "KILLED"
    assert client.get_run(first.run_id).data.tags["state"] == "killed"

    longer = CONFIG | {"train": {"epochs": "20ep", "global_batch_size": 16}, "new": 1}
    run = RunDir.open(path, longer, FACTS)
    run.start_session(world_size=1, resumed_from=20)
    log = MetricsLog(path)
    log.rewind(20)
    log_steps(log, 21, 40)
    mirror = Mirror(path, sqlite_uri)
    assert mirror.push().run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    assert client.get_run(first.run_id).data.tags["state"] == "running"
    run.close("stopped")
    mirror.push("stopped")

    stored = client.get_run(first.run_id)
    steps = [metric.step for metric in client.get_metric_history(first.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 41))
    assert (stored.info.status, stored.data.tags["state"]) == ("FINISHED", "stopped")
    assert stored.data.params["train.epochs"] == "10ep" and stored.data.params["new"] == "1"
    assert json.loads(stored.data.tags["config_changed"]) == {"train.epochs": "20ep"}
    assert stored.data.tags["starts"] == "2"


def test_of_two_parents_of_a_sweep_the_older_stays(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "r", CONFIG | {"tracking": {"experiment": "sweeps", "sweep": "s"}})
    first = Mirror(run, sqlite_uri).push()
    experiment = client.get_experiment_by_name("sweeps").experiment_id

    def parents() -> list[str]:
        return [found.info.run_id for found in client.search_runs([experiment], f"tags.`{SWEEP_TAG}` = 's'")]

    (made,) = parents()
    assert client.get_run(first.run_id).data.tags["mlflow.parentRunId"] == made
    # Another trial looked at the same time, and its own came to light later.
    tags = {SWEEP_TAG: "s", MAKER_TAG: "another"}
    older = client.create_run(experiment, start_time=1, tags=tags, run_name="s").info.run_id
    Mirror(run, sqlite_uri).end_if_over()
    assert parents() == [older]
    assert client.get_run(first.run_id).data.tags["mlflow.parentRunId"] == older
    assert client.get_run(older).info.status == "FINISHED"


def test_a_copy_of_a_run_is_another_and_one_that_was_moved_is_not(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    """What a copy goes on to measure must not end up in the run of its original."""
    run = make_run(tmp_path / "original", steps=5)
    first = Mirror(run, sqlite_uri).push()
    moved = run.rename(tmp_path / "moved")
    again = Mirror(moved, sqlite_uri).push()
    assert (again.run_id, again.lines, again.notices) == (first.run_id, 0, [])
    shutil.copytree(moved, tmp_path / "copy")
    copied = Mirror(tmp_path / "copy", sqlite_uri).push()
    assert copied.notices == [f"{tmp_path / 'copy'} is a copy of {moved}, and gets an MLflow run of its own"]
    assert copied.run_id != first.run_id and client.get_run(copied.run_id).info.run_name == "copy"
    assert stored_points(client, copied.run_id) == logged_points(moved) == stored_points(client, first.run_id)
    for path, same in ((moved, first), (tmp_path / "copy", copied)):
        assert Mirror(path, sqlite_uri).push().run_id == same.run_id


def test_a_deleted_run_is_made_anew_and_said(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    run = make_run(tmp_path / "r")
    first = Mirror(run, sqlite_uri).push()
    client.delete_run(first.run_id)
    second = Mirror(run, sqlite_uri).push()
    assert second.run_id != first.run_id
    assert second.notices == [f"MLflow at {sqlite_uri} no longer has run {first.run_id}; all goes to a new one"]
    assert stored_points(client, second.run_id) == logged_points(run)


def test_long_and_many_parameters(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    params = {f"section.key{i}": i for i in range(250)} | {"long": "x" * 7000, "odd[0]": "y"}
    report = Mirror(make_run(tmp_path / "r"), sqlite_uri, params=params).push()
    stored = client.get_run(report.run_id).data.params
    assert report.params == len(stored) == 252
    assert all(stored[f"section.key{i}"] == str(i) for i in range(250))
    assert stored["odd_0_"] == "y"
    assert len(stored["long"]) == 6000 and stored["long"].endswith(" ... (cut)")
    assert report.notices == ["MLflow holds 6000 characters of long; config.yaml has all"]


def test_infinities_arrive_as_the_largest_numbers(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    """SQL has no infinity; MLflow stores the largest float64 for it."""
    run = make_run(tmp_path / "r", steps=1)
    MetricsLog(run).log("train", 2, loss=math.inf, grad_norm=-math.inf)
    report = Mirror(run, sqlite_uri).push()
    last = client.get_run(report.run_id).data.metrics
    assert (last["train/loss"], last["train/grad_norm"]) == (1.7976931348623157e308, -1.7976931348623157e308)


def test_a_database_appears_as_a_whole(tmp_path: Path) -> None:
    """MLflow can't go on with one that was half made, so no run could be tracked there any more."""
    database = tmp_path / "mlflow.db"

    def killed(aside: Path) -> None:
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_whole(database, killed)
    assert not database.exists()
    make_whole(database, lambda aside: aside.write_text(f"whole, {aside.exists()}"))
    make_whole(database, killed)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"] and database.read_text() == "whole, False"


def test_two_addresses_have_their_own_state(tmp_path: Path, sqlite_uri: str) -> None:
    run = make_run(tmp_path / "r")
    other = f"sqlite:///{shutil.copy(sqlite_uri.removeprefix('sqlite:///'), tmp_path)}"
    first, second = Mirror(run, sqlite_uri).push(), Mirror(run, other).push()
    assert first.values == second.values and first.run_id != second.run_id
    assert Mirror(run, sqlite_uri).push().values == 0
    assert resolve_uri(run) == sqlite_uri


def test_which_address_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.json").write_text('{"current": "http://used-before:5000", "targets": {}}')
    assert resolve_uri(tmp_path) == "http://used-before:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert resolve_uri(tmp_path) == "http://from-environment:5000"
    assert resolve_uri(tmp_path, "sqlite:///here.db") == f"sqlite:///{tmp_path}/here.db"


@pytest.mark.parametrize(
    "damage", ["[1]", '{"current": 3}', '{"targets": []}', '{"targets": {"TARGET": {"colour": 1}}}']
)
def test_a_damaged_state_is_told(damage: str, tmp_path: Path, sqlite_uri: str) -> None:
    run = make_run(tmp_path / "r", steps=1)
    (run / "mlflow.json").write_text(damage.replace("TARGET", sqlite_uri))
    with pytest.raises(UserError, match=r"mlflow\.json is damaged: restore it, or delete it"):
        resolve_uri(run)
        Mirror(run, sqlite_uri).push()


def test_sync_uploads_a_folder_of_runs_once(tmp_path: Path, sqlite_uri: str, client: Any) -> None:
    runs = [make_run(tmp_path / "runs" / name, steps=3) for name in ("a", "b")]
    first = cli(str(tmp_path / "runs"), "--uri", sqlite_uri)
    assert first.exit_code == 0, first.output
    for run, line in zip(runs, first.stdout.splitlines(), strict=True):
        assert line.startswith(f"{run}: 15 values of 3 lines, 10 parameters, ")
        assert stored_points(client, line.split()[-1].rstrip(")")) == logged_points(run)
    again = cli(str(tmp_path / "runs"), "--uri", sqlite_uri)
    assert [line.split(": ")[1].split(" -> ")[0] for line in again.stdout.splitlines()] == ["nothing new"] * 2


def test_a_faulty_run_does_not_keep_the_others_from_it(tmp_path: Path, sqlite_uri: str) -> None:
    runs = [make_run(tmp_path / "runs" / name, steps=1) for name in ("a", "b", "c")]
    (runs[1] / "sessions.jsonl").write_text('{"time": 1}\n')
    done = cli(str(tmp_path / "runs"), "--uri", sqlite_uri)
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [str(runs[0]), str(runs[2])]
    assert isinstance(done.exception, UserError) and "b/sessions.jsonl holds what no run wrote" in str(done.exception)


def test_an_address_that_nobody_answered_at_is_not_kept(tmp_path: Path, sqlite_uri: str) -> None:
    run, nobody = make_run(tmp_path / "r", steps=1), f"http://127.0.0.1:{free_port()}"
    for reached in (None, sqlite_uri):
        if reached is not None:
            Mirror(run, reached).push()
        with pytest.raises(UserError, match="can't be reached"):
            Mirror(run, nobody).push()
        assert resolve_uri(run) == (reached or nobody)


def test_sync_says_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    nobody = f"http://me:hunter2@127.0.0.1:{free_port()}"
    for args, message in {
        (str(tmp_path / "none"),): "none doesn't exist; name a run directory",
        (str(run / "config.yaml"),): "is no run directory",
        (str(run), "--uri", nobody): r"MLflow at http://127.0.0.1:\d+ can't be reached \(refused\)",
        (str(run), "--uri", f"sqlite:///{tmp_path}/no/folder.db"): "FileNotFoundError",
        (str(run), "--uri", str(tmp_path / "mlruns")): "refused the upload: MlflowException",
    }.items():
        with pytest.raises(UserError, match=message):
            raise cli(*args).exception
    assert "hunter2" not in (run / "mlflow.json").read_text()
