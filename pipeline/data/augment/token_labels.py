"""Targets of the class token and of every patch token from dense label maps.

A map lists the k largest logits of a teacher in every cell of a grid over the whole picture. The loader sends maps as
they are stored, with the warps that lead from the augmented input back to the picture; here, on the training device,
they become distributions. For an input that is a plain crop, the logits of a token are torchvision's `roi_align` of the
map at the token's place (`aligned=True`, adaptive sampling), and those of the class token at the whole crop, as in
TokenLabeling and Refiner (`data/mixup.py`). Rotations, shears and shifts move the points that are sampled.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
import torch

from data_prep.manifest import Manifest
from data_prep.npy import parse_npy
from pipeline.data.augment.mix_token import MixTokenParams
from pipeline.errors import UserError


class TokenLabelBatch(NamedTuple):
    """What B samples bring for the loss of their tokens.

    Attributes:
        maps: (B, 2, k, rows, columns) float16 or float32: logits, then classes.
        warps: (B, L, 2, 3) float32, from a point of the input back to the picture, in order; see `geometry`.
        mix: MixToken; None without.
    """

    maps: torch.Tensor
    warps: torch.Tensor
    mix: MixTokenParams | None

    def to(self, device: torch.device) -> Self:
        """The same on `device`; copies from pinned memory do not wait."""
        maps, warps = (t.to(device, non_blocking=True) for t in (self.maps, self.warps))
        mix = self.mix and MixTokenParams(*(t.to(device, non_blocking=True) for t in self.mix))
        return type(self)(maps, warps, mix)

    def rows(self, part: slice) -> Self:
        """Those samples alone; with MixToken they must be whole chunks."""
        return type(self)(self.maps[part], self.warps[part], self.mix and self.mix.rows(part))


def decode_map(data: bytes, manifest: Manifest) -> torch.Tensor:
    """(2, k, rows, columns) of a stored `.npy` file.

    Raises:
        UserError: it is none of the maps that the manifest describes, or names classes that don't exist.
    """
    described = manifest.token_labels
    assert described is not None, "callers read maps only where there are any"
    try:
        values = parse_npy(data)
        if values.shape != described.shape or values.dtype.name != described.dtype:
            raise ValueError(f"shape {values.shape} and type {values.dtype}")
        classes = values[1]
        # On a GPU a class that does not exist would end the process.
        if not (np.isfinite(values).all() and classes.min() >= 0 and classes.max() < manifest.num_classes):
            raise ValueError("not finite, or of a class that does not exist")
    except ValueError as error:
        raise UserError(f"its label map is damaged ({error})") from error
    return torch.from_numpy(values)


def token_targets(
    maps: torch.Tensor, warps: torch.Tensor, grid: int, num_classes: int, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target distributions, float32; the device is not waited for.

    Args:
        maps, warps: as in `TokenLabelBatch`.
        grid: tokens on a side.
        num_classes: K.
        smoothing: mass spread over all classes.

    Returns:
        (B, K) of the class token and (B, grid * grid, K) of the patch tokens in raster order.
    """
    size = (maps.shape[-2], maps.shape[-1])
    dense = torch.zeros(len(maps), num_classes, math.prod(size), device=maps.device)
    dense.scatter_(1, maps[:, 1].flatten(2).long(), maps[:, 0].flatten(2).float())
    cells = dense.transpose(1, 2)
    of_class, of_tokens = (
        (_cell_weights(warps, side, size).flatten(2) @ cells).softmax(-1) * (1 - smoothing) + smoothing / num_classes
        for side in (1, grid)
    )
    return of_class[:, 0], of_tokens


def _cell_weights(warps: torch.Tensor, grid: int, size: tuple[int, int]) -> torch.Tensor:
    """How much of every map cell is in every token: (B, grid * grid, rows, columns) of a map of `size`.

    A token is sampled at regular points, as many along each side as the side is long in cells, rounded up. A point that
    came from outside a picture adds nothing, so that its share is a logit of 0 for every class.
    """
    rows, columns = size
    x, used_x = _points(warps, grid, columns, 0, size)
    y, used_y = _points(warps, grid, rows, 1, size)
    # Axes: sample, token row, token column, point row, point column.
    x, y = torch.broadcast_tensors(x[:, None, :, None, :], y[:, :, None, :, None])
    used = used_x[:, None, None, None, :] * used_y[:, None, None, :, None]
    x, y, used = (t.expand(x.shape).flatten(3).flatten(1, 2) for t in (x, y, used))
    for warp in warps.unbind(1):
        xx, xy, x0, yx, yy, y0 = warp.flatten(1)[:, :, None, None].unbind(1)
        x, y = xx * x + xy * y + x0, yx * x + yy * y + y0
        used = used * ((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))
    across, down = _bilinear(x, columns), _bilinear(y, rows)
    return torch.einsum("bnsi,bnsj->bnij", down * used[..., None], across)


def _points(
    warps: torch.Tensor, grid: int, cells: int, axis: int, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample points of each token along an axis, (B, grid, n), and their weights, (B, n): 0 where one is too many."""
    linear = warps[:, 0, :, :2]
    for warp in warps.unbind(1)[1:]:
        linear = warp[:, :, :2] @ linear
    # Numbers, since a tensor of them would have to be brought to the device first, which the host would wait for.
    across, down = linear[:, 0, axis] * size[1], linear[:, 1, axis] * size[0]
    length = torch.stack([across, down], 1).norm(dim=1)
    most = math.ceil(cells / grid)
    count = (length / grid).ceil().clamp(1, most)[:, None]
    number = torch.arange(most, device=warps.device)
    place = (number + 0.5) / count
    points = (torch.arange(grid, device=warps.device)[None, :, None] + place[:, None]) / grid
    return points, (number < count) / count


def _bilinear(place: torch.Tensor, cells: int) -> torch.Tensor:
    """(..., cells) weights of the two cells whose centres are around a place in 0..1; beyond the last centre, of it."""
    centre = (place * cells - 0.5).clamp(0, cells - 1)
    return (1 - (centre[..., None] - torch.arange(cells, device=place.device)).abs()).clamp(min=0)
