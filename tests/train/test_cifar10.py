"""The CIFAR-10 recipe on real images: it learns, and a kill in the middle leaves no trace."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.tracking.metrics import read_metrics
from pipeline.train.export import WEIGHTS
from pipeline.train.trace import read_trace
from tests.train.commands import ROOT, command, environment, run_command

STEPS, BATCH, KILLED_AFTER = 40, 8, 16


@pytest.mark.chaos
@pytest.mark.timeout(5400)
def test_nest_tiny_learns_and_survives_a_kill(real_data: Path, tmp_path: Path) -> None:
    shards = tmp_path / "cifar10"
    # 10,000 images are enough for so few steps.
    prepare_splits(str(real_data / "cifar10" / "test.parquet"), shards, PrepOptions(workers=2))
    arguments = (
        ROOT / "configs" / "nest" / "tiny_cifar10.yaml",
        f"data.train={shards / 'test'}",
        "data.val=null",
        "data.trace=true",
        # The recipe's schedule spans 300 epochs; this is one of its own, 40 steps long.
        f"train.epochs={STEPS}steps",
        "optim.schedule.warmup=6steps",
        "optim.lr=5e-4",
        "optim.lr_batch=null",
        f"train.global_batch_size={BATCH}",
        # Ten times as fast as bf16 on a CPU without instructions for it.
        "train.precision=fp32",
        "train.log_every=1steps",
        "checkpoint.every=7steps",
        "tracking.mlflow=false",
        "--nproc",
        2,
        "--threads",
        1,
    )
    run_command(tmp_path, "train", *arguments, "name=whole", timeout=2400)
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"

    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command("train", *arguments, "name=cut"),
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env=environment(),
            start_new_session=True,
        )
        while process.poll() is None and len(losses(cut)) < KILLED_AFTER:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert KILLED_AFTER <= len(losses(cut)) < STEPS
    run_command(tmp_path, "train", *arguments, "name=cut", timeout=2400)

    assert sha256(cut / "final" / WEIGHTS) == sha256(whole / "final" / WEIGHTS)
    assert losses(cut) == losses(whole)
    assert mean(losses(whole)[-15:]) < mean(losses(whole)[:15]) - 0.02
    samples = read_trace(whole)
    assert read_trace(cut) == samples
    used = Counter(key for keys in samples.values() for key in keys)
    assert len(used) == STEPS * BATCH and set(used.values()) == {1}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"] if run.exists() else []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
