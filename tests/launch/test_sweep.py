"""What a sweep is made of, without a cluster: its file, its trials, its schedulers, and what it reads of runs."""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch import cli
from launch.sweep import cluster
from launch.sweep.cluster import probe
from launch.sweep.config import load_sweep
from launch.sweep.milestones import Length, milestones
from launch.sweep.plan import plan_trial, run_config
from launch.sweep.processes import Evaluations
from launch.sweep.records import FILE, Records
from launch.sweep.space import arguments_of, drawn_trials, shown
from launch.sweep.take_over import give, take_over
from pipeline.config_load import load_config
from pipeline.data.order import default_lanes
from pipeline.errors import UserError
from pipeline.tracking.files import read_lines, write_json
from pipeline.tracking.metrics import MetricsLog, read_metrics
from pipeline.tracking.run_dir import RunDir
from pipeline.train.checkpoint import CheckpointStore
from tests.test_recipes import ALONE, SMALL, shards

__all__ = ["shards"]

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
TREE: dict[str, Any] = {"recipe": "recipe.yaml", "space": {"optim.lr": {"grid": [1e-3, 1e-4]}}}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(TREE | {"out": str(folder / "runs")} | changes, sort_keys=False))
    return path


# --- the file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"spaces": {}}, "unknown key spaces; did you mean space?"),
        ({"scheduler": {"kind": "asha", "graze": 3}}, "did you mean scheduler.grace?"),
        ({"scheduler": "bohb"}, "should be one of 'fifo', 'asha', 'hyperband', 'median', 'pbt'"),
        ({"space": {"optim.lr": {"uniform": [1, 0]}}}, "low below high"),
        ({"space": {"optim.lr": {"loguniform": [0, 1]}}}, "above 0"),
        ({"space": {"optim.lr": {"grid": [1], "choice": [1]}}}, "exactly one of grid, choice"),
        ({"space": {"optim.lr": {"uniform": [0, 1]}}}, "trials is missing"),
        ({"space": {}}, "space is empty"),
        ({"searcher": "grid", "trials": 3}, "trials follows from the grids"),
        ({"space": {"seed": {"grid": [1], "when": {"optim.lr": 1}}}}, "optim.lr is no key of the space above it"),
        (
            {"trials": 1, "space": {"seed": {"choice": [1]}, "optim.lr": {"grid": [1], "when": {"seed": 1}}}},
            "a grid can depend on grids only",
        ),
        ({"scheduler": {"kind": "pbt", "every": "1ep"}}, "space.optim.lr can't be a grid"),
        (
            {"scheduler": {"kind": "hyperband"}, "concurrent": 1},
            "scheduler=hyperband lets trials wait for each other, and with concurrent=1 most would never meet",
        ),
        (
            {
                "scheduler": {"kind": "pbt", "every": "1ep"},
                "space": {"optim.lr": {"uniform": [0, 1]}},
                "trials": 4,
                "concurrent": 3,
            },
            "scheduler=pbt lets trials wait for each other, and with concurrent=3 most would never meet",
        ),
        ({"metric": "top2"}, "metric=top2"),
        ({"overrides": ["optim.lr=3"]}, "space.optim.lr varies this key"),
        ({"overrides": ["name=x"]}, "the runs are named by the sweep"),
        ({"name": "a/b"}, "a name has letters"),
        ({"space": {"optim.lr": [1, 2]}}, "space.optim.lr=[1, 2]: should have keys of its own"),
        ({"overrides": "train.epochs=3"}, "overrides=train.epochs=3: should be a valid list"),
        ({"overrides": {"train.epochs": 3}}, "overrides: should be a valid list"),
        ({"recipe": 3}, "recipe=3: should be a valid string or list"),
        ({"scheduler": "pbt"}, "scheduler.every is missing"),
        ({"scheduler": {"grace": "3ep"}}, "scheduler.kind is missing"),
        ({"space": {"name": {"grid": ["a", "b"]}}}, "space.name: the runs are named by the sweep"),
        (
            {"space": {"data.train": {"grid": ["s3://K:S@b/train", "s3://K:T@b/train"]}}},
            "space.data.train: two values differ in credentials alone",
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_mistake_is_explained(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_sweep(write(tmp_path, **changes))
    assert expected in str(error.value)


def test_all_trials_of_a_grid_may_run_at_a_time(tmp_path: Path) -> None:
    """Two here, which hyperband can have meet."""
    assert load_sweep(write(tmp_path, scheduler={"kind": "hyperband"}, concurrent=2)).concurrent == 2


@pytest.mark.parametrize("overrides", [[], ["train.epochs=2"], ["model.name=x", "space.seed.grid=[1]"]])
def test_recipes_and_sweeps_are_told_apart(overrides: list[str]) -> None:
    recipe, sweep = str(ROOT / "configs" / "demo.yaml"), str(ROOT / "configs" / "sweep" / "digits.yaml")
    with pytest.raises(UserError) as error:
        load_sweep(recipe, overrides)
    assert str(error.value) == f"{recipe}: this is a recipe: rookery train {recipe}; a sweep names one as its recipe"
    with pytest.raises(UserError) as error:
        load_config(sweep, overrides)
    assert str(error.value).startswith(f"{sweep}: this is a sweep: rookery sweep {sweep}; the recipe")


def test_overrides_go_to_the_sweep_or_to_its_recipe(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path), ["resources.nproc=3", "name=other", "train.epochs=2", "concurrent=1"])
    assert (sweep.resources.nproc, sweep.name, sweep.concurrent) == (3, "other", 1)
    assert sweep.overrides == ["train.epochs=2"]
    assert load_sweep(write(tmp_path)).name == "sweep"


# --- what Tune is told


@pytest.mark.parametrize(
    ("metric", "measured", "expected"),
    [
        ("loss", {"loss": 0.5, "top1": 0.1}, {"loss": 0.5, "ended": ""}),
        ("loss", {"loss": math.nan, "top1": 0.1}, {"loss": math.inf, "ended": ""}),
        ("top1", {"loss": 0.5, "top1": math.nan}, {"top1": -math.inf, "ended": ""}),
        (
            "f1",
            {"loss": 0.5, "top1": 0.1},
            {"f1": -math.inf, "ended": "failed", "fault": "metric=f1: the evaluations of this run measure top1, loss"},
        ),
    ],
)
def test_an_evaluation_is_a_result(
    metric: str, measured: dict[str, float], expected: dict[str, Any], tmp_path: Path
) -> None:
    from launch.sweep.trial import Job, Trial

    MetricsLog(tmp_path).log("eval", 5, **measured)
    trial = object.__new__(Trial)  # Ray makes the others, in actors
    trial.job = Job(load_sweep(write(tmp_path, metric=metric)), 0, (), 0, str(tmp_path), {})
    trial.evaluations, trial.length = Evaluations(tmp_path, seen=0), Length(10, 5.0)
    trial.nodes, trial.milestones, trial.ids, trial.last = None, [], ["node"], {}
    result = trial.step()
    assert {key: result[key] for key in expected} == expected
    assert result["done"] == (expected["ended"] == "failed")


# --- the space


def trials(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    return drawn_trials(load_sweep(write(folder, **changes)))


def test_grids_are_crossed_where_they_are_active(tmp_path: Path) -> None:
    space = {
        "model.name": {"grid": ["a", "b"]},
        "train.epochs": {"grid": [1, 2]},
        "optim.eps": {"grid": [3, 4], "when": {"model.name": "b", "train.epochs": [2, 5]}},
    }
    found = [tuple(values.values()) for values in trials(tmp_path, space=space)]
    assert found == [("a", 1), ("a", 2), ("b", 1), ("b", 2, 3), ("b", 2, 4)]


def test_draws_are_in_range_and_a_function_of_seed_and_trial(tmp_path: Path) -> None:
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e-1]},
        "mix.prob": {"uniform": [0.25, 0.75]},
        "seed": {"randint": [3, 5]},
        "model.name": {"choice": ["a", "b"]},
        "optim.eps": {"uniform": [0, 1], "when": {"model.name": "b"}},
    }
    drawn = trials(tmp_path, space=space, trials=400)
    assert drawn == trials(tmp_path, space=space, trials=400)
    assert drawn[:10] == trials(tmp_path, space=space, trials=10)
    assert drawn != trials(tmp_path, space=space, trials=400, searcher={"kind": "random", "seed": 1})
    assert all(1e-5 <= values["optim.lr"] <= 1e-1 and 0.25 <= values["mix.prob"] <= 0.75 for values in drawn)
    decades = Counter(int(f"{values['optim.lr']:e}".split("e")[1]) for values in drawn)
    assert all(70 <= decades[decade] <= 130 for decade in (-5, -4, -3, -2))
    assert 0.48 <= sum(values["mix.prob"] for values in drawn) / 400 <= 0.52
    assert {values["seed"] for values in drawn} == {3, 4, 5}
    assert all(("optim.eps" in values) == (values["model.name"] == "b") for values in drawn)
    assert len({values["optim.lr"] for values in drawn}) > 390


def test_drawn_keys_vary_within_the_grids(tmp_path: Path) -> None:
    space = {"model.name": {"grid": ["a", "b"]}, "optim.lr": {"uniform": [0, 1]}}
    drawn = trials(tmp_path, space=space, trials=5)
    assert [values["model.name"] for values in drawn] == ["a", "b", "a", "b", "a"]
    assert len({values["optim.lr"] for values in drawn}) == 5


def test_values_become_overrides(tmp_path: Path) -> None:
    space = {
        "model.options.depths": {"grid": [[1, 2]]},
        "train.epochs": {"grid": ["3ep"]},
        "model.name": {"grid": ["null", "nest"]},
        "optim.lr": {"grid": [1e-05]},
        "data.val": {"grid": [None]},
    }
    sweep = load_sweep(write(tmp_path, space=space, recipe=["a.yaml", "b/c.yaml"]))
    values = drawn_trials(sweep)[2]
    recipe, *overrides = arguments_of(sweep, "x", values)
    assert Path(recipe).resolve() == tmp_path / "b" / "c.yaml"
    assert overrides[:5] == [
        "model.options.depths=[1, 2]",
        "train.epochs=3ep",
        'model.name="null"',
        "optim.lr=1e-05",
        "data.val=null",
    ]
    assert overrides[5:7] == [f"out={tmp_path}/runs/sweep/trials", "name=x"]
    assert shown(values).startswith("recipe=c depths=[1, 2] epochs=3ep")


# --- milestones


@pytest.mark.parametrize(
    ("scheduler", "epochs", "expected"),
    [
        ("fifo", 10, []),
        ({"kind": "asha", "grace": 3}, 10, []),
        ({"kind": "pbt", "every": "3ep"}, 10, [(3, 1), (6, 2), (9, 3)]),
        ({"kind": "pbt", "every": "0.1ep"}, 0.3, [(0.1, 1), (0.2, 2)]),
        ({"kind": "hyperband", "grace": 1, "factor": 3}, 27, [(1, 1), (3, 3), (9, 9)]),
        ({"kind": "hyperband", "grace": 2, "factor": 2}, 10, [(2.5, 1), (5, 2)]),
    ],
    ids=str,
)
def test_milestones(scheduler: Any, epochs: float, expected: list[tuple[float, int]], tmp_path: Path) -> None:
    space = {"optim.lr": {"uniform": [0, 1]}}
    wanted = load_sweep(write(tmp_path, scheduler=scheduler, space=space, trials=4)).scheduler
    found = milestones(wanted, epochs)
    assert [(round(m.epochs, 9), m.time) for m in found] == expected


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"kind": "asha", "grace": "30ep"}, "scheduler.grace=30ep is longer than the trials, which have 10 epochs"),
        ({"kind": "median", "grace": "30steps"}, "write it in epochs"),
    ],
)
def test_lengths_that_do_not_fit(scheduler: Any, expected: str, tmp_path: Path) -> None:
    wanted = load_sweep(write(tmp_path, scheduler=scheduler)).scheduler
    with pytest.raises(UserError, match=expected):
        milestones(wanted, 10)


# --- population based training in rounds


@dataclass(eq=False)
class FakeTrial:
    """As much of Tune's trial as schedulers look at."""

    name: str
    config: dict[str, Any]
    status: str = "RUNNING"
    recovers: bool = False
    taken: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    @property
    def trial_id(self) -> str:
        return self.name

    def should_recover(self) -> bool:
        return self.recovers

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config
        self.taken.append(config["trial"])


class FakeController:
    def __init__(self, count: int, lr: list[float]) -> None:
        self.trials = [
            FakeTrial(f"t{i}", {"trial": {"values": {"optim.lr": lr[i], "seed": i % 3}}}) for i in range(count)
        ]

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    get_live_trials = get_trials


def population(folder: Path, first_round: int = 1) -> tuple[Any, FakeController]:
    from launch.sweep.schedulers import make_scheduler

    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "seed": {"choice": [0, 1, 2]}}
    scheduler = {"kind": "pbt", "every": "1ep", "resample": 0.0}
    config = load_sweep(write(folder, scheduler=scheduler, space=space, trials=8))
    controller = FakeController(8, [1e-3] * 7 + [9.5e-3])
    rounds = make_scheduler(config, 5.0, first_round)
    for trial in controller.trials:
        rounds.on_trial_add(controller, trial)
    return rounds, controller


def test_rounds_end_when_all_have_come_and_the_worst_take_over(tmp_path: Path) -> None:
    rounds, controller = population(tmp_path)
    first, *others = controller.trials
    assert rounds.on_trial_result(controller, first, {"time": 0, "step": 5, "top1": 0.0}) == "CONTINUE"
    for place, trial in enumerate(controller.trials):
        assert rounds.on_trial_result(controller, trial, {"time": 1, "step": 10, "top1": place / 10}) == "PAUSE"
        trial.status = "PAUSED"
        assert (rounds.choose_trial_to_run(controller) is None) == (place < 7)
    taken = [trial for trial in controller.trials if trial.taken]
    assert [trial.name for trial in taken] == ["t0", "t1"]
    for trial in taken:
        source, values = trial.taken[0]["take_over"], trial.taken[0]["values"]
        assert source["donor"] in ("t6", "t7") and source["step"] == 10 and source["ticket"] == "round 1"
        donor = {"t6": 1e-3, "t7": 9.5e-3}[source["donor"]]
        assert values["optim.lr"] in (round(donor * 0.8, 9), min(round(donor * 1.25, 9), 1e-2))
        assert values["seed"] in (0, 1, 2)
    again, same = population(tmp_path)
    for place, trial in enumerate(same.trials):
        again.on_trial_result(same, trial, {"time": 1, "step": 10, "top1": place / 10})
    assert [trial.taken for trial in same.trials] == [trial.taken for trial in controller.trials]
    assert all(rounds.choose_trial_to_run(controller) is not None for _ in others)


def test_a_round_does_not_wait_for_a_trial_that_failed(tmp_path: Path) -> None:
    rounds, controller = population(tmp_path, first_round=3)
    *most, last = controller.trials
    for place, trial in enumerate(most):
        rounds.on_trial_result(controller, trial, {"time": 3, "step": 30, "top1": place / 10})
    last.recovers = True
    rounds.on_trial_error(controller, last)
    assert not any(trial.taken for trial in most)
    last.recovers = False
    rounds.on_trial_error(controller, last)
    assert [trial.name for trial in most if trial.taken] == ["t0", "t1"]
    assert most[0].taken[0]["take_over"]["ticket"] == "round 3"


# --- Tune's own schedulers, as they are set up here


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_the_worst_are_stopped(kind: str, tmp_path: Path) -> None:
    from launch.sweep.schedulers import make_scheduler

    wanted = {"kind": kind, "grace": "2ep"} | ({"factor": 2} if kind == "asha" else {"least": 3})
    config = load_sweep(write(tmp_path, scheduler=wanted, metric="loss"))
    controller = FakeController(5, [0.0] * 5)
    scheduler = make_scheduler(config, 8.0, 1)
    for trial in controller.trials:
        scheduler.on_trial_add(controller, trial)

    def report(time: float, *losses: float) -> list[str]:
        reports = zip(controller.trials, losses, strict=False)
        return [scheduler.on_trial_result(controller, trial, {"time": time, "loss": loss}) for trial, loss in reports]

    assert report(1.0, 1, 2, 3, 4, 9) == ["CONTINUE"] * 5
    assert report(2.0, 1, 2, 3, 4)[:2] == ["CONTINUE", "STOP" if kind == "asha" else "CONTINUE"]
    last = controller.trials[4]
    assert scheduler.on_trial_result(controller, last, {"time": 2.0, "loss": 9}) == "STOP"
    assert report(3.0, 0.5)[0] == "CONTINUE"


# --- the end of a sweep


@pytest.mark.parametrize("budget", [{"epochs": 3.0}, {"gpu_hours": 1e-9}, {}], ids=str)
def test_the_budget_ends_a_sweep_when_all_have_saved(budget: dict[str, float], tmp_path: Path) -> None:
    from launch.sweep.driver import Watch
    from launch.sweep.table import Progress
    from launch.sweep.trial import LEAVE

    sweep = load_sweep(write(tmp_path, budget=budget))
    records = Records(sweep)
    first, second = (records.add(values) for values in drawn_trials(sweep))
    records.save()
    watch = Watch(sweep, records, Progress(records, {}), nodes=None)  # type: ignore[arg-type]
    running, waiting = FakeTrial(first.name, {}), FakeTrial(second.name, {}, status="PENDING")
    records.note(first, {"step": 10, "epoch": 2.0, "top1": 0.1})
    records.note(second, {"step": 10, "epoch": 1.5, "top1": 0.1})
    for _ in range(2):
        watch.on_step_begin(0, [running, waiting])
        assert not watch.all_have_left()
    assert (records.folder / LEAVE).exists() == bool(budget)
    assert records.gpu_hours > 0 and watch.status() == 0
    running.status = "TERMINATED"
    watch.on_step_begin(0, [running, waiting])
    assert watch.all_have_left() == bool(budget)


# --- what is kept, and what is read of runs


def test_records_survive_a_restart(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, metric="loss"))
    records = Records(sweep)
    first, second, third = (records.add(values) for values in [*drawn_trials(sweep), {"optim.lr": 3.0}])
    for record, losses in ((first, [3.0, 1.0]), (second, [0.5, 2.0]), (third, [0.1])):
        for step, loss in enumerate(losses):
            records.note(record, {"step": step, "epoch": step + 1.0, "loss": loss})
    first.state, second.state, third.state = "finished", "finished", "running"
    records.save()
    again = Records(sweep)
    assert [r.name for r in again.all()] == ["sweep-000", "sweep-001", "sweep-002"]
    assert [r.state for r in again.all()] == ["finished", "finished", "waiting"]
    assert [r.best for r in again.all()] == [1.0, 0.5, 0.1]
    assert again.epochs() == 5.0
    best = again.best()
    assert best is not None and best.name == "sweep-000"
    assert json.loads((sweep.folder / FILE).read_text())["best"] == "sweep-000"
    with records.locked(), pytest.raises(UserError, match="this sweep is running already"), again.locked():
        pass
    assert records.is_outdated() and not again.is_outdated(), "the first has written since it read"
    with pytest.raises(UserError, match="holds a sweep with another space"):
        Records(load_sweep(write(tmp_path, metric="loss", space={"optim.lr": {"grid": [5.0]}})))


@pytest.mark.parametrize("trials", [2, 3, 4])
def test_a_sweep_takes_no_trial_back(trials: int, tmp_path: Path) -> None:
    space, searcher = {"optim.lr": {"uniform": [1.0, 2.0]}}, {"kind": "random"}
    records = Records(load_sweep(write(tmp_path, space=space, searcher=searcher, trials=3)))
    for lr in (1.0, 1.5, 1.2):
        records.add({"optim.lr": lr})
    records.save()
    wanted = load_sweep(write(tmp_path, space=space, searcher=searcher, trials=trials))
    if trials < 3:
        with pytest.raises(UserError, match=r"trials=2: .* has 3 trials already; write at least as many"):
            Records(wanted)
    else:
        assert len(Records(wanted).all()) == 3


@pytest.mark.parametrize("damage", ["3", "[]", "{}", '{"sweep": {}}', "trial without values", "trial with more"])
def test_a_damaged_record_is_told(damage: str, tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path))
    records = Records(sweep)
    records.add({"optim.lr": 3.0})
    records.save()
    path = sweep.folder / FILE
    saved = json.loads(path.read_text())
    if damage == "trial without values":
        del saved["trials"][0]["values"]
    elif damage == "trial with more":
        saved["trials"][0]["colour"] = "red"
    else:
        saved = json.loads(damage)
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"sweep\.json is not what a sweep wrote .*; restore it, or"):
        Records(sweep)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", Path("/proc")):
        records = Records(load_sweep(write(tmp_path, out=str(out))))
        with pytest.raises(UserError, match="choose another out="), records.locked():
            pass


def test_evaluations_come_once_each_though_the_file_is_cut_back(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path)
    reader = Evaluations(tmp_path, seen=1)

    def evaluate(*steps: int) -> None:
        for step in steps:
            metrics.log("train", step, epoch=step / 10, images_per_second=step * 2.0)
            metrics.log("eval", step, epoch=step / 10, top1=step / 100)

    def read() -> list[int]:
        found = []
        while (figures := reader.next()) is not None:
            assert figures["images_per_second"] == figures["step"] * 2 and figures["top1"] == figures["step"] / 100
            found.append(figures["step"])
        return found

    assert read() == []
    evaluate(1, 2, 3)
    assert read() == [2, 3]
    metrics.rewind(2)
    assert read() == []
    evaluate(3, 4)
    with open(metrics.path, "ab") as file:
        file.write(b'{"kind": "eval", "st')
    assert read() == [4]
    metrics.close()


@pytest.mark.parametrize("killed", ["", "removed", "installed", "told"])
def test_taking_over(killed: str, shards: Path, tmp_path: Path) -> None:
    """Another run's checkpoint, under values of its own; what the run measured itself stays.

    Killed once its own checkpoint is removed, the donor's is in place, or the event is in the metrics, it is called
    again.
    """
    tree = {"name": "x", "model": {"name": "nest_micro"}, "data": {"train": f"{shards}/train", "val": f"{shards}/val"}}
    tree |= {"train": {"epochs": 2, "global_batch_size": 2}, "optim": {"lr": 1e-3}, "augment": {"crop": "none"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    space = {"optim.lr": {"choice": [1e-3, 1e-4, 5e-4]}, "optim.weight_decay": {"choice": [0.0, 0.1]}}
    sweep = load_sweep(write(tmp_path, space=space, trials=2, scheduler={"kind": "pbt", "every": "1ep"}))
    own, donor = (sweep.folder / "trials" / name for name in ("own", "donor"))
    for run, figure in ((own, 0.2), (donor, 0.3)):
        run.mkdir(parents=True)
        store = CheckpointStore(run / "checkpoints")
        for step in (2, 4):
            text = f"{run.name} {step}"
            progress = {"step": step, "best": {"top1": figure}, "seconds": figure, "losses": [figure]}
            store.save(step, progress, lambda path, text=text: (path / "state.pt").write_text(text) and None, ALONE)
    give(donor, 4)
    (donor / "checkpoints" / "step-00000004" / "commit.json").unlink()  # as when the donor goes on and retires it
    values = {"optim.lr": 5e-4, "optim.weight_decay": 0.1}
    best = 0.2
    if killed == "removed":
        best = 0.25  # which only its result still knows
        (own / "checkpoints" / "step-00000004" / "commit.json").unlink()
        write_json(own / "result.json", {"step": 4, "best": {"top1": best}, "wall_seconds": best})
    elif killed:
        take_over(sweep, own, values, donor="donor", step=4, ticket="round 1")
        (own / "taken_over.jsonl").unlink()
        if killed == "installed":
            (own / "metrics.jsonl").unlink()
    for _ in range(2):
        take_over(sweep, own, values, donor="donor", step=4, ticket="round 1")
    taken = CheckpointStore(own / "checkpoints").newest()
    assert taken is not None and taken.step == 4 and (taken.path / "state.pt").read_text() == "donor 4"
    assert taken.progress() == {"step": 4, "best": {"top1": best}, "seconds": best, "losses": [0.3]}
    saved = RunDir.saved_config(own)
    assert saved is not None and (saved["optim"]["lr"], saved["optim"]["weight_decay"]) == (5e-4, 0.1)
    assert len(read_lines(own / "taken_over.jsonl")) == 1
    (event,) = read_metrics(own)
    assert (event["step"], event["epoch"], event["donor"], event["values"]) == (4, 1.0, "donor", values)
    with pytest.raises(RuntimeError, match="has left no checkpoint of step 8"):
        take_over(sweep, own, values, donor="donor", step=8, ticket="round 2")


# --- the sweeps that come with the project


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10", 9),
        ("cifar10_pbt", 8),
        ("digits", 8),
        ("hvt_lr_wd", 12),
        ("hvt_pooling", 13),
        ("nest_aggregation", 11),
        ("nest_early_layers", 6),
        ("nest_epochs", 6),
        ("nest_lr_wd", 12),
        ("nest_warmup", 10),
        ("refiner_expansion", 8),
        ("refiner_local", 4),
        ("refiner_lr_wd", 9),
    ],
)
def test_shipped_sweep(name: str, count: int, shards: Path, tmp_path: Path) -> None:
    path = ROOT / "configs" / "sweep" / f"{name}.yaml"
    assert path in SWEEPS and len(SWEEPS) == 13
    sweep = load_sweep(path)
    config = run_config(sweep, "x", {} if sweep.searcher.kind == "optuna" else drawn_trials(sweep)[0])
    lanes = config.data.lanes or default_lanes(config.train.global_batch_size)
    assert lanes % sweep.resources.world_size == 0
    smaller = [*SMALL, "resources.nodes=1", "resources.nproc=1", f"out={tmp_path}"]
    own = [f"data.train={shards}/train", f"data.val={shards}/val"]
    said = CliRunner().invoke(cli._commands, ["sweep", str(path), *own, *smaller, "--dry-run"], env={"COLUMNS": "300"})
    assert said.exit_code == 0, said.output
    assert f"{tmp_path}/sweep_{name}: {count} trials" in said.output
    assert said.output.count("example-") + said.output.count(f"sweep_{name}-") == count
    assert not list(tmp_path.iterdir())


def test_a_trial_that_can_not_be_is_named(shards: Path, tmp_path: Path) -> None:
    path = ROOT / "configs" / "sweep" / "nest_aggregation.yaml"
    sweep = load_sweep(path, [f"data.train={shards}/train", f"data.val={shards}/val", *SMALL, f"out={tmp_path}"])
    with pytest.raises(UserError, match=r"trial x \(aggregation=max4\): model: "):
        plan_trial(sweep, "x", {"model.options.aggregation": "max4"})


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from launch.sweep.cluster import import_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'rookery\\[ray\\]'"):
        import_ray()


@pytest.mark.parametrize("address", ["foo", "foo:", ":1", "foo:bar", "foo:0", "foo:65536", "foo:1/x"])
def test_an_address_without_host_and_port_is_explained(address: str) -> None:
    with pytest.raises(UserError, match=f"Ray's address {address} is no HOST:PORT"):
        probe(address)


@pytest.mark.parametrize("address", ["auto", "local", "ray://nowhere.invalid:10001"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    probe(address)


def test_a_head_that_listens_late_is_waited_for() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address}: Connection refused; start one"):
            probe(address, seconds=0.1)
        timer = Timer(0.7, head.listen)
        timer.start()
        probe(address, seconds=20)
        timer.join()


@pytest.mark.parametrize("how", ["option", "variable", "auto"])
def test_where_nobody_listens_ray_is_not_asked(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait without an end."""
    monkeypatch.setattr(cluster, "import_ray", lambda: None)
    monkeypatch.setattr(cluster, "_PAUSE_SECONDS", 99.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        if how != "option":
            monkeypatch.setenv("RAY_ADDRESS", address)
        asked = {"option": address, "variable": None, "auto": "auto"}[how]
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address}"), cluster.connected(asked):
            pass
