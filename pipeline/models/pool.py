"""HVT's hierarchical pooling: the sequence of tokens gets shorter after the first layer of each stage.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", ICCV 2021, arXiv 2103.10619.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.errors import ModelError, check_choice, check_ints, check_keys

PoolKind = Literal["max", "avg", "conv"]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Pool:
    """Where and how tokens are pooled: the `pool` option of a model whose tokens are one sequence.

    Attributes:
        stages: the layers are cut into this many equal stages; the first layer of each is followed by a pool. 0: none.
        after: instead of `stages`, the layers that are followed by a pool, counted from 0.
        kind: "max" (HVT), "avg", or "conv", a convolution over all channels.
        kernel: tokens of a window (a side of it, with two dimensions).
        stride: tokens from one window to the next; with two dimensions one number, or rows and columns.
        dims: 1, windows along the raster order, which run on from the end of a row to the next (HVT's code);
            2, square windows on the image plane, padded by (kernel - 1) // 2.
    """

    stages: int = 1
    after: tuple[int, ...] | None = None
    kind: PoolKind = "max"
    kernel: int = 3
    stride: int | tuple[int, int] = 2
    dims: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        check_choice("pool.kind", self.kind, PoolKind)
        check_choice("pool.dims", self.dims, Literal[1, 2])
        strides = self.stride if isinstance(self.stride, tuple) else (self.stride,)
        check_ints(1, **{"pool.kernel": self.kernel})
        check_ints(0, **{"pool.stages": self.stages})
        for stride in strides:
            check_ints(1, **{"pool.stride": stride})
        if self.after is not None and not (
            isinstance(self.after, tuple) and all(type(layer) is int for layer in self.after)
        ):
            raise ModelError(f"pool.after={self.after!r}: give a list of layer numbers, or null to go by the stages")
        if len(strides) not in (1, self.dims):
            wanted = "one number, or rows and columns" if self.dims == 2 else "one number, or set pool.dims=2"
            raise ModelError(f"pool.stride={list(strides)}: give {wanted}")

    @classmethod
    def of(cls, options: Self | Mapping[str, Any] | None) -> Self:
        """The settings that a recipe gives as a mapping; None: no pooling.

        Raises:
            ModelError: an unknown key or a value that can't be used.
        """
        if isinstance(options, cls):
            return options
        if options is None:
            return cls(stages=0)
        given = dict(check_keys("pool", options, cls, "{stages: 3, kernel: 3}"))
        for key in ("after", "stride"):
            if isinstance(given.get(key), list):
                given[key] = tuple(given[key])
        return cls(**given)

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers of a model of `depth` layers that are followed by a pool.

        Raises:
            ModelError: the stages can't be of equal depth, or a layer doesn't exist.
        """
        if self.after is not None:
            if sorted(set(self.after)) != list(self.after) or not all(0 <= i < depth for i in self.after):
                raise ModelError(f"pool.after={list(self.after)}: give rising layer numbers from 0 to {depth - 1}")
            return self.after
        if self.stages == 0:
            return ()
        if depth % self.stages:
            raise ModelError(f"{depth} layers can't be cut into {self.stages} equal stages: change depth or the stages")
        return tuple(range(0, depth, depth // self.stages))

    def grids(self, side: int, depth: int) -> list[Grid]:
        """Shape of the sequence after each pool: (rows, columns), or (1, length) with one dimension.

        Raises:
            ModelError: a sequence gets shorter than a window.
        """
        grid = (side, side) if self.dims == 2 else (1, side * side)
        grids = []
        for layer in self.layers(depth):
            grid = self._pooled(grid, layer)
            grids.append(grid)
        return grids

    def raster(self, pools: int) -> tuple[float, float]:
        """Where the tokens are after so many pools with one dimension: token j at place first + step * j at the start.

        Returns:
            step and first; the place of a window is its middle.
        """
        step, first = 1.0, 0.0
        for _ in range(pools):
            step, first = step * self._strides[0], first + step * (self.kernel - 1) / 2
        return step, first

    def make(self, dim: int, grid: Grid) -> TokenPool:
        """The pool of one layer, for sequences of shape `grid` and `dim` channels."""
        return TokenPool(self, dim, grid)

    def _pooled(self, grid: Grid, layer: int) -> Grid:
        rows, columns = grid
        if self.dims == 1:
            length = (columns - self.kernel) // self._strides[0] + 1
            if length < 1:
                raise ModelError(
                    f"{columns} tokens after layer {layer} are fewer than the {self.kernel} of a pooling window: use "
                    "fewer stages, a smaller kernel, larger images or smaller patches"
                )
            return 1, length
        padding = (self.kernel - 1) // 2
        sides = [(n + 2 * padding - self.kernel) // s + 1 for n, s in zip((rows, columns), self._strides, strict=True)]
        if min(sides) < 1 or self.kernel > min(rows, columns) + 2 * padding:
            raise ModelError(
                f"{rows}x{columns} tokens after layer {layer} are too few for a {self.kernel}-sided window"
            )
        return sides[0], sides[1]

    @property
    def _strides(self) -> tuple[int, ...]:
        strides = self.stride if isinstance(self.stride, tuple) else (self.stride,)
        return strides * self.dims if len(strides) == 1 else strides


class TokenPool(nn.Module):
    """One pool: (B, N, C) -> (B, N', C)."""

    def __init__(self, pool: Pool, dim: int, grid: Grid) -> None:
        super().__init__()
        self.kind = pool.kind
        self.dims = pool.dims
        self.kernel = pool.kernel
        self.stride = pool._strides
        self.padding = (pool.kernel - 1) // 2 if pool.dims == 2 else 0
        self.grid = grid
        self.conv: nn.Module | None = None
        if pool.kind == "conv":
            make = nn.Conv1d if pool.dims == 1 else nn.Conv2d
            self.conv = make(dim, dim, pool.kernel, self.stride, self.padding)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N', C)."""
        x = x.transpose(1, 2)
        if self.dims == 2:
            x = x.unflatten(2, self.grid)
        return self._pool(x).flatten(2).transpose(1, 2)

    def _pool(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.conv(x)
        if self.kind == "max":
            pool = F.max_pool1d if self.dims == 1 else F.max_pool2d
            return pool(x, self.kernel, self.stride, self.padding)
        if self.dims == 1:
            return F.avg_pool1d(x, self.kernel, self.stride, self.padding)
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, count_include_pad=False)

    def extra_repr(self) -> str:
        return f"{self.kind}, kernel={self.kernel}, stride={self.stride}, grid={self.grid}"
