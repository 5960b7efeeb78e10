"""Slurm's answers read, its options written, and what can be refused without a cluster."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from launch.slurm import Allocation, fields, free_port, port
from launch.slurm_job import newest_step, step_environment
from launch.slurm_script import Request, options_of, standing_options, write_script
from pipeline.errors import UserError
from pipeline.train.checkpoint import COMMIT
from pipeline.train.cores import in_order, share
from pipeline.train.distributed import World
from pipeline.train.status import RESUBMIT
from pipeline.train.stop import StopRequest
from pipeline.train.walltime import job_here, leave_at
from tests.conftest import missing
from tests.train.commands import ROOT
from tests.train.conftest import Rookery, digits, fork_server, recipe, rookery

__all__ = ["digits", "fork_server", "recipe", "rookery"]

SHOWN = (
    "JobId=17 JobName=nest UserId=ann(1001) GroupId=vision(7) MCS_label=N/A Account=vision QOS=(null) "
    "JobState=RUNNING Requeue=1 Restarts=2 "
    "TimeLimit=1-00:00:00 Partition=gpu,spare ReqNodeList=(null) ExcNodeList=node7 NodeList=node[1-4] NumNodes=4-4 "
    "CPUs/Task=1 MinCPUsNode=1 MinMemoryNode=0 Features=h100 OverSubscribe=NO Licenses=(null) "
    "Command=/home/ann/her runs/run/resubmit.sh WorkDir=/home/ann Power= TresPerNode=gres:gpu:8 "
)


def test_fields_of_scontrol() -> None:
    found = fields(SHOWN)
    assert found["JobId"] == "17" and found["CPUs/Task"] == "1" and found["NodeList"] == "node[1-4]"
    assert found["Command"] == "/home/ann/her runs/run/resubmit.sh" and found["WorkDir"] == "/home/ann"
    assert found["TresPerNode"] == "gres:gpu:8" and found["GroupId"] == "vision(7)"
    assert not found.keys() & {"QOS", "Licenses", "Power"}


def test_a_job_is_asked_for_again() -> None:
    assert set(options_of(fields(SHOWN))) == {
        "--nodes=4",
        "--partition=gpu,spare",
        "--account=vision",
        "--time=1-00:00:00",
        "--gres=gpu:8",
        "--mem=0",
        "--constraint=h100",
        "--exclude=node7",
        "--exclusive",
    }


@pytest.mark.parametrize(
    ("fields_", "expected"),
    [
        ({"TresPerTask": "gres:gpu:1"}, ["--gpus-per-node=8"]),
        ({"TresPerTask": "cpu=4,gres/gpu=1"}, ["--gpus-per-node=8"]),
        ({"TresPerSocket": "gres:gpu:h100:4"}, ["--gpus-per-node=h100:8"]),
        ({"TresPerTask": "cpu=4"}, []),
        ({"TresPerJob": "gres:gpu:16"}, ["--gpus=16"]),
    ],
    ids=str,
)
def test_gpus_of_tasks_are_asked_for_as_those_of_nodes(
    fields_: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert options_of(fields_) == expected


def test_the_one_task_of_a_node_gets_all_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"SLURM_GPUS_PER_TASK": "1", "SLURM_NTASKS_PER_GPU": "1", "SLURM_GPU_BIND": "single:1"}
    kept = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17", "NCCL_DEBUG": "INFO"}
    for name, value in (asked | kept).items():
        monkeypatch.setenv(name, value)
    environment = step_environment()
    assert environment.items() >= kept.items() and not environment.keys() & asked.keys()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:4"}, 6),
        ({"ROOKERY_NPROC": "3", "SLURM_GPUS_ON_NODE": "8"}, 3),
    ],
    ids=str,
)
def test_processes_of_a_node(environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Allocation("1", "1", 1, None, 0, {}).processes() == expected


def test_a_wrong_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_NPROC", "all")
    with pytest.raises(UserError, match="ROOKERY_NPROC=all"):
        Allocation("1", "1", 1, None, 0, {}).processes()


def test_a_port_in_use_is_passed_over() -> None:
    ports = {port(str(job)) for job in range(10_000, 10_400)}
    assert len(ports) == 400 and min(ports) >= 15000 and max(ports) < 31100
    job = next(str(job) for job in range(20_000, 30_000) if free_port(str(job)) == port(str(job)))
    with socket.socket() as taken:
        taken.bind(("", port(job)))
        taken.listen()
        assert free_port(job) > port(job)
    assert free_port(job) == port(job)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "17_3"),
        ({"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0"}, "17_0"),
    ],
    ids=str,
)
def test_a_task_of_an_array_has_a_name_of_its_own(
    environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job_here() == expected


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(Path("a.yaml"), ("seed=1",), None, None), ["a.yaml", "seed=1", "--on-allocation"]),
        (
            Request(Path("a.yaml"), (), 8, 4, 0),
            ["a.yaml", "--nproc", "8", "--threads", "4", "--restarts", "0", "--on-allocation"],
        ),
    ],
    ids=["little", "all"],
)
def test_what_a_job_script_repeats(request_: Request, expected: list[str]) -> None:
    assert request_.arguments() == expected


NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("start", "end", "margin", "expected"),
    [
        (NOW, NOW + 86400, 300, NOW + 86400 - 300),
        (NOW, NOW + 600, 300, NOW + 540),
        (NOW, NOW + 600, 0, NOW + 600),
        (NOW, None, 300, None),
        (NOW, "N/A", 300, None),
    ],
)
def test_when_to_leave(
    start: float, end: object, margin: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(start))
    if end is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert leave_at(margin, may_ask=True) == expected


def test_the_clock_asks_to_be_submitted_again(cpu_world: World) -> None:
    assert StopRequest(cpu_world, time.time() - 1).decided() == RESUBMIT
    assert StopRequest(cpu_world, time.time() + 3600).decided() is None


@pytest.fixture
def cpu_world() -> World:
    import torch

    return World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(("count", "size"), [(8, 2), (8, 3), (2, 2), (64, 8)])
def test_shares_of_the_cores(count: int, size: int) -> None:
    cores = [*range(count)]
    shares = [share(cores, rank, size) for rank in range(size)]
    assert {len(part) for part in shares} == {count // size}
    assert [core for part in shares for core in part] == cores[: count // size * size]


def test_all_cores_have_a_place() -> None:
    assert sorted(in_order(range(4))) == [0, 1, 2, 3]


def test_newest_step(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000005", "step-00000020", "step-00000030", ".part-00000040"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-00000005", "step-00000020"):
        (tmp_path / "checkpoints" / name / COMMIT).touch()
    assert newest_step(tmp_path) == 20


def scripts() -> list[Path]:
    return sorted((ROOT / "slurm").glob("*.sh"))


def test_scripts_are_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0 or 'eth1'")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    options = [*standing_options("run", tmp_path / "run"), "--comment=two words"]
    written = write_script(tmp_path / "run", options, ["a recipe.yaml", "mix={mixup_alpha: 0.2}", "--on-allocation"])
    text = written.read_text()
    assert """export NCCL_SOCKET_IFNAME='eth0 or '"'"'eth1'"'"''""" in text and "hidden" not in text
    assert "train 'a recipe.yaml' 'mix={mixup_alpha: 0.2}' --on-allocation" in text
    assert '#SBATCH "--comment=two words"' in text
    assert len(scripts()) >= 4 and all(path.stat().st_mode & 0o111 for path in [written, *scripts()])
    if shutil.which("shellcheck") is None:
        missing("shell scripts left out: shellcheck is not installed")
    done = subprocess.run(["shellcheck", written, *scripts()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_job_script_keeps_no_credentials(tmp_path: Path) -> None:
    arguments = ["recipe.yaml", "data.train=s3://AKIA:se/cret@bucket/train", "--on-allocation"]
    with pytest.raises(UserError, match=r"data.train=s3://\*\*\*@bucket/train: the job script would keep these") as e:
        write_script(tmp_path / "run", [], arguments)
    assert "se/cret" not in str(e.value) and not (tmp_path / "run").exists()
    text = write_script(tmp_path / "run", [], ["recipe.yaml", "data.train=s3://bucket/train"]).read_text()
    assert "data.train=s3://bucket/train" in text


@pytest.mark.parametrize("script", [path for path in scripts() if path.name.startswith("train_")], ids=lambda p: p.name)
def test_default_recipe_of_a_script(script: Path, tmp_path: Path) -> None:
    """The script itself, with a `rookery` that prints its arguments."""
    fake = tmp_path / ".venv" / "bin" / "rookery"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    fake.chmod(0o755)

    def arguments(*given: str) -> list[str]:
        done = subprocess.run([script, *given], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.rstrip("|").split("|")

    command, default, *rest = arguments()
    assert command == "train" and (ROOT / default).is_file() and rest == ["--on-allocation"]
    assert arguments("seed=3") == ["train", default, "seed=3", "--on-allocation"]
    assert arguments("--nproc", "2") == ["train", default, "--nproc", "2", "--on-allocation"]
    assert arguments("my.yaml", "name=a b") == ["train", "my.yaml", "name=a b", "--on-allocation"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--slurm", "--nproc", "2"], ["sbatch is not installed here"]),
        (["--slurm", "--nproc", "2", "--rendezvous", "host:1"], ["--rendezvous"]),
        (["--time", "1:00"], ["--slurm"]),
        (["--sbatch=--qos=high"], ["--slurm"]),
        (["--on-allocation"], ["this is no Slurm job", "sbatch slurm/train_nest.sh"]),
        (["--on-allocation", "--dry-run"], ["leave --slurm and --dry-run out"]),
        (["--on-allocation", "--slurm"], ["leave --slurm and --dry-run out"]),
        (["--on-allocation", "--nodes", "2"], ["takes all nodes of this job"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_refused(
    arguments: list[str],
    expected: list[str],
    recipe: Path,
    rookery: Rookery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    done = rookery("train", recipe, *arguments, check=2)
    assert "Traceback" not in done.stdout + done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_any_task_can_be_submitted(rookery: Rookery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of sentences is checked, forecast by a dry run, and goes as far as sbatch, which is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("train", ROOT / "configs" / "nlp" / "demo.yaml", "--slurm", "--nproc", "1")
    forecast = rookery(*words, "--dry-run", "--images-per-second", "100")
    assert "GPU-hours at 100 " in forecast.stdout and "memory of a process" in forecast.stdout
    assert "sbatch is not installed here" in rookery(*words, check=2).stderr
    assert "choose another out=" in rookery(*words, "out=/proc/nowhere", check=2).stderr
    assert not (tmp_path / "runs").exists()
