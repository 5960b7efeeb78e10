"""`rookery prep` and `rookery verify`: what they print and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from data_prep.errors import UserError
from launch import prep_cli
from tests.data_prep.helpers import TEXT, digests, make_folder

app = typer.Typer()
app.command()(prep_cli.prep)
app.command()(prep_cli.verify)
runner = CliRunner()


def test_prep_and_verify(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    (source / "ant" / "bad.jpg").write_bytes(TEXT)
    made = runner.invoke(app, ["prep", str(source), str(out), "--workers", "1", "--shard-samples", "5"])
    assert made.exit_code == 0
    assert f"{out / 'train'}: 15 samples, 3 classes, 4 shards" in made.stdout
    assert "ant/bad.jpg: not an image (JPEG, PNG, WEBP, GIF, BMP, TIFF) (dropped)" in made.stdout
    fine = runner.invoke(app, ["verify", str(out)])
    assert (fine.exit_code, fine.stdout) == (0, "train: everything is as it was made\n")
    as_json = runner.invoke(app, ["verify", str(out / "train"), "--json"])
    assert json.loads(as_json.stdout) == {"ok": True, "splits": [str(out / "train")], "problems": []}

    (out / "train" / "train-000002.tar").unlink()
    wrong = runner.invoke(app, ["verify", str(out)])
    assert wrong.exit_code == 1
    assert f"{out / 'train'}/train-000002.tar: missing" in wrong.stdout
    assert "--repair" in wrong.stdout
    as_json = runner.invoke(app, ["verify", str(out), "--json"])
    assert as_json.exit_code == 1
    [problem] = json.loads(as_json.stdout)["problems"]
    assert (problem["file"], problem["what"]) == ("train-000002.tar", "missing")


def test_every_option_reaches_the_manifest(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source", size=60), tmp_path / "out"
    arguments = ["--split", "val", "--shuffle", "--shuffle-seed", "7", "--resize", "24", "--quality", "80"]
    result = runner.invoke(app, ["prep", str(source), str(out), "--workers", "1", "--shard-mb", "9", *arguments])
    assert result.exit_code == 0
    content = json.loads((out / "val" / "manifest.json").read_text())
    assert content["options"] == {
        "shard_samples": None, "shard_mb": 9, "shuffle_seed": 7, "resize": 24, "quality": 80, "restart_markers": True
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["prep", "nowhere", "out"],
        ["verify", "nowhere"],
        ["prep", "digits", "out", "--split", "val"],
        ["prep", "digits", "out", "--coarse-labels"],
    ],
)
def test_user_errors_reach_the_command_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--workers", "--shard-samples", "--resize", "--quality"])
def test_zero_is_a_usage_error(option: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["prep", "digits", str(tmp_path / "out"), option, "0"])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_help_names_every_option() -> None:
    text = runner.invoke(app, ["prep", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).stdout
    for option in ("split", "workers", "shard-samples", "shard-mb", "no-shuffle", "shuffle-seed", "resize", "quality",
                   "max-bad", "kind", "devkit", "coarse-labels", "image-column", "label-column", "format", "overwrite",
                   "repair", "max-resolution", "write-mode", "compress-probability", "smart-threshold"):  # fmt: skip
        assert re.search(rf"--{option}\b", text), option


def everybody_left(group: int, seconds: float = 10) -> bool:
    """Does the process group empty itself in time? The dead that nobody has collected don't count."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_the_workers_and_the_same_command_continues(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source", per_class=120, size=400), tmp_path / "out"
    code = "import typer; from launch.prep_cli import prep; typer.run(prep)"
    arguments = [str(source), str(out), "--workers", "2", "--shard-samples", "3", "--resize", "250"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where these tests run in the background of a script, SIGINT is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not list(out.glob("train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in errors
    assert everybody_left(process.pid)
    assert not (out / "train" / "manifest.json").exists()
    for target in (out, tmp_path / "whole"):
        assert runner.invoke(app, ["prep", arguments[0], str(target), *arguments[2:]]).exit_code == 0
    assert digests(out) == digests(tmp_path / "whole")
