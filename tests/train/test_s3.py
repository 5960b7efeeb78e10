"""From raw images to weights over a real S3 server, and through a network that fails, stalls and corrupts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import yaml
from typer.testing import CliRunner

from data_prep.manifest import Manifest
from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch import cli
from launch.eval_cli import find_job
from pipeline.train.distributed import World
from pipeline.train.eval_worker import run_job
from tests.faulty_server import Faults, FaultyServer, another
from tests.folder_watch import Watch
from tests.s3_server import S3Server
from tests.train.commands import command, environment, run_command
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer

pytestmark = pytest.mark.s3

# A secret as Amazon's are: with a slash in it.
KEY, SECRET = f"AKIA{token_hex(8).upper()}", f"{token_hex(9)}/{token_hex(9)}"
STORE = f"s3://{KEY}:{SECRET}@bucket/digits"
SHARD_SAMPLES = 100
SEED = 5


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    """The S3 server, behind a network that works until a test sets its `fault`."""
    with (
        S3Server(tmp_path_factory.mktemp("s3")) as server,
        FaultyServer(another(server.port)) as network,
        pytest.MonkeyPatch.context() as patch,
    ):
        for variable in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(variable)
        patch.setenv("AWS_ENDPOINT_URL", network.uri)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("ROOKERY_STORE_SECONDS", "4")
        yield network


@pytest.fixture(autouse=True)
def works_again(network: FaultyServer) -> Iterator[None]:
    yield
    network.fault = lambda request: None


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    prepare_splits("digits", out, PrepOptions(workers=1, shard_samples=SHARD_SAMPLES))
    return out


@pytest.fixture(scope="module")
def stored(network: FaultyServer, local: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits, prepared into the store through a faulty network, killed half-way and started again."""
    network.fault = faults = Faults(SEED, failing=0.05, stalling=0.02)
    arguments = ("prep", "digits", STORE, "--workers", 1, "--shard-samples", SHARD_SAMPLES)
    folder = tmp_path_factory.mktemp("prep")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command(*arguments), cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        wait_for(lambda: network.asked(".tar", "PUT") >= 6 or process.poll() is not None, 120)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "log").read_text()
    records, before = network.asked(".tar.json", "PUT"), network.asked(".tar", "PUT")
    done = run_command(folder, *arguments)
    said = done.stdout + done.stderr + (folder / "log").read_text()
    assert "of them finished" in said and SECRET not in said
    shards = sum(len(Manifest.load(local / split).shards) for split in ("train", "test"))
    uploads = network.asked(".tar", "PUT") - before
    assert shards - records <= uploads <= shards - records + len(faults.made), "only what is missing"
    assert {fault for fault, _ in faults.made} >= {"busy", "reset"}, faults.made
    return STORE


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_prepared_bytes(stored: str, local: Path) -> None:
    for split in ("train", "test"):
        assert Manifest.load(f"{stored}/{split}") == Manifest.load(local / split)
    done = CliRunner().invoke(cli._commands, ["verify", stored])
    assert done.stdout == "test, train: everything is as it was made\n"
    assert SECRET not in done.output


def recipe(local: Path, folder: Path) -> Path:
    """A run that reads its lanes in small windows, so that it moves on from shard to shard."""
    path = write_recipe(local, folder, augment=False)
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= {"lanes": 4, "window": 16}
    tree["train"] |= {"epochs": "36steps", "log_every": "6steps"}
    tree["eval"]["every"] = "18steps"
    tree["checkpoint"]["every"] = "12steps"
    path.write_text(yaml.safe_dump(tree))
    return path


def weights(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / "runs" / name / "final" / "model.safetensors").read_bytes()).hexdigest()


def test_training_through_a_faulty_network_gives_the_same_weights(
    network: FaultyServer, stored: str, local: Path, tmp_path: Path
) -> None:
    """Two processes with a loader process each; 5 % of the requests fail, 2 % stall, one shard arrives corrupted.

    The run is killed while it fetches, and started again. The cache has room for half of the shards.
    """
    path, cache = recipe(local, tmp_path), tmp_path / "cache"
    shards = Manifest.load(local / "train").shards
    limit = sum(shard.bytes for shard in shards) // 2
    remote = (f"data.train={stored}/train", f"data.val={stored}/test", "data.workers=1")
    remote += (f"data.cache={cache}", f"data.cache_gb={limit / 1e9}")
    with ForkServer(tmp_path) as server, Watch(cache) as watch:
        server.train(path, "name=clean", nproc=2)
        network.fault = faults = Faults(SEED, failing=0.05, stalling=0.02)
        requests = len(network.requests)
        job = server.start(path, "name=faulty", *remote, nproc=2)
        wait_for(lambda: cache.is_dir() and any(cache.glob("*.part")), 120)
        job.kill()
        assert set(job.wait()) == {-signal.SIGKILL}
        corrupted = next(shard.file for shard in shards if not (cache / shard.sha256).exists())
        faults.corrupted = corrupted
        server.train(path, "name=faulty", *remote, nproc=2)
        log = server.log.read_text()
    assert weights(tmp_path, "faulty") == weights(tmp_path, "clean"), log[-3000:]
    made = [fault for fault, _ in faults.made]
    print(f"{len(network.requests) - requests} requests, faults: { {fault: made.count(fault) for fault in set(made)} }")
    assert {"busy", "reset", "stall", "corrupt"} <= set(made)
    assert log.count(f"/{corrupted}: arrived damaged") == 1
    assert limit / 2 < watch.most <= limit and watch.looks > 1000
    assert network.asked("0.tar") + network.asked("5.tar") > 6, "some were fetched again after others took their room"
    for file in [server.log, *(tmp_path / "runs").rglob("*")]:
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    saved = yaml.safe_load((tmp_path / "runs" / "faulty" / "config.yaml").read_text())
    assert saved["data"]["train"] == "s3://***@bucket/digits/train"
    evaluate_again(tmp_path / "runs" / "faulty")


def evaluate_again(run: Path) -> None:
    """The run has forgotten the credentials; where the environment has them its address works as it is."""
    job = find_job(run, None, None, None)
    assert job.data == "s3://***@bucket/digits/test" and job.cache.directory == str(run.parents[1] / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        result = run_job(replace(job, workers=0), World(0, 1, 0, torch.device("cpu")))
    assert result["count"] == 360 and result["top1"] == json.loads((run / "result.json").read_text())["top1"]


def test_a_missing_credential_is_one_message(stored: str, local: Path, tmp_path: Path) -> None:
    path, place = recipe(local, tmp_path), "s3://bucket/digits/train"
    done = run_command(tmp_path, "train", path, f"data.train={place}", "--nproc", 2, check=2)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"rookery: {place}/manifest.json: no credentials that could be used")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in line
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_tells_what_is_read_and_kept(stored: str, local: Path, tmp_path: Path) -> None:
    path = recipe(local, tmp_path)
    options = (f"data.train={stored}/train", f"data.val={stored}/test", f"data.cache={tmp_path / 'cache'}")
    arguments = ["train", str(path), *options, "data.cache_gb=0.0015", "--dry-run"]
    done = CliRunner().invoke(cli._commands, arguments, env={"COLUMNS": "500"})
    said = " ".join(done.output.split())
    assert "data s3://***@bucket/digits/train, 1,437 samples in 15 shards; evaluated on 360 of s3://***@" in said
    assert "at most 1.5 MB: a node reads 3.0 MB an epoch and 0.7 MB to evaluate, of which 41% stays there" in said
    assert "shards of 3.0 MB per node" in said and SECRET not in said
    assert not (tmp_path / "cache").exists(), "a dry run fetches single samples"
