"""Killed at any moment and started again, a run ends with the same bits and has used the same samples."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_prep.manifest import Manifest, load_index
from pipeline.tracking.metrics import read_metrics
from pipeline.train.export import WEIGHTS
from pipeline.train.trace import read_trace
from tests.train.commands import command, environment
from tests.train.conftest import Rookery, write_recipe
from tests.train.forked import ForkServer

DDP, FSDP = ("engine.name=ddp",), ("engine.name=fsdp",)
TARS, FFCV = "webdataset", "ffcv"
ZERO0, ZERO1, ZERO2, ZERO3 = (("engine.name=deepspeed", f"engine.zero_stage={stage}") for stage in range(4))
OFFLOAD = (*ZERO2, "engine.offload_optimizer=true")
BF16, FP16 = ("train.precision=bf16",), ("train.precision=fp16",)


def kill_after(lines: int, seconds: float, number: int, run: Path, log: Path, *args: object) -> None:
    """Start a training and send a signal to its process group after so many new lines of metrics, plus `seconds`."""
    with open(log, "a") as out:
        process = subprocess.Popen(
            command("train", *args), stdout=out, stderr=out, env=environment(), cwd=log.parent, start_new_session=True
        )
        path = run / "metrics.jsonl"
        lines += len(path.read_text().splitlines()) if path.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and len(path.read_text().splitlines()) >= lines:
                break
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, number)
        assert process.wait() != 0


@pytest.mark.chaos
@pytest.mark.parametrize(("nproc", "kills"), [(1, 1), (2, 3)])
def test_kill_and_resume_is_bit_identical(
    nproc: int, kills: int, recipe: Path, rookery: Rookery, fork_server: ForkServer, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"kill moments from seed {seed}")
    moments = random.Random(seed)
    options = (recipe, "--nproc", nproc, "--threads", 1)
    fork_server.train(recipe, "name=whole", nproc=nproc)
    for number in [signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL][:kills]:
        # All three within 24 steps, of which a fast machine takes many a second.
        moment = moments.randint(1, 5), moments.uniform(0, 0.05)
        kill_after(*moment, number, tmp_path / "runs" / "cut", tmp_path / "log", *options, "name=cut")
    rookery("train", *options, "name=cut")
    check_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("engine", "nproc", "shards"),
    [
        (FSDP + BF16, 3, TARS),
        (ZERO0 + FP16, 2, TARS),
        (ZERO1, 2, TARS),
        (ZERO2 + BF16, 2, TARS),
        (OFFLOAD + BF16, 2, TARS),
        (DDP, 2, FFCV),
    ],
)
def test_other_engines_and_shards_do_it_too(
    engine: tuple[str, ...],
    nproc: int,
    shards: str,
    recipe: Path,
    ffcv_digits: tuple[str, ...],
    fork_server: ForkServer,
    tmp_path: Path,
) -> None:
    """And precisions: those that test_chaos.py leaves out. On FFCV shards a run ends as the one on tars does."""
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fork_server.train(recipe, *engine, "name=whole", nproc=nproc)
    engine += ffcv_digits if shards == FFCV else ()
    job = fork_server.start(recipe, *engine, "name=cut", nproc=nproc)
    deadline = time.monotonic() + 120
    while len(read_metrics(cut)) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill()
    assert set(job.wait()) == {-9}
    fork_server.train(recipe, *engine, "name=cut", nproc=nproc)
    check_same_run(whole, cut)


def check_same_run(whole: Path, cut: Path) -> None:
    for weights in ("final", "best"):
        assert (cut / weights / WEIGHTS).read_bytes() == (whole / weights / WEIGHTS).read_bytes()
    assert read_trace(cut) == read_trace(whole)
    assert losses(cut) == losses(whole)
    of_cut, of_whole = (json.loads((run / "result.json").read_text()) for run in (cut, whole))
    assert of_cut.pop("wall_seconds") > 0 and of_whole.pop("wall_seconds") > 0
    assert of_cut == of_whole


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run) if line["kind"] == "train"]


def test_an_epoch_uses_every_sample_once(recipe: Path, rookery: Rookery, tmp_path: Path, digits: Path) -> None:
    rookery("train", recipe, "train.epochs=2ep", "eval.every=2ep", "--nproc", 2)
    trace = read_trace(tmp_path / "runs" / "run")
    manifest = Manifest.load(digits / "train")
    every = [key.decode() for shard in manifest.shards for key in load_index(digits / "train", shard)["key"]]
    steps = len(every) // 48
    assert sorted(trace) == list(range(2 * steps))
    for epoch in (0, 1):
        used = Counter(key for step in range(epoch * steps, (epoch + 1) * steps) for key in trace[step])
        assert set(used.values()) == {1} and len(used) == steps * 48 and used.keys() <= set(every)


# Processes of each start, and the step after which it stops.
TWO_ONE_THREE = [(2, 8), (1, 12), (3, 17), (2, 24)]
UP_AND_DOWN = [(1, 5), (2, 9), (4, 14), (3, 19), (1, 24)]


@pytest.mark.parametrize(
    ("engines", "starts", "shards"),
    # Every engine goes on from the checkpoint of any other, so a chain may change it as well.
    [
        ((DDP, DDP, DDP, DDP), TWO_ONE_THREE, TARS),
        ((FSDP, FSDP, FSDP, FSDP), TWO_ONE_THREE, TARS),
        ((ZERO3, ZERO1, ZERO2, ZERO3), TWO_ONE_THREE, TARS),
        ((DDP, FSDP, ZERO3, FSDP), TWO_ONE_THREE, FFCV),
        ((ZERO1, DDP, FSDP, ZERO2), TWO_ONE_THREE, TARS),
        ((FSDP, DDP, ZERO1, ZERO3, DDP), UP_AND_DOWN, TARS),
    ],
    ids=["ddp", "fsdp", "stages", "ddp to fsdp to deepspeed, ffcv", "deepspeed to ddp to fsdp", "up and down"],
)
def test_another_world_size_uses_the_same_samples_and_losses(
    engines: tuple[tuple[str, ...], ...],
    starts: list[tuple[int, int]],
    shards: str,
    digits: Path,
    ffcv_digits: tuple[str, ...],
    tmp_path: Path,
    fork_server: ForkServer,
) -> None:
    recipe = write_recipe(digits, tmp_path, augment=set(engines) == {DDP})
    # A small rate: Adam divides by the gradient's size, so at a large one rounding grows faster than it would in SGD.
    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.0001"))
    fork_server.train(recipe, "name=one")
    for engine, (nproc, stop) in zip(engines, starts, strict=True):
        engine += ffcv_digits if shards == FFCV else ()  # the single process had tars
        fork_server.train(recipe, *engine, "name=many", f"train.stop_after={stop}steps", nproc=nproc)
    one, many = tmp_path / "runs" / "one", tmp_path / "runs" / "many"
    assert read_trace(many) == read_trace(one)
    assert losses(many) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(one)]


def test_batch_norms_do_not_depend_on_the_world_size(
    recipe: Path, rookery: Rookery, fork_server: ForkServer, tmp_path: Path
) -> None:
    """The released Refiner: statistics per lane chunk, running averages over the step, wherever the lanes are read."""
    tree = yaml.safe_load(recipe.read_text())
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "aux_head": False}
    tree["model"] = {"name": "refiner_vit_s", "in_chans": 1, "img_size": 16, "options": options}
    tree["optim"]["lr"] = 1e-4
    recipe.write_text(yaml.safe_dump(tree))
    fork_server.train(recipe, "name=one", "train.epochs=8steps")
    for engine, nproc, stop, accumulate in ((ZERO3, 2, 3, 1), (ZERO1, 1, 5, 3), (DDP, 3, 8, 2)):
        options = (*engine, "name=many", "train.epochs=8steps", f"train.accumulate={accumulate}")
        fork_server.train(recipe, *options, f"train.stop_after={stop}steps", nproc=nproc)
    fork_server.train(recipe, "name=sharded", "train.epochs=8steps", "engine.name=fsdp", nproc=2)
    for name, engine in (("lean_zero3", ZERO3), ("lean_sharded", ("engine.name=fsdp",))):
        lean = "train.activation_checkpointing=maps"
        fork_server.train(recipe, f"name={name}", "train.epochs=8steps", lean, *engine, nproc=2)
    one = tmp_path / "runs" / "one"
    wanted = load_file(one / "final" / WEIGHTS)
    running = [name for name in wanted if "running_" in name]
    assert len(running) == 2 * (3 + 4)
    for other in (tmp_path / "runs" / name for name in ("many", "sharded", "lean_zero3", "lean_sharded")):
        assert losses(other) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(one)]
        weights = load_file(other / "final" / WEIGHTS)
        for name in running:
            assert not torch.equal(wanted[name], torch.full_like(wanted[name], float(name.endswith("var"))))
            torch.testing.assert_close(weights[name], wanted[name], rtol=1e-3, atol=1e-4)
    refused = rookery("train", recipe, "name=other", "train.accumulate=24", check=2)
    assert "train.accumulate=24 leaves 2 samples to a micro-batch" in refused.stderr


def test_a_finished_run_is_not_run_again(recipe: Path, rookery: Rookery, tmp_path: Path) -> None:
    first = rookery("train", recipe, "train.epochs=4steps", "optim.schedule.warmup=1steps")
    weights = (tmp_path / "runs" / "run" / "final" / WEIGHTS).read_bytes()
    # As saved by a version that did not know these keys yet.
    saved = tmp_path / "runs" / "run" / "config.yaml"
    saved.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(saved.read_text()).items() if k != "objective"}))
    again = rookery("train", recipe, "train.epochs=4steps", "optim.schedule.warmup=1steps")
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert (tmp_path / "runs" / "run" / "final" / WEIGHTS).read_bytes() == weights
    assert "step 4/4" not in again.stdout
