"""`explain.images`: pictures of every evaluation, and a training that doesn't notice."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.train.distributed import World
from pipeline.train.engines import make_engine
from pipeline.train.explained import Explainer
from pipeline.train.setup import initial_model
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer

SHORT = ("train.epochs=6steps", "eval.every=3steps", "checkpoint.every=3steps")


def test_weights_are_those_of_a_run_without(digits: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    recipe = write_recipe(digits, tmp_path)
    fork_server.train(recipe, *SHORT, "name=without", nproc=2)
    fork_server.train(recipe, *SHORT, "name=with", "explain.images=5", nproc=2)
    weights = [load_file(tmp_path / "runs" / name / "final" / "model.safetensors") for name in ("without", "with")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    drawn = sorted((tmp_path / "runs" / "with" / "explain").iterdir())
    assert [path.name for path in drawn] == ["step-00000003.png", "step-00000006.png"]
    with Image.open(drawn[0]) as sheet:
        assert sheet.width > 4 * 288 and sheet.height > 2 * 288
    assert not (tmp_path / "runs" / "without" / "explain").exists()


def test_no_generator_moves(digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(digits, tmp_path)
    run = resolve(load_config(recipe, ["explain.images=2", "eval.weights=ema"]), 1)
    world = World(0, 1, 0, torch.device("cpu"))
    engine = make_engine(initial_model(run.config, world), run.config, world)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    Explainer(run, world).draw(7, engine)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002
    assert all(param.grad is None for param in engine.plain.parameters())
    assert [path.name for path in (tmp_path / "runs" / "run" / "explain").iterdir()] == ["step-00000007.png"]


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. If reserved memory is ..."


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            "no memory for it (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free); fewer",
        ),
        (MemoryError(), "no memory for it (MemoryError)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (UserError("a damaged sample"), "a damaged sample"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_is_told_and_costs_nothing(
    failure: Exception, expected: str, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = resolve(load_config(write_recipe(digits, tmp_path), ["explain.images=2"]), 1)
    world = World(0, 1, 0, torch.device("cpu"))
    engine = make_engine(initial_model(run.config, world), run.config, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.train.explained.explain", Mock(side_effect=failure))
        Explainer(run, world).draw(7, engine)
    (told,) = caplog.messages
    assert told.startswith("no explanation of step 7: ") and told.endswith("; training goes on")
    assert expected in told and "\n" not in told


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=hvt_ti_1", "model.options=null", "model.img_size=32"], "explain.images=4: GradCAT walks down"),
        (["data.val=null"], "there is no split for them: set data.val"),
    ],
)
def test_mistakes(overrides: list[str], expected: str, digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(digits, tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(load_config(recipe, ["explain.images=4", *overrides]), 1)
    assert expected in str(caught.value)
