"""Where ZeRO keeps a parameter's values and moments, and how a process reads and writes its part of them.

Everything is fp32 here: the engine lets autocast do lower precision, so that DeepSpeed has no second copy of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

AVERAGES = ("exp_avg", "exp_avg_sq")


class Replicated:
    """ZeRO 0: every process has everything, as in DDP.

    Args:
        engine: the `DeepSpeedEngine` of the deepspeed package.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer

    def part(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of a parameter's values."""
        return parameter.data

    def whole(self, part: Tensor, parameter: nn.Parameter) -> Tensor:
        """The whole of which every process has a part that `part` or `cut` gave; collective."""
        return part

    def cut(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's part of something of a parameter's shape."""
        return whole

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's whole moments and number of steps of a parameter; empty before the first update; collective."""
        return dict(self.optimizer.state.get(parameter, {}))

    def set_moments(self, states: Sequence[tuple[nn.Parameter, Mapping[str, Tensor]]]) -> None:
        """Set what `moments` gives, for all parameters at once."""
        for parameter, state in states:
            self.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}

    def weights_are_set(self) -> None:
        """To be called after the parameters have been written to."""


class SplitMoments(Replicated):
    """ZeRO 1 and 2: the optimizer steps on one flat piece per group, that may cut through parameters."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # With several groups DeepSpeed finds the moments again only if they are there before the first step.
        self._make_moments()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        return {"step": self._steps()[0]} | {key: safe_get_full_optimizer_state(parameter, key) for key in AVERAGES}

    def set_moments(self, states: Sequence[tuple[nn.Parameter, Mapping[str, Tensor]]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._set_steps(states)
        for parameter, state in states:
            for key in AVERAGES:
                safe_set_full_optimizer_state(parameter, state[key].to(parameter.device), key)

    def weights_are_set(self) -> None:
        self.optimizer.refresh_fp32_params()

    def _flat_parts(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def _make_moments(self) -> None:
        """What AdamW would make at its first step."""
        for flat in self._flat_parts():
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in AVERAGES}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | zeros
        self._link()

    def _link(self) -> None:
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> list[Tensor]:
        """AdamW's counts of updates, all the same."""
        return [self.optimizer.state[flat]["step"] for flat in self._flat_parts()]

    def _set_steps(self, states: Sequence[tuple[nn.Parameter, Mapping[str, Tensor]]]) -> None:
        for step in self._steps():
            step.copy_(states[0][1]["step"])


class SplitWeights(SplitMoments):
    """ZeRO 3: every parameter is cut into equal parts, the last one padded; so are its moments."""

    def part(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor.data

    def whole(self, part: Tensor, parameter: Any) -> Tensor:
        part = part.to(self.engine.device)
        parts = part.new_empty(dist.get_world_size() * part.numel())
        dist.all_gather_into_tensor(parts, part.contiguous())
        return parts[: parameter.ds_numel].view(parameter.ds_shape)

    def cut(self, whole: Tensor, parameter: Any) -> Tensor:
        size = parameter.ds_tensor.numel()
        padding = size * dist.get_world_size() - whole.numel()
        return F.pad(whole.flatten(), (0, padding)).narrow(0, size * dist.get_rank(), size)

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_local_optimizer_state

        parts = {key: safe_get_local_optimizer_state(parameter, key) for key in AVERAGES}
        return {"step": self._steps()[0]} | {key: self.whole(part, parameter) for key, part in parts.items()}

    def set_moments(self, states: Sequence[tuple[nn.Parameter, Mapping[str, Tensor]]]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        self._set_steps(states)
        for parameter, state in states:
            for key in AVERAGES:
                part = self.cut(state[key], parameter).to(self.engine.device)
                safe_set_local_optimizer_state(parameter, part, key)

    def _flat_parts(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def _link(self) -> None:
        """ZeRO 3 looks moments up whenever they are asked for."""


def partition(engine: Any) -> Replicated:
    """How this engine's stage spreads things."""
    return (Replicated, SplitMoments, SplitMoments, SplitWeights)[engine.zero_optimization_stage()](engine)
