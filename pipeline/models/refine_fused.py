"""The released refiner trained by kernels of this package: what `refine_lean` computes, with fewer passes over maps.

It keeps the maps and the reduced maps for the backward pass, as `refine_lean` does. The expanded maps are written in
one place, before the second BatchNorm, which has to see all of them; in the backward pass so is the gradient behind it.
All else happens in registers; see `refine_steps` and `refine_kernel`. Groups of BatchNorm statistics go through the
kernels together, as many as `SLICE` allows: what one of them computes doesn't depend on the others.

It is opt-in (`kernels="triton"`): it rounds otherwise than PyTorch, so a run has it or not from its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.models.batch_norm import note_groups
from pipeline.models.errors import ModelError
from pipeline.models.kernels import launching, triton_module
from pipeline.models.refine_group import as_typed, refine_groups

if TYPE_CHECKING:
    from pipeline.models.refine_maps import OfficialRefiner

MOST_HEADS, SIDES = 32, (1, 3, 5)
# Expanded maps at a time: half a gigabyte in half precision, of which there are one forward and two backward.
SLICE = 2**28


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
    eps, scale, norms = refiner.bn1.eps, refiner.scale, refiner.norms()
    hidden, places = len(refiner.expand.weight), maps[0, 0].numel()

    def refined(part: slice, some: Tensor, groups: int, parameters: Sequence[Tensor]) -> Tensor:
        out, _, statistics, *_ = torch.ops.rookery.refine(some, list(parameters), groups, eps, scale)
        note_groups(norms, statistics, len(some) // groups * places)
        return out

    return refine_groups(refiner, maps, refined, most=max(1, SLICE // (hidden * places)))


@torch.library.custom_op("rookery::refine", mutates_args=())
def _forward(
    maps: Tensor, parameters: Sequence[Tensor], groups: int, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with as_typed(maps), launching(maps):
        out, known = triton_module("refine_steps").forward(maps, parameters, groups, eps, scale)
    return out, *known


@_forward.register_fake
def _(
    maps: Tensor, parameters: Sequence[Tensor], groups: int, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, hidden = maps.shape[1], len(parameters[0])
    small = maps.new_empty((), dtype=torch.promote_types(maps.dtype, torch.float32))
    out = torch.empty_like(maps, memory_format=torch.contiguous_format)
    return (
        out,
        torch.empty_like(out),
        small.new_empty(groups, 4 * hidden + 4 * heads),
        small.new_empty(groups, 3, heads),
        small.new_empty(groups, heads, heads),
        maps.new_empty(groups, hidden, heads),
        small.new_empty(groups, 3, hidden),
    )


@torch.library.custom_op("rookery::refine_backward", mutates_args=())
def _backward(
    grad: Tensor,
    maps: Tensor,
    known: Sequence[Tensor],
    parameters: Sequence[Tensor],
    groups: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    steps = triton_module("refine_steps")
    with as_typed(maps), launching(maps):
        return steps.backward(grad, maps, steps.Known(*known), parameters, groups, eps, scale)


@_backward.register_fake
def _(
    grad: Tensor,
    maps: Tensor,
    known: Sequence[Tensor],
    parameters: Sequence[Tensor],
    groups: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    size = sum(p.numel() for p in parameters)
    grads = maps.new_empty(size, dtype=torch.promote_types(maps.dtype, torch.float32))
    return torch.empty_like(maps, memory_format=torch.contiguous_format), grads


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, parameters, *ctx.settings = inputs
    # The other outputs have no gradients; zeros for them would be as large as the maps.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(maps, *output[1:], *parameters)


def _gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Any, None, None, None]:
    if grad is None:
        return None, [None] * (len(ctx.saved_tensors) - 7), None, None, None
    maps, *saved = ctx.saved_tensors
    known, parameters = saved[:6], saved[6:]
    grad_maps, grads = torch.ops.rookery.refine_backward(grad, maps, known, parameters, *ctx.settings)
    parts = grads.split([p.numel() for p in parameters])
    of_parameters = [part.view(p.shape).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]
    return grad_maps, of_parameters, None, None, None


_forward.register_autograd(_gradient, setup_context=_remember)
