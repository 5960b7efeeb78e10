"""What makes a process compute the same each time, and what it does without."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config_load import load_config
from pipeline.train import eval_worker, loop, worker
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.distributed import World
from pipeline.train.export import WEIGHTS
from pipeline.train.meters import peak_tflops
from pipeline.train.saver import Saver
from tests.train.plain import ALONE


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    rounds = torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.backends.cudnn.allow_tf32 = rounds


def test_nothing_reads_memory_before_it_is_written(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory full of NaN gives the same weights as memory with whatever was there."""
    setting, seen, weights = loop.use_deterministic_kernels, [], []
    for fill in (False, True):

        def use(wanted: bool, fill: bool = fill) -> None:
            setting(wanted)
            assert wanted and torch.are_deterministic_algorithms_enabled()
            seen.append(torch.utils.deterministic.fill_uninitialized_memory)
            torch.utils.deterministic.fill_uninitialized_memory = fill

        monkeypatch.setattr(loop, "use_deterministic_kernels", use)
        config = load_config(recipe, [f"name=fill{fill}", "train.epochs=6steps"])
        loop.train(config, ALONE)
        weights.append(Path(config.out, config.name, "final", WEIGHTS).read_bytes())
    assert weights[0] == weights[1] and seen == [False, False]


def _start_training(recipe: Path) -> None:
    worker.run(load_config(recipe, []).model_dump_json())


def _start_evaluation(recipe: Path) -> None:
    eval_worker.run(eval_worker.payload(eval_worker.EvalJob("weights", "data")))


def _start_other_evaluation(recipe: Path) -> None:
    eval_worker.run(eval_worker.payload(eval_worker.EvalJob("weights", "data", deterministic=False)))


@pytest.mark.parametrize(
    ("start", "module", "name", "deterministic"),
    [
        (_start_training, worker, "train", False),
        (_start_evaluation, eval_worker, "run_job", True),
        (_start_other_evaluation, eval_worker, "run_job", False),
    ],
    ids=["train", "eval", "eval of a run with train.deterministic=false"],
)
def test_how_a_process_computes(
    start: Callable[[Path], None], module: Any, name: str, deterministic: bool, recipe: Path, monkeypatch: Any
) -> None:
    """float32 is not rounded, and an evaluation takes the kernels of a run's own; a run decides on these itself."""
    torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(False)
    seen: list[tuple[bool, bool]] = []

    def job(*given: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()))

    monkeypatch.setattr(module, name, job)
    start(recipe)
    assert seen == [(False, deterministic)]


@pytest.mark.parametrize(("device", "expected"), [("cuda:3", ["cuda:3"]), ("cpu", [])])
def test_a_checkpoint_is_written_beside_its_own_gpu(
    device: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread stands on the first GPU, where it would take memory of another process; a mock of being moved."""
    moved: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: moved.append((str(to), threading.current_thread().name)))

    class Engine:
        def snapshot(self, planned: bool) -> Callable[[Path, World], None]:
            return lambda path, world: (path / "state").write_text(str(world.device)) and None

    world = replace(ALONE, device=torch.device(device))
    with Saver(CheckpointStore(tmp_path, 1), world, asynchronous=True) as saver:
        saver.save(5, {}, Engine())  # type: ignore[arg-type]
    newest = next(tmp_path.glob("step-*"))
    assert (newest / "state").read_text() == "cpu"
    assert moved == [(to, "save-5") for to in expected]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("Quadro P400", None),
    ],
)
def test_peak_of_a_device(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak
