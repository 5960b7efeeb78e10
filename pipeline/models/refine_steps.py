"""Both passes of `refine_fused`: the kernels in their order, and between them what is small, by PyTorch.

The expanded maps that go into the second BatchNorm are in memory for `SLICE` elements at a time. Where that is the
whole group they are computed once in each pass, else once more after their sums are known. Notation is that of
`refine_kernel_backward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.models import refine_kernel as ahead
from pipeline.models import refine_kernel_backward as behind
from pipeline.models.refine_group import Group, Norm, sum_places

# Of expanded maps: half a gigabyte in half precision, of which there are one forward and two backward.
SLICE = 2**28
# Pixels of a program that goes map by map, and how many times as many it takes one after the other.
FLAT, FLAT_TILES = 1024, 8
# Tiles that a program takes one after the other where it takes sums pixel by pixel, and rows where it goes down them.
TILES, ROWS = 8, 32


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
    group, size = step.group, step.size
    center = group.center = sum_places(step.maps) / group.count
    programs = triton.cdiv(size.pixels(len(maps)), TILES * size.tile)
    found = center.new_empty(programs, size.heads, size.heads)
    covariance_arguments = {"TILES": TILES, **size.constants("HEADS", "HP", "P")}
    ahead.covariance_kernel[(programs,)](
        step.maps, center, found, len(maps), size.plane, **covariance_arguments, **size.options()
    )
    covariance = group.covariance = found.sum(0) / group.count
    matrix = group.expand
    group.learn(matrix @ center, ((matrix @ covariance) * matrix).sum(1).clamp(min=0))

    whole = len(step.slices) == 1
    convolved = step.hidden_buffer()
    found = torch.cat([step.convolve(part, convolved, store=whole) for part in step.slices], 1)
    group.learn(*_merged(found))
    reduced = torch.empty_like(step.maps)
    parts = []
    for part in step.slices:
        if not whole:
            step.convolve(part, convolved, store=True)
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
    whole = len(step.slices) == 1
    convolved, grad_second = step.hidden_buffer(), step.hidden_buffer()
    parts = []
    for part in step.slices:
        step.convolve(part, convolved, store=True)
        parts.append(step.behind_second(part, grad, reduced, means, behind_third, convolved, grad_second, whole))
    found = torch.cat(parts).sum(0)
    grad_reduce, sum2 = found[:, : size.heads].t(), found[:, size.heads]
    grad_weight2 = norm2.inv * found[:, size.heads + 1]
    k2 = norm2.scale
    behind_second = torch.stack([k2, -k2 * norm2.inv * grad_weight2 / count, -k2 * sum2 / count])

    # The local convolution and the expansion.
    grad_maps = torch.empty_like(step.maps)
    parts = []
    for part in step.slices:
        if not whole:
            step.convolve(part, convolved, store=True)
            step.behind_second(part, grad, reduced, means, behind_third, convolved, grad_second, True)
        parts.append(step.deconvolve(part, convolved, grad_second, behind_second, grad_maps))
    found = torch.cat(parts).sum(0)
    moments, sum1, grad_kernel = found.split([size.heads, 1, size.kernel**2], 1)
    sum1 = sum1[:, 0]

    # The first: its normalised input is inv1 · expand A, linear in the maps.
    grad_weight1 = norm1.inv * (moments * group.expand).sum(1)
    pull1 = norm1.scale * norm1.inv * grad_weight1 / count
    mixed = group.expand.t() @ (pull1[:, None] * group.expand)
    behind_last[3] -= group.expand.t() @ (norm1.scale * sum1 / count)
    step.finish(grad, reduced, means, behind_last, mixed, grad_maps)
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
    """What the kernels are compiled for, besides the numbers of samples and pixels.

    Attributes:
        heads, hidden, kernel: H, H', side of the local kernels.
        plane: pixels of a map.
        dtype: of the maps.
    """

    heads: int
    hidden: int
    kernel: int
    plane: int
    dtype: torch.dtype

    @property
    def tile(self) -> int:
        """Pixels of a program that are computed at a time: what the registers of its threads hold."""
        return 64 if self.dtype.itemsize == 2 else 32

    def pixels(self, samples: int) -> int:
        return samples * self.plane

    def constants(self, *names: str) -> dict[str, object]:
        """The constants of these names, and TYPE."""
        values = {
            "HEADS": self.heads,
            "HP": max(16, triton.next_power_of_2(self.heads)),
            "HIDDEN": self.hidden,
            "CH": 16,
            "K": self.kernel,
            "P": self.tile,
        }
        sums = tl.float64 if self.dtype == torch.float64 else tl.float32
        return {name: values[name] for name in names} | {"TYPE": sums}

    def options(self) -> dict[str, Any]:
        """How the kernels are compiled."""
        return {"num_warps": 4, "num_stages": 1}


class _Step:
    """One group's maps and parameters as the kernels take them, and the calls of these."""

    def __init__(self, maps: Tensor, parameters: Sequence[Tensor], eps: float, scale: float) -> None:
        self.maps = maps.contiguous()
        self.group = Group(self.maps, None, eps, scale, parameters, SLICE)
        self.slices = self.group.slices
        self.rows, self.columns = maps.shape[2:]
        kernel = self.group.kernel
        self.size = Size(maps.shape[1], len(kernel), kernel.shape[-1], self.rows * self.columns, maps.dtype)
        self.kernel = kernel.contiguous()
        self.reduced_by = self.group.reduce.to(maps.dtype).contiguous()

    def hidden_buffer(self) -> Tensor:
        """For the expanded maps of any slice."""
        samples = self.slices[0].stop
        return self.maps.new_empty(samples, self.size.hidden, self.rows, self.columns)

    def _down(self, part: slice) -> tuple[int, int, int]:
        """Of the kernels that go down the rows: programs side by side, one above the other, rows of each."""
        run = triton.cdiv(self.rows, triton.cdiv(self.rows, ROWS))
        return triton.cdiv(_length(part) * self.columns, self.size.tile), triton.cdiv(self.rows, run), run

    def _expansion(self) -> tuple[Tensor, Tensor]:
        first = self.group.norms[0]
        return (first.scale[:, None] * self.group.expand).to(self.maps.dtype), first.bias.contiguous()

    def convolve(self, part: slice, convolved: Tensor, store: bool) -> Tensor:
        """What goes into the second BatchNorm, to `convolved` if it is to be stored: number, mean and squares of it."""
        across, down, run = self._down(part)
        constants = self.size.constants("HEADS", "HP", "HIDDEN", "CH", "K", "P")
        found = self.group.center.new_empty(3, across * down, self.size.hidden)
        grid = triton.cdiv(self.size.hidden, constants["CH"]), across, down
        ahead.convolve_kernel[grid](
            self.maps[part], self.group.center, *self._expansion(), self.kernel, convolved, found,
            _length(part), self.rows, self.columns, run, STORE=store, **constants, **self.size.options(),
        )  # fmt: skip
        return found

    def reduce(self, part: slice, convolved: Tensor, reduced: Tensor) -> Tensor:
        """Write the reduced maps; see `reduce_kernel` for what it returns."""
        programs = triton.cdiv(self.size.pixels(_length(part)), TILES * self.size.tile)
        found = self.group.center.new_empty(5, programs, self.size.heads)
        ahead.reduce_kernel[(programs,)](
            convolved, self.maps[part], self.group.center, *_affine(self.group.norms[1]), self.reduced_by,
            reduced[part], found, _length(part), self.size.plane,
            TILES=TILES, **self.size.constants("HEADS", "HP", "HIDDEN", "CH", "P"), **self.size.options(),
        )  # fmt: skip
        return found

    def combine(self, reduced: Tensor, means: Tensor, factors: Tensor, out: Tensor) -> None:
        grid = len(out) * self.size.heads, triton.cdiv(self.size.plane, FLAT)
        ahead.combine_kernel[grid](
            reduced, self.maps, means, factors, out, self.size.plane, SIZE=FLAT, **self.size.constants("HEADS")
        )

    def head_sums(self, grad: Tensor, reduced: Tensor, means: Tensor) -> Iterable[Tensor]:
        """Sums of g, g R and g A, (H,) each."""
        grid = len(grad) * self.size.heads, triton.cdiv(self.size.plane, FLAT * FLAT_TILES)
        found = means.new_empty(3, len(grad), self.size.heads, grid[1])
        behind.head_sums_kernel[grid](
            grad, reduced, self.maps, means, found, self.size.plane,
            SIZE=FLAT, TILES=FLAT_TILES, **self.size.constants("HEADS"),
        )  # fmt: skip
        return found.sum((1, 3)).unbind()

    def behind_second(
        self,
        part: slice,
        grad: Tensor,
        reduced: Tensor,
        means: Tensor,
        factors: Tensor,
        convolved: Tensor,
        grad_second: Tensor,
        store: bool,
    ) -> Tensor:
        """The gradient of the second BatchNorm's output; see `behind_second_kernel` for what it returns."""
        size, second = self.size, self.group.norms[1]
        programs = triton.cdiv(size.pixels(_length(part)), TILES * size.tile)
        constants = size.constants("HEADS", "HP", "HIDDEN", "CH", "P")
        found = means.new_empty(programs, size.hidden, size.heads + 2)
        behind.behind_second_kernel[(triton.cdiv(size.hidden, constants["CH"]), programs)](
            grad[part], reduced[part], self.maps[part], means, factors, convolved, *_affine(second), second.mean,
            self.reduced_by, grad_second, found, _length(part), size.plane,
            TILES=TILES, STORE=store, **constants, **size.options(),
        )  # fmt: skip
        return found

    def deconvolve(
        self, part: slice, convolved: Tensor, grad_second: Tensor, factors: Tensor, grad_maps: Tensor
    ) -> Tensor:
        """Down to the maps; see `deconvolve_kernel` for what it returns."""
        size = self.size
        across, down, run = self._down(part)
        found = factors.new_empty(across * down, size.hidden, size.heads + 1 + size.kernel**2)
        behind.deconvolve_kernel[(1, across, down)](
            self.maps[part], self.group.center, *self._expansion(), self.kernel, convolved, grad_second,
            self.group.norms[1].mean, factors, grad_maps[part], found,
            _length(part), self.rows, self.columns, run,
            **size.constants("HEADS", "HP", "HIDDEN", "CH", "K", "P"), **size.options(),
        )  # fmt: skip
        return found

    def finish(
        self, grad: Tensor, reduced: Tensor, means: Tensor, factors: Tensor, mixed: Tensor, grad_maps: Tensor
    ) -> None:
        samples = len(grad)
        behind.finish_kernel[(triton.cdiv(self.size.pixels(samples), self.size.tile),)](
            grad, reduced, self.maps, means, factors, mixed.to(self.maps.dtype).contiguous(), grad_maps, samples,
            self.size.plane, **self.size.constants("HEADS", "HP", "P"), **self.size.options(),
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
