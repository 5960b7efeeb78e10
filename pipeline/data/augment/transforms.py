"""From a decoded picture to the model's input, one sample at a time: the plain reference path.

What is done to a sample is first drawn, then done; the draw is a pure function of (seed, epoch, index) and, for the
crop, the picture's size. The order is that of the recipes: resize, crop, flip, affine and RandAugment on 8-bit pixels
(with `crop_last` the crop comes after these), then colour jitter, normalisation and random erasing on floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.data.augment.color import COLOR_JITTER_DRAWS, ColorJitter, apply_color_jitter, draw_color_jitter
from pipeline.data.augment.crop import (
    AFFINE_DRAWS,
    CROP_DRAWS,
    Affine,
    Box,
    affine_pixels,
    apply_affine,
    cut,
    draw_affine,
    draw_resized_crop,
    padded,
    pick_resample,
    require_side,
    resize,
    resize_shorter_side,
)
from pipeline.data.augment.erasing import ERASING_DRAWS, draw_erasing
from pipeline.data.augment.evaluation import EvalTransform, to_mode, to_tensor
from pipeline.data.augment.geometry import (
    FLIP,
    IDENTITY,
    crop_warp,
    mirrored,
    pixel_warp,
    swapped_axes,
)
from pipeline.data.augment.keyed import Numbers, Stream, normals, sample_key
from pipeline.data.augment.randaugment import DrawnOp, draw_ops, fill_color, rand_augment_draws
from pipeline.data.augment.settings import AugmentConfig, CenterCrop, EvalTransformConfig, PadCrop, RandomResizedCrop


@dataclass(frozen=True)
class SampleDraw:
    """What is done to one sample after its crop; None and () mean nothing.

    Attributes:
        flip: mirror it.
        affine: small affine map.
        ops: RandAugment operations, in order.
        jitter: colour jitter.
        erased: box to erase.
    """

    flip: bool
    affine: Affine | None
    ops: tuple[DrawnOp, ...]
    jitter: ColorJitter | None
    erased: Box | None


class TrainTransform:
    """`transform(image, seed, epoch, index)` is the (C, H, W) float32 model input.

    Args:
        config: what to do.
        img_size: side of the model's input.
        in_chans: channels of the model's input, 1 or 3.

    Raises:
        UserError: the normalisation has another number of channels.
    """

    def __init__(self, config: AugmentConfig, img_size: int, in_chans: int) -> None:
        self.config, self.img_size, self.in_chans = config, img_size, in_chans
        mean, std = config.mean_std(in_chans)
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.fill = fill_color(config.rand_augment.policy, mean) if config.rand_augment else 0

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> torch.Tensor:
        """The augmented input.

        Args:
            image: the decoded picture, of any mode and size.
            seed: seed of the run.
            epoch: epoch of this presentation.
            index: the sample's number; copies under repeated augmentation have different ones.

        Raises:
            UserError: the picture is too small for the configured crop.
        """
        return self.traced(image, seed, epoch, index)[0]

    def traced(
        self, image: Image.Image, seed: int, epoch: int, index: int, swap_axes: bool = False
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The augmented input, and where its parts come from.

        Args:
            swap_axes: give the crop as the official code of token labels reads it; see `geometry.swapped_axes`.

        Returns:
            The input as from a call, and (L, 2, 3) float32 warps that take a point of it back to the picture, in the
            order of their application. L depends on the config alone.
        """
        numbers = Numbers(sample_key(seed, epoch, index))
        image, drawn = to_mode(image, self.in_chans), self.drawn(numbers)
        whole = image.size
        if self.config.crop_last:
            image, box, size = self.cropped(self.distorted(image, drawn), numbers)
        else:
            image, box, size = self.cropped(image, numbers)
            image = self.distorted(image, drawn)
        return self._finish(image, drawn, numbers.key), self.warps(drawn, box, size, whole, swap_axes)

    def crop(self, image: Image.Image, key: int) -> Image.Image:
        """Resize and crop to img_size x img_size."""
        return self.cropped(image, Numbers(key))[0]

    def cropped(self, image: Image.Image, numbers: Numbers) -> tuple[Image.Image, Box, tuple[int, int]]:
        """The cropped picture, and the box, which may reach over the edge, of a picture of that (width, height)."""
        config, side = self.config, self.img_size
        u = numbers.of(Stream.CROP, CROP_DRAWS + 1)
        resample = pick_resample(config.interpolation, u[CROP_DRAWS])
        if config.resize is not None:
            image = resize_shorter_side(image, config.resize, resample, config.antialias)
        if isinstance(config.crop, RandomResizedCrop):
            box = draw_resized_crop(config.crop, image.width, image.height, u)
            return resize(cut(image, box), (side, side), resample, config.antialias), box, image.size
        if isinstance(config.crop, PadCrop):
            larger, box = padded(image, config.crop, side, u)
            p = config.crop.padding
            return cut(larger, box), Box(box.top - p, box.left - p, side, side), image.size
        if isinstance(config.crop, CenterCrop):
            require_side(min(image.size) >= side, image, side, "by a centre crop")
            box = Box(round((image.height - side) / 2), round((image.width - side) / 2), side, side)
            return cut(image, box), box, image.size
        require_side(image.size == (side, side), image, side, "without a crop")
        return image, Box(0, 0, side, side), image.size

    def draw(self, key: int) -> SampleDraw:
        """Everything that follows the crop."""
        return self.drawn(Numbers(key))

    def drawn(self, numbers: Numbers) -> SampleDraw:
        """As `draw`, with numbers that may have been computed with those of a whole batch."""
        config, side, u = self.config, self.img_size, numbers.of
        rand, jitter, erasing = config.rand_augment, config.color_jitter, config.random_erasing
        ops: tuple[DrawnOp, ...] = ()
        if rand is not None:
            ops = draw_ops(rand, side, config.interpolation, u(Stream.RAND_AUGMENT, rand_augment_draws(rand)))
        return SampleDraw(
            flip=config.hflip > 0 and u(Stream.FLIP, 1)[0] < config.hflip,
            affine=draw_affine(config.affine, side, u(Stream.AFFINE, AFFINE_DRAWS)) if config.affine else None,
            ops=ops,
            jitter=draw_color_jitter(jitter, u(Stream.COLOR_JITTER, COLOR_JITTER_DRAWS)) if jitter else None,
            erased=draw_erasing(erasing, side, u(Stream.RANDOM_ERASING, ERASING_DRAWS)) if erasing else None,
        )

    def needed(self) -> dict[Stream, int]:
        """How many uniform numbers of which streams a sample takes."""
        config = self.config
        wanted = {
            Stream.CROP: CROP_DRAWS + 1,
            Stream.FLIP: int(config.hflip > 0),
            Stream.AFFINE: AFFINE_DRAWS if config.affine else 0,
            Stream.RAND_AUGMENT: rand_augment_draws(config.rand_augment) if config.rand_augment else 0,
            Stream.COLOR_JITTER: COLOR_JITTER_DRAWS if config.color_jitter else 0,
            Stream.RANDOM_ERASING: ERASING_DRAWS if config.random_erasing else 0,
        }
        return {stream: n for stream, n in wanted.items() if n}

    def warps(
        self, draw: SampleDraw, box: Box, size: tuple[int, int], whole: tuple[int, int], swap_axes: bool
    ) -> np.ndarray:
        """Where the input's parts come from; see `traced`.

        Args:
            draw: what was done.
            box: what was cut out, as seen before any mirroring that came first.
            size: (width, height) of what it was cut out of.
            whole: (width, height) of the decoded picture.
            swap_axes: as in `traced`.
        """
        crop_last = self.config.crop_last
        moved = self._moves(draw, whole if crop_last else (self.img_size, self.img_size))
        box = mirrored(box, size[0]) if draw.flip and not crop_last else box
        crop = crop_warp(box, *size)
        crop = swapped_axes(crop) if swap_axes else crop
        warps = [crop, *moved] if crop_last else [*moved, crop]
        return np.stack([*warps, FLIP if draw.flip else IDENTITY]).astype(np.float32)

    def _moves(self, draw: SampleDraw, size: tuple[int, int]) -> list[np.ndarray]:
        """Warps of the affine map and RandAugment of a picture of `size`, the last operation first."""
        moves = [affine_pixels(draw.affine, *size)] if draw.affine else []
        moves += [move for op in draw.ops if (move := op.moves(*size))]
        warps = [pixel_warp(move, *size) for move in reversed(moves)]
        layers = (self.config.rand_augment.layers if self.config.rand_augment else 0) + bool(self.config.affine)
        return warps + [IDENTITY] * (layers - len(warps))

    def distorted(self, image: Image.Image, draw: SampleDraw) -> Image.Image:
        """What is done to 8-bit pixels besides the crop."""
        if draw.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw.affine is not None:
            image = apply_affine(image, draw.affine)
        for op in draw.ops:
            image = op.apply(image, self.fill)
        return image

    def _finish(self, image: Image.Image, draw: SampleDraw, key: int) -> torch.Tensor:
        """What is done to floats."""
        pixels = to_tensor(image)
        if draw.jitter is not None:
            pixels = apply_color_jitter(pixels, draw.jitter)
        pixels = pixels.sub_(self.mean).div_(self.std)
        erasing, box = self.config.random_erasing, draw.erased
        if erasing is not None and box is not None:
            area = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
            area.zero_()
            if erasing.mode == "pixel":
                area.add_(torch.from_numpy(normals(key, Stream.ERASING_NOISE, area.numel())).view(area.shape))
        return pixels


def build_train_transform(config: AugmentConfig, img_size: int, in_chans: int = 3) -> TrainTransform:
    """The training transform; see `TrainTransform`."""
    return TrainTransform(config, img_size, in_chans)


def build_eval_transform(
    config: EvalTransformConfig, augment: AugmentConfig, img_size: int, in_chans: int = 3
) -> EvalTransform:
    """The evaluation transform, normalised as in training; see `EvalTransform`."""
    mean, std = augment.mean_std(in_chans)
    return EvalTransform(config, img_size, mean, std)
