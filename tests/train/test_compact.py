"""Compact checkpoints: two thirds of the size, and a run that is killed ends as the one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.tracking.metrics import read_metrics
from pipeline.train.again import newest_step
from pipeline.train.engines.parts import PartsWriter, opened, part_of
from pipeline.train.engines.whole import MOMENTS, STATE, WholeState
from pipeline.train.export import WEIGHTS
from tests.train.conftest import Rookery, write_recipe
from tests.train.forked import ForkServer
from tests.train.test_bad_data import wait_for
from tests.train.test_resume import check_same_run

COMPACT = "checkpoint.compact=true"


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    return write_recipe(digits, tmp_path, augment=False)


def test_killed_and_resumed_as_if_left_alone(recipe: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    whole, cut, usual = (tmp_path / "runs" / name for name in ("whole", "cut", "usual"))
    fork_server.train(recipe, COMPACT, "name=whole", nproc=2)
    job = fork_server.start(recipe, COMPACT, "checkpoint.part_mb=1", "name=cut", nproc=2)
    wait_for(lambda: newest_step(cut) >= 10)
    job.kill()
    assert set(job.wait()) == {-9}
    assert newest_step(cut) < 24
    newest = cut / "checkpoints" / f"step-{newest_step(cut):08}"
    assert part_of(newest / STATE, 1).exists() and not (newest / STATE).exists()
    fork_server.train(recipe, COMPACT, "name=cut", nproc=2)
    check_same_run(whole, cut)

    # What is saved between the planned steps is not rounded, or the stop would show.
    stopped = tmp_path / "runs" / "stopped"
    fork_server.train(recipe, COMPACT, "name=stopped", "train.stop_after=7steps", nproc=2)
    between = torch.load(stopped / "checkpoints" / "step-00000007" / STATE, weights_only=True)["moments"]
    assert {state[name].dtype for state in between.values() for name in MOMENTS} == {torch.float32}
    fork_server.train(recipe, COMPACT, "name=stopped", nproc=2)
    assert (stopped / "final" / WEIGHTS).read_bytes() == (whole / "final" / WEIGHTS).read_bytes()

    fork_server.train(recipe, "name=usual", nproc=2)
    losses = [[line["loss"] for line in read_metrics(run) if line["kind"] == "train"] for run in (whole, usual)]
    # Rounding shows after the first save, and hardly.
    assert losses[0][:5] == losses[1][:5] and losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    last = "checkpoints/step-00000024"
    moments = [torch.load(run / last / STATE, weights_only=True)["moments"] for run in (whole, usual)]
    assert {state[name].dtype for state in moments[0].values() for name in MOMENTS} == {torch.bfloat16}
    sizes = [sum(tensor.nbytes for state in of_run.values() for tensor in state.values()) for of_run in moments]
    assert sizes[0] < 0.51 * sizes[1]
    read = WholeState.read(whole / last)
    for name, state in moments[0].items():
        for moment in MOMENTS:
            assert read.moments[name][moment].dtype == torch.float32
            assert torch.equal(read.moments[name][moment], state[moment].float())


def test_parts(tmp_path: Path) -> None:
    """Three of the size that was asked for and a rest, which make the same state again; without one it is damaged."""
    weight = torch.randn(800_000, generator=torch.Generator().manual_seed(0))
    state = WholeState({"weight": weight}, {"weight": {"step": torch.tensor(3.0)}}, {}, None, 0)
    state.write(tmp_path, part_mb=1)
    parts = [part_of(tmp_path / STATE, number) for number in range(1, 5)]
    assert sorted(tmp_path.iterdir()) == [*parts, tmp_path / f"{STATE}.parts"]
    assert [part.stat().st_size for part in parts[:3]] == [10**6] * 3 and parts[3].stat().st_size < 10**6
    part_of(tmp_path / STATE, 5).write_bytes(b"from elsewhere")
    read = WholeState.read(tmp_path)
    assert torch.equal(read.model["weight"], weight) and read.moments["weight"]["step"] == 3 and read.ema is None
    parts[3].unlink()
    with pytest.raises(FileNotFoundError):
        WholeState.read(tmp_path)


def test_thousands_of_parts(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    with PartsWriter(tmp_path / "file", 2) as file:
        for start in range(0, len(data), 300):
            assert file.write(data[start : start + 300]) == len(data[start : start + 300])
    assert opened(tmp_path / "file").read() == data and len(list(tmp_path.iterdir())) == 1281
    (tmp_path / "file.parts").write_text("{}")
    with pytest.raises(RuntimeError, match="damaged"):
        opened(tmp_path / "file")


def test_what_does_not_fit_is_refused(recipe: Path, rookery: Rookery, fork_server: ForkServer) -> None:
    done = rookery("train", recipe, COMPACT, "engine.name=fsdp", check=2)
    assert "checkpoint.compact=true goes with engine.name=ddp, not fsdp" in " ".join(done.stderr.split())
    done = rookery("train", recipe, "checkpoint.part_mb=8", "engine.name=fsdp", check=2)
    assert "checkpoint.part_mb goes with engine.name=ddp, not fsdp" in " ".join(done.stderr.split())
    fork_server.train(recipe, COMPACT, "train.stop_after=5steps")
    for changed in (("checkpoint.every=4steps", COMPACT), ("checkpoint.compact=false",)):
        done = rookery("train", recipe, *changed, check=2)
        assert changed[0].partition("=")[0] in done.stderr and "another config" in " ".join(done.stderr.split())
