"""From 8-bit batches to the model's floats: normalisation and random erasing, on any device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.augment.settings import AugmentConfig
from pipeline.data.pinned import brought

# Values of a batch whose boxes a GPU erases all at once: several numbers for each of them take their time and memory.
_AT_ONCE = 2**23


class Erased(NamedTuple):
    """Boxes of a batch that are erased after normalisation.

    Attributes:
        boxes: (n, 5) int64: sample, top, left, height, width. On the host, where they choose which memory is written.
        noise: float32, the (C, height, width) values of all boxes one after the other; empty: they become 0.
    """

    boxes: Any
    noise: Any


class Finish:
    """`finish(pixels, erased)` is the (B, C, H, W) float32 model input.

    Args:
        config: mean and standard deviation, and whether erased boxes become noise.
        in_chans: channels.

    Raises:
        UserError: the normalisation has another number of channels.
    """

    def __init__(self, config: AugmentConfig, in_chans: int) -> None:
        mean, std = config.mean_std(in_chans)
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.most = torch.tensor(255.0)  # a tensor: a GPU would multiply by the reciprocal of a number
        self.noisy = config.random_erasing is not None and config.random_erasing.mode == "pixel"
        self._on_host = np.array(mean, np.float32), np.array(std, np.float32)

    def __call__(self, pixels: torch.Tensor, erased: Erased) -> torch.Tensor:
        """The inputs, on the device of `pixels` and without waiting for it.

        Args:
            pixels: (B, C, H, W) uint8, of any strides.
            erased: `boxes` on the host, `noise` on the device.
        """
        if self.mean.device != pixels.device:
            self.mean, self.std, self.most = (t.to(pixels.device) for t in (self.mean, self.std, self.most))
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(self.most)
        images = images.sub_(self.mean).div_(self.std)
        if images.is_cuda and images.numel() <= _AT_ONCE:
            return self.erase_all(images, erased)
        return self._erase(images, erased)

    def on_host(self, pixels: np.ndarray, erased: Erased, out: torch.Tensor | None = None) -> torch.Tensor:
        """The same inputs to the bit, of (B, H, W, C) uint8 in the memory of the host, by one compiled loop.

        Args:
            out: contiguous, takes the result; None: new memory.
        """
        from pipeline.data.fast.kernels import normalize  # a process that trains on a GPU never needs it

        batch, height, width, channels = pixels.shape
        images = torch.empty((batch, channels, height, width)) if out is None else out
        normalize(pixels, *self._on_host, images.numpy())
        return self._erase(images, Erased(erased.boxes, torch.as_tensor(erased.noise)))

    def erase_all(self, images: torch.Tensor, erased: Erased) -> torch.Tensor:
        """What `_erase` does box by box, in a few operations on the whole batch: for many small pictures."""
        boxes = np.asarray(erased.boxes)
        batch, channels, height, width = images.shape
        # Of every sample its box, empty where it has none, and where the box's noise begins.
        of_samples = np.zeros((batch, 5), np.int64)
        of_samples[boxes[:, 0], :4] = boxes[:, 1:]
        sizes = channels * boxes[:, 3] * boxes[:, 4]
        of_samples[boxes[:, 0], 4] = np.cumsum(sizes) - sizes
        fields = brought(torch.from_numpy(of_samples), images.device)[:, :, None, None, None]
        top, left, high, wide, start = fields.unbind(1)
        row = torch.arange(height, device=images.device)[:, None] - top
        column = torch.arange(width, device=images.device) - left
        inside = (row >= 0) & (row < high) & (column >= 0) & (column < wide)
        if not (self.noisy and len(erased.noise)):
            return images.masked_fill_(inside, 0)
        channel = torch.arange(channels, device=images.device)[:, None, None]
        place = torch.where(inside, start + (channel * high + row) * wide + column, 0)
        return torch.where(inside, erased.noise[place], images)

    def _erase(self, images: torch.Tensor, erased: Erased) -> torch.Tensor:
        start = 0
        for sample, top, left, height, width in np.asarray(erased.boxes).tolist():
            area = images[sample, :, top : top + height, left : left + width]
            if self.noisy:
                area.copy_(erased.noise[start : start + area.numel()].view(area.shape))
                start += area.numel()
            else:
                area.zero_()
        return images
