"""The kernels of `refine_fused` as Python calls them: sizes, grids, memory for what they find.

Notation is that of `refine_kernel` and `refine_kernel_backward`; what is small is that of `refine_kernel_between`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.models import refine_fused
from pipeline.models import refine_kernel as ahead
from pipeline.models import refine_kernel_backward as behind
from pipeline.models import refine_kernel_between as between
from pipeline.models import refine_kernel_between_backward as between_backward
from pipeline.models.errors import ModelError

KERNELS = (
    ahead.covariance_kernel,
    ahead.convolve_kernel,
    ahead.reduce_kernel,
    ahead.combine_kernel,
    behind.head_sums_kernel,
    behind.behind_second_kernel,
    behind.deconvolve_kernel,
    behind.finish_kernel,
    between.gather_products_kernel,
    between.gather_moments_kernel,
    between.gather_sums_kernel,
    between.first_kernel,
    between.second_kernel,
    between.heads_kernel,
    between_backward.heads_backward_kernel,
    between_backward.second_backward_kernel,
    between_backward.first_backward_kernel,
)
# Rows of a program that goes down them.
ROWS = 32
# Programs that share the pixels of a group: enough to fill a GPU, each with enough to do.
PROGRAMS, FEWEST_TILES = 4096, 8
# Records that gathering leaves of those of a group.
GATHERED = 16


class Size(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        heads, hidden, kernel: H, H', side of the local kernels.
        dtype: of the maps.
        eps, scale: epsilon of the BatchNorms, and the refiner's last factor.
    """

    heads: int
    hidden: int
    kernel: int
    dtype: torch.dtype
    eps: float
    scale: float

    @property
    def sums(self) -> torch.dtype:
        """Type of sums and statistics."""
        return torch.promote_types(self.dtype, torch.float32)

    @functools.cache  # noqa: B019 - a model has few sizes
    def constants(self, function: Any) -> dict[str, Any]:
        """The constants of one of the kernels; not to be changed."""
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
            "WP": max(16, triton.next_power_of_2(self.hidden)),
            "CH": channels,
            "K": self.kernel,
            "KP": triton.next_power_of_2(self.kernel**2),
            "P": tile,
            "LINES": 16,
            "WIDTH": 16,
            "TILES": 8,
            "SIZE": 1024,
            "BLOCK": 64,
            "EPS": self.eps,
            "SCALE": self.scale,
            "TYPE": tl.float64 if self.sums == torch.float64 else tl.float32,
        }
        return {name: value for name, value in values.items() if name in function.arg_names}

    @functools.cache  # noqa: B019
    def options(self, function: Any) -> dict[str, Any]:
        """How one of them is compiled; not to be changed."""
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        if function is ahead.convolve_kernel and self.dtype.itemsize > 2:
            options["num_warps"] = 8  # their registers have no room for twice as many numbers of twice the size
        return options


class Parameters(NamedTuple):
    """Those of a refiner in the order of `refine_fused`, in the type of the sums."""

    expand: Tensor
    weight1: Tensor
    bias1: Tensor
    kernel: Tensor
    weight2: Tensor
    bias2: Tensor
    reduce: Tensor
    weight3: Tensor
    bias3: Tensor
    weight4: Tensor
    bias4: Tensor


class Calls:
    """The maps of some groups and the parameters as the kernels take them, and the calls of these.

    Args:
        maps: (B, H, rows, columns), the samples of one group after those of another.
        groups: G; of one group the expanded maps may be computed in slices, of several they are not.

    Attributes:
        slices: of a group's samples.
        count: pixels of a group.
    """

    def __init__(self, maps: Tensor, parameters: Sequence[Tensor], groups: int, eps: float, scale: float) -> None:
        self.maps, self.groups = maps.contiguous(), groups
        self.samples = len(maps) // groups
        self.rows, self.columns = maps.shape[2:]
        self.plane = self.rows * self.columns
        self.count = self.samples * self.plane
        kernel = parameters[3]
        self.size = Size(maps.shape[1], len(kernel), kernel.shape[-1], maps.dtype, eps, scale)
        self.parameters = Parameters(*(p.to(self.size.sums).contiguous() for p in parameters))
        if self.size.hidden * self.plane >= 2**30:
            raise ModelError(f"kernels=triton: maps of {self.rows} x {self.columns} are too large; leave it out")
        step = self.samples
        if groups == 1:
            step = min(step, max(1, refine_fused.SLICE // (self.size.hidden * self.plane)))
        self.slices = [slice(i, min(i + step, self.samples)) for i in range(0, self.samples, step)]

    def new(self, *shape: int) -> Tensor:
        """(G, ...) of the type of the sums."""
        return self.maps.new_empty(self.groups, *shape, dtype=self.size.sums)

    def like_maps(self, *shape: int) -> Tensor:
        """(G, ...) of the type of the maps."""
        return self.maps.new_empty(self.groups, *shape)

    def hidden_buffer(self) -> Tensor:
        """For the expanded maps of any slice of all groups."""
        shape = self.slices[0].stop, self.size.hidden, self.rows, self.columns
        return self.maps.new_empty(self.groups * shape[0], *shape[1:])

    def launch(self, function: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        """Of programs for each group."""
        constants = self.size.constants(function) | self.size.options(function) | constants
        function[(*grid, self.groups)](*arguments, **constants)

    def part(self, values: Tensor, part: slice) -> Tensor:
        """Of values of all samples those of a slice, which is all of them where there are more groups than one."""
        return values if len(self.slices) == 1 else values[part]

    def pixelwise(self, function: Any, part: slice) -> tuple[int, int]:
        """How many programs take the pixels of a slice of a group, and how many tiles each."""
        tile = self.size.constants(function)["P"]
        # A constant of the kernels: a loop of unknown length takes more registers.
        tiles = max(FEWEST_TILES, triton.next_power_of_2(triton.cdiv(self.count, tile * PROGRAMS)))
        tiles = min(tiles, triton.next_power_of_2(triton.cdiv(self.plane, tile)))
        return length(part) * triton.cdiv(self.plane, tile * tiles), tiles

    def down(self, function: Any, part: slice) -> tuple[int, int, int]:
        """For programs that go down the rows: how many side by side, and one above the other, and rows of each."""
        run = triton.cdiv(self.rows, triton.cdiv(self.rows, ROWS))
        constants, halo, runs = self.size.constants(function), self.size.kernel - 1, triton.cdiv(self.rows, run)
        if "LINES" in constants:
            lines = triton.cdiv(length(part) * runs, constants["LINES"])
            return triton.cdiv(self.columns, constants["WIDTH"] - halo), lines, run
        return triton.cdiv(length(part) * self.columns, constants["P"] - halo), runs, run

    def chunks(self, function: Any) -> int:
        return triton.cdiv(self.size.hidden, self.size.constants(function)["CH"])

    def gathered(self, function: Any, found: Tensor, **constants: Any) -> tuple[Tensor, int]:
        """Records (G, parts, ...) merged into `GATHERED` at most, and how many."""
        parts = found.shape[1]
        if parts <= GATHERED:
            return found, parts
        run = triton.cdiv(parts, GATHERED)
        left = triton.cdiv(parts, run)
        into = found.new_empty(self.groups, left, *found.shape[2:])
        blocks, sizes = 1, []
        if function is between.gather_sums_kernel:
            sizes = [found[0, 0].numel()]
            blocks = triton.cdiv(sizes[0], self.size.constants(function)["BLOCK"])
        self.launch(function, (left, blocks), found, into, parts, run, *sizes, **constants)
        return into, left

    def sums(self, found: Tensor) -> tuple[Tensor, int]:
        """`gathered` for sums."""
        return self.gathered(between.gather_sums_kernel, found)

    def moments(self, found: Tensor) -> tuple[Tensor, int]:
        """`gathered` for the statistics of `convolve_kernel` and `reduce_kernel`."""
        fields, count = found.shape[2:]
        padded = max(16, triton.next_power_of_2(count))
        return self.gathered(between.gather_moments_kernel, found, COUNT=count, C=padded, PAIRS=fields == 5)


def length(part: slice) -> int:
    """Samples of a slice."""
    return int(part.stop - part.start)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Records (G, programs, ...) of slices as those of a whole."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
