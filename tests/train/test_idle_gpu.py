"""Training on a GPU that computes nothing (`bench.idle_gpu`): a mock, for what no machine without a GPU can run.

What is checked holds on a true one as well: that a step is done on the device, in kernels that give the same bits each
time, without waiting for them, and how much memory it takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_load import load_config
from tests.recipe_cases import GENERATE, LANGUAGE, RECIPES, WHOLE, make_pictures, make_sentences
from tests.train.commands import ROOT, environment

COMMON = (
    *("train.global_batch_size=16", "optim.lr_batch=null", "data.lanes=4", "data.workers=0"),
    *("train.compile=false", "tracking.mlflow=false"),
)


def distinct() -> dict[str, Path]:
    """Recipes whose steps differ in more than size, samples and learning rates; if WHOLE, in size too."""
    found: dict[str, tuple[str, Path]] = {}
    larger = () if WHOLE else ("deit/small", "deit/base", "nest/small", "nest/base", "refiner/m", "refiner/l")
    for name, path in RECIPES.items():
        if name.startswith(larger):
            continue
        tree = load_config(path).model_dump(mode="json")
        tree["train"] = {key: tree["train"][key] for key in ("precision", "clip_grad_norm", "ema_decay")}
        step = {key: tree[key] for key in ("task", "model", "objective", "augment", "mix", "train")}
        step["resident"] = tree["data"]["resident"]
        found.setdefault(json.dumps(step, sort_keys=True), (name, path))
    return dict(found.values())


DISTINCT = distinct()
# The demo's recipe by every engine, and in the ways of a step that no recipe takes.
WAYS = {
    **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)},
    "fsdp": ["engine.name=fsdp"],
    "fp16 in two micro-batches": ["train.precision=fp16", "train.accumulate=2"],
    "fp32": ["train.precision=fp32"],
    "layers recomputed": ["train.activation_checkpointing=true"],
    "rates by layers": ["optim.layer_decay=0.75"],
}
_BY_KERNELS = ["train.precision=bf16", "model.options.kernels=triton"]
WAYS |= {f"kernels, {name}": [*WAYS[name], *_BY_KERNELS] for name in ("zero3", "fsdp", "layers recomputed")}
# Blocks of 196 tokens, and sequences that become shorter.
KERNELS = {f"{name} by kernels": name for name in ("nest/tiny_imagenet", "hvt/s_1_imagenet")}
# Refiner-S by kernels, 16 samples in so many groups of BatchNorm statistics.
GROUPS = {
    f"refiner in {groups} groups": ["model.options={kernels: triton}", f"data.lanes={groups}"] for groups in (2, 8)
}


@pytest.fixture(scope="module")
def walked(idle: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `walk_on_idle_gpu` says of the recipes, by name, and of WAYS."""
    folder = tmp_path_factory.mktemp("walked")
    shards = make_pictures(folder, of_a_class=8)
    pictures = [f"data.train={shards}/train", f"data.val={shards}/val", "model.init=null"]
    jobs: dict[str, list[str]] = {}
    for name, path in DISTINCT.items():
        data = make_sentences(name, folder, 64) if name in LANGUAGE else pictures[: 2 if name in GENERATE else 3]
        jobs[name] = [str(path), *data, f"out={folder}/runs", *COMMON]
    jobs |= {name: [*jobs["demo"], *way] for name, way in WAYS.items()}
    jobs |= {name: [*jobs["refiner/s_imagenet"], *way] for name, way in GROUPS.items()}
    jobs |= {name: [*jobs[recipe], "model.options={kernels: triton}"] for name, recipe in KERNELS.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.walk_on_idle_gpu"],
        input=json.dumps(jobs),
        cwd=ROOT,
        env=environment() | idle,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [*DISTINCT, *WAYS, *GROUPS, *KERNELS])
def test_a_step_of(name: str, walked: dict[str, dict[str, Any]]) -> None:
    """It is done on the GPU, the host doesn't wait for it, and nothing in it may come out otherwise the next time."""
    assert walked[name]["error"] is None, walked[name]["error"]


def test_kernels_are_counted(walked: dict[str, dict[str, Any]]) -> None:
    """Two micro-batches launch about twice as many; what is recomputed comes on top."""
    kernels = {name: line["launches"] for name, line in walked.items()}
    assert 1.5 < kernels["fp16 in two micro-batches"] / kernels["demo"] < 3.5
    assert kernels["layers recomputed"] > kernels["demo"] > 100
    # Its parameters are updated in 11 groups (8 layers, 3 of them with positions, which are not decayed) instead of 2.
    assert 9 * 3 <= kernels["rates by layers"] - kernels["demo"] <= 9 * 6


def test_kernels_take_the_place_of_several(walked: dict[str, dict[str, Any]]) -> None:
    for name, recipe in KERNELS.items():
        assert walked[name]["launches"] < 0.95 * walked[recipe]["launches"]


def test_groups_share_their_launches(walked: dict[str, dict[str, Any]]) -> None:
    few, many = (walked[name]["launches"] for name in GROUPS)
    assert few <= many < 1.1 * few


# One process for several commands: most of the time goes into imports.
TRAIN = """
import json, sys
from launch.cli import app
for sys.argv in json.loads(sys.argv[1]):
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
"""


def train(recipe: Path, idle: dict[str, str], *starts: list[str]) -> subprocess.CompletedProcess[str]:
    """`rookery train` for each list of overrides; without evaluations, whose figures would be 0 / 0 here."""
    given = ["rookery", "train", str(recipe), "data.val=null", "train.max_bad_steps=1000"]
    line = [sys.executable, "-c", TRAIN, json.dumps([[*given, *overrides] for overrides in starts])]
    return subprocess.run(line, env=environment() | idle, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_a_run(engine: str, recipe: Path, idle: dict[str, str], tmp_path: Path) -> None:
    """From start to stop, and from there to its end, with loader processes and pinned memory."""
    options = [f"engine.name={engine}", "data.workers=2", "train.precision=bf16"]
    starts = [[*options, "train.stop_after=12steps"], options]
    # DeepSpeed can't be set up twice in a process.
    runs = [train(recipe, idle, one) for one in starts] if engine == "deepspeed" else [train(recipe, idle, *starts)]
    for done in runs:
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "after step 12" in runs[-1].stderr + runs[-1].stdout
    result = json.loads((tmp_path / "runs" / "run" / "result.json").read_text())
    assert result["step"] == 24


def test_compiled_layers(recipe: Path, idle: dict[str, str]) -> None:
    done = train(recipe, idle, ["train.compile=layers", "train.precision=bf16", "train.stop_after=2steps"])
    assert done.returncode == 0, done.stderr


def test_more_processes_than_gpus(recipe: Path, idle: dict[str, str]) -> None:
    done = train(recipe, idle, ["--nproc", "2"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--nproc 2: each process takes a GPU, and this node has 1 GPU; set" in " ".join(done.stderr.split())


@pytest.mark.parametrize("megabytes", ["0", "-1", "2 GB"])
def test_the_idle_gpu_has_a_size(megabytes: str) -> None:
    settings = os.environ | {"IDLE_GPU_MB": megabytes}
    done = subprocess.run([ROOT / "bench/idle_gpu.sh", "true"], env=settings, capture_output=True, text=True)
    assert done.returncode == 2 and f"IDLE_GPU_MB={megabytes}: give the megabytes" in done.stderr


def test_a_gpu_that_is_too_small(recipe: Path, idle: dict[str, str]) -> None:
    done = train(recipe, idle | {"IDLE_GPU_MB": "60"}, ["data.workers=1"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the GPU has no room for this. Tried to allocate" in done.stderr and "train.accumulate=N" in done.stderr
