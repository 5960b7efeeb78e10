"""Sweeps are killed at named points and started again: compared with what they would have done without.

Ray, Tune and the sweep are the real thing, its runs are `short_runs`; `test_ray` kills sweeps of real trainings.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.sweep.config import SweepConfig, load_sweep
from launch.sweep.records import FILE, TAKEN_OVER, Records
from launch.sweep.rounds import FILE as ROUNDS
from launch.sweep.schedulers import make_scheduler
from launch.sweep.search import OptunaSearch
from pipeline.tracking.files import read_lines
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.short_runs import BEGIN, KILL, STAND_IN, loss, reached, trained
from tests.cluster.slurm_cluster import wait_for
from tests.faulty_server import FaultyServer
from tests.faulty_server import folder as served
from tests.launch.test_sweep import FakeTrial
from tests.train.conftest import write_recipe

pytestmark = pytest.mark.ray_cluster

STEPS, EVERY = 16, 2
EPOCH = 29  # steps


def epochs(steps: int) -> str:
    return f"{steps / EPOCH}ep"


@pytest.fixture(scope="module")
def kill_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill") / "kill"


@pytest.fixture(scope="module")
def ray_cluster(kill_file: Path) -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KILL, str(kill_file))
        patch.setenv("PYTHONPATH", "")  # to be put back afterwards
        with RayCluster(1, STAND_IN) as cluster:
            yield cluster


class Swept:
    """A sweep on disk, and what became of it."""

    def __init__(self, cluster: RayCluster, folder: Path, tree: dict[str, Any], *overrides: str) -> None:
        self.cluster, self.file, self.folder = cluster, folder / "sweep.yaml", folder / "runs" / "sweep"
        short = ["data.augment_by=pillow", "train.ema_decay=null", "optim.schedule.warmup=0ep"]
        short += [f"train.epochs={STEPS}steps", f"eval.every={EVERY}steps", "checkpoint.every=3steps", *overrides]
        common = {"name": "sweep", "out": str(folder / "runs"), "recipe": "recipe.yaml", "overrides": short}
        common |= {"space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}}, "metric": "loss"}
        self.file.write_text(yaml.safe_dump(common | tree, sort_keys=False))

    def start(self) -> subprocess.Popen[str]:
        return self.cluster.start_sweep(self.file)

    def finish(self, kill_file: Path, kills: list[str]) -> None:
        """Run it to its end, killed at each of some points before; what was over then stays as it was."""
        left = set(kills)
        while left:
            before = self.over()
            process = self.start()
            kill_file.write_text(json.dumps({"points": [*left], "pid": process.pid}))
            assert process.wait(300) == -signal.SIGKILL, f"{left} were not reached\n{self.logs()}"
            wait_for(lambda: not self.cluster.runs_on(0), "runs end with the sweep", self.logs)
            left.remove(reached(kill_file).read_text())
            kill_file.unlink()
            reached(kill_file).unlink()
            assert before.items() <= self.over().items()
        before = self.over()
        assert self.start().wait(300) == 0, self.logs()
        assert before.items() <= self.over().items() and len(self.over()) == len(self.trials())

    def trials(self) -> dict[str, dict[str, Any]]:
        path = self.folder / FILE
        return {trial["name"]: trial for trial in json.loads(path.read_text())["trials"]} if path.exists() else {}

    def over(self) -> dict[str, Any]:
        """The trials that are over, and all that training them again would change."""
        over = {name: trial for name, trial in self.trials().items() if trial["state"] in ("finished", "stopped")}
        return {name: (trial, self.lines(name), self.lines(name, "sessions.jsonl")) for name, trial in over.items()}

    def lines(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return read_lines(self.folder / "trials" / name / file)

    def logs(self) -> str:
        files = [self.file.parent / "sweep.log", *self.folder.glob("trials/*/logs/*")]
        return "\n".join(f"== {file}\n{file.read_text()[-2500:]}" for file in files if file.exists())


def check_runs(sweep: Swept) -> None:
    """Every step of every trial was taken once, from the weights that it should be and under the trial's values."""
    weights: dict[tuple[str, int], str] = {}
    rates: dict[tuple[str, int], float] = {}
    for name in sweep.trials():
        steps = [line for line in sweep.lines(name) if line["kind"] == "train"]
        assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
        weights |= {(name, line["step"]): line["weights"] for line in steps} | {(name, 0): BEGIN}
        rates |= {(name, line["step"]): line["lr"] for line in steps}
    for name, trial in sweep.trials().items():
        assert trial["failures"] == 0 and trial["fault"] is None
        taken = {line["step"]: line for line in sweep.lines(name, TAKEN_OVER)}
        lr = rates[name, 1]
        for step in range(1, max(s for n, s in weights if n == name) + 1):
            before = weights[name, step - 1]
            if step - 1 in taken:
                line = taken[step - 1]
                before, lr = weights[line["donor"], step - 1], line["values"]["optim.lr"]
            assert rates[name, step] == lr and weights[name, step] == trained(before, lr, step), (name, step)
        assert lr == trial["values"]["optim.lr"]
        evaluations = [line for line in sweep.lines(name) if line["kind"] == "eval"]
        assert [line["step"] for line in evaluations] == list(range(EVERY, evaluations[-1]["step"] + 1, EVERY))
        assert all(
            line["loss"] == loss(weights[name, line["step"]], rates[name, line["step"]], line["step"])
            for line in evaluations
        )
        if trial["state"] == "finished":
            assert (
                trial["figures"]["step"]
                == STEPS
                == json.loads((sweep.folder / "trials" / name / "result.json").read_text())["step"]
            )


# --- one trial after the other: the whole sweep is a function of its file


class Expected:
    """What a sweep does whose trials run one after the other."""

    def __init__(self, config: SweepConfig) -> None:
        records = Records(config.model_copy(update={"out": "/nowhere"}))
        search = OptunaSearch(config, records, lambda record: {}, lambda error: True)
        scheduler: Any = make_scheduler(config, STEPS / EPOCH, 1)
        self.trials = {}
        for number in range(config.trials or 0):
            search.suggest(str(number))
            record = records.all()[-1]
            trial = FakeTrial(record.name, {})
            scheduler.on_trial_add(None, trial)
            lr, weights = record.values["optim.lr"], BEGIN
            for step in range(1, STEPS + 1):
                weights = trained(weights, lr, step)
                result = {"time": step / EPOCH, "loss": loss(weights, lr, step)}
                if step % EVERY == 0 and scheduler.on_trial_result(None, trial, result) == "STOP":
                    break
            scheduler.on_trial_complete(None, trial, result)
            search.on_trial_complete(str(number), result)
            state = "finished" if step == STEPS else "stopped"
            self.trials[record.name] = {"state": state, "step": step, "lr": lr, "loss": result["loss"]}


@pytest.mark.parametrize(
    ("scheduler", "kills"),
    [
        ({"kind": "asha", "grace": epochs(2), "factor": 2}, ["sweep-003 3 saved"]),
        ({"kind": "median", "grace": epochs(4), "least": 2}, ["sweep-001 16 evaluated"]),
    ],
    ids=["asha", "median"],
)
def test_trials_one_after_the_other(
    scheduler: dict[str, Any], kills: list[str], ray_cluster: RayCluster, kill_file: Path, digits: Path, tmp_path: Path
) -> None:
    """Optuna proposes the same, and the scheduler stops the same, as if the sweep had not been killed."""
    write_recipe(digits, tmp_path, augment=False)
    searcher = {"kind": "optuna", "startup": 3}
    tree = {"trials": 5, "concurrent": 1, "scheduler": scheduler, "searcher": searcher}
    sweep = Swept(ray_cluster, tmp_path, tree)
    sweep.finish(kill_file, kills)
    expected = Expected(load_sweep(sweep.file)).trials
    assert {trial["state"] for trial in expected.values()} == {"finished", "stopped"}
    check_runs(sweep)
    for name, trial in sweep.trials().items():
        figures = trial["figures"]
        found = {
            "state": trial["state"],
            "step": figures["step"],
            "lr": trial["values"]["optim.lr"],
            "loss": figures["loss"],
        }
        assert found == expected[name], name


def test_hyperband(ray_cluster: RayCluster, kill_file: Path, digits: Path, tmp_path: Path) -> None:
    """Trials 0 to 2 are a bracket that is never halved; of 3 to 5 the best two go on from step 8."""
    write_recipe(digits, tmp_path, augment=False)
    tree = {"trials": 6, "scheduler": {"kind": "hyperband", "grace": epochs(4), "factor": 2}}
    sweep = Swept(ray_cluster, tmp_path, tree)
    sweep.finish(kill_file, ["sweep-004 8 evaluated"])
    check_runs(sweep)
    ended = {name: (trial["state"], trial["figures"]["step"]) for name, trial in sweep.trials().items()}
    at_8 = {name: next(m["loss"] for m in sweep.lines(name) if (m["kind"], m["step"]) == ("eval", 8)) for name in ended}
    worst = max(sorted(ended)[3:], key=lambda name: at_8[name])
    assert ended == dict.fromkeys(ended, ("finished", STEPS)) | {worst: ("stopped", 8)}


def test_population_based_training(ray_cluster: RayCluster, kill_file: Path, digits: Path, tmp_path: Path) -> None:
    write_recipe(digits, tmp_path, augment=False)
    scheduler = {"kind": "pbt", "every": epochs(6), "quantile": 0.5, "resample": 0.0}
    kills = ["round 1", "sweep-003 6 takes over", "sweep-001 12 ended"]
    sweep = Swept(ray_cluster, tmp_path, {"trials": 4, "scheduler": scheduler})
    sweep.finish(kill_file, kills)
    check_runs(sweep)
    assert {trial["state"] for trial in sweep.trials().values()} == {"finished"}
    rounds = read_lines(sweep.folder / ROUNDS)
    assert [(line["round"], line["step"]) for line in rounds] == [(1, 6), (2, 12)]
    measured = {n: {m["step"]: m["loss"] for m in sweep.lines(n) if m["kind"] == "eval"} for n in sweep.trials()}
    for line in rounds:
        ranked = sorted(measured, key=lambda name: -measured[name][line["step"]])
        assert set(line["takes"]) == set(ranked[:2])
        assert {take["take_over"]["donor"] for take in line["takes"].values()} <= set(ranked[2:])
    for name in sweep.trials():
        taken = [line["takes"][name] for line in rounds if name in line["takes"]]
        assert sweep.lines(name, TAKEN_OVER) == [{"values": take["values"]} | take["take_over"] for take in taken]
        events = [line for line in sweep.lines(name) if line.get("event") == "taken_over"]
        assert [(e["step"], e["donor"]) for e in events] == [
            (t["take_over"]["step"], t["take_over"]["donor"]) for t in taken
        ]


# --- a store that is out of reach


def test_a_store_that_never_answers_ends_the_sweep(
    ray_cluster: RayCluster, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It falls silent once the first trial is over, when Optuna is to propose the second."""
    write_recipe(digits, tmp_path, augment=False)
    monkeypatch.setenv("ROOKERY_STORE_TRIES", "1")
    monkeypatch.setenv("ROOKERY_STORE_SECONDS", "0.5")
    first = tmp_path / "runs" / "sweep" / "trials" / "sweep-000" / "result.json"
    is_well: list[bool] = []
    with FaultyServer(served(digits), lambda request: "stall" if first.exists() and not is_well else None) as server:
        searcher = {"kind": "optuna", "startup": 3}
        tree = {"trials": 2, "concurrent": 1, "failures": 1, "searcher": searcher}
        sweep = Swept(ray_cluster, tmp_path, tree, f"data.train={server.uri}/train", f"data.cache={tmp_path}/cache")
        assert sweep.start().wait(300) == 1, sweep.logs()
        said = (tmp_path / "sweep.log").read_text()
        assert said.count("tried 2 times, and no trial runs: the same command goes on") == 1 and "Traceback" not in said
        assert [trial["state"] for trial in sweep.trials().values()] == ["finished", "waiting"]
        before = sweep.over()
        is_well.append(True)
        assert sweep.start().wait(300) == 0, sweep.logs()
    check_runs(sweep)
    assert before.items() <= sweep.over().items() and len(sweep.over()) == 2
    assert {name: trial["values"]["optim.lr"] for name, trial in sweep.trials().items()} == {
        name: trial["lr"] for name, trial in Expected(load_sweep(sweep.file)).trials.items()
    }
