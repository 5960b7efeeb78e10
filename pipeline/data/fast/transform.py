"""From encoded bytes to a batch of 8-bit inputs, and what is left to do to them in floats.

What is drawn for a sample is what `TrainTransform` draws, by the same code. What is done to it differs from that plain
path by at most one in 255 in few pixels (resizing), and by the rounding of colour-jittered values to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.data.augment.crop import CROP_DRAWS, Box, draw_resized_crop, pick_resample, require_side
from pipeline.data.augment.finish import Erased, Finish
from pipeline.data.augment.keyed import Numbers, Stream
from pipeline.data.augment.lazy import LazyModule
from pipeline.data.augment.settings import AugmentConfig, CenterCrop, PadCrop, RandomResizedCrop
from pipeline.data.augment.transforms import SampleDraw, TrainTransform
from pipeline.data.fast.decode import Part
from pipeline.data.fast.noise import normals

# Loader processes compile or load these; a process that trains only hands the transform on to them.
kernels = LazyModule("pipeline.data.fast.kernels")
resizing = LazyModule("pipeline.data.fast.resize")
color = LazyModule("pipeline.data.fast.color")
randaugment = LazyModule("pipeline.data.fast.randaugment")


Picture = np.ndarray | Part
# Which part of a width x height picture is needed.
Wanted = Callable[[int, int], Box]


class Augmented(NamedTuple):
    """A batch after its 8-bit operations.

    Attributes:
        pixels: (B, H, W, C) uint8.
        erased: boxes that are still to be erased.
        warps: (B, L, 2, 3) float32, where parts of the inputs come from; see `TrainTransform.traced`. None: not asked.
    """

    pixels: np.ndarray
    erased: Erased
    warps: np.ndarray | None


class FastTransform:
    """The training transform of whole batches.

    Args:
        config: what to do.
        img_size: side of the model's input.
        in_chans: channels of the model's input, 1 or 3.

    Raises:
        UserError: the normalisation has another number of channels.
    """

    def __init__(self, config: AugmentConfig, img_size: int, in_chans: int) -> None:
        self.config, self.img_size, self.in_chans = config, img_size, in_chans
        self.plain = TrainTransform(config, img_size, in_chans)
        self.finish = Finish(config, in_chans)
        self._needed = self.plain.needed()
        self._fill = np.atleast_1d(np.array(self.plain.fill, np.uint8))
        # These come before or between what is compiled here; Pillow does the whole sample then.
        self._by_pillow = config.crop_last or config.resize is not None or config.affine is not None
        self._planes: np.ndarray | None = None

    def __call__(
        self,
        pictures: Sequence[Picture | Callable[[Wanted], Picture]],
        seed: int,
        epoch: int,
        indices: np.ndarray,
        trace: bool = False,
        swap_axes: bool = False,
        naming: Callable[[int], AbstractContextManager[None]] = lambda i: nullcontext(),
        out: np.ndarray | None = None,
    ) -> Augmented:
        """The augmented batch.

        Args:
            pictures: decoded, (H, W, C) uint8 each, of any size, or only the parts that are needed; or functions that
                decode them. These are called one by one, so that a picture is still in the processor's cache when it
                is cropped, and the next one takes its memory.
            seed, epoch: of this presentation.
            indices: (B,) the samples' numbers.
            trace: give the warps too; `swap_axes` as in `TrainTransform.traced`.
            naming: entered around the work on picture i; it may say in an error which one that is.
            out: (B, side, side, C) uint8, takes the result; None: new memory.

        Raises:
            UserError: a picture is too small for the configured crop.
        """
        side = self.img_size
        pixels = np.empty((len(pictures), side, side, self.in_chans), np.uint8) if out is None else out
        spare = np.empty(pixels.shape[1:], np.uint8)
        if self._planes is None:  # not in a pickle that goes to a loader process
            self._planes = np.empty((self.in_chans, side * side), np.float32)
        boxes, noise, warps = [], [], []
        for i, numbers in enumerate(self.numbers(seed, epoch, indices)):
            drawn = self.plain.drawn(numbers)
            given = pictures[i]
            wanted = _Wanted(self, numbers)
            picture = given(wanted) if callable(given) else given
            part = Part.whole(picture) if isinstance(picture, np.ndarray) else picture
            with naming(i):
                crop, size = self._sample(part, drawn, wanted, pixels[i], spare)
            if drawn.jitter is not None:
                color.apply_color_jitter(pixels[i], drawn.jitter, self._planes)
            if drawn.erased is not None:
                box = drawn.erased
                boxes.append((i, box.top, box.left, box.height, box.width))
                if self.finish.noisy:
                    n = self.in_chans * box.height * box.width
                    noise.append(normals(numbers.key, Stream.ERASING_NOISE, n))
            if trace:
                warps.append(self.plain.warps(drawn, crop, size, (part.width, part.height), swap_axes))
        erased = Erased(
            np.array(boxes, np.int64).reshape(-1, 5),
            np.concatenate(noise) if noise else np.empty(0, np.float32),
        )
        return Augmented(pixels, erased, np.stack(warps) if trace else None)

    def numbers(self, seed: int, epoch: int, indices: np.ndarray) -> list[Numbers]:
        """What is drawn from for the samples of a batch."""
        return Numbers.of_batch(seed, epoch, indices, self._needed)

    def wanted(self, numbers: Numbers, width: int, height: int) -> Box:
        """The part of a width x height picture that the crop needs."""
        if self._by_pillow or not isinstance(self.config.crop, RandomResizedCrop):
            return Box(0, 0, height, width)
        return draw_resized_crop(self.config.crop, width, height, numbers.of(Stream.CROP, CROP_DRAWS + 1))

    def _sample(
        self, part: Part, drawn: SampleDraw, wanted: _Wanted, out: np.ndarray, spare: np.ndarray
    ) -> tuple[Box, tuple[int, int]]:
        """Write the picture after its 8-bit operations to `out`; returns what `TrainTransform.cropped` says of it."""
        picture, numbers = part.pixels, wanted.numbers
        if self._by_pillow:
            image = Image.fromarray(picture if self.in_chans == 3 else picture[:, :, 0])
            if self.config.crop_last:
                image, box, size = self.plain.cropped(self.plain.distorted(image, drawn), numbers)
            else:
                image, box, size = self.plain.cropped(image, numbers)
                image = self.plain.distorted(image, drawn)
            out[:] = np.asarray(image).reshape(out.shape)
            return box, size
        box = self._crop(part, drawn.flip, wanted, out)
        current, other = out, spare
        for op in drawn.ops:
            current, other = randaugment.apply_op(current, other, op, self._fill)
        if current is not out:
            out[:] = current
        return box, (part.width, part.height)

    def _crop(self, part: Part, mirror: bool, wanted: _Wanted, out: np.ndarray) -> Box:
        config, side = self.config.crop, self.img_size
        picture, height, width = part.pixels, part.height, part.width
        u = wanted.numbers.of(Stream.CROP, CROP_DRAWS + 1)
        if isinstance(config, RandomResizedCrop):
            box = wanted(width, height)
            inside = Box(box.top - part.top, box.left - part.left, box.height, box.width)
            self._resize(picture, inside, pick_resample(self.config.interpolation, u[CROP_DRAWS]), mirror, out)
            return box
        if isinstance(config, PadCrop):
            p = config.padding
            require_side(min(height, width) + 2 * p >= side, _Sized(width, height), side, f"with {p} px of padding")
            larger = np.pad(picture, [(p, p), (p, p), (0, 0)], "constant" if config.fill == "zero" else "reflect")
            top, left = int(u[0] * (height + 2 * p - side + 1)), int(u[1] * (width + 2 * p - side + 1))
            kernels.copy(larger[top : top + side, left : left + side], mirror, out)
            return Box(top - p, left - p, side, side)
        if isinstance(config, CenterCrop):
            require_side(min(height, width) >= side, _Sized(width, height), side, "by a centre crop")
            box = Box(round((height - side) / 2), round((width - side) / 2), side, side)
        else:
            require_side((width, height) == (side, side), _Sized(width, height), side, "without a crop")
            box = Box(0, 0, side, side)
        kernels.copy(picture[box.top : box.top + side, box.left : box.left + side], mirror, out)
        return box

    def _resize(self, picture: np.ndarray, box: Box, resample: Image.Resampling, mirror: bool, out: np.ndarray) -> None:
        top, left, height, width = box.top, box.left, box.height, box.width
        part = picture[top : top + height, left : left + width]
        if (height, width) == out.shape[:2]:
            kernels.copy(part, mirror, out)
        elif not self.config.antialias and resample == Image.Resampling.BILINEAR:
            resizing.resize_point(picture, top, left, height, width, mirror, out)
        elif self.config.antialias:
            # torch's own kernel for 8-bit pictures: within one of Pillow's, but for 1 value in 10,000 of bicubic ones.
            mode = "bilinear" if resample == Image.Resampling.BILINEAR else "bicubic"
            resized = F.interpolate(
                torch.from_numpy(part).permute(2, 0, 1)[None], out.shape[:2], mode=mode, antialias=True
            )
            kernels.copy(resized[0].permute(1, 2, 0).contiguous().numpy(), mirror, out)
        else:
            image = Image.fromarray(part if self.in_chans == 3 else part[:, :, 0])
            point = image.transform(out.shape[1::-1], Image.Transform.EXTENT, (0, 0, width, height), resample)
            kernels.copy(np.asarray(point).reshape(out.shape), mirror, out)


class _Wanted:
    """`FastTransform.wanted` of a sample, drawn once for the decoder and for the crop."""

    __slots__ = ("_box", "_size", "_transform", "numbers")

    def __init__(self, transform: FastTransform, numbers: Numbers) -> None:
        self._transform, self.numbers = transform, numbers
        self._size: tuple[int, int] | None = None

    def __call__(self, width: int, height: int) -> Box:
        if self._size != (width, height):
            self._size, self._box = (width, height), self._transform.wanted(self.numbers, width, height)
        return self._box


class _Sized(NamedTuple):
    """What a message says of a picture."""

    width: int
    height: int
