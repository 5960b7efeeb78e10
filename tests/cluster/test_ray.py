"""Sweeps on a real Ray cluster: nodes, trials and the sweep itself are killed, and nothing is lost or repeated."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch.sweep.records import FILE, TAKEN_OVER
from pipeline.tracking.files import read_lines
from pipeline.tracking.metrics import read_metrics
from pipeline.train.again import newest_step
from pipeline.train.export import WEIGHTS
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.slurm_cluster import wait_for
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer

pytestmark = pytest.mark.ray_cluster

# Without augmentation, whose compiled loops every process would load.
QUICK = ["data.augment_by=pillow", "data.trace=false", "train.ema_decay=null"]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    with RayCluster(3) as cluster:
        yield cluster


class Sweep:
    """A sweep on disk, and what became of it."""

    def __init__(self, cluster: RayCluster, folder: Path, tree: dict[str, Any]) -> None:
        self.cluster, self.folder = cluster, folder
        self.file = folder / "sweep.yaml"
        self.file.write_text(yaml.safe_dump({"name": "sweep", "out": str(folder / "runs")} | tree, sort_keys=False))

    def start(self) -> subprocess.Popen[str]:
        return self.cluster.start_sweep(self.file)

    def finish(self, process: subprocess.Popen[str], status: int = 0) -> dict[str, dict[str, Any]]:
        """The trials by name, once the sweep has ended by itself."""
        assert process.wait(1200) == status, self.logs()
        return self.trials()

    def trials(self) -> dict[str, dict[str, Any]]:
        saved = json.loads((self.folder / "runs" / "sweep" / FILE).read_text())
        return {trial["name"]: trial for trial in saved["trials"]}

    def best(self) -> str:
        return json.loads((self.folder / "runs" / "sweep" / FILE).read_text())["best"]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / "sweep" / "trials" / name

    def wait(self, met: Callable[[], Any], what: str) -> Any:
        return wait_for(met, what, self.logs, 900)

    def logs(self) -> str:
        files = [self.folder / "sweep.log", *self.folder.glob("runs/*/trials/*/logs/*")]
        return "\n".join(f"== {file}\n{file.read_text()[-2500:]}" for file in files if file.exists())


def starts(run: Path) -> list[int | None]:
    """Where each start of a run went on from."""
    lines = read_lines(run / "sessions.jsonl")
    return [line["resumed_from"] for line in lines if line["event"] == "start"]


def evaluated(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run) if line["kind"] == "eval"]


def weights(run: Path) -> bytes:
    return (run / "final" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def cifar10(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few of CIFAR-10's images."""
    folder = tmp_path_factory.mktemp("cifar10")
    (folder / "few").mkdir()
    for split, count in (("train", 1600), ("test", 160)):
        table = parquet.read_table(real_data / "cifar10" / f"{split}.parquet")
        every = table.num_rows // count
        parquet.write_table(table.take(list(range(0, count * every, every))), folder / "few" / f"{split}.parquet")
    prepare_splits(str(folder / "few"), folder / "shards", PrepOptions(workers=1))
    return folder / "shards"


def cifar10_recipe(shards: Path, folder: Path) -> Path:
    """NesT-T's recipe with a model of a few thousand parameters, for 40 steps of 16 images."""
    tree = {
        "model": {
            "name": "nest_tiny_cifar",
            "img_size": 32,
            "options": {"embed_dims": 16, "num_heads": 1, "depths": 1},
        },
        "data": {"train": str(shards / "train"), "val": str(shards / "test"), "workers": 0, "lanes": 4},
        "augment": {"crop": {"kind": "pad", "padding": 2}, "normalize": "cifar10"},
        "eval_transform": {"resize": "none"},
        "train": {"epochs": "40steps", "global_batch_size": 16, "precision": "fp32", "log_every": "1steps"},
        "optim": {"lr": 1e-3},
        "eval": {"every": "10steps", "batch_size": 80},
        "checkpoint": {"every": "5steps"},
        "tracking": {"mlflow": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.timeout(3600)
def test_a_node_and_a_trial_die(
    ray_cluster: RayCluster, cifar10: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    """ASHA over eight trials of two workers each, whose values Optuna proposes."""
    cifar10_recipe(cifar10, tmp_path)
    sweep = Sweep(
        ray_cluster,
        tmp_path,
        {
            "recipe": "recipe.yaml",
            "overrides": QUICK,
            "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "optim.weight_decay": {"choice": [0.0, 0.05]}},
            "trials": 8,
            "scheduler": {"kind": "asha", "grace": "0.1ep", "factor": 2},
            "searcher": "optuna",
            "metric": "loss",
            "resources": {"nproc": 2},
        },
    )
    process = sweep.start()

    def advanced(nodes: tuple[int, ...], besides: set[str]) -> str | None:
        """A trial on one of these nodes that has saved and is not nearly done."""
        running = {name for node in nodes for name in ray_cluster.runs_on(node)} - besides
        return next((name for name in sorted(running) if 0 < newest_step(sweep.run(name)) < 30), None)

    on_node = sweep.wait(lambda: advanced((1, 2), set()), "a trial on a node to be killed")
    node = next(n for n in (1, 2) if on_node in ray_cluster.runs_on(n))
    with_node = set(ray_cluster.runs_on(node))
    ray_cluster.kill_node(node)
    alone = sweep.wait(lambda: advanced((0, 3 - node), with_node), "a trial to be killed")
    for other in (0, 3 - node):
        if alone in ray_cluster.runs_on(other):
            ray_cluster.runs_on(other)[alone].kill()

    trials = sweep.finish(process)
    assert [trial["state"] for trial in trials.values()].count("stopped") >= 3 and len(trials) == 8
    assert {trial["state"] for trial in trials.values()} == {"finished", "stopped"}
    for name in (on_node, alone):
        assert trials[name]["failures"] == 1
        first, second, *_ = starts(sweep.run(name))
        assert first is None and second is not None and second > 0
        assert evaluated(sweep.run(name)) == sorted(set(evaluated(sweep.run(name))))
    assert all(newest_step(sweep.run(name)) == 40 for name, t in trials.items() if t["state"] == "finished")
    assert any(newest_step(sweep.run(name)) < 40 for name, t in trials.items() if t["state"] == "stopped")

    best = sweep.run(sweep.best())
    serial = tmp_path / "runs" / "serial"
    fork_server.train(best / "config.yaml", "name=serial", f"out={tmp_path}/runs", nproc=2)
    assert weights(serial) == weights(best)
    figures = read_metrics(serial)[-1]
    assert trials[best.name]["figures"]["loss"] == figures["loss"]
    finished = [trial["figures"]["loss"] for trial in trials.values() if trial["state"] == "finished"]
    assert min(finished) == figures["loss"]
    ray_cluster.add_node()


def digits_sweep(cluster: RayCluster, digits: Path, folder: Path, tree: dict[str, Any]) -> Sweep:
    """A sweep over short runs on the digits."""
    write_recipe(digits, folder, augment=False)
    overrides = [*QUICK, "train.epochs=16steps", "eval.every=4steps", "checkpoint.every=4steps"]
    overrides += ["checkpoint.keep_last=9", "optim.schedule.warmup=0ep"]
    return Sweep(cluster, folder, {"recipe": "recipe.yaml", "overrides": overrides} | tree)


def test_the_sweep_is_killed_and_started_again(ray_cluster: RayCluster, digits: Path, tmp_path: Path) -> None:
    """Two nodes for each trial; one is over, the other one is running."""
    tree = {"space": {"optim.lr": {"grid": [1e-3, 1e-2]}}, "concurrent": 1, "metric": "loss"}
    sweep = digits_sweep(ray_cluster, digits, tmp_path, tree | {"resources": {"nodes": 2}})
    first, second = (sweep.run(f"sweep-{i:03d}") for i in range(2))
    process = sweep.start()
    sweep.wait(lambda: newest_step(second) > 0, "a checkpoint of the second trial")
    process.send_signal(signal.SIGKILL)
    process.wait()
    sweep.wait(lambda: not any(ray_cluster.runs_on(node) for node in ray_cluster.alive()), "trials end with the sweep")
    assert [trial["state"] for trial in sweep.trials().values()] == ["finished", "running"]
    before = (first / "sessions.jsonl").read_bytes()

    trials = sweep.finish(sweep.start())
    assert [trial["state"] for trial in trials.values()] == ["finished"] * 2
    assert (first / "sessions.jsonl").read_bytes() == before
    assert [len(starts(run)) for run in (first, second)] == [1, 2]
    resumed = starts(second)[1]
    assert resumed is not None and resumed > 0
    for run, trial in zip((first, second), trials.values(), strict=True):
        assert evaluated(run) == [4, 8, 12, 16]
        assert trial["figures"]["loss"] == read_metrics(run)[-1]["loss"] and len(set(trial["nodes"])) == 2
        assert read_lines(run / "sessions.jsonl")[0]["world_size"] == 2


def test_population_based_training(ray_cluster: RayCluster, digits: Path, tmp_path: Path) -> None:
    space = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "optim.weight_decay": {"choice": [0.0, 0.05, 0.1]}}
    every = f"{8 / 29}ep"
    scheduler = {"kind": "pbt", "every": every, "quantile": 0.5, "resample": 0.0}
    tree = {"space": space, "trials": 2, "scheduler": scheduler, "metric": "loss"}
    sweep = digits_sweep(ray_cluster, digits, tmp_path, tree)
    trials = sweep.finish(sweep.start())
    assert [trial["state"] for trial in trials.values()] == ["finished", "finished"]
    taker = next(name for name in trials if (sweep.run(name) / TAKEN_OVER).exists())
    donor = next(name for name in trials if name != taker)
    (taken,) = read_lines(sweep.run(taker) / TAKEN_OVER)
    assert (taken["donor"], taken["step"], taken["values"]) == (donor, 8, trials[taker]["values"])
    states = [sweep.run(name) / "checkpoints" / "step-00000008" / "state.pt" for name in (taker, donor)]
    assert states[0].read_bytes() == states[1].read_bytes()
    lr, given = (trials[name]["values"]["optim.lr"] for name in (taker, donor))
    assert lr != given and lr / given in (pytest.approx(0.8, rel=1e-3), pytest.approx(1.25, rel=1e-3))
    config = yaml.safe_load((sweep.run(taker) / "config.yaml").read_text())
    assert config["optim"]["lr"] == lr

    rates = {m["step"]: m["lr"] for m in read_metrics(sweep.run(taker)) if m["kind"] == "train"}
    assert rates[9] == pytest.approx(lr * (1 + math.cos(math.pi * 9 / 16)) / 2)

    losses = {n: {m["step"]: m["loss"] for m in read_metrics(sweep.run(n)) if m["kind"] == "eval"} for n in trials}
    assert losses[donor][8] < losses[taker][8]
    assert losses[taker][12] < losses[taker][8]
    for name in trials:
        assert evaluated(sweep.run(name)) == [4, 8, 12, 16]
        assert [
            line["status"] for line in read_lines(sweep.run(name) / "sessions.jsonl") if line["event"] == "end"
        ] == [
            "stopped",
            "finished",
        ]
