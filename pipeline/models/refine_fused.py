"""The released refiner trained by kernels of this package: what `refine_lean` computes, with fewer passes over maps.

It keeps the maps and the reduced maps for the backward pass, as `refine_lean` does. The expanded maps are written in
one place, before the second BatchNorm, which has to see all of them; in the backward pass so is the gradient behind it.
All else happens in registers; see `refine_steps` and `refine_kernel`.

It is opt-in (`kernels="triton"`): it rounds otherwise than PyTorch, so a run has it or not from its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.models.errors import ModelError
from pipeline.models.kernels import triton_module
from pipeline.models.refine_group import as_typed, refine_groups

if TYPE_CHECKING:
    from pipeline.models.refine_maps import OfficialRefiner

MOST_HEADS, SIDES = 32, (1, 3, 5)


def check_refine_fused(num_heads: int, kernel: int) -> None:
    """Raise ModelError unless the kernels can do it."""
    if num_heads > MOST_HEADS:
        raise ModelError(f"kernels=triton refines at most {MOST_HEADS} maps, this layer has {num_heads}: leave it out")
    if kernel not in SIDES:
        sides = ", ".join(map(str, SIDES))
        raise ModelError(f"kernels=triton has local kernels of side {sides}, not refine.kernel={kernel}: leave it out")


def refine_fused(refiner: OfficialRefiner, maps: Tensor) -> Tensor:
    """What `refiner(maps)` gives in training, its running statistics included: (B, H, N, N) -> same shape.

    Raises:
        ModelError: the batch can't be cut into the groups of the BatchNorms, or Triton can't be imported.
    """
    eps, scale = refiner.bn1.eps, refiner.scale

    def refined(_: slice, part: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, float, list[Tensor]]:
        out, _, hidden, heads, _ = torch.ops.rookery.refine(part, list(parameters), eps, scale)
        return out, part[:, 0].numel(), [*hidden.detach().unbind(), *heads.detach()[:4].unbind()]

    return refine_groups(refiner, maps, refined)


@torch.library.custom_op("rookery::refine", mutates_args=())
def _forward(
    maps: Tensor, parameters: Sequence[Tensor], eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with as_typed(maps):
        out, reduced, known = triton_module("refine_steps").forward(maps, parameters, eps, scale)
    return out, reduced, *known


@_forward.register_fake
def _(
    maps: Tensor, parameters: Sequence[Tensor], eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, like = maps.shape[1], maps.new_empty((), dtype=torch.promote_types(maps.dtype, torch.float32))
    out = torch.empty_like(maps, memory_format=torch.contiguous_format)
    hidden, known = like.new_empty(4, len(parameters[0])), like.new_empty(6, heads)
    return out, torch.empty_like(out), hidden, known, like.new_empty(heads, heads)


@torch.library.custom_op("rookery::refine_backward", mutates_args=())
def _backward(
    grad: Tensor,
    maps: Tensor,
    reduced: Tensor,
    hidden: Tensor,
    heads: Tensor,
    covariance: Tensor,
    parameters: Sequence[Tensor],
    eps: float,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    steps = triton_module("refine_steps")
    with as_typed(maps):
        return steps.backward(grad, maps, reduced, steps.Known(hidden, heads, covariance), parameters, eps, scale)


@_backward.register_fake
def _(
    grad: Tensor,
    maps: Tensor,
    reduced: Tensor,
    hidden: Tensor,
    heads: Tensor,
    covariance: Tensor,
    parameters: Sequence[Tensor],
    eps: float,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
    return torch.empty_like(maps, memory_format=torch.contiguous_format), grads


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, parameters, ctx.eps, ctx.scale = inputs
    ctx.save_for_backward(maps, *output[1:], *parameters)


def _gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, list[Tensor], None, None]:
    maps, reduced, hidden, heads, covariance, *parameters = ctx.saved_tensors
    grad_maps, grads = torch.ops.rookery.refine_backward(
        grad, maps, reduced, hidden, heads, covariance, parameters, ctx.eps, ctx.scale
    )
    return grad_maps, grads, None, None


_forward.register_autograd(_gradient, setup_context=_remember)
