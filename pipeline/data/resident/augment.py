"""A `Plan` carried out: the arithmetic of `pipeline.data.fast` on whole batches, to the last bit, on any device.

Products and sums of floats are operations of their own, each of which rounds: fused ones would round otherwise.
Nothing is added up by several threads at once, so the numbers are the same each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.augment.settings import AugmentConfig, PadCrop
from pipeline.data.augment.transforms import TrainTransform
from pipeline.data.resident.plan import Factor, Plan, Table


class DeviceAugment:
    """`augment(plan)` are the pictures of a batch after their 8-bit operations: (B, C, side, side) uint8.

    Args:
        pictures: (N, C, H, W) uint8, the whole split, on the device.
        config: what is done.
        img_size: side of the model's input.
    """

    def __init__(self, pictures: Tensor, config: AugmentConfig, img_size: int) -> None:
        self.pictures, self.side = pictures, img_size
        self.reflect = isinstance(config.crop, PadCrop) and config.crop.fill == "reflect"
        fill = TrainTransform(config, img_size, pictures.shape[1]).fill
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=pictures.device).view(-1, 1)

    def __call__(self, plan: Plan) -> Tensor:
        """Nothing here waits for the device.

        Args:
            plan: on the device of the pictures.
        """
        images = self._cropped(plan)
        for layer in range(plan.warps.shape[1]):
            images = warped(images, plan.warps[:, layer], self.fill)
            factors = plan.factors[:, layer].view(-1, 3, 1, 1, 1)
            if images.shape[1] == 3:
                images = blended(grey(images)[:, None], images, factors[:, Factor.COLOR])
            images = sharpened(images, factors[:, Factor.SHARPNESS])
            images = tabled(images, plan.source[:, layer], plan.tables[:, layer], plan.factors[:, layer])
        return images

    def _cropped(self, plan: Plan) -> Tensor:
        height, width = self.pictures.shape[2:]
        steps = torch.arange(self.side, device=self.pictures.device)
        rows = plan.corner[:, :1] + steps
        columns = plan.corner[:, 1:] + torch.where(plan.mirror[:, None], self.side - 1 - steps, steps)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        if self.reflect:
            rows, columns = _reflected(rows, height), _reflected(columns, width)
        else:
            rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        # A picture is small beside the split: it is taken first, so that places count within it.
        cut = _taken(self.pictures[plan.samples], places, self.side)
        return cut if self.reflect else torch.where(inside[:, None], cut, 0)


def warped(images: Tensor, warps: Tensor, fill: Tensor) -> Tensor:
    """`kernels.warp_nearest` of (B, C, H, W), with (B, 6) in fixed point and (C, 1) to fill with."""
    height, width = images.shape[2:]
    a, b, d, e, x, y = warps[:, :, None, None].unbind(1)
    down, right = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    columns, rows = (x + b * down + a * right) >> 16, (y + e * down + d * right) >> 16
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    places = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    moved = _taken(images, places.flatten(1), width)
    return torch.where(inside[:, None], moved, fill[..., None])


def grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in 16-bit fixed point, rounded: (B, 3, H, W) uint8 -> (B, H, W) int32."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def blended(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """The distance of `high` from `low`, times the factor, in single precision, cut to 8 bits."""
    distance = (high.to(torch.int32) - low).float()
    return (factor * distance).add_(low).clamp_(0, 255).to(torch.uint8)


def sharpened(images: Tensor, factor: Tensor) -> Tensor:
    """`kernels.sharpen` of (B, C, H, W), with factors (B, 1, 1, 1)."""
    height, width = images.shape[2:]
    if height < 3 or width < 3:
        return images
    values = images.to(torch.int32)
    middle = values[:, :, 1:-1, 1:-1]
    total = 4 * middle
    for down in range(3):
        for right in range(3):
            total = total + values[:, :, down : height - 2 + down, right : width - 2 + right]
    smooth = ((2 * total + 13) * 10083) >> 18
    sharp = images.clone()
    sharp[:, :, 1:-1, 1:-1] = blended(smooth, middle, factor)
    return sharp


def tabled(images: Tensor, source: Tensor, given: Tensor, factors: Tensor) -> Tensor:
    """Every value replaced by a table's.

    Args:
        images: (B, C, H, W).
        source: (B,), which table: a `Table`.
        given: (B, 256) uint8.
        factors: (B, 3), see `Factor`.
    """
    flat = images.flatten(2)
    source = source[:, None, None]
    tables = given[:, None, :].expand(-1, images.shape[1], -1)
    # Counted by sorting, which gives the same each time and needs no sums by many threads at once.
    ordered = flat.to(torch.int16).sort(-1).values
    tables = torch.where(source == Table.AUTO_CONTRAST, auto_contrast(ordered), tables)
    tables = torch.where(source == Table.EQUALIZE, equalize(ordered), tables)
    tables = torch.where(source == Table.CONTRAST, contrast(images, factors[:, Factor.CONTRAST])[:, None], tables)
    return tables.gather(2, flat.long()).view_as(images)


def auto_contrast(ordered: Tensor) -> Tensor:
    """(B, C, 256) tables that stretch each channel, from its (B, C, n) values in order."""
    values = torch.arange(256, device=ordered.device)
    low, high = ordered[..., :1].long(), ordered[..., -1:].long()
    span = (high - low).clamp_min(1).double()
    scale = torch.full_like(span, 255) / span  # a number over a tensor would be its reciprocal, rounded, times it
    table = (values * scale).add_(-low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, table, values.to(torch.uint8))


def equalize(ordered: Tensor) -> Tensor:
    """(B, C, 256) tables after which every value is about as frequent, from (B, C, n) values in order."""
    values = torch.arange(256, device=ordered.device, dtype=ordered.dtype)
    below = torch.searchsorted(ordered, values.expand(*ordered.shape[:2], -1).contiguous())
    step = below.gather(2, ordered[..., -1:].long()) // 255
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255).to(torch.uint8)
    return torch.where(step > 0, table, values.to(torch.uint8))


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """(B, 256) tables: the distance from the mean grey, times the factor (B,)."""
    values = torch.arange(256, device=images.device)
    greys = grey(images) if images.shape[1] == 3 else images[:, 0].to(torch.int32)
    total = greys.sum((1, 2)).double()
    # By a tensor: a GPU multiplies by the reciprocal of a number.
    mean = (total / torch.full_like(total, greys[0].numel()) + 0.5).to(torch.int32)
    return blended(mean[:, None], values, factor[:, None])


def _taken(images: Tensor, places: Tensor, width: int) -> Tensor:
    """Pixels of (B, C, H, W) at places (B, n), counted along the rows: (B, C, n / width, width)."""
    channels = images.shape[1]
    return images.flatten(2).gather(2, places[:, None].expand(-1, channels, -1)).unflatten(2, (-1, width))


def _reflected(places: Tensor, length: int) -> Tensor:
    """Places beyond the edge, mirrored at the pixels of the edge, as often as need be."""
    if length == 1:
        return torch.zeros_like(places)
    places = places.remainder(2 * length - 2)
    return torch.minimum(places, 2 * length - 2 - places)
