"""Pictures to explain: found, prepared as for the run's evaluation, and where a box of the input lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.images import UnusableImage, make_usable
from pipeline.data.augment.evaluation import EvalTransform, to_mode
from pipeline.data.fast.decode import decode_image
from pipeline.errors import UserError
from pipeline.explain.localize import Box

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


@dataclass(frozen=True)
class Picture:
    """A picture as the model sees it.

    Attributes:
        name: what it is called.
        size: (width, height) of the original in pixels.
        pixels: (C, S, S) float32, the model's input.
    """

    name: str
    size: tuple[int, int]
    pixels: torch.Tensor


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files, and of every folder the images in it and below it by their suffix, sorted.

    Raises:
        UserError: a path doesn't exist, or a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such image; name image files, or folders of them")
    return found


def read_picture(path: Path, transform: EvalTransform) -> Picture:
    """Read as `rookery prep` and the loader do, so that the model gets what it would get from a shard.

    Raises:
        UserError: it is no image, it can't be read, or it doesn't fit the transform.
    """
    try:
        usable = make_usable(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); name another image") from error
    except UnusableImage as error:
        raise UserError(f"{path}: can't be read as an image ({error}); name another one") from error
    try:
        image, side = decode_image(usable.data, len(transform.mean)), transform.img_size
        if transform.config.resize == "none" and image.size != (side, side):
            # The loader's words are about the config of a training that is over.
            raise UserError(
                f"{image.width}x{image.height} pixels; this model takes pictures of {side}x{side} as they are "
                f"(eval_transform.resize=none): make a copy of that size and name it"
            )
        return prepared(path.name, image, transform)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def prepared(name: str, image: Image.Image, transform: EvalTransform) -> Picture:
    """A decoded picture.

    Raises:
        UserError: it doesn't fit the transform.
    """
    return Picture(name, image.size, transform(image))


def shown(pixels: torch.Tensor, transform: EvalTransform) -> Image.Image:
    """The model's input as an RGB picture: normalisation undone."""
    values = ((pixels * transform.std + transform.mean) * 255).round().clamp(0, 255).byte()
    array = values.permute(1, 2, 0).numpy()
    return to_mode(Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)), 3)


def in_original(box: Box, size: tuple[int, int], transform: EvalTransform) -> Box:
    """A box of the model's input in pixels of the original of this (width, height), cut at its edges."""
    place = transform.placement(*size)
    scale, corner = (size[0] / place.width, size[1] / place.height), (place.left, place.top)
    left, top, right, bottom = (
        min(max((value + corner[i % 2]) * scale[i % 2], 0.0), float(size[i % 2])) for i, value in enumerate(box)
    )
    return left, top, right, bottom
