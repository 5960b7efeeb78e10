"""A sweep that goes on after a kill, without a cluster: what of its trials counts, and what is decided already."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.sweep.config import SweepConfig, load_sweep
from launch.sweep.milestones import Calendar, Length, Milestone
from launch.sweep.records import TAKEN_OVER, Records
from launch.sweep.rounds import begun_round, left_to_take, write_round
from launch.sweep.schedulers import make_scheduler
from launch.sweep.search import OptunaSearch
from launch.sweep.space import drawn_trials
from launch.sweep.trial import Job, Trial, held_port
from pipeline.errors import Unreachable
from pipeline.tracking.files import append_line, read_lines, write_json
from pipeline.tracking.metrics import MetricsLog
from tests.launch.test_sweep import FakeController, FakeTrial, population, write

RATES = {"optim.lr": {"uniform": [0.0, 1.0]}}


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit.json").touch()


# --- what a run that was killed has done


class FakeNodes:
    """A run that ends at once, as it should."""

    ids = ("node",)
    asked: list[list[str]]

    def __init__(self, job: Job, run: Path, arguments: list[str]) -> None:
        type(self).asked.append([word for word in arguments if word.startswith("train.stop_after")])
        step = 8 if type(self).asked[-1] else 16
        checkpoint(run, step)
        write_json(run / "result.json", {"step": step})

    def poll(self) -> int:
        return 0


PBT = {"kind": "pbt", "every": "8ep"}


@pytest.mark.parametrize(
    ("scheduler", "evaluated", "written", "saved", "over", "starts"),
    [
        ("fifo", 16, 16, 16, False, []),
        ("fifo", 16, 8, 12, False, [[]]),
        ("fifo", 16, None, 16, False, [[]]),
        ("fifo", 12, None, 12, True, []),
        (PBT, 8, 8, 8, False, []),
        (PBT, 8, None, 6, False, [["train.stop_after=8steps"]]),
        (PBT, 8, 8, 6, False, [["train.stop_after=8steps"]]),
    ],
)
def test_the_end_of_a_part_counts_once_all_of_it_is_written(
    scheduler: Any,
    evaluated: int,
    written: int | None,
    saved: int,
    over: bool,
    starts: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newest evaluation is in the metrics; the result of the part, or its checkpoint, may not be."""
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr("launch.sweep.trial.Nodes", FakeNodes)
    monkeypatch.chdir(tmp_path)  # a trial goes to its sweep's folder: so that this process comes back
    FakeNodes.asked = []
    config = load_sweep(write(tmp_path, scheduler=scheduler, space=RATES, trials=2))
    run = config.folder / "trials" / "x"
    checkpoint(run, saved)
    MetricsLog(run).log("eval", evaluated, top1=0.5)
    if written is not None:
        write_json(run / "result.json", {"step": written})
    trial = object.__new__(Trial)  # Ray makes the others, in actors
    trial._trial_info = SimpleNamespace(trial_name="x")
    told = {"name": "x", "values": {"optim.lr": 0.5}, "length": [16, 1], "over": over, "told": evaluated}
    parts = (Milestone(8.0, 1),) if scheduler == PBT else ()
    trial.setup({"trial": told}, Job(config, 0, parts, 1, str(tmp_path), {}))
    result = trial.step()
    assert (result["step"], result["top1"], FakeNodes.asked) == (evaluated, 0.5, starts)
    assert result["ended"] == ("finished" if evaluated == 16 else "")
    assert (config.folder / "given" / "x" / "step-00000008").exists() == (scheduler == PBT)
    if over:
        assert (trial.step()["ended"], FakeNodes.asked) == ("stopped", [])


# --- what was told to the scheduler


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_trial_is_not_stopped_where_it_went_on(kind: str, tmp_path: Path) -> None:
    """It came there first, and is told last."""
    wanted = {"kind": kind, "grace": "2ep"} | ({"factor": 2} if kind == "asha" else {"least": 3})
    controller = FakeController(5, [0.0] * 5)
    scheduler: Any = make_scheduler(load_sweep(write(tmp_path, scheduler=wanted, metric="loss")), 8.0, 1)
    for trial in controller.trials:
        scheduler.on_trial_add(controller, trial)
        for time in (2.0, 4.0):
            last = trial is controller.trials[-1]
            result = {"time": time, "loss": 9.0 if last else 1.0, "is_passed": last and time < 4.0}
            answer = scheduler.on_trial_result(controller, trial, result)
            assert answer == ("STOP" if last and time == 4.0 else "CONTINUE")


# --- what Optuna proposes


@pytest.mark.parametrize("kills", [[1], [2, 3], [4], [6, 9]], ids=str)
def test_optuna_proposes_the_same_after_a_restart(kills: list[int], tmp_path: Path) -> None:
    """Three trials are drawn, the others follow from their results."""
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e-1]},
        "seed": {"randint": [0, 9]},
        "model.name": {"choice": ["a", "b"]},
    }
    searcher = {"kind": "optuna", "startup": 3, "seed": 5}

    def propose(folder: Path, *counts: int) -> list[dict[str, Any]]:
        folder.mkdir()
        config = load_sweep(write(folder, space=space, trials=11, metric="loss", searcher=searcher))
        records = Records(config)
        for count in counts:
            records = Records(config)
            search = OptunaSearch(config, records, lambda record: {}, lambda error: True)
            for i in range(count):
                search.suggest(str(i))
                values = records.all()[i].values
                search.on_trial_complete(str(i), {"loss": abs(values["optim.lr"] - 1e-3) + 0.1 * values["seed"]})
            records.save()
        return [record.values for record in records.all()]

    expected = propose(tmp_path / "whole", 11)
    assert len({json.dumps(values) for values in expected}) == 11
    assert propose(tmp_path / "killed", *kills, 11) == expected


@pytest.mark.parametrize(
    ("failures", "running", "outages", "answers"),
    [
        (0, [False], 1, [True]),
        (2, [False] * 3, 3, [False, False, True]),
        (1, [True, True, True, False, False], 5, [False, False, False, False, True]),
    ],
)
def test_an_outage_ends_a_sweep_once_nothing_runs(
    failures: int, running: list[bool], outages: int, answers: list[bool], tmp_path: Path, capsys: Any
) -> None:
    from launch.sweep.driver import Watch
    from launch.sweep.table import Progress

    config = load_sweep(write(tmp_path, failures=failures))
    records = Records(config)
    trial = FakeTrial(records.add({"optim.lr": 1e-3}).name, {})
    records.save()
    watch = Watch(config, records, Progress(records, {}), nodes=None)  # type: ignore[arg-type]
    found = []
    for runs in running:
        trial.status = "RUNNING" if runs else "TERMINATED"
        watch.on_step_begin(0, [trial])
        found.append(watch.gives_up(Unreachable("the store is gone")))
    assert found == answers and watch.status() == 1
    said = capsys.readouterr().out
    assert said.count("the store is gone; it is tried again") == (1 if outages > 1 else 0)
    assert said.count("no trial runs: the same command goes on") == 1


# --- rounds of population based training


def swept(folder: Path) -> tuple[SweepConfig, Records, Calendar]:
    config = load_sweep(write(folder, scheduler=PBT, space=RATES, trials=4))
    records = Records(config)
    for values in drawn_trials(config):
        records.add(values)
    names = [record.name for record in records.all()]
    return config, records, Calendar(dict.fromkeys(names, Length(30, 1)), [Milestone(8, 1), Milestone(16, 2)], 30.0)


TAKE = {"values": {"optim.lr": 0.25}, "take_over": {"donor": "sweep-001", "step": 8, "ticket": "round 1"}}


@pytest.mark.parametrize(
    ("decided", "saved", "taken", "begun", "left"),
    [
        (None, [0, 0, 0, 0], None, 1, False),
        (None, [8, 8, 6, 0], None, 1, False),
        (8, [8, 8, 8, 8], None, 2, True),
        (8, [8, 16, 8, 8], None, 2, True),
        (8, [8, 16, 8, 8], "round 1", 2, False),
        (8, [8, 16, 8, 8], "round 0", 2, True),
        (8, [12, 8, 8, 8], None, 2, False),
        (8, [8, 20, 8, 8], "round 1", 3, False),
    ],
)
def test_a_round_goes_on_where_it_was(
    decided: int | None, saved: list[int], taken: str | None, begun: int, left: bool, tmp_path: Path
) -> None:
    """The first of four trials is to take over after the first of two rounds."""
    config, records, calendar = swept(tmp_path)
    for record, step in zip(records.all(), saved, strict=True):
        if step:
            checkpoint(records.path(record), step)
    first = records.all()[0]
    if decided is not None:
        write_round(config.folder, 1, decided, {first.name: TAKE})
    if taken is not None:
        append_line(records.path(first) / TAKEN_OVER, {"donor": "sweep-001", "step": 8, "ticket": taken, "values": {}})
    assert begun_round(records, calendar) == begun
    assert left_to_take(records) == ({first.name: TAKE} if left else {})
    first.state = "finished"
    assert left_to_take(records) == {}


def test_a_round_is_written_down_before_trials_hear_of_it(tmp_path: Path) -> None:
    rounds, controller = population(tmp_path)
    for place, trial in enumerate(controller.trials):
        rounds.on_trial_result(controller, trial, {"time": 1, "step": 10, "top1": place / 10})
    (line,) = read_lines(tmp_path / "runs" / "sweep" / "rounds.jsonl")
    told = {trial.name: {key: trial.config["trial"][key] for key in TAKE} for trial in controller.trials if trial.taken}
    assert line == {"round": 1, "step": 10, "takes": told} and set(told) == {"t0", "t1"}


# --- where the nodes of a trial meet


def test_a_held_port_is_taken_for_all_but_the_store() -> None:
    from torch.distributed import TCPStore

    holders = [held_port() for _ in range(3)]
    ports = {holder.getsockname()[1] for holder in holders}
    assert len(ports) == 3
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError) as error:
            other.bind(("", port))
        assert error.value.errno == errno.EADDRINUSE
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        TCPStore("localhost", port, is_master=False).set("key", "value")
        assert store.get("key") == b"value"
        with socket.socket() as other, pytest.raises(OSError):  # even of those who would share it
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("", port))
            other.listen()
    for holder in holders:
        holder.close()
