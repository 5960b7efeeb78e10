"""Shards and configs that the training tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from tests.train.commands import run_command
from tests.train.forked import ForkServer


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's digits: `train` (1,437 samples) and `test` (360)."""
    out = tmp_path_factory.mktemp("digits")
    prepare_splits("digits", out, PrepOptions(workers=1))
    return out


@pytest.fixture(scope="session")
def ffcv_digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for a run on the pixels of `digits` in FFCV shards."""
    out = tmp_path_factory.mktemp("ffcv-digits")
    prepare_splits("digits", out, PrepOptions(format="ffcv", write_mode="raw", workers=1))
    return (f"data.train={out / 'train'}", f"data.val={out / 'test'}")


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    """A run of 24 steps on the digits, in `runs/run`, that uses about every part of the recipe language."""
    return write_recipe(digits, tmp_path)


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that trained for 12 steps; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = (write_recipe(digits, folder), "train.stop_after=12steps", "eval.every=100steps")
    run_command(folder, "train", *arguments)
    return folder / "runs" / "run"


# Overrides for a model of two levels instead of three, where the model is not what is tested.
TWO_LEVELS = ("model.options.num_levels=2", "model.options.embed_dims=[16,32]", "model.options.num_heads=[1,2]")


def write_recipe(digits: Path, folder: Path, augment: bool = True) -> Path:
    """The recipe of `recipe`; without augmentation its steps take a third of the time."""
    tree: dict[str, Any] = {
        "name": "run",
        "out": str(folder / "runs"),
        "model": {
            "name": "nest_micro",
            "in_chans": 1,
            "drop_path_rate": 0.2,
            "options": {"depths": 1, "embed_dims": [16, 32, 48], "num_heads": [1, 2, 3]},
        },
        "data": {
            "train": str(digits / "train"),
            "val": str(digits / "test"),
            "lanes": 12,
            "workers": 0,
            "trace": True,
        },
        "augment": {
            "resize": 16,
            "crop": "none",
            "hflip": 0,
            "affine": {"degrees": 10, "translate": 0.08},
            "rand_augment": {"policy": "nest"},
            "random_erasing": {"prob": 0.25},
            "normalize": "half",
        },
        "eval_transform": {"resize": "resize_only"},
        "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "sample", "beta": "nest_approx"},
        "train": {
            "epochs": "24steps",
            "global_batch_size": 48,
            "precision": "fp32",
            "ema_decay": 0.9,
            "clip_grad_norm": 5.0,
            "log_every": "1steps",
        },
        "optim": {"lr": 1e-3, "schedule": {"warmup": "4steps"}},
        "eval": {"every": "10steps", "batch_size": 50},
        "checkpoint": {"every": "5steps"},
        "tracking": {"mlflow": False},
    }
    if not augment:
        for key in ("affine", "rand_augment", "random_erasing"):
            del tree["augment"][key]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Trains in processes that start quickly: `fork_server.train(recipe, "train.epochs=2", nproc=2)`."""
    with ForkServer(tmp_path_factory.mktemp("forked")) as server:
        yield server


Rookery = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def rookery(fork_server: ForkServer, tmp_path: Path) -> Rookery:
    """Runs the command line in `tmp_path`: `rookery("train", recipe, "--nproc", 2)`."""
    return partial(fork_server.command, tmp_path)
