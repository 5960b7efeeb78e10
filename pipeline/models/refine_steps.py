"""Both passes of `refine_fused`: the kernels in their order, and between them what is small, by PyTorch.

The expanded maps that go into the second BatchNorm are in memory for `SLICE` elements at a time. Where that is the
whole group they are computed once in each pass, else once more after their sums are known. Notation is that of
`refine_kernel_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.refine_calls import Calls
from pipeline.models.refine_group import sum_places, total


class Known(NamedTuple):
    """Statistics of the forward pass.

    Attributes:
        hidden: (4, H'), mean and variance of the first and the second BatchNorm.
        heads: (6, H), those of the third and the fourth, means of the maps, covariances of reduced maps and maps.
        covariance: (H, H), of the maps.
    """

    hidden: Tensor
    heads: Tensor
    covariance: Tensor

    def statistics(self) -> list[Tensor]:
        """Mean and variance of each BatchNorm."""
        return [*self.hidden.unbind(), *self.heads[:4].unbind()]


def forward(maps: Tensor, parameters: Sequence[Tensor], eps: float, scale: float) -> tuple[Tensor, Tensor, Known]:
    """Refined and reduced maps, and the statistics, of one group.

    Args:
        maps: (B, H, N, N).
        parameters: in the order of `Group`.
        eps, scale: as there.
    """
    step = Calls(maps, parameters, eps, scale)
    group = step.group
    center = group.center = sum_places(step.maps) / group.count
    covariance = group.covariance = total(step.covariance(part) for part in step.slices) / group.count
    matrix = group.expand
    group.learn(matrix @ center, ((matrix @ covariance) * matrix).sum(1).clamp(min=0))

    whole = len(step.slices) == 1
    convolved = step.hidden_buffer()
    found = torch.cat([step.convolve(part, convolved, store=whole, measure=True) for part in step.slices], 1)
    group.learn(*_merged(found))
    reduced = torch.empty_like(step.maps)
    parts = []
    for part in step.slices:
        if not whole:
            step.convolve(part, convolved)
        parts.append(step.reduce(part, convolved, reduced))
    found = torch.cat(parts, 1)
    mean3, var3 = _merged(found[:3])
    n, mean, _, of_maps, products = found
    # Maps are less their means here, which leaves the mean of the covariance's second factor at nothing but rounding.
    common = (products + n * (mean - mean3) * of_maps).sum(0) / group.count
    group.learn(mean3, var3)
    k3 = group.norms[2].scale
    group.learn(
        group.norms[2].bias + center, (k3.square() * var3 + covariance.diagonal() + 2 * k3 * common).clamp(min=0)
    )
    last = group.norms[3]
    out = torch.empty_like(reduced)
    step.combine(
        reduced, torch.stack([mean3, center]), scale * torch.stack([last.scale * k3, last.scale, last.bias]), out
    )
    statistics = group.statistics
    known = Known(torch.stack(statistics[:4]), torch.stack([*statistics[4:], center, common]), covariance)
    return out, reduced, known


def backward(
    grad: Tensor,
    maps: Tensor,
    reduced: Tensor,
    known: Known,
    parameters: Sequence[Tensor],
    eps: float,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the maps and of the parameters, in float32 at least and in the order and shapes of `forward`."""
    step = Calls(maps, parameters, eps, scale)
    group, size, count = step.group, step.size, step.group.count
    mean3, var3, _, _, center, common = known.heads
    group.center = center
    statistics = known.statistics()
    for mean, var in zip(statistics[::2], statistics[1::2], strict=True):
        group.learn(mean, var)
    norm1, norm2, norm3, norm4 = group.norms
    grad = grad.to(maps.dtype).contiguous()
    means = torch.stack([mean3, center])

    # The last two BatchNorms: x̂ of the fourth is inv4 (k3 R + A).
    sum_g, sum_gr, sum_ga = step.head_sums(grad, reduced, means)
    k3, k4 = norm3.scale, norm4.scale * scale
    grad_weight4 = scale * norm4.inv * (k3 * sum_gr + sum_ga)
    pull4 = norm4.scale * norm4.inv.square() * scale * (k3 * sum_gr + sum_ga) / count
    behind_last = torch.stack([k4, -pull4 * k3, -pull4, -k4 * sum_g / count])
    grad_weight3 = norm3.inv * (k4 * sum_gr - pull4 * count * (k3 * var3 + common))
    behind_third = k3 * behind_last
    behind_third[1] -= k3 * norm3.inv * grad_weight3 / count

    # The second.
    at_heads = grad, reduced, means, behind_third
    whole = len(step.slices) == 1
    convolved, grad_second = step.hidden_buffer(), step.hidden_buffer()
    parts = []
    for part in step.slices:
        step.convolve(part, convolved)
        parts.append(step.behind_second(part, at_heads, convolved, grad_second, store=whole))
    found = torch.cat(parts).sum(0)
    grad_reduce, sum2 = found[:, : size.heads].t(), found[:, size.heads]
    grad_weight2 = norm2.inv * found[:, size.heads + 1]
    k2 = norm2.scale
    pull2 = k2 * norm2.inv * grad_weight2 / count
    behind_second = torch.stack([k2, -pull2, pull2 * norm2.mean - k2 * sum2 / count])

    # The local convolution and the expansion.
    grad_maps = torch.empty_like(step.maps)
    parts = []
    for part in step.slices:
        if not whole:
            step.convolve(part, convolved)
            step.behind_second(part, at_heads, convolved, grad_second, store=True)
        parts.append(step.deconvolve(part, convolved, grad_second, behind_second, grad_maps))
    found = torch.cat(parts).sum(0)
    moments, sum1, grad_kernel = found.split([size.heads, 1, size.kernel**2], 1)
    sum1 = sum1[:, 0]

    # The first: its normalised input is inv1 · expand A, linear in the maps.
    grad_weight1 = norm1.inv * (moments * group.expand).sum(1)
    pull1 = norm1.scale * norm1.inv * grad_weight1 / count
    mixed = group.expand.t() @ (pull1[:, None] * group.expand)
    behind_last[3] -= group.expand.t() @ (norm1.scale * sum1 / count)
    for part in step.slices:
        step.finish(part, (grad, reduced, means, behind_last), mixed, grad_maps)
    grad_expand = norm1.scale[:, None] * (
        moments - (norm1.inv * grad_weight1)[:, None] * (group.expand @ known.covariance)
    )
    # The fourth BatchNorm takes away whatever the third one's bias adds.
    zero = torch.zeros_like(sum_g)
    grads = [grad_expand, grad_weight1, sum1, grad_kernel, grad_weight2, sum2, grad_reduce, grad_weight3, zero]
    grads += [grad_weight4, scale * sum_g]
    # Copies: an operator's outputs don't share memory.
    return grad_maps, [g.reshape(p.shape).to(p.dtype).clone() for g, p in zip(grads, parameters, strict=True)]


def _merged(found: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) each, from number, mean and squared differences of parts, (3, parts, C)."""
    n, mean, squares = found
    count = n.sum(0)
    of_all = (n * mean).sum(0) / count
    return of_all, (squares + n * (mean - of_all).square()).sum(0) / count
