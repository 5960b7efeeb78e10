"""Memory for what a backward pass needs of its forward pass, and the shapes on the way.

One micro-batch goes through model and loss on tensors that have a shape, a type and a device but no memory (torch's
FakeTensor). Every tensor that autograd keeps is counted, by storage and once; parameters are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from pipeline.models.batch_norm import group_statistics
from pipeline.models.layers import encoder_layers
from pipeline.resolve import Resolved
from pipeline.train.engines.base import PRECISIONS
from pipeline.train.engines.native import lane_chunk
from pipeline.train.forecast.storages import storage_key


@dataclass(frozen=True)
class Activations:
    """What a micro-batch leaves behind between forward and backward.

    Attributes:
        images: shape of the input.
        layers: shapes of the tokens on their way into the encoder layers, and how many layers in a row have that shape.
        bytes: kept for the backward pass. With activation checkpointing: the layers' inputs, what lies between the
            layers, and the one layer that is being recomputed.
    """

    images: tuple[int, ...]
    layers: list[tuple[int, tuple[int, ...]]]
    bytes: int


def count_activations(run: Resolved, micro_batch: int, device: str = "cuda") -> Activations:
    """Count what autograd keeps of a micro-batch.

    Autocast of a CPU and of a GPU differ: a GPU's keeps LayerNorms in float32. The GPU need not be there.

    Args:
        micro_batch: samples that one process puts through the model at once.
        device: `cuda` or `cpu`.
    """
    config = run.config
    recomputed = config.train.activation_checkpointing is True
    with ExitStack() as stack:
        # Built before: timm reads rates of its model from tensors, which fake ones can't tell.
        bare = run.task.build_model("meta")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = bare.to_empty(device=device)
        # Checkpointed layers would hide from us what they keep while they are recomputed.
        model.set_grad_checkpointing(False)  # type: ignore[operator]
        group_statistics(model, lane_chunk(config))
        keeper = Keeper(model)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keeper.keep, lambda tensor: tensor))
        stack.enter_context(_GpuAttention())
        autocast = _autocast(device, config.train.precision)
        loss = run.task.sample_loss(run, model, micro_batch, torch.device(device), autocast)
        counted = keeper.checkpointed() if recomputed else keeper.bytes()
        del loss
    layers = [(len(list(same)), shape) for shape, same in groupby(keeper.shapes)]
    return Activations(run.task.input_shape(micro_batch), layers, counted)


class Keeper:
    """Notes every tensor that autograd keeps while the model runs, and in which encoder layer it first did.

    Args:
        model: gets hooks that tell which layer is at work.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._parameters = {storage_key(parameter) for parameter in model.parameters()}
        self._kept: dict[int, tuple[Tensor, int | None]] = {}
        self._inputs: dict[int, Tensor] = {}
        self._layer: int | None = None
        for layer in encoder_layers(model):
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        """Hook for `saved_tensors_hooks`."""
        key = storage_key(tensor)
        if key not in self._parameters:
            # The tensor itself is held, so that no other storage gets the same key.
            self._kept.setdefault(key, (tensor.detach(), self._layer))
        return tensor

    def bytes(self) -> int:
        """Of everything that was kept."""
        return sum(_size(tensor) for tensor, _ in self._kept.values())

    def checkpointed(self) -> int:
        """Of what would be kept if layers kept their inputs alone, with the largest layer recomputed."""
        inside: dict[int, int] = {}
        between = 0
        for key, (tensor, layer) in self._kept.items():
            if key in self._inputs or layer is None:
                between += 0 if key in self._inputs else _size(tensor)
            else:
                inside[layer] = inside.get(layer, 0) + _size(tensor)
        return between + sum(map(_size, self._inputs.values())) + max(inside.values(), default=0)

    def _enter(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._layer = len(self.shapes)
        self.shapes.append(tuple(arguments[0].shape))
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                self._inputs.setdefault(storage_key(tensor), tensor.detach())

    def _leave(self, *_: Any) -> None:
        self._layer = None


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
    """`torch.autocast`, which turns itself off where there is no GPU."""
    dtype = PRECISIONS[precision]
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


class _GpuAttention(TorchFunctionMode):
    """Takes the fused attention that a GPU has; without one torch would choose the plain form, which keeps the maps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].device.type != "cuda":
            return func(*args, **kwargs)
        half = torch.is_autocast_enabled("cuda")
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) if half else t for t in args)
        if half:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
