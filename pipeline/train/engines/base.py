"""What the loop asks of an engine, whatever shards the model underneath."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from pipeline.train.distributed import World

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(ABC):
    """A model and its optimizer, spread over the processes.

    A step is: `forward_backward` once per micro-batch, then `step`. All methods are collective: every process calls
    them in the same order.

    Attributes:
        model: call it for a training forward; same interface as the plain model.
        plain: the underlying model, for noise, names and evaluation.
        world: this process among the others.
    """

    model: nn.Module
    plain: nn.Module
    world: World

    @abstractmethod
    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forwards."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss that is already divided by the number of micro-batches."""

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Around every micro-batch but the last of a step: gradients stay local."""

    @abstractmethod
    def step(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update the weights and their average, clear the gradients.

        Returns:
            The global gradient norm before clipping, and 1.0 if the step was skipped because a gradient was NaN or
            infinite, else 0.0; both 0-D float32 tensors on the device, so that nobody waits for them.
        """

    @abstractmethod
    def eval_model(self, weights: str) -> nn.Module:
        """The module to evaluate: `model`, or `ema` for the averaged weights."""

    @abstractmethod
    def full_weights(self, weights: str) -> dict[str, torch.Tensor]:
        """All weights on the CPU of rank 0 (an empty dict elsewhere)."""

    @abstractmethod
    def snapshot(self, planned: bool = True) -> Callable[[Path, World], None]:
        """Copy everything needed to go on, so that training may.

        Args:
            planned: a run saves at this step whatever happens to it. Only then may `checkpoint.compact` round, the
                state that training goes on from as well: so a stop in between changes nothing.

        Returns:
            What writes the copy into a checkpoint's directory, together with the processes of the given world. Each
            process calls it once; training may go on meanwhile.
        """

    def save(self, directory: Path) -> None:
        """Write everything needed to go on."""
        self.snapshot()(directory, self.world)

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Go on from what any engine wrote.

        Raises:
            UserError: the files belong to another model.
        """
