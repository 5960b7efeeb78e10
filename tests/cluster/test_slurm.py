"""Training under a real Slurm: started by sbatch, preempted, killed, out of time, and the weights stay the same."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch.slurm_script import LOGS, SCRIPT
from pipeline.data.shards import ShardSet
from pipeline.tracking.metrics import read_metrics
from pipeline.train.again import newest_step
from pipeline.train.export import WEIGHTS
from tests.cluster.slurm_cluster import SlurmCluster, wait_for
from tests.data_prep.test_ilsvrc import devkit, train_tar, val_tar
from tests.train.commands import ROOT, command, run_command
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer

pytestmark = pytest.mark.slurm

# What each script trains when it is given no recipe, and what makes that model small.
FAMILIES = {
    "train_nest.sh": ("nest_tiny", {"embed_dims": [8, 16, 32], "num_heads": 1, "depths": 1, "patch_size": 1}, {}),
    "train_refiner.sh": (
        "refiner_vit_s",
        {"embed_dim": 24, "num_heads": 2, "depth": 3, "patch_size": 4},
        {"optim.schedule.cooldown": "0ep"},
    ),
    "train_hvt.sh": (
        "hvt_s_1",
        {"head_dim": 8, "num_heads": 2, "depth": 2, "patch_size": 4},
        {"optim.schedule.delay": "0ep"},
    ),
}
# Makes a recipe for ImageNet two steps on the digits.
SHORT = {
    "model.img_size": 16,
    "model.in_chans": 1,
    "data.lanes": 12,
    "data.workers": 0,
    "augment.resize": 16,
    "augment.crop": "none",
    "augment.interpolation": "bilinear",
    "augment.normalize": "half",
    "eval_transform.resize": "resize_only",
    "optim.schedule.warmup": "0ep",
    "train.epochs": "2steps",
    "train.global_batch_size": 48,
    "train.precision": "fp32",
    "tracking.mlflow": False,
}

ENDLESS = "train.epochs=100000steps"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Work:
    """A folder with a recipe, from which jobs are submitted."""

    def __init__(self, cluster: SlurmCluster, digits: Path, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe = write_recipe(digits, folder)

    def submit(self, *arguments: object, nproc: int = 1) -> str:
        """The id of `sbatch [options] slurm/train_nest.sh ...`."""
        more = {"ROOKERY_NPROC": str(nproc), "ROOKERY_THREADS": "1"}
        return self.cluster.run("sbatch", "--parsable", *arguments, folder=self.folder, more=more).strip()

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def end_after(self, steps: int) -> None:
        """Let the next start of an endless run be its last."""
        tree = yaml.safe_load(self.recipe.read_text())
        tree["train"]["stop_after"] = f"{steps}steps"
        self.recipe.write_text(yaml.safe_dump(tree))

    def wait(self, job: str, *states: str) -> str:
        """Until a job is in one of these states; another one from which it can't get there fails."""
        return wait_for(lambda: self.state(job, *states), f"job {job} is {' or '.join(states)}", self.logs) or ""

    def state(self, job: str, *states: str) -> str | None:
        """The state of a job if it is one of these."""
        now = self.cluster.facts(job)["JobState"]
        assert now in states or now not in OVER, f"job {job} is {now}\n{self.logs()}"
        return now if now in states else None

    def wait_for_steps(self, job: str, run: Path, count: int = 3) -> None:
        """Until a running job has made some steps and a checkpoint of its own."""
        self.wait(job, "RUNNING")
        before, first = newest_step(run), lines(run)

        def advanced() -> bool:
            self.state(job)
            return newest_step(run) > before and lines(run) >= first + count

        wait_for(advanced, f"steps of {run}", self.logs)

    def wait_for_requeue(self, job: str, restarts: int) -> None:
        """Until Slurm has put a job back into the queue for the n-th time; then it may start soon."""

        def again() -> bool:
            self.state(job)
            return int(self.cluster.facts(job)["Restarts"]) >= restarts

        wait_for(again, f"{job} is requeued", self.logs)
        self.wait(job, "PENDING")
        self.cluster.hurry(job)

    def logs(self) -> str:
        files = [*self.folder.glob("slurm-*.out"), *self.folder.glob(f"runs/*/{LOGS}/*")]
        return "\n".join([f"== {f}\n{f.read_text()[-3000:]}" for f in files] + [self.cluster.logs()])


@pytest.fixture
def work(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> Iterator[Work]:
    yield Work(cluster, digits, tmp_path)
    cluster.run("scancel", "--user", os.environ.get("USER", str(os.getuid())), "--signal=KILL")


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def weights(run: Path) -> bytes:
    return (run / "final" / WEIGHTS).read_bytes()


def sessions(run: Path) -> list[str]:
    """How each start of a run ended; `killed` where it could not say."""
    entries = [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]
    ends = []
    for entry, following in zip(entries, [*entries[1:], {"event": "start"}], strict=True):
        if entry["event"] == "start":
            ends.append(following["status"] if following["event"] == "end" else "killed")
    return ends


def test_two_nodes_equal_one_machine(work: Work) -> None:
    job = work.submit("--nodes=2", ROOT / "slurm" / "train_nest.sh", work.recipe, "name=nodes", nproc=2)
    run_command(work.folder, "train", work.recipe, "--nproc", 4, "--threads", 1, "name=alone")
    work.wait(job, "COMPLETED")
    assert weights(work.run("nodes")) == weights(work.run("alone"))
    start = json.loads((work.run("nodes") / "sessions.jsonl").read_text().splitlines()[0])
    assert start["world_size"] == 4
    logs = work.run("nodes") / LOGS
    assert sorted(path.name.split("-")[:2] for path in logs.iterdir()) == [[job, "0"], [job, "1"]]
    assert f"{LOGS}/{job}-*.log" in (work.folder / f"slurm-{job}.out").read_text()
    script = (work.run("nodes") / SCRIPT).read_text().splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --exclusive", "#SBATCH --requeue", "export ROOKERY_NPROC=2"} <= {*script}


def test_each_script_trains_its_own_family(work: Work, digits: Path) -> None:
    """From the checkout and without a recipe, as in the first lines of docs/slurm.md."""
    scripts = {path.name for path in (ROOT / "slurm").iterdir()}
    assert scripts == {*FAMILIES, "prep_imagenet.sh", "sweep.sh"}, "a script that no test of this file submits"
    jobs = {}
    for script, (_, options, more) in FAMILIES.items():
        place = {"data.train": digits / "train", "data.val": digits / "test", "out": work.folder / "runs"}
        model = {f"model.options.{key}": value for key, value in options.items()}
        given = [f"{key}={value}" for key, value in (SHORT | place | model | more).items()]
        said = ["--output", work.folder / "slurm-%j.out", "--chdir", ROOT]
        jobs[script] = work.submit(*said, ROOT / "slurm" / script, f"name={script}", *given)
    for script, job in jobs.items():
        work.wait(job, "COMPLETED")
        name, options, _ = FAMILIES[script]
        model = yaml.safe_load((work.run(script) / "config.yaml").read_text())["model"]
        assert model["name"] == name and model["options"].items() >= options.items()
        trained = [line["loss"] for line in read_metrics(work.run(script)) if line["kind"] == "eval"]
        assert len(trained) == 1 and math.isfinite(trained[0]) and weights(work.run(script))


def test_preempted_requeued_and_a_node_lost(work: Work, fork_server: ForkServer) -> None:
    """USR1, `scontrol requeue` and a dead node, one after the other."""
    arguments = [work.recipe, ENDLESS, "name=cut"]
    run, cluster = work.run("cut"), work.cluster
    job = work.submit("--nodes=2", ROOT / "slurm" / "train_nest.sh", *arguments)
    work.wait_for_steps(job, run)
    cluster.run("scancel", "--signal=USR1", job)
    work.wait_for_requeue(job, 1)
    assert "rookery: back in the queue after step" in (work.folder / f"slurm-{job}.out").read_text()

    work.wait_for_steps(job, run)
    cluster.run("scontrol", "requeue", job)
    work.wait_for_requeue(job, 2)

    work.wait_for_steps(job, run)
    cluster.kill_node("node2")
    work.wait_for_requeue(job, 3)
    end = newest_step(run) + 3
    work.end_after(end)
    cluster.start_node("node2")
    work.wait(job, "COMPLETED")

    assert sessions(run)[:2] == ["interrupted", "interrupted"]
    assert sessions(run)[2] in ("killed", "failed")
    assert sessions(run)[3:] == ["stopped"]
    fork_server.train(work.recipe, ENDLESS, "name=whole", nproc=2)
    assert weights(run) == weights(work.run("whole"))
    steps = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
    assert steps == [*range(1, end + 1)]


def test_time_limit_seeds_and_errors(work: Work) -> None:
    """A job of one minute saves in time and goes on; meanwhile an array of seeds runs on the other node."""
    script = ROOT / "slurm" / "train_nest.sh"
    # Without Slurm's own notice: what is tested is the clock.
    limited = work.submit("--time=1", "--signal=USR1@0", script, work.recipe, ENDLESS, "name=limited")
    array = work.submit("--array=3-4", script, work.recipe, "name=each", "train.stop_after=2steps")
    for seed in (3, 4):
        wait_for(lambda seed=seed: (work.run(f"each-seed{seed}") / "result.json").exists(), f"seed {seed}", work.logs)
        saved = yaml.safe_load((work.run(f"each-seed{seed}") / "config.yaml").read_text())
        assert saved["seed"] == seed
        assert f"seed={seed} name=each-seed{seed}" in (work.run(f"each-seed{seed}") / SCRIPT).read_text()
    assert weights(work.run("each-seed3")) != weights(work.run("each-seed4"))
    work.wait(array, "COMPLETED")

    run, restarts = work.run("limited"), 1
    work.wait_for_requeue(limited, restarts)
    while newest_step(run) == 0:  # a busy machine may spend the minute on the start
        restarts += 1
        work.wait_for_requeue(limited, restarts)
    trained = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
    assert newest_step(run) == trained[-1]
    assert sessions(run) == ["interrupted"]
    work.end_after(trained[-1] + 2)
    work.wait(limited, "COMPLETED")
    assert read_metrics(run)[-1]["step"] == trained[-1] + 2


def test_a_task_of_an_array_leaves_alone(work: Work) -> None:
    """The one whose number is that of the whole array, too: the other one goes on, on its own node."""
    array = work.submit("--array=0-1", ROOT / "slurm" / "train_nest.sh", work.recipe, ENDLESS, "name=task")
    first, second = (work.run(f"task-seed{seed}") for seed in (0, 1))
    for run in (first, second):
        wait_for(lambda run=run: newest_step(run) and lines(run) > 2, f"steps of {run}", work.logs)
    facts = [work.cluster.facts(f"{array}_{index}") for index in (0, 1)]
    assert {task["NodeList"] for task in facts} == {"node1", "node2"}
    for index, task in enumerate(facts):
        said = (work.folder / f"slurm-{array}_{index}.out").read_text()
        assert f"job {task['JobId']} on {task['NodeList']};" in said
    leaves = [task["JobId"] for task in facts].index(array)
    work.cluster.run("scancel", "--signal=USR1", f"{array}_{leaves}")
    work.wait_for_requeue(f"{array}_{leaves}", 1)
    stays = work.cluster.facts(f"{array}_{1 - leaves}")
    assert (stays["JobState"], stays["Restarts"]) == ("RUNNING", "0")
    assert sessions((first, second)[leaves])[:1] == ["interrupted"]
    assert sessions((first, second)[1 - leaves]) == ["killed"]  # which is how a run looks that goes on


def test_submitted_by_rookery_and_again_by_its_script(work: Work) -> None:
    done = rookery(
        work, "--slurm", "--nproc", 1, "--threads", 1, "--sbatch=--comment=two words", "train.stop_after=2steps"
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split("submitted job ")[1].split(":")[0]
    run = work.run("run")
    assert f"logs: {run / LOGS}" in done.stdout
    work.wait(job, "COMPLETED")
    assert read_metrics(run)[-1]["step"] == 2
    assert {path.name for path in (run / LOGS).iterdir()} >= {f"slurm-{job}.out"}
    script = (run / SCRIPT).read_text()
    assert '#SBATCH "--comment=two words"' in script
    (run / SCRIPT).write_text(script.replace("stop_after=2steps", "stop_after=4steps"))
    (work.folder / "another way").symlink_to(work.folder)
    again = work.cluster.run(work.folder / "another way" / "runs" / "run" / SCRIPT, "--parsable").strip()
    work.wait(again, "COMPLETED")
    assert read_metrics(run)[-1]["step"] == 4
    assert "two words" in (run / SCRIPT).read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc", "1", "--partition", "nowhere"], ["sbatch refuses", "invalid partition"]),
        (["--nproc", "1", "--time", "soon"], ["sbatch refuses", "Invalid --time"]),
        (["--nproc", "1", "--sbatch", "--no-such-option=1"], ["sbatch refuses", "no-such-option"]),
        (["--nproc", "1", "--sbatch", "account"], ["--sbatch=--account=vision"]),
        (["--nproc", "5"], ["5 processes", "multiple of 5"]),
        ([], ["--nproc"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_refused(arguments: list[str], expected: list[str], work: Work, fork_server: ForkServer) -> None:
    words = ("train", work.recipe, "--slurm", *arguments)
    done = fork_server.command(work.folder, *words, check=2, env=work.cluster.environment)
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr
    assert not work.run("run").exists()


def test_preempted_while_it_starts(work: Work) -> None:
    """Before `rookery train` on the node listens to signals, or has anything to save."""
    job = work.submit(ROOT / "slurm" / "train_nest.sh", work.recipe, ENDLESS, "name=early")
    wait_for(lambda: work.state(job) or [*work.run("early").glob(f"{LOGS}/{job}-*")], "a start", work.logs)
    work.cluster.run("scancel", "--signal=USR1", job)
    work.wait_for_requeue(job, 1)
    assert "rookery: back in the queue after step 0" in (work.folder / f"slurm-{job}.out").read_text()


def test_a_mistake_ends_the_job_with_its_message(work: Work) -> None:
    job = work.submit(ROOT / "slurm" / "train_nest.sh", work.recipe, "train.epoch=3")
    work.wait(job, "FAILED")
    assert work.cluster.facts(job)["ExitCode"] == "2:0"
    assert "train.epochs" in (work.folder / f"slurm-{job}.out").read_text()


def test_archives_to_shards(work: Work) -> None:
    """The job is asked to leave in the middle, and Slurm starts it again."""
    archives, shards = work.folder / "archives", work.folder / "shards"
    archives.mkdir()
    train_tar(archives / "ILSVRC2012_img_train.tar", per_class=500)
    val_tar(archives / "ILSVRC2012_img_val.tar")
    devkit(archives, archive=True)
    options = ["--shard-samples", 5, "--workers", 1]
    job = work.submit(ROOT / "slurm" / "prep_imagenet.sh", archives, shards, *options)
    wait_for(lambda: work.state(job) or len([*shards.rglob("*.tar")]) > 3, "some shards", work.logs)
    work.cluster.run("scancel", "--batch", "--signal=USR1", job)
    work.wait_for_requeue(job, 1)
    work.wait(job, "COMPLETED")
    expected = prepare_splits(archives, work.folder / "expected", PrepOptions(shard_samples=5, workers=1))
    for split, manifest in expected.items():
        assert ShardSet(shards / split).manifest.fingerprint() == manifest.fingerprint()
    said = (work.folder / f"slurm-{job}.out").read_text()
    assert "of them finished" in said and "everything is as it was made" in said


def rookery(work: Work, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("train", work.recipe, *arguments),
        cwd=work.folder,
        env=work.cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_sweep_over_two_nodes(work: Work) -> None:
    """Hyperband: two trials run to their end, of two that wait for each other the better one does.

    The job is asked to leave when the first one is over, and Slurm starts it again.
    """
    tree = {
        "recipe": work.recipe.name,
        "overrides": ["train.epochs=16steps", "eval.every=4steps", "checkpoint.every=4steps", "data.augment_by=pillow"],
        "space": {"optim.lr": {"grid": [1e-4, 1e-3, 3e-3, 1e-2]}},
        "scheduler": {"kind": "hyperband", "grace": "0.25ep", "factor": 2},
        "metric": "loss",
        "resources": {"cpus": 2},
    }
    (work.folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    job = work.submit("--nodes=2", ROOT / "slurm" / "sweep.sh", "sweep.yaml")
    result = work.folder / "runs" / "sweep" / "sweep.json"

    def trials() -> list[dict[str, Any]]:
        return json.loads(result.read_text())["trials"] if result.exists() else []

    def over() -> list[str]:
        work.state(job)
        return [trial["name"] for trial in trials() if trial["state"] == "finished"]

    first = wait_for(over, "a trial is over", work.logs)[0]
    work.cluster.run("scancel", "--batch", "--signal=USR1", job)
    work.wait_for_requeue(job, 1)
    started = (work.folder / "runs" / "sweep" / "trials" / first / "sessions.jsonl").read_bytes()
    work.wait(job, "COMPLETED")
    assert [trial["state"] for trial in trials()][:2] == ["finished", "finished"]
    assert sorted(trial["state"] for trial in trials()[2:]) == ["finished", "stopped"]
    losses = {trial["state"]: trial["figures"]["loss"] for trial in trials()[2:]}
    assert losses["finished"] < losses["stopped"]
    assert (work.folder / "runs" / "sweep" / "trials" / first / "sessions.jsonl").read_bytes() == started
    said = (work.folder / f"slurm-{job}.out").read_text()
    assert "SIGUSR1: trials save and end" in said and "back in the queue" in said
    for trial in trials():
        metrics = read_metrics(work.folder / "runs" / "sweep" / "trials" / trial["name"])
        assert [line["step"] for line in metrics if line["kind"] == "eval"] == (
            [4, 8, 12, 16] if trial["state"] == "finished" else [4, 8]
        )
