"""What a user can get wrong: one clear message, exit status 2, no traceback, nothing overwritten."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.tracking.run_dir import RunDir
from tests.train.conftest import Rookery
from tests.train.forked import ForkServer

CASES = {
    "out is a file": (["{recipe}", "out={recipe}"], ["recipe.yaml: not a folder; choose another out=..."]),
    "out below a file": (["{recipe}", "out={recipe}/x", "--dry-run"], ["recipe.yaml is no folder", "another out=..."]),
    "out of the kernel": (["{recipe}", "out=/proc/x", "--dry-run"], ["/proc/x: can't be written"]),
    "no such recipe": (["missing.yaml"], ["missing.yaml", "no such config"]),
    "typo in a key": (["{recipe}", "train.epoch=3"], ["train.epoch", "train.epochs"]),
    "no override": (["{recipe}", "train.epochs"], ["key=value"]),
    "no shards": (["{recipe}", "data.train=nowhere"], ["nowhere", "rookery prep"]),
    "parent of the splits": (["{recipe}", "data.train={digits}"], ["test, train"]),
    "unknown model": (["{recipe}", "model.name=nest_tny"], ["nest_tny", "nest_tiny"]),
    "unknown model option": (["{recipe}", "model.options.depth=3"], ["depth"]),
    "no maps to recompute": (
        ["{recipe}", "train.activation_checkpointing=maps"],
        ["train.activation_checkpointing=maps", "refines no attention maps", "set it to true"],
    ),
    "image size that nothing can take": (
        ["{recipe}", "model.img_size=100000", "--dry-run"],
        ["less than or equal to 8192"],
    ),
    "image size the model can't take": (["{recipe}", "model.img_size=30"], ["30"]),
    "classes": (["{recipe}", "model.num_classes=7"], ["model.num_classes=7", "10 classes"]),
    "lanes": (["{recipe}", "data.lanes=7"], ["data.lanes=7", "train.global_batch_size=48"]),
    "processes": (["{recipe}", "--nproc", "5"], ["5 processes", "multiple of 5"]),
    "accumulate": (["{recipe}", "train.accumulate=7"], ["train.accumulate=7", "48"]),
    "batch above the data": (["{recipe}", "train.global_batch_size=4800"], ["train.global_batch_size", "1437"]),
    "no partner to mix with": (["{recipe}", "data.lanes=48"], ["data.lanes", "mix.prob=0"]),
    "ema weights without ema": (["{recipe}", "train.ema_decay=null", "eval.weights=ema"], ["train.ema_decay"]),
    "warm-up as long as the run": (["{recipe}", "optim.schedule.warmup=30steps"], ["optim.schedule.warmup=0ep"]),
    "cool-down as long as the rest": (
        ["{recipe}", "optim.schedule.cooldown=20steps"],
        ["warmup=4steps (4 steps) + cooldown=20steps (20 steps)", "optim.schedule.cooldown=0ep"],
    ),
    "no weights to start from": (["{recipe}", "model.init={digits}"], ["model.init={digits}", "no weights there"]),
    "channels": (["{recipe}", "augment.normalize=cifar10"], ["augment.normalize"]),
    "several nodes without a meeting point": (["{recipe}", "--nodes", "2"], ["--rendezvous"]),
}


def test_a_run_that_never_took_a_step_binds_nobody(recipe: Path, rookery: Rookery, tmp_path: Path) -> None:
    """After a mistake that shows in the first batch only the same name can be used again; after a step it can't."""
    run = tmp_path / "runs" / "run"
    short = ("train.epochs=6steps", "train.stop_after=2steps", "optim.schedule.warmup=1steps")
    tree = load_config(recipe, [*short, "optim.lr=7"]).model_dump(mode="json")
    RunDir.open(run, tree, {}).close("failed")
    (run / "mlflow.json").write_text("{}")
    rookery("train", recipe, *short, "--dry-run")
    assert (run / "mlflow.json").exists()
    rookery("train", recipe, *short)
    assert RunDir.saved_config(run) != tree and len(read_metrics(run)) > 1 and not (run / "mlflow.json").exists()
    for more in ([], ["--dry-run"]):
        done = rookery("train", recipe, *short, "optim.lr=7", *more, check=2)
        assert "holds a run with another config (optim.lr: 0.001 there, 7" in done.stderr
        assert "starting" not in done.stdout


@pytest.mark.parametrize("case", CASES)
def test_message_and_status(case: str, recipe: Path, digits: Path, rookery: Rookery, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    done = rookery("train", *(a.format(recipe=recipe, digits=digits) for a in arguments), check=2)
    assert "Traceback" not in done.stdout + done.stderr
    for text in expected:
        assert text.format(digits=digits) in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (9, r"\(9 classes and 10 classes\): number 9 is missing in data.val and is '9' in data.train; prepare both"),
        (1, r"\(1 class and 10 classes\): number 1 is missing in data.val and is '1' in data.train"),
        (11, r"\(11 classes and 10 classes\): number 10 is '10' in data.val and is missing in data.train"),
        (-10, r"\(10 classes and 10 classes\): number 0 is 'x0' in data.val and is '0' in data.train"),
    ],
)
def test_classes_that_differ_are_told_by_the_first(
    classes: int, told: str, recipe: Path, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "test", tmp_path / "val")
    names = [f"{'x' if classes < 0 else ''}{number}" for number in range(abs(classes))]
    replace(Manifest.load(tmp_path / "val"), classes=names).save(tmp_path / "val")
    with pytest.raises(UserError, match=f"data.val={tmp_path}/val has other classes than data.train=.* {told}"):
        resolve(load_config(recipe, [f"data.val={tmp_path}/val"]), 1)


def test_a_single_class_is_no_classification(recipe: Path, digits: Path, tmp_path: Path) -> None:
    """As of a folder one too high: top-1 would be 1 from the first step on."""
    shutil.copytree(digits / "train", tmp_path / "train")
    replace(Manifest.load(tmp_path / "train"), classes=["images"]).save(tmp_path / "train")
    with pytest.raises(UserError, match=f"data.train={tmp_path}/train has a single class, so there is nothing to tell"):
        resolve(load_config(recipe, [f"data.train={tmp_path}/train"]), 1)


SHORT = ("train.epochs=4steps", "optim.schedule.warmup=1steps", "checkpoint.every=2steps")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("override", "expected"),
    [("optim.lr=0.5", "optim.lr"), ("seed=9", "seed"), ("resume=never", "resume=never")],
)
def test_another_run_in_the_directory_is_left_alone(
    override: str, expected: str, recipe: Path, rookery: Rookery, tmp_path: Path
) -> None:
    rookery("train", recipe, *SHORT)
    before = snapshot(tmp_path / "runs")
    done = rookery("train", recipe, *SHORT, override, check=2)
    assert expected in done.stderr and "name=" in done.stderr
    assert snapshot(tmp_path / "runs") == before


def test_other_data_under_the_same_path(recipe: Path, rookery: Rookery, tmp_path: Path, digits: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data)
    rookery("train", recipe, *SHORT, f"data.train={data}")
    shutil.rmtree(data)
    shutil.copytree(digits / "test", data)
    done = rookery("train", recipe, *SHORT, f"data.train={data}", check=2)
    assert "other shards" in done.stderr


def test_a_shard_that_disappeared(recipe: Path, rookery: Rookery, tmp_path: Path, digits: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data)
    victim = sorted(data.glob("*.tar"))[3]
    victim.unlink()
    done = rookery("train", recipe, *SHORT, f"data.train={data}", "--nproc", 2, check=2)
    assert victim.name in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count(victim.name) == 1


def test_two_runs_in_one_directory(recipe: Path, rookery: Rookery, tmp_path: Path) -> None:
    import fcntl

    rookery("train", recipe, *SHORT, "train.stop_after=2steps")
    before = snapshot(tmp_path / "runs")
    with open(tmp_path / "runs" / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = rookery("train", recipe, *SHORT, "--nproc", 2, check=2)
    assert "another run is writing" in done.stderr and "Traceback" not in done.stderr
    assert snapshot(tmp_path / "runs") == before


def test_kernels_without_a_gpu_are_told(recipe: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    options = ("model.options.kernels=triton", "data.val=null", "train.stop_after=1steps")
    done = fork_server.command(tmp_path, "train", recipe, *options)
    assert "kernels=triton: this is no GPU, so PyTorch computes the same" in done.stdout + done.stderr
