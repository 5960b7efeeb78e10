"""Both passes of `refine_fused`: the kernels in their order, for several groups of BatchNorm statistics at once.

The expanded maps that go into the second BatchNorm are in memory for `refine_fused.SLICE` elements at a time. Where
that is a whole group they are computed once in each pass, else once more after their sums are known. Notation is that
of `refine_kernel_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models import refine_kernel as ahead
from pipeline.models import refine_kernel_backward as behind
from pipeline.models import refine_kernel_between as between
from pipeline.models import refine_kernel_between_backward as between_backward
from pipeline.models.refine_calls import Calls, joined, length


class Known(NamedTuple):
    """What the backward pass needs of the forward pass, all but the maps small; see `refine_kernel`.

    Attributes:
        reduced: R, (B, H, N, N).
        statistics: (G, 4 H' + 4 H), mean and variance of each BatchNorm.
        heads: (G, 3, H), means of reduced maps and of maps, and the covariance of each with its map.
        covariance: (G, H, H), of the maps.
        weights: (G, H', H), of the expansion with the first BatchNorm's scale.
        hidden: (G, 3, H'), its shift, and the second BatchNorm's scale and shift.
    """

    reduced: Tensor
    statistics: Tensor
    heads: Tensor
    covariance: Tensor
    weights: Tensor
    hidden: Tensor


def forward(maps: Tensor, parameters: Sequence[Tensor], groups: int, eps: float, scale: float) -> tuple[Tensor, Known]:
    """Refined maps, and what is known of them.

    Args:
        maps: (B, H, N, N).
        parameters: weights of expansion and first BatchNorm, its bias, the same of the local convolution and of the
            reduction, weight and bias of the last BatchNorm.
        groups: of BatchNorm statistics, each of as many consecutive samples.
        eps, scale: epsilon of the BatchNorms, and the last factor.
    """
    step = Calls(maps, parameters, groups, eps, scale)
    heads, hidden = step.size.heads, step.size.hidden
    given = step.parameters
    known = Known(
        torch.empty_like(step.maps),
        step.new(4 * hidden + 4 * heads),
        step.new(3, heads),
        step.new(heads, heads),
        step.like_maps(hidden, heads),
        step.new(3, hidden),
    )

    found = joined([_covariance(step, part) for part in step.slices])
    some, parts = step.gathered(between.gather_products_kernel, found)
    step.launch(
        between.first_kernel, (1, 1), some, given.expand, given.weight1, given.bias1, known.statistics, known.heads,
        known.covariance, known.weights, known.hidden, parts,
    )  # fmt: skip

    whole = len(step.slices) == 1
    convolved = step.hidden_buffer()
    found = joined([_convolve(step, part, known, convolved, store=whole, measure=True) for part in step.slices])
    some, parts = step.moments(found)
    step.launch(between.second_kernel, (1, 1), some, given.weight2, given.bias2, known.statistics, known.hidden, parts)

    records = []
    for part in step.slices:
        if not whole:
            _convolve(step, part, known, convolved)
        records.append(_reduce(step, part, known, convolved))
    some, parts = step.moments(joined(records))
    factors = step.new(3, heads)
    step.launch(
        between.heads_kernel, (1, 1), some, given.weight3, given.bias3, given.weight4, given.bias4, known.covariance,
        known.statistics, known.heads, factors, parts,
    )  # fmt: skip

    out = torch.empty_like(step.maps)
    function = ahead.combine_kernel
    grid = step.samples * heads, -(-step.plane // step.size.constants(function)["SIZE"])
    step.launch(function, grid, known.reduced, step.maps, known.heads, factors, out, step.plane)
    return out, known


def backward(
    grad: Tensor,
    maps: Tensor,
    known: Known,
    parameters: Sequence[Tensor],
    groups: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the maps and, one behind the other, of the parameters, in float32 at least."""
    step = Calls(maps, parameters, groups, eps, scale)
    given, heads, hidden = step.parameters, step.size.heads, step.size.hidden
    grad = grad.to(maps.dtype).contiguous()
    size = sum(p.numel() for p in parameters)
    grads = step.new(size)
    sizes = step.count, size

    # The last two BatchNorms.
    some, parts = step.sums(_head_sums(step, grad, known))
    behind_last, behind_third = step.new(4, heads), step.new(4, heads)
    step.launch(
        between_backward.heads_backward_kernel, (1, 1), some, given.weight3, given.weight4, known.statistics,
        known.heads, behind_last, behind_third, grads, parts, *sizes,
    )  # fmt: skip

    # The second.
    whole = len(step.slices) == 1
    convolved, grad_second = step.hidden_buffer(), step.hidden_buffer()

    def at_second(part: slice, store: bool) -> Tensor:
        _convolve(step, part, known, convolved)
        return _behind_second(step, part, grad, known, behind_third, convolved, grad_second, store)

    some, parts = step.sums(joined([at_second(part, whole) for part in step.slices]))
    behind_second = step.new(3, hidden)
    step.launch(
        between_backward.second_backward_kernel, (1, 1), some, given.weight2, known.statistics, behind_second, grads,
        parts, *sizes,
    )  # fmt: skip

    # The local convolution and the expansion.
    grad_maps = torch.empty_like(step.maps)
    records = []
    for part in step.slices:
        if not whole:
            at_second(part, True)
        records.append(_deconvolve(step, part, known, convolved, grad_second, behind_second, grad_maps))
    some, parts = step.sums(joined(records))
    mixed = step.like_maps(heads, heads)
    step.launch(
        between_backward.first_backward_kernel, (1, 1), some, given.expand, given.weight1, known.statistics,
        known.covariance, mixed, behind_last, grads, parts, *sizes,
    )  # fmt: skip

    # What is linear in the maps, of the first BatchNorm and of the last.
    function = behind.finish_kernel
    for part in step.slices:
        programs, tiles = step.pixelwise(function, part)
        step.launch(
            function, (programs, 1), *_at(step, part, grad, known.reduced, step.maps), known.heads, behind_last, mixed,
            *_at(step, part, grad_maps), length(part), step.plane, TILES=tiles,
        )  # fmt: skip
    return grad_maps, grads.sum(0)


def _at(step: Calls, part: slice, *values: Tensor) -> list[Tensor]:
    return [step.part(each, part) for each in values]


def _covariance(step: Calls, part: slice) -> Tensor:
    function, heads = ahead.covariance_kernel, step.size.heads
    programs, tiles = step.pixelwise(function, part)
    found = step.new(programs, 1 + heads + heads**2)
    step.launch(
        function, (programs, 1), step.part(step.maps, part), found, length(part), step.plane, TILES=tiles
    )  # fmt: skip
    return found


def _convolve(
    step: Calls, part: slice, known: Known, convolved: Tensor, *, store: bool = True, measure: bool = False
) -> Tensor:
    """What goes into the second BatchNorm, to `convolved`; to be measured: its number, mean and squares."""
    function = ahead.convolve_kernel
    across, down, run = step.down(function, part)
    found = step.new(across * down, 3, step.size.hidden)
    step.launch(
        function, (across * step.chunks(function), down), step.part(step.maps, part), known.heads, known.weights,
        known.hidden, step.parameters.kernel, convolved, found, length(part), step.rows, step.columns, run,
        STORE=store, SUM=measure,
    )  # fmt: skip
    return found


def _reduce(step: Calls, part: slice, known: Known, convolved: Tensor) -> Tensor:
    function = ahead.reduce_kernel
    programs, tiles = step.pixelwise(function, part)
    found = step.new(programs, 5, step.size.heads)
    step.launch(
        function, (programs, 1), convolved, step.part(step.maps, part), known.heads, known.hidden,
        step.parameters.reduce, step.part(known.reduced, part), found, length(part), step.plane,
        TILES=tiles,
    )  # fmt: skip
    return found


def _head_sums(step: Calls, grad: Tensor, known: Known) -> Tensor:
    function, heads = behind.head_sums_kernel, step.size.heads
    constants = step.size.constants(function)
    runs = -(-step.plane // (constants["SIZE"] * constants["TILES"]))
    found = step.new(step.samples * runs, 3, heads)
    step.launch(
        function, (step.samples * heads, runs), grad, known.reduced, step.maps, known.heads, found, step.plane
    )  # fmt: skip
    return found


def _behind_second(
    step: Calls,
    part: slice,
    grad: Tensor,
    known: Known,
    factors: Tensor,
    convolved: Tensor,
    grad_second: Tensor,
    store: bool,
) -> Tensor:
    function = behind.behind_second_kernel
    programs, tiles = step.pixelwise(function, part)
    found = step.new(programs, step.size.hidden, step.size.heads + 2)
    step.launch(
        function, (programs, step.chunks(function)), *_at(step, part, grad, known.reduced, step.maps), known.heads,
        factors, convolved, known.hidden, known.statistics, step.parameters.reduce, grad_second, found,
        length(part), step.plane, TILES=tiles, STORE=store,
    )  # fmt: skip
    return found


def _deconvolve(
    step: Calls,
    part: slice,
    known: Known,
    convolved: Tensor,
    grad_second: Tensor,
    factors: Tensor,
    grad_maps: Tensor,
) -> Tensor:
    function = behind.deconvolve_kernel
    across, down, run = step.down(function, part)
    found = step.new(across * down, step.size.hidden, step.size.heads + 1 + step.size.kernel**2)
    step.launch(
        function, (across, down), step.part(step.maps, part), known.heads, known.weights, known.hidden,
        step.parameters.kernel, convolved, grad_second, factors, step.part(grad_maps, part), found,
        length(part), step.rows, step.columns, run,
    )  # fmt: skip
    return found
