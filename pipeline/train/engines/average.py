"""The exponential moving average of the weights, as every engine keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """What `torch.optim.swa_utils.AveragedModel` does to lists of tensors, with its count of updates on the host.

    `AveragedModel` has the count in a tensor that it brings to the GPU at every update, for which the host waits until
    the GPU has done all that it was told before.

    Attributes:
        updates: how many there were; the first copies the values.
    """

    def __init__(self, decay: float) -> None:
        self.updates = 0
        self._move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def move(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Move the averages towards the values, in place."""
        pairs = list(zip(averages, values, strict=True))
        for floating in (True, False):
            chosen = [pair for pair in pairs if pair[0].is_floating_point() == floating]
            if not chosen:
                continue
            kept, new = map(list, zip(*chosen, strict=True))
            if self.updates:
                self._move(kept, new, self.updates)
            else:
                torch._foreach_copy_(kept, new)
        self.updates += 1


class ModuleAverage(Average):
    """The average of a model's tensors, in a module of the same kind.

    Args:
        module: holds the average.
        decay: see `train.ema_decay`.
        tensors_of: those of a model that this process has.
    """

    def __init__(self, module: nn.Module, decay: float, tensors_of: Callable[[nn.Module], list[Tensor]]) -> None:
        super().__init__(decay)
        self.module = module
        self._tensors_of = tensors_of

    def update(self, model: nn.Module) -> None:
        self.move(self._tensors_of(self.module), self._tensors_of(model))


def all_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters, then the buffers."""
    return [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]
