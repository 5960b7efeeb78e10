"""What makes a process compute the same each time, and what it does without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config_load import load_config
from pipeline.train import loop
from pipeline.train.export import WEIGHTS
from tests.train.plain import ALONE


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


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
