"""What is to be done to the pictures of a batch, as tensors: drawn on the host, carried out on any device.

Every picture takes the same way through all of an operation's arithmetic, with numbers that leave it as it is where
the operation wasn't drawn. So nothing about a batch decides which kernels run, and the host waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image

from pipeline.data.augment.crop import CROP_DRAWS, require_side
from pipeline.data.augment.finish import Erased
from pipeline.data.augment.keyed import Numbers, Stream
from pipeline.data.augment.lazy import LazyModule
from pipeline.data.augment.randaugment import DrawnOp
from pipeline.data.augment.settings import AugmentConfig, CenterCrop, PadCrop
from pipeline.data.augment.transforms import SampleDraw, TrainTransform
from pipeline.data.fast.noise import normals

randaugment = LazyModule("pipeline.data.fast.randaugment")

# a, b, d, e of `warp_nearest` and where the first row begins, in 16.16 fixed point: every pixel comes from its place.
_STAYS = (65536, 0, 0, 65536, 32768, 32768)


class Table(IntEnum):
    """Where the table comes from that an operation replaces values by."""

    GIVEN = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    CONTRAST = 3


class Factor(IntEnum):
    """Places of `Plan.factors`."""

    CONTRAST = 0
    COLOR = 1
    SHARPNESS = 2


class Plan(NamedTuple):
    """What is done to B pictures; after the crop come L operations, all but one part of each without effect.

    Attributes:
        samples: (B,) int64, which pictures of the split.
        corner: (B, 2) int64, top and left of the part that is cut out; it may reach over the edge.
        mirror: (B,) bool.
        warps: (B, L, 6) int64, where pixels come from: a, b, d, e, x, y in 16.16 fixed point.
        factors: (B, L, 3) float32, see `Factor`; 1 changes nothing.
        source: (B, L) uint8, a `Table`.
        tables: (B, L, 256) uint8, the one of `Table.GIVEN`.
    """

    samples: torch.Tensor
    corner: torch.Tensor
    mirror: torch.Tensor
    warps: torch.Tensor
    factors: torch.Tensor
    source: torch.Tensor
    tables: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """The same on `device`; copies from pinned memory do not wait."""
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in self))


class Planner:
    """`planner(seed, epoch, indices, samples)` is the plan of a batch.

    Args:
        config: what to do; `AugmentConfig.off_device` finds nothing in it.
        height, width: of all pictures of the split.
        img_size: side of the model's input.
        in_chans: channels.

    Raises:
        UserError: the pictures are too small for the crop.
    """

    def __init__(self, config: AugmentConfig, height: int, width: int, img_size: int, in_chans: int) -> None:
        self.config, self.height, self.width, self.side = config, height, width, img_size
        self.in_chans = in_chans
        self.layers = config.rand_augment.layers if config.rand_augment else 0
        self._plain = TrainTransform(config, img_size, in_chans)
        self._needed = self._plain.needed()
        self._noisy = config.random_erasing is not None and config.random_erasing.mode == "pixel"
        crop, whole = config.crop, _Sized(width, height)
        if isinstance(crop, PadCrop):
            fits = min(height, width) + 2 * crop.padding >= img_size
            require_side(fits, whole, img_size, f"with {crop.padding} px of padding")
        elif isinstance(crop, CenterCrop):
            require_side(min(height, width) >= img_size, whole, img_size, "by a centre crop")
        else:
            require_side((height, width) == (img_size, img_size), whole, img_size, "without a crop")

    def __call__(self, seed: int, epoch: int, indices: np.ndarray, samples: np.ndarray) -> tuple[Plan, Erased]:
        """The plan, and the boxes that are erased after it.

        Args:
            seed, epoch: of this presentation.
            indices: (B,) what is drawn by: the samples that the order asks for, copies told apart.
            samples: (B,) pictures to take: others in the place of bad ones.
        """
        batch, layers = len(samples), self.layers
        corner, mirror = np.empty((batch, 2), np.int64), np.empty(batch, np.bool_)
        warps = np.empty((batch, layers, 6), np.int64)
        warps[:] = _STAYS
        factors = np.ones((batch, layers, len(Factor)), np.float32)
        source = np.zeros((batch, layers), np.uint8)
        tables = np.empty((batch, layers, 256), np.uint8)
        tables[:] = np.arange(256)
        boxes, noise = [], []
        for i, numbers in enumerate(Numbers.of_batch(seed, epoch, indices, self._needed)):
            drawn = self._plain.drawn(numbers)
            corner[i], mirror[i] = self._corner(numbers), drawn.flip
            for layer, op in enumerate(drawn.ops):
                warp, factor, where, table = self._parts(op)
                if warp is not None:
                    warps[i, layer] = warp
                if factor is not None:
                    factors[i, layer, factor] = op.arg
                source[i, layer] = where
                if table is not None:
                    tables[i, layer] = table
            for box, values in self._erased(drawn, numbers):
                boxes.append((i, *box))
                noise.append(values)
        plan = Plan(*map(torch.from_numpy, (samples.astype(np.int64), corner, mirror, warps, factors, source, tables)))
        return plan, Erased(
            np.array(boxes, np.int64).reshape(-1, 5), np.concatenate(noise) if noise else np.empty(0, np.float32)
        )

    def _corner(self, numbers: Numbers) -> tuple[int, int]:
        crop, side = self.config.crop, self.side
        if isinstance(crop, PadCrop):
            u, p = numbers.of(Stream.CROP, CROP_DRAWS + 1), crop.padding
            return int(u[0] * (self.height + 2 * p - side + 1)) - p, int(u[1] * (self.width + 2 * p - side + 1)) - p
        if isinstance(crop, CenterCrop):
            return round((self.height - side) / 2), round((self.width - side) / 2)
        return 0, 0

    def _parts(self, op: DrawnOp) -> tuple[tuple[int, ...] | None, Factor | None, Table, np.ndarray | None]:
        """Warp, place of the factor, source of the table, and the table that is given."""
        moves = op.moves(self.side, self.side)
        if moves is not None:
            assert op.resample == Image.Resampling.NEAREST, "the config has seen the policy"
            return _fixed(randaugment.matrix(moves, op.resample).tolist()), None, Table.GIVEN, None
        if op.name in _FACTORS:
            return None, _FACTORS[op.name], Table.CONTRAST if op.name == "Contrast" else Table.GIVEN, None
        if op.name in _SOURCES:
            return None, None, _SOURCES[op.name], None
        return None, None, Table.GIVEN, randaugment.fixed_table(op)

    def _erased(self, drawn: SampleDraw, numbers: Numbers) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        if drawn.erased is not None:
            box = drawn.erased
            count = self.in_chans * box.height * box.width if self._noisy else 0
            values = normals(numbers.key, Stream.ERASING_NOISE, count) if count else np.empty(0, np.float32)
            yield (box.top, box.left, box.height, box.width), values


_FACTORS = {"Contrast": Factor.CONTRAST, "Color": Factor.COLOR, "Sharpness": Factor.SHARPNESS}
_SOURCES = {"AutoContrast": Table.AUTO_CONTRAST, "Equalize": Table.EQUALIZE}


def _fixed(matrix: list[float]) -> tuple[int, ...]:
    """A Pillow transform in the fixed point of `kernels.warp_nearest`."""
    a, b, c, d, e, f = matrix
    starts = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
    return tuple(math.floor(value * 65536 + 0.5) for value in (a, b, d, e, *starts))


class _Sized(NamedTuple):
    """What a message says of a picture."""

    width: int
    height: int
