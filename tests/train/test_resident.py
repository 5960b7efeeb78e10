"""A run whose pictures stay on the device: the same bits as one that loads them, from any step to any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.tracking.metrics import read_metrics
from pipeline.tracking.run_dir import QUARANTINE_NAME
from pipeline.train.export import WEIGHTS
from pipeline.train.trace import read_trace
from tests.train.conftest import Rookery, write_recipe
from tests.train.forked import ForkServer
from tests.train.test_bad_data import spoil

ON, OFF = "data.resident=true", "data.resident=false"
# What the device does in place of the shared recipe's affine map and enlargement.
AUGMENT = {
    "crop": {"kind": "pad", "padding": 4},
    "hflip": 0.5,
    "rand_augment": {"policy": "nest", "prob": 0.8},
    "random_erasing": {"prob": 0.5},
    "normalize": "half",
}
GENERATE = {
    "kind": "generate",
    "discriminator": {"width": 4, "max_width": 8, "group": 2},
    "features": "small",
    "samples": 40,
}
NEST = {"latent_dim": 8, "patch_size": 1, "num_levels": 3, "embed_dims": 16, "depths": 1, "num_heads": 2}


@pytest.fixture
def tree(digits: Path, tmp_path: Path) -> dict[str, Any]:
    return yaml.safe_load(write_recipe(digits, tmp_path).read_text()) | {"augment": AUGMENT}


def written(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "resident.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def check_same(tmp_path: Path, name: str) -> None:
    """All that a run leaves behind is that of the run `loaded`."""
    wanted, got = tmp_path / "runs" / "loaded", tmp_path / "runs" / name
    assert (got / "final" / WEIGHTS).read_bytes() == (wanted / "final" / WEIGHTS).read_bytes()
    assert read_trace(got) == read_trace(wanted)
    kinds = ("train", "eval")  # and not what the machine does meanwhile
    times = ("time", "images_per_second", "step_seconds", "data_wait", "memory_gb", "tflops_per_process")
    of_wanted, of_got = (
        [{k: v for k, v in line.items() if k not in times} for line in read_metrics(run) if line["kind"] in kinds]
        for run in (wanted, got)
    )
    assert of_wanted == of_got and {line["kind"] for line in of_got} == set(kinds)


def test_runs_end_alike(tree: dict[str, Any], digits: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    """With bad samples, on two processes, with loader processes, and when what was begun one way goes on the other."""
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    spoil(data / "train", [5, 77, 401, 900, 1300])
    tree["data"] |= {"train": str(data / "train"), "val": str(data / "test")}
    recipe = written(tree, tmp_path)
    fork_server.train(recipe, "name=loaded", OFF, nproc=2)
    fork_server.train(recipe, "name=resident", ON, "data.workers=1", nproc=2)
    fork_server.train(recipe, "name=mixed", ON, "train.stop_after=11steps", "checkpoint.every=11steps", nproc=2)
    fork_server.train(recipe, "name=mixed", OFF, nproc=2)
    check_same(tmp_path, "resident")
    quarantines = [(tmp_path / "runs" / run / QUARANTINE_NAME).read_bytes() for run in ("loaded", "resident", "mixed")]
    assert quarantines[0] == quarantines[1] == quarantines[2] and quarantines[0]
    assert (tmp_path / "runs" / "mixed" / "final" / WEIGHTS).read_bytes() == (
        tmp_path / "runs" / "loaded" / "final" / WEIGHTS
    ).read_bytes()


def test_generators_too(tree: dict[str, Any], fork_server: ForkServer, tmp_path: Path) -> None:
    model = {"name": "nest_gen_micro", "img_size": 16, "in_chans": 1, "options": NEST}
    del tree["mix"]
    recipe = written(
        tree | {"task": GENERATE, "model": model, "augment": {**AUGMENT, "random_erasing": None}}, tmp_path
    )
    for name, resident in (("loaded", OFF), ("resident", ON)):
        fork_server.train(recipe, f"name={name}", resident, "train.epochs=6steps", "eval.every=6steps")
    check_same(tmp_path, "resident")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("augment.crop=rrc", "but augment.crop=rrc resizes every picture otherwise (choose pad, center or none)"),
        ("data.augment_by=pillow", "but data.augment_by=pillow augments on the host; or set data.resident=false"),
        ("augment.crop={kind: pad, padding: 3}", "a 8x8 picture can't give a 16x16 input with 3 px of padding"),
    ],
)
def test_what_it_can_not_do(
    override: str, expected: str, tree: dict[str, Any], rookery: Rookery, tmp_path: Path
) -> None:
    done = rookery("train", written(tree, tmp_path), ON, override, check=2)
    assert expected in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_the_dry_run_counts_it(tree: dict[str, Any], rookery: Rookery, tmp_path: Path) -> None:
    said = " ".join(rookery("train", written(tree, tmp_path), ON, "--dry-run", "--nproc", 2).stdout.split())
    sizes = f"{1437 * 64 / 1e6:,.1f} MB; inputs of evaluation: {180 * 256 * 4 / 1e6:,.1f} MB"
    assert f"1,437 pictures of 8x8, read once: {sizes}" in said
    assert "read once" not in rookery("train", written(tree, tmp_path), OFF, "--dry-run").stdout
