"""The released refiner trained with two maps per head kept in place of twenty.

`OfficialRefiner` keeps every intermediate of its operations for the backward pass, most of them as wide as the expanded
maps. Here its input and its reduced maps are kept. The expanded maps are computed again in the backward pass, a few
samples at a time, so that those of a whole batch never exist at once, in neither pass.

BatchNorm couples the samples, so slices can't be recomputed one by one as layers are:

* The statistics of the expanded maps need none of them: E = W A has mean W mean(A) and variance diag(W Cov(A) Wᵀ), from
  the H x H covariance of the input. The gradient through these statistics is linear in A.
* Those of the convolved maps take a pass over the slices, and so do their sums in the backward pass. All else works on
  maps of one per head.

Shapes: B samples, H heads, H' expanded maps, N tokens. `real` (B, 1, N, N) is 1 where query and key are tokens and 0
where one is padding, or None. Maps are computed in the type of the input, statistics in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.models.batch_norm import note_groups
from pipeline.models.refine_group import Group, accurate, as_typed, refine_groups, sum_places, total, wide

if TYPE_CHECKING:
    from pipeline.models.refine_maps import OfficialRefiner


def refine_lean(refiner: OfficialRefiner, maps: Tensor, real: Tensor | None) -> Tensor:
    """What `refiner(maps, real)` gives in training, its running statistics included: (B, H, N, N) -> same shape.

    Raises:
        ModelError: the batch can't be cut into the groups of the BatchNorms.
    """

    def refined(part: slice, some: Tensor, _: int, parameters: Sequence[Tensor]) -> Tensor:
        places = None if real is None else real[part]
        out, count, *statistics = LeanRefiner.apply(some, places, refiner.bn1.eps, refiner.scale, *parameters)
        note_groups(refiner.norms(), torch.cat(statistics)[None], count)
        return out

    return refine_groups(refiner, maps, refined)


class LeanRefiner(torch.autograd.Function):
    """One group of BatchNorm statistics: (maps, real, epsilon, scale, *parameters) -> refined maps, n, statistics.

    n counts the places of the statistics; these are mean and biased variance of the four BatchNorms, (C,) each. None of
    them has a gradient, and there are no second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, real: Tensor | None, eps: float, scale: float, *parameters: Tensor) -> Any:
        with as_typed(maps):
            group = Group(maps, real, eps, scale, parameters)
            out, reduced = _forward(group)
        ctx.save_for_backward(maps, real, reduced, group.center, group.covariance, *group.statistics, *parameters)
        ctx.eps, ctx.scale = eps, scale
        ctx.mark_non_differentiable(group.count, *group.statistics)
        return out, group.count, *group.statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        maps, real, reduced, center, covariance, *rest = ctx.saved_tensors
        statistics, parameters = rest[:8], rest[8:]
        with as_typed(maps):
            group = Group(maps, real, ctx.eps, ctx.scale, parameters)
            group.center, group.covariance = center, covariance
            for mean, var in zip(statistics[::2], statistics[1::2], strict=True):
                group.learn(mean, var)
            grad_maps, grads = _backward(group, reduced, grad)
        return grad_maps, None, None, None, *(g.view_as(p).to(p.dtype) for g, p in zip(grads, parameters, strict=True))


def _forward(group: Group) -> tuple[Tensor, Tensor]:
    """Refined and reduced maps; the group learns its statistics."""
    maps, dtype, slices = group.maps, group.maps.dtype, group.slices
    group.center = total(sum_places(group.masked(maps[part], part)) for part in slices) / group.count
    flat = (group.masked(maps[part] - wide(group.center), part) for part in slices)
    group.covariance = total(_outer(x, x) for x in flat) / group.count
    matrix = group.expand
    group.learn(matrix @ group.center, ((matrix @ group.covariance) * matrix).sum(1).clamp(min=0))

    def convolved(part: slice) -> Tensor:
        return group.local(group.expanded(group.centered(part)), part)[1]

    # A slice that is the whole group is small enough to be kept from one pass to the next.
    kept = [convolved(slices[0])] if len(slices) == 1 else []
    group.learn(*group.moments(kept or (convolved(part) for part in slices)))
    reduced = torch.empty_like(maps, memory_format=torch.contiguous_format)
    for part in slices:
        hidden = F.relu6(group.norms[1](kept.pop() if kept else convolved(part)))
        reduced[part] = F.conv2d(hidden, group.reduce.to(dtype)[..., None, None])
    group.learn(*group.moments(reduced[part] for part in slices))
    group.learn(*group.moments(group.summed(reduced, part) for part in slices))
    out = torch.empty_like(reduced)
    for part in slices:
        out[part] = group.masked(group.norms[3](group.summed(reduced, part), group.scale), part)
    return out, reduced


def _backward(group: Group, reduced: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the maps and of the parameters, in the order of `refine_lean`."""
    dtype, count, slices = group.maps.dtype, group.count, group.slices
    norm1, norm2, norm3, norm4 = group.norms

    # Down to the reduced maps: tensors of one map per head.
    def behind_last(part: slice) -> Tensor:
        return group.masked(grad[part] * group.scale, part)

    sums4 = total(norm4.sums(behind_last(part), group.summed(reduced, part)) for part in slices)
    grad_maps = torch.empty_like(reduced)
    for part in slices:
        grad_sum = norm4.backward(behind_last(part), group.summed(reduced, part), sums4, count)
        grad_maps[part] = group.masked(grad_sum, part)
    sums3 = total(norm3.sums(grad_maps[part], reduced[part]) for part in slices)
    grad_reduced = torch.empty_like(reduced)
    for part in slices:
        grad_reduced[part] = group.masked(norm3.backward(grad_maps[part], reduced[part], sums3, count), part)

    # Past the second BatchNorm, whose sums take a pass of their own.
    back = group.reduce.t().to(dtype)[..., None, None]

    def at_second(part: slice) -> tuple[Tensor, ...]:
        """What was computed up to the second BatchNorm, its output, and the gradient of this."""
        centered = group.centered(part)
        expanded = group.expanded(centered)
        hidden, convolved = group.local(expanded, part)
        output = norm2(convolved)
        return (
            centered,
            expanded,
            hidden,
            convolved,
            output,
            _relu6_backward(F.conv2d(grad_reduced[part], back), output),
        )

    kept: list[tuple[Tensor, ...]] = []  # as in the forward pass
    sums2 = grad_reduce = count.new_zeros(())
    for part in slices:
        *before, convolved, output, grad_output = at_second(part)
        sums2 = sums2 + norm2.sums(grad_output, convolved)
        grad_reduce = grad_reduce + _outer(grad_reduced[part], F.relu6(output))
        if len(slices) == 1:
            kept.append((*before, convolved, output, grad_output))

    grad_kernel = moments1 = sum1 = count.new_zeros(())
    kernel, back1 = group.kernel.to(dtype), (norm1.scale[:, None] * group.expand).t().to(dtype)[..., None, None]
    for part in slices:
        centered, expanded, hidden, convolved, _, grad_output = kept.pop() if kept else at_second(part)
        grad_convolved = group.masked(norm2.backward(grad_output, convolved, sums2, count), part)
        grad_hidden, grad_part = _convolution_backward(grad_convolved, hidden, kernel)
        grad_expanded = group.masked(_relu6_backward(grad_hidden, expanded), part)
        grad_kernel = grad_kernel + accurate(grad_part)
        sum1 = sum1 + sum_places(grad_expanded)
        moments1 = moments1 + _outer(grad_expanded, centered)
        grad_maps[part] += F.conv2d(grad_expanded, back1)

    # What the first BatchNorm's statistics add: its normalised input is inv · W (A - mean), linear in the maps.
    moment1 = norm1.inv * (moments1 * group.expand).sum(1)
    pull = norm1.scale * norm1.inv * moment1 / count
    mixed = group.expand.t() @ (pull[:, None] * group.expand)
    shift = group.expand.t() @ (norm1.scale * sum1 / count)
    for part in slices:
        linear = F.conv2d(group.centered(part), mixed.to(dtype)[..., None, None], shift.to(dtype))
        grad_maps[part] -= group.masked(linear, part)
    grad_expand = norm1.scale[:, None] * (moments1 - (norm1.inv * moment1)[:, None] * (group.expand @ group.covariance))
    ordered = [grad_expand, moment1, sum1, grad_kernel, sums2[1], sums2[0], grad_reduce, sums3[1], sums3[0]]
    return grad_maps, [*ordered, sums4[1], sums4[0]]


def _convolution_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the kernel of a depthwise convolution with zero padding."""
    padding = [kernel.shape[-1] // 2] * 2
    settings = ([1, 1], padding, [1, 1], False, [0, 0], len(kernel), [True, True, False])
    grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(grad, x, kernel, None, *settings)
    return grad_x, grad_kernel


def _relu6_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.hardtanh_backward(grad, x, 0.0, 6.0)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum over samples and places: (b, C, N, N) and (b, C', N, N) -> (C, C')."""
    return accurate(a.flatten(2) @ b.flatten(2).transpose(1, 2)).sum(0)
