"""A run's whole state, by parameter names: what every engine can make of its own and go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.train.engines.parts import PartsWriter, in_parts, opened

STATE = "state.pt"
# Of AdamW's state, what a compact checkpoint rounds.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class WholeState:
    """Weights, optimizer and average of a run, whole, on the CPU.

    Attributes:
        model: the model's state dict.
        moments: by parameter name, AdamW's state (step, exp_avg, exp_avg_sq); empty before the first update.
        scaler: of the loss; empty without.
        ema: the average's state dict, None without.
        averaged: updates of the average.
    """

    model: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    scaler: Mapping[str, Any]
    ema: Mapping[str, Tensor] | None
    averaged: int

    def write(self, directory: Path, part_mb: int | None = None) -> None:
        """Write it into a checkpoint's directory, as one file, or in parts of so many megabytes at most."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        if part_mb is None:
            torch.save(state, directory / STATE)
            return
        with PartsWriter(directory / STATE, part_mb * 10**6) as file:
            torch.save(state, file)  # type: ignore[arg-type]

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether a checkpoint's directory has it, and not the parts of several processes."""
        return (directory / STATE).exists() or in_parts(directory / STATE)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read it from what any engine wrote into a checkpoint's directory.

        Raises:
            OSError, RuntimeError, KeyError: the files are missing or damaged.
            UserError: they are laid out in another way.
        """
        if cls.is_in(directory):
            cut = in_parts(directory / STATE)
            file: Any = opened(directory / STATE) if cut else directory / STATE
            try:
                saved = torch.load(file, map_location="cpu", weights_only=True, mmap=None if cut else True)
            except (RuntimeError, EOFError, ValueError, UnpicklingError) as error:
                if "allocate memory" in str(error):  # the host has none left: that says nothing of the file
                    raise
                # Their words are about archives and offsets.
                raise RuntimeError(f"{STATE} is damaged or incomplete; choose another checkpoint") from error
            expected = {field.name for field in fields(cls)}
            if not isinstance(saved, dict) or saved.keys() != expected:
                raise UserError(
                    f"{directory / STATE} is laid out as another version of rookery writes it; go on with that "
                    "version, or choose another name=... to begin anew"
                )
            return cls(**{**saved, "moments": {name: _in_full(state) for name, state in saved["moments"].items()}})
        from pipeline.train.engines.sharded_files import read_whole

        return cls(**read_whole(directory))

    def weights(self, name: str) -> Mapping[str, Tensor]:
        """The state dict of `model` or `ema`.

        Raises:
            KeyError: there is no average.
        """
        if name != "ema":
            return self.model
        if self.ema is None:
            raise KeyError("there is no average of the weights")
        return self.ema

    def average(self, directory: Path) -> Mapping[str, Tensor]:
        """The average's state dict, for a run that keeps one.

        Raises:
            UserError: the checkpoint has none.
        """
        if self.ema is None:
            raise UserError(f"{directory}: no average of the weights in it; set train.ema_decay=null to go on without")
        return self.ema


def _in_full(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's moments as they are computed with."""
    return {n: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for n, tensor in state.items()}


def saved_weights(directory: Path, weights: str) -> Mapping[str, Tensor]:
    """`model` or `ema` weights of a checkpoint that any engine wrote, on the CPU; needs no engine.

    Raises:
        OSError, RuntimeError, KeyError: the directory holds no such weights.
        UserError: another version wrote them.
    """
    return WholeState.read(directory).weights(weights)
