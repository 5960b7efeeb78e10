"""A loss spike takes a run back to the checkpoint before it, and past the samples that led to it."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import median

import pytest

from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.export import WEIGHTS
from pipeline.train.spikes import is_spike, roll_back
from pipeline.train.state import State
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer
from tests.train.many_runs import train_all
from tests.train.plain import ALONE, PlainTraining

STEPS, EVERY, FACTOR = 24, 3, 1.000001
# Nearly every rise of the loss counts, so that there are several roll-backs.
JUMPY = [f"train.spike_factor={FACTOR}", "train.max_rollbacks=100", f"checkpoint.every={EVERY}steps", "data.val=null"]
ENGINES = {
    "ddp": [],
    "fsdp": ["engine.name=fsdp"],
    "zero2": ["engine.name=deepspeed", "engine.zero_stage=2"],
}


@pytest.mark.parametrize(
    ("loss", "before", "factor", "expected"),
    [
        (2.0, [1.0] * 5, 1.9, True),
        (2.0, [1.0] * 5, 2.0, False),
        (2.0, [1.0] * 5, None, False),
        (9.0, [1.0] * 4, 1.5, False),
        (2.0, [9.0, 1.0, 1.0, 1.0, 9.0], 1.9, True),
        (float("nan"), [1.0] * 9, 1.5, False),
        (float("inf"), [1.0] * 9, 1.5, True),
    ],
)
def test_what_a_spike_is(loss: float, before: list[float], factor: float | None, expected: bool) -> None:
    assert is_spike(loss, before, factor) is expected


def plain_losses(recipe: Path) -> tuple[list[float], list[tuple[int, int]]]:
    """Losses and roll-backs of the run by a plain loop."""
    plain = PlainTraining(recipe)
    saved = {0: (plain.copy(), [])}
    losses: list[float] = []
    rollbacks: list[tuple[int, int]] = []
    known: list[float] = []
    for step, batch in zip(range(1, STEPS + 1), plain.batches(), strict=False):
        loss = plain.step(step - 1, batch)
        losses.append(loss)
        if len(known) >= 5 and loss > FACTOR * median(known):
            back = (step - 1) // EVERY * EVERY
            copied, known = saved[back]
            plain.load(copied)
            rollbacks.append((back, step))
        else:
            known = [*known, loss][-20:]
        if step % EVERY == 0:
            saved[step] = (plain.copy(), known)
    return losses, rollbacks


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spikes")
    recipe = write_recipe(digits, folder, augment=False)
    train_all([load_config(recipe, [*own, *JUMPY, f"name={name}"]) for name, own in ENGINES.items()], 2, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_as_a_plain_loop_does_it(engine: str, runs: Path) -> None:
    losses, rollbacks = plain_losses(runs / "recipe.yaml")
    lines = read_metrics(runs / "runs" / engine)
    assert [line["loss"] for line in lines if line["kind"] == "train"] == pytest.approx(losses, rel=1e-5)
    found = [(line["checkpoint"], line["step"]) for line in lines if line.get("event") == "rolled_back"]
    assert found == rollbacks and len(rollbacks) >= 3


def test_a_killed_run_goes_on_alike(runs: Path, fork_server: ForkServer) -> None:
    """Also where it goes on at a checkpoint from before a roll-back."""
    recipe, cut = runs / "recipe.yaml", runs / "runs" / "cut"
    fork_server.train(recipe, *JUMPY, "name=cut", "train.stop_after=14steps", nproc=2)
    newest = CheckpointStore(cut / "checkpoints").newest()
    assert newest is not None
    (newest.path / "commit.json").unlink()
    fork_server.train(recipe, *JUMPY, "name=cut", nproc=2)
    assert (cut / "final" / WEIGHTS).read_bytes() == (runs / "runs" / "ddp" / "final" / WEIGHTS).read_bytes()
    last = CheckpointStore(cut / "checkpoints").newest()
    assert last is not None and len(last.progress()["rollbacks"]) == len(plain_losses(recipe)[1])


class NoEngine:
    """None of these cases gets as far as to load anything."""


@pytest.mark.parametrize("step", [3, 10])
def test_no_checkpoint_before_it(step: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    store.save(10, {}, lambda path: None, ALONE)
    state = State(step=step)
    with caplog.at_level(logging.WARNING):
        assert roll_back(NoEngine(), store, state, 1, 5, ALONE) is state  # type: ignore[arg-type]
    assert f"spiked in step {step}, but there is no checkpoint before it" in caplog.text


def test_too_often(tmp_path: Path) -> None:
    state = State(step=50, rollbacks=[(10, 20), (20, 30)])
    with pytest.raises(UserError, match=r"after 2 roll-backs \(train.max_rollbacks\); lower optim.lr"):
        roll_back(NoEngine(), CheckpointStore(tmp_path), state, 1, 2, ALONE)  # type: ignore[arg-type]


def test_saved_between_two_lines_of_the_log(recipe: Path) -> None:
    config = load_config(recipe, ["train.spike_factor=2", "train.log_every=2steps", "checkpoint.every=5steps"])
    with pytest.raises(UserError, match=r"checkpoint.every=5steps .* multiple of train.log_every=2steps"):
        resolve(config, 1)
