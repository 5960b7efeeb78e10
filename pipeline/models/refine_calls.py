"""The kernels of `refine_fused` as Python calls them: sizes, grids, memory for what they find.

Notation is that of `refine_kernel` and `refine_kernel_backward`.
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
from pipeline.models.refine_group import Group, Norm

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


class Calls:
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


def _length(part: slice) -> int:
    return int(part.stop - part.start)
