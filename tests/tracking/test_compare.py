"""The comparison: known runs give known figures, in every form of output."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from launch.compare_cli import CompareCommand, compare, fit, not_judged, plain_table, show
from pipeline.errors import UserError
from pipeline.tracking.compare import Column, short_titles, sparkline, table_columns
from pipeline.tracking.files import append_line, write_json, write_text
from pipeline.tracking.groups import differing_keys
from pipeline.tracking.record import summarize, summarize_all
from pipeline.tracking.runs import find_runs
from tests.tracking.conftest import CONFIG, make_run


def write_run(path: Path, top1: list[float], sessions: list[dict[str, Any]], **changes: Any) -> Path:
    """A run directory with known numbers: evaluations `top1` every 100 steps of 50 per epoch, times from 1000 s on."""
    path.mkdir(parents=True)
    config = CONFIG | {"name": path.name} | changes
    write_text(path / "config.yaml", json.dumps(config))
    write_json(path / "facts.json", {"model_params": 17_074_890, "total_steps": 1000, "total_epochs": 20.0})
    for entry in sessions:
        append_line(path / "sessions.jsonl", entry)
    for i, value in enumerate(top1, start=1):
        position = {"step": 100 * i, "samples": 1600 * i, "epoch": 2.0 * i, "time": 1000.0 + 60 * i}
        for speed in (90.0, 100.0, 120.0):
            append_line(
                path / "metrics.jsonl", {"kind": "train", **position, "loss": 2.0 / i, "images_per_second": speed}
            )
        append_line(path / "metrics.jsonl", {"kind": "eval", **position, "top1": value})
    return path


def start(at: float) -> dict[str, Any]:
    return {"event": "start", "time": at}


def end(at: float, status: str) -> dict[str, Any]:
    return {"event": "end", "time": at, "status": status}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs: finished, killed after 200 steps and an earlier session, and not yet at its first log line."""
    folder = tmp_path / "runs"
    done = write_run(folder / "a", [0.5, 0.75, 0.7], [start(1000.0), end(2800.0, "finished")])
    write_json(done / "result.json", {"top1": 0.71, "best": {"top1": 0.76, "step": 250}, "wall_seconds": 1.0})
    sessions = [start(1000.0), end(1090.0, "interrupted"), start(1100.0)]
    write_run(folder / "b", [0.25, 0.625], sessions, optim={"lr": 0.2, "betas": [0.9, 0.999]}, extra=True)
    write_run(folder / "c", [], [start(1000.0)], model={"name": "nest_small", "num_classes": 10})
    return folder


def invoke(*args: str) -> str:
    app = typer.Typer()
    app.command(cls=CompareCommand)(compare)
    result = CliRunner().invoke(app, list(args))
    if result.exception:
        raise result.exception
    return result.stdout


def test_figures_of_a_finished_a_killed_and_a_starting_run(runs: Path) -> None:
    a, b, c = (summarize(path) for path in find_runs([runs]))
    assert (a.state, b.state, c.state) == ("finished", "killed", "killed")
    assert (a.final_top1, a.best_top1, a.best_step) == (0.71, 0.76, 250)
    assert (b.final_top1, b.best_top1, b.best_step) == (0.625, 0.625, 200)
    assert (c.final_top1, c.best_top1, c.step, c.epoch, c.curve) == (None, None, None, None, [])
    assert (a.step, a.total_steps, a.epoch, a.total_epochs, a.params) == (300, 1000, 6.0, 20.0, 17_074_890)
    assert a.train_loss == pytest.approx(2 / 3)
    assert (a.images_per_second, c.images_per_second) == (100.0, None)
    # Half an hour; 90 s and, until the last sign of life at 1120 s, 20 s more.
    assert (a.wall_hours, b.wall_hours, c.wall_hours) == (0.5, pytest.approx(110 / 3600), 0.0)
    assert a.curve == [(100, 0.5), (200, 0.75), (300, 0.7)]


def test_only_keys_that_differ_are_shown(runs: Path) -> None:
    summaries = [summarize(path) for path in find_runs([runs])]
    assert differing_keys(summaries) == ["model.name", "optim.lr", "extra"]
    assert differing_keys(summaries[:1]) == []


@pytest.mark.parametrize(
    ("keys", "titles"),
    [
        (["optim.lr", "train.epochs"], ["lr", "epochs"]),
        (["model.name", "optim.name", "name"], ["model.name", "optim.name", "name"]),
        (["a.b.c", "x.b.c", "c.b"], ["a.b.c", "x.b.c", "b"]),
    ],
)
def test_titles_are_as_short_as_they_stay_clear(keys: list[str], titles: list[str]) -> None:
    assert short_titles(keys) == titles


EXPECTED_TABLE = """
run name       lr  extra params epochs steps    top-1 % best % at step eval curve train loss img/s hours state
a   nest_tiny  0.1 -      17.1M   6/20 300/1000   71.00  76.00     250 ▅█▇            0.6667 100.0  0.50 finished
b   nest_tiny  0.2 true   17.1M   4/20 200/1000   62.50  62.50     200 ▁▆             1.0000 100.0  0.03 killed
c   nest_small 0.1 -      17.1M      -        -       -      -       - -                   -     -  0.00 killed, no metrics yet
"""  # noqa: E501


def test_plain_table(runs: Path) -> None:
    """Output that is no terminal: one aligned line per run."""
    lines = invoke(str(runs)).splitlines()
    assert [line.split() for line in lines] == [line.split() for line in EXPECTED_TABLE.strip().splitlines()]
    assert (
        len({line.index(word) for line, word in zip(lines, ("state", "finished", "killed", "killed"), strict=True)})
        == 1
    )


def test_json_holds_everything(runs: Path) -> None:
    whole = json.loads(invoke(str(runs / "b"), str(runs / "a"), "--json"))
    assert whole["differing"] == ["optim.lr", "extra"]
    b, a = whole["runs"]
    assert (b["name"], b["path"], b["config"]) == ("b", str(runs / "b"), {"optim.lr": 0.2, "extra": True})
    assert (a["best_top1"], a["best_step"], a["curve"][1]) == (0.76, 250, [200, 0.75])


def test_a_page_is_not_printed_to_a_terminal(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(str(runs), "--html").startswith("<!doctype html>")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(UserError, match=r"not for a terminal; name its file: --html report\.html"):
        compare([runs], html="-")
    assert capsys.readouterr().out == ""


def test_csv_has_full_names(runs: Path) -> None:
    a, b, c = csv.DictReader(io.StringIO(invoke(str(runs), "--csv")))
    assert (a["name"], a["state"], a["final_top1"], a["optim.lr"]) == ("a", "finished", "0.71", "0.1")
    assert (b["optim.lr"], b["extra"], b["best_top1"]) == ("0.2", "True", "0.625")
    assert (c["model.name"], c["final_top1"]) == ("nest_small", "")


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_the_terminal_table_fits_and_leaves_nothing_out(runs: Path, width: int) -> None:
    columns = table_columns([summarize(path) for path in find_runs([runs])])
    output = io.StringIO()
    show(columns, Console(file=output, width=width, force_terminal=True, no_color=True), best=0)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    for column in columns:
        for cell in column.cells:
            assert any(cell in line for line in lines), (column.title, cell)
    pieces = fit(columns, width)
    assert [column.title for piece in pieces for column in piece if column.title != "run"] == [
        column.title for column in columns[1:]
    ]
    assert len(pieces) == 1 or width < 300


def test_without_unicode_the_curve_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [Column("run", ["a"], numeric=False), Column("eval curve", ["▁█"], numeric=False), Column("img/s", ["1"])]
    assert plain_table(columns) == "run  eval curve  img/s\na    ▁█              1\n"
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert plain_table(columns) == "run  img/s\na        1\n"


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([0.7], "▆"),
        ([math.nan, 0.0, math.inf, 1.0], "x▁x█"),
        ([i / 99 for i in range(100)], "▁▂▂▃▄▄▅▅▆▇▇█"),
    ],
)
def test_sparkline(values: list[float], drawn: str) -> None:
    assert sparkline(values, 0.0, 1.0) == drawn


def test_runs_of_the_same_name_show_their_paths(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_run(tmp_path / folder / "same", [0.5], [])
    cells = table_columns([summarize(path) for path in find_runs([tmp_path])])[0].cells
    assert cells == [str(tmp_path / "x" / "same"), str(tmp_path / "y" / "same")]


def test_a_run_is_one_however_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "a", [0.5], [])
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    ways = [Path("runs/a"), tmp_path / "runs", Path("link"), Path("runs/../runs/a")]
    assert find_runs(ways) == [Path("runs/a")]
    runs, left_out = summarize_all(ways)
    assert ([run.path for run in runs], left_out) == ([Path("runs/a")], [])


def test_a_diverged_run_is_compared(tmp_path: Path) -> None:
    for name, losses in (("good", [2.0, 1.0]), ("diverged", ["NaN", "Infinity"])):
        run = write_run(tmp_path / name, [0.5, 0.6], [])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line, loss in zip([line for line in lines if line["kind"] == "eval"], losses, strict=True):
            line["loss"] = loss
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = {column.title: column.cells for column in table_columns(summarize_all([tmp_path])[0], "loss")}
    assert cells["eval curve"] == ["xx", "█▁"]
    assert [cell.strip() for cell in cells["best"]] == ["inf", "1.0000"]


def test_a_run_that_training_wrote_is_read(tmp_path: Path) -> None:
    summary = summarize(make_run(tmp_path / "first", steps=20))
    assert (summary.state, summary.step, summary.epoch, summary.best_top1) == ("finished", 20, 0.5, 0.95)
    assert summary.images_per_second == 110.5
    assert summary.wall_hours is not None and 0 < summary.wall_hours < 0.01


def test_errors_name_the_path_and_the_mend(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere doesn't exist; name a run directory"):
        invoke(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="xxx doesn't exist; name a run directory"):
        invoke("x" * 300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is no run directory"):
        invoke(str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match="2"):
        invoke()
    with pytest.raises(UserError, match="--json and --csv exclude each other"):
        invoke(str(runs), "--json", "--csv")
    shutil.copy(runs / "a" / "config.yaml", runs / "a" / "facts.json")
    (runs / "a" / "facts.json").write_text("{")
    with pytest.raises(UserError, match=r"facts\.json can't be read as JSON"):
        invoke(str(runs / "a"))


def test_runs_that_measured_something_else_are_told(runs: Path) -> None:
    """And by what they can be compared: beside images they would be rows of dashes."""
    write_run(runs / "sentences", [], [start(1000.0)])
    line = {"kind": "eval", "step": 9, "samples": 9, "epoch": 1.0, "time": 1001.0, "loss": 0.5, "mcc": 0.25}
    append_line(runs / "sentences" / "metrics.jsonl", line)
    summaries, _ = summarize_all([runs])
    wanted = "1 run of 4 didn't measure top1 (sentences); --metric mcc compares those"
    assert not_judged(summaries, "top1") == [wanted]
    # Of three runs the third has no evaluation yet.
    wanted = "2 runs of 4 didn't measure mcc (a, b); --metric top1 compares those"
    assert not_judged(summaries, "mcc") == [wanted]
    app = typer.Typer()
    app.command(cls=CompareCommand)(compare)
    assert (
        CliRunner().invoke(app, [str(runs)]).stderr
        == "1 run of 4 didn't measure top1 (sentences); --metric mcc compares those\n"
    )
