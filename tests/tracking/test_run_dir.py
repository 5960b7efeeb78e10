"""The run directory: one writer, nothing touched by the second; code and place recorded; no secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from secrets import token_hex

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.tracking import environment
from pipeline.tracking.compare import table_columns
from pipeline.tracking.files import file_reference, read_json, read_lines, write_text
from pipeline.tracking.record import summarize
from pipeline.tracking.redact import redact, redact_command, without_password
from pipeline.tracking.run_dir import RunDir, is_locked
from pipeline.tracking.runs import run_state
from tests.tracking.conftest import CONFIG, FACTS

SECRET = token_hex(8)


def files_of(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.iterdir()}


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"] and (tmp_path / "pipe").is_fifo()
    with pytest.raises(UserError, match="No space left on device"):
        write_text(Path("/dev/full"), "much")
    assert Path("/dev/full").is_char_device()
    with pytest.raises(UserError, match="can't be written: Is a directory"):
        write_text(tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_what_a_run_is_stands_in_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first"
    assert RunDir.saved_config(path) is None
    with RunDir.open(path, CONFIG, FACTS) as run:
        run.start_session(world_size=2, engine="ddp")
        assert run_state(path) == "running"
        run.write_result({"top1": 0.5, "loss": float("nan")})
    assert RunDir.saved_config(path) == CONFIG
    facts = read_json(path / "facts.json")
    assert {key: facts[key] for key in FACTS} == FACTS
    assert facts["environment"]["torch"] and facts["environment"]["packages"]["numpy"]
    assert facts["environment"]["memory_bytes"] > 1 << 28
    start, end = read_lines(path / "sessions.jsonl")
    assert (start["event"], start["world_size"], start["resumed_from"], start["engine"]) == ("start", 2, None, "ddp")
    assert start["pid"] == os.getpid() and start["versions"]["torch"] == metadata.version("torch")
    assert (end["event"], end["status"]) == ("end", "finished")
    assert '"loss": "NaN"' in (path / "result.json").read_text()
    assert run_state(path) == "finished"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "failed"), (UserError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_sessions_add_up_and_say_how_they_ended(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), RunDir.open(tmp_path, CONFIG) as run:
        run.start_session(world_size=1)
        raise error
    assert run_state(tmp_path) == status
    with RunDir.open(tmp_path, CONFIG) as run:
        run.start_session(world_size=2, resumed_from=40)
    sessions = read_lines(tmp_path / "sessions.jsonl")
    assert [entry.get("resumed_from", entry.get("status")) for entry in sessions] == [None, status, 40, "finished"]


def test_a_session_ends_once_and_before_what_takes_time(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, CONFIG) as run:
        run.start_session(world_size=1)
        run.end_session("stopped")
        assert [entry.get("status") for entry in read_lines(tmp_path / "sessions.jsonl")] == [None, "stopped"]
        assert is_locked(tmp_path), "until uploads have ended too"
        run.end_session("failed")
    assert [entry.get("status") for entry in read_lines(tmp_path / "sessions.jsonl")] == [None, "stopped"]
    assert not is_locked(tmp_path)


def test_a_run_can_end_as_planned_before_its_schedule(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, CONFIG) as run:
        run.start_session(world_size=1)
        run.close("stopped")
    assert [entry.get("status") for entry in read_lines(tmp_path / "sessions.jsonl")] == [None, "stopped"]
    assert run_state(tmp_path) == "stopped"
    [state] = [column for column in table_columns([summarize(tmp_path)]) if column.title == "state"]
    assert state.cells == ["stopped, no metrics yet"]


_HOLDER = """
import sys, time
from pipeline.tracking.run_dir import RunDir
run = RunDir.open(sys.argv[1], {"name": "holder"}, {})
run.start_session(world_size=1)
if sys.argv[2] == "fork":
    import multiprocessing
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,)).start()
print("open", flush=True)
time.sleep(120)
"""


def holder(path: Path, mode: str = "plain") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path), mode], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def test_a_second_process_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        before = files_of(tmp_path)
        with pytest.raises(UserError, match=rf"another run is writing .*\(pid {process.pid} on host .*name="):
            RunDir.open(tmp_path, CONFIG, FACTS, wait=0.1)
        assert files_of(tmp_path) == before
        assert run_state(tmp_path) == "running"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run_state(tmp_path) == "killed"
    RunDir.open(tmp_path, CONFIG).close()


def test_a_forked_worker_that_outlives_a_kill_keeps_nobody_out(tmp_path: Path) -> None:
    process = holder(tmp_path, "fork")
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        started = time.monotonic()
        RunDir.open(tmp_path, CONFIG).close()
        assert time.monotonic() - started < 25, "the lock was free only when the worker ended"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_start_waits_for_a_lock_that_is_about_to_fall(tmp_path: Path) -> None:
    first = RunDir.open(tmp_path, CONFIG)
    assert is_locked(tmp_path)
    with pytest.raises(UserError):
        RunDir.open(tmp_path, CONFIG, wait=0)
    threading.Timer(0.5, first.close).start()
    started = time.monotonic()
    RunDir.open(tmp_path, CONFIG).close()
    assert time.monotonic() - started > 0.4


def test_a_folder_that_cant_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .*file/run can't be written \(Not a directory\)"):
        RunDir.open(tmp_path / "file" / "run", CONFIG)


@pytest.mark.parametrize("content", ["a: [", "- 1\n", ""])
def test_a_damaged_saved_config_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml .*name="):
        RunDir.saved_config(tmp_path)


def test_git_state_and_diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    assert environment.git_state(repository) == (None, "")
    git(repository, "init", "-q", "-b", "trunk")
    state, diff = environment.git_state(repository)
    assert state == {"commit": None, "branch": "trunk", "dirty": False, "untracked": []}
    (repository / "code.py").write_text("a = 1\n")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "first")
    (repository / "new.py").write_text("b = 1\n")
    state, diff = environment.git_state(repository)
    assert (state, diff) == (
        {"commit": git(repository, "rev-parse", "HEAD"), "branch": "trunk", "dirty": False, "untracked": ["new.py"]},
        "",
    )
    (repository / "code.py").write_text("a = 2\n")
    monkeypatch.setattr(environment, "_code_folder", lambda: repository)
    RunDir.open(tmp_path / "run", CONFIG).close()
    assert read_json(tmp_path / "run" / "facts.json")["git"]["dirty"] is True
    # The saved diff turns the commit into the code that ran.
    git(repository, "checkout", "-q", "code.py")
    git(repository, "apply", str(tmp_path / "run" / "git.diff"))
    assert (repository / "code.py").read_text() == "a = 2\n"
    git(repository, "checkout", "-q", "code.py")
    RunDir.open(tmp_path / "run", CONFIG).close()
    assert not (tmp_path / "run" / "git.diff").exists()


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "SLURM_JWT", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"https://user:{SECRET}@minio:9000/")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(
        sys, "argv", ["rookery", "train", f"tracking.uri=http://me:{SECRET}@host", f"data.token={SECRET}"]
    )
    config = {"tracking": {"uri": f"http://me:{SECRET}@host:5000"}, "data": {"api_key": SECRET, "train": "shards"}}
    facts = {"datasets": {"train": {"path": f"s3://key:{SECRET}@bucket/train"}}}
    with RunDir.open(tmp_path, config, facts) as run:
        run.start_session(world_size=1, endpoint=f"https://me:{SECRET}@host")
    for name, content in files_of(tmp_path).items():
        assert SECRET.encode() not in content, name
    recorded = read_json(tmp_path / "facts.json")
    assert recorded["environment"]["variables"]["SLURM_JOB_ID"] == "4711"
    assert recorded["environment"]["variables"]["MLFLOW_S3_ENDPOINT_URL"] == "https://***@minio:9000/"
    assert recorded["command"] == ["rookery", "train", "tracking.uri=http://***@host", "data.token=***"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"] == {"api_key": "***", "train": "shards"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:p@ss@host/x", "http://***@host/x"),
        ("https://ghp_abc@github.com/a/b", "https://***@github.com/a/b"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("x s3://AKIA:se/cr+et@bucket/a@b", "x s3://***@bucket/a@b"),
        ("s3a://AKIA:9/et@bucket:x", "s3a://***@bucket:x"),
        ("https://h:8080/a@b", "https://h:8080/a@b"),
        ("-dhttps://user:pw@host/x", "-dhttps://***@host/x"),
        ("1https://user:pw@host 2026-11-30-https://u:p@h", "1https://***@host 2026-11-30-https://***@h"),
        ("(...https://u:p@h) \u2014.https://u:p@h", "(...https://***@h) \u2014.https://***@h"),
        (
            "abfs://box@account.dfs.core.windows.net/x az://box@a",
            "abfs://box@account.dfs.core.windows.net/x az://box@a",
        ),
        ("abfs://box:geheim@account/x", "abfs://***@account/x"),
        ("ABFSS://box@key:geheim@account/x", "ABFSS://***@account/x"),
        ("https://h/x?sig=***: no such file", "https://h/x?sig=***: no such file"),
        ("https://h/x.tar?X-Amz-Signature=abc&part=2&token=t", "https://h/x.tar?X-Amz-Signature=***&part=2&token=***"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ({"cls_token": "mean", "num_tokens": 4, "metric_key": "top1"},) * 2,
        (
            {"a": [{"password": "x", "access_key": "y", "token": "z"}]},
            {"a": [dict.fromkeys(("password", "access_key", "token"), "***")]},
        ),
    ],
)
def test_redaction(text: object, shown: object) -> None:
    assert redact(text) == shown


def test_command_lines_hide_option_values() -> None:
    argv = ["x", "--password", "a", "--api-key=b", "train.lr=0.1", "--token", "c", "d"]
    assert redact_command(argv) == ["x", "--password", "***", "--api-key=***", "train.lr=0.1", "--token", "***", "d"]


@pytest.mark.parametrize(
    ("uri", "stored"),
    [
        ("http://me:pw@host:5000/base", "http://host:5000/base"),
        ("postgresql://me:pw@db:5432/mlflow", "postgresql://me@db:5432/mlflow"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_stored_addresses_work_again_with_credentials_from_elsewhere(uri: str, stored: str) -> None:
    assert without_password(uri) == stored


def test_references_name_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert file_reference(tmp_path / "model.safetensors") == {
        "path": str(tmp_path / "model.safetensors"),
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


def test_json_files_are_replaced_whole(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, CONFIG)
    run.write_checkpoints({"final": {"path": "a", "sha256": "b"}})
    assert json.loads((tmp_path / "checkpoints.json").read_text()) == {"final": {"path": "a", "sha256": "b"}}
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    run.close()


def test_the_status_of_a_run_counts_for_more_than_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk, a run that a signal ended must not seem to end for a mistake: nobody would start it again."""

    def full(*arguments: object) -> None:
        raise UserError("sessions.jsonl can't be written: No space left on device")

    with pytest.raises(KeyboardInterrupt), RunDir.open(tmp_path / "run", {}) as run:
        run.start_session(world_size=1)
        monkeypatch.setattr("pipeline.tracking.run_dir.append_line", full)
        raise KeyboardInterrupt
    assert caplog.messages == [
        "the end of this session is not recorded: sessions.jsonl can't be written: No space left on device"
    ]
    assert not is_locked(tmp_path / "run")
