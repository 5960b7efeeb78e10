"""Both passes of `refine_fused`: the kernels in their order, and between them what is small, by PyTorch.

The expanded maps that go into the second BatchNorm are in memory for `SLICE` elements at a time. Where that is the
whole group they are computed once in each pass, else once more after their sums are known. Notation is that of
`refine_kernel_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.models import refine_kernel as ahead
from pipeline.models import refine_kernel_backward as behind
from pipeline.models.errors import ModelError
from pipeline.models.refine_group import Group, Norm, sum_places, total

# Of expanded maps: half a gigabyte in half precision, of which there are one forward and two backward.
SLICE = 2**28
KERNELS = (
    ahead.covariance_kernel,
    ahead.convolve_kernel,
    ahead.reduce_kernel,
    ahead.combine_kernel,
    behind.head_sums_kernel,
    behind.behind_second_kernel,
    behind.deconvolve_kernel,
    behind.finish_kernel,
)
# Rows of a program that goes down them.
ROWS = 32


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
    step = _Step(maps, parameters, eps, scale)
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
    step = _Step(maps, parameters, eps, scale)
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


class Size(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        heads, hidden, kernel: H, H', side of the local kernels.
        dtype: of the maps.
    """

    heads: int
    hidden: int
    kernel: int
    dtype: torch.dtype

    def constants(self, function: Any) -> dict[str, Any]:
        """The constants of one of the kernels."""
        name, half = function.fn.__name__, self.dtype.itemsize == 2
        channels, tile = 16, 32  # a warp's threads hold one column of pixels each
        if half and name in ("covariance_kernel", "reduce_kernel"):
            tile = 64
        elif half and name == "behind_second_kernel":
            # A product for 16 channels would be done by each warp anew.
            channels = min(64, max(16, triton.next_power_of_2(self.hidden)))
        values = {
            "HEADS": self.heads,
            "HP": max(16, triton.next_power_of_2(self.heads)),
            "HIDDEN": self.hidden,
            "CH": channels,
            "K": self.kernel,
            "P": tile,
            "TILES": 8,
            "SIZE": 1024,
            "TYPE": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }
        return {name: value for name, value in values.items() if name in function.arg_names}

    def options(self) -> dict[str, Any]:
        """How they are compiled."""
        return {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


class _Step:
    """One group's maps and parameters as the kernels take them, and the calls of these."""

    def __init__(self, maps: Tensor, parameters: Sequence[Tensor], eps: float, scale: float) -> None:
        self.maps = maps.contiguous()
        self.group = Group(self.maps, None, eps, scale, parameters, SLICE)
        self.slices = self.group.slices
        self.rows, self.columns = maps.shape[2:]
        self.plane = self.rows * self.columns
        kernel = self.group.kernel
        self.size = Size(maps.shape[1], len(kernel), kernel.shape[-1], maps.dtype)
        if self.size.hidden * self.plane >= 2**30:
            raise ModelError(f"kernels=triton: maps of {self.rows} x {self.columns} are too large; leave it out")
        self.kernel = kernel.contiguous()
        self.reduce_weight = self.group.reduce.to(maps.dtype).contiguous()

    def _launch(self, function: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        function[grid](*arguments, **self.size.constants(function), **constants, **self.size.options())

    def _pixelwise(self, function: Any, samples: int) -> int:
        """How many programs take the pixels of so many samples."""
        constants = self.size.constants(function)
        return triton.cdiv(samples * self.plane, constants["P"] * constants.get("TILES", 1))

    def _down(self, function: Any, samples: int) -> tuple[int, int, int]:
        """For programs that go down the rows: how many side by side, and one above the other, and rows of each."""
        run = triton.cdiv(self.rows, triton.cdiv(self.rows, ROWS))
        own = self.size.constants(function)["P"] - self.size.kernel + 1
        return triton.cdiv(samples * self.columns, own), triton.cdiv(self.rows, run), run

    def _chunks(self, function: Any) -> int:
        return triton.cdiv(self.size.hidden, self.size.constants(function)["CH"])

    def _expansion(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means of the maps, weights with the first BatchNorm's scale, and what `expanded` adds."""
        first, center = self.group.norms[0], self.group.center
        weight = (first.scale[:, None] * self.group.expand).to(self.maps.dtype)
        shift = first.bias
        if self.maps.dtype.itemsize == 2:
            shift = shift - weight.to(center.dtype) @ center
        return center, weight, shift.contiguous()

    def hidden_buffer(self) -> Tensor:
        """For the expanded maps of any slice."""
        return self.maps.new_empty(self.slices[0].stop, self.size.hidden, self.rows, self.columns)

    def covariance(self, part: slice) -> Tensor:
        """Products of the centred maps, summed: (H, H)."""
        function, maps = ahead.covariance_kernel, self.maps[part]
        programs = self._pixelwise(function, len(maps))
        found = self.group.center.new_empty(programs, self.size.heads, self.size.heads)
        self._launch(function, (programs,), maps, self.group.center, found, len(maps), self.plane)
        return found.sum(0)

    def convolve(self, part: slice, convolved: Tensor, *, store: bool = True, measure: bool = False) -> Tensor:
        """What goes into the second BatchNorm, to `convolved`; to be measured: its number, mean and squares."""
        function, maps = ahead.convolve_kernel, self.maps[part]
        across, down, run = self._down(function, len(maps))
        found = self.group.center.new_empty(3, across * down, self.size.hidden)
        grid = across * self._chunks(function), down
        sizes = len(maps), self.rows, self.columns, run
        self._launch(
            function, grid, maps, *self._expansion(), self.kernel, convolved, found, *sizes, STORE=store, SUM=measure
        )
        return found

    def reduce(self, part: slice, convolved: Tensor, reduced: Tensor) -> Tensor:
        """Write the reduced maps; see `reduce_kernel` for what it returns."""
        function, maps = ahead.reduce_kernel, self.maps[part]
        programs = self._pixelwise(function, len(maps))
        found = self.group.center.new_empty(5, programs, self.size.heads)
        second = _affine(self.group.norms[1])
        self._launch(
            function, (programs,), convolved, maps, self.group.center, *second, self.reduce_weight, reduced[part],
            found, len(maps), self.plane,
        )  # fmt: skip
        return found

    def combine(self, reduced: Tensor, means: Tensor, factors: Tensor, out: Tensor) -> None:
        """See `combine_kernel`."""
        function = ahead.combine_kernel
        grid = len(out) * self.size.heads, triton.cdiv(self.plane, self.size.constants(function)["SIZE"])
        self._launch(function, grid, reduced, self.maps, means, factors, out, self.plane)

    def head_sums(self, grad: Tensor, reduced: Tensor, means: Tensor) -> tuple[Tensor, ...]:
        """Sums of g, g R and g A, (H,) each."""
        function = behind.head_sums_kernel
        constants = self.size.constants(function)
        programs = triton.cdiv(self.plane, constants["SIZE"] * constants["TILES"])
        found = means.new_empty(3, len(grad), self.size.heads, programs)
        grid = len(grad) * self.size.heads, programs
        self._launch(function, grid, grad, reduced, self.maps, means, found, self.plane)
        return found.sum((1, 3)).unbind()

    def behind_second(
        self, part: slice, at_heads: tuple[Tensor, ...], convolved: Tensor, grad_second: Tensor, store: bool
    ) -> Tensor:
        """The gradient of the second BatchNorm's output; see `behind_second_kernel` for what it returns."""
        function, second = behind.behind_second_kernel, self.group.norms[1]
        grad, reduced, means, factors = at_heads
        samples = _length(part)
        programs = self._pixelwise(function, samples)
        found = means.new_empty(programs, self.size.hidden, self.size.heads + 2)
        self._launch(
            function, (programs, self._chunks(function)), grad[part], reduced[part], self.maps[part], means, factors,
            convolved, *_affine(second), second.mean, self.reduce_weight, grad_second, found, samples, self.plane,
            STORE=store,
        )  # fmt: skip
        return found

    def deconvolve(
        self, part: slice, convolved: Tensor, grad_second: Tensor, factors: Tensor, grad_maps: Tensor
    ) -> Tensor:
        """Down to the maps; see `deconvolve_kernel` for what it returns."""
        function, maps = behind.deconvolve_kernel, self.maps[part]
        across, down, run = self._down(function, len(maps))
        found = factors.new_empty(across * down, self.size.hidden, self.size.heads + 1 + self.size.kernel**2)
        self._launch(
            function, (across, down), maps, *self._expansion(), self.kernel, convolved, grad_second, factors,
            grad_maps[part], found, len(maps), self.rows, self.columns, run,
        )  # fmt: skip
        return found

    def finish(self, part: slice, at_heads: tuple[Tensor, ...], mixed: Tensor, grad_maps: Tensor) -> None:
        """See `finish_kernel`."""
        function, samples = behind.finish_kernel, _length(part)
        grad, reduced, means, factors = at_heads
        mixed = mixed.to(self.maps.dtype).contiguous()
        self._launch(
            function, (self._pixelwise(function, samples),), grad[part], reduced[part], self.maps[part], means,
            factors, mixed, grad_maps[part], samples, self.plane,
        )  # fmt: skip


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    return norm.scale, norm.bias - norm.scale * norm.mean


def _merged(found: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) each, from number, mean and squared differences of parts, (3, parts, C)."""
    n, mean, squares = found
    count = n.sum(0)
    of_all = (n * mean).sum(0) / count
    return of_all, (squares + n * (mean - of_all).square()).sum(0) / count


def _length(part: slice) -> int:
    return int(part.stop - part.start)
