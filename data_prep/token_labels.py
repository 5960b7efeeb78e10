"""Dense label maps that lie beside the images: TokenLabeling's `.pt` files, checked and stored as `.npy`.

A map is what a teacher says about every cell of a grid laid over the whole image: its k largest logits and their
classes, one tensor (2, k, rows, columns) with the logits first. TokenLabeling's `generate_label.py` writes them as
float16, k = 5 on an 18 x 18 grid, to `<class>/<file name up to the first dot>.pt`.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.images import UnusableImage
from data_prep.manifest import MAX_BYTES
from data_prep.sources.base import Item, Listing

# The member of a sample that holds its map: `key.tokens.npy`.
EXTENSION = "tokens.npy"
DTYPES = ("float16", "float32")
_PROBED = 16


@dataclass(frozen=True)
class TokenMaps:
    """The maps of one split; every one must have the same shape and type.

    Attributes:
        directory: where they lie.
        classes: class names of the split, in label order.
        shape: (2, k, rows, columns).
        dtype: one of `DTYPES`.
    """

    directory: Path
    classes: list[str]
    shape: tuple[int, ...]
    dtype: str

    def read(self, item: Item) -> bytes:
        """The map of an image as an `.npy` file.

        Raises:
            UnusableImage: it is missing, can't be read, or is no map of this split.
        """
        path = self.directory / map_file(self.classes, item)
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise UnusableImage(f"the token-label map of class {self.classes[item.label]} would lie elsewhere: {path}")
        values = _load(path)
        if values.shape != self.shape or values.dtype.name != self.dtype:
            raise UnusableImage(
                f"token-label map of shape {values.shape} and type {values.dtype}, "
                f"the others have {self.shape} and {self.dtype}"
            )
        _check(values, len(self.classes))
        return _npy(values)

    def description(self) -> dict[str, Any]:
        """What the manifest says about them; `bytes` is the size of the member of a sample."""
        empty = np.zeros(self.shape, self.dtype)
        return {
            "maps": self.directory.resolve().name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bytes": len(_npy(empty)),
        }


def map_file(classes: list[str], item: Item) -> str:
    """Where the map of an image lies below the directory of maps.

    `<class>/<file name up to the first dot>.pt`; of sources without file names `<class>/<sample key>.pt`.
    """
    return f"{classes[item.label]}/{item.stem.split('.')[0] or item.key}.pt"


def open_token_maps(directory: Path, listing: Listing) -> TokenMaps:
    """The maps of a listing's images, with the shape of the first one that can be found.

    Raises:
        UserError: none of some images spread over the listing has a map.
    """
    if not directory.is_dir():
        raise UserError(f"--token-labels {directory}: no such directory")
    spread = np.unique(np.linspace(0, len(listing) - 1, _PROBED).astype(np.int64))
    reasons = []
    for item in listing.items(spread):
        path = directory / map_file(listing.classes, item)
        try:
            values = _load(path)
        except UnusableImage as error:
            reasons.append(f"{path}: {error}")
        else:
            return TokenMaps(directory, listing.classes, values.shape, values.dtype.name)
    raise UserError(
        f"--token-labels {directory}: none of {len(reasons)} images looked at has a usable map; the first: "
        f"{reasons[0]}; a map is DIR/<class>/<file name up to the first dot>.pt, of sources without file names "
        "DIR/<class>/<sample key>.pt"
    )


def _load(path: Path) -> np.ndarray:
    """(2, k, rows, columns), float16 or float32.

    Raises:
        UnusableImage: the file is missing, or holds something else.
    """
    import torch

    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_BYTES):
            raise ValueError("not a regular file, or too large")
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UnusableImage(f"no token-label map: {path} is missing") from None
    except Exception as error:  # PyTorch raises nearly every type on a damaged file
        # Of an object of some class it says at length how to run the code in the file after all.
        unsafe = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        reason = "it holds more than tensors" if unsafe else str(error).strip().split("\n")[0] or type(error).__name__
        raise UnusableImage(f"unreadable token-label map {path.name} ({reason})") from error
    if not isinstance(tensor, torch.Tensor):
        raise UnusableImage(f"token-label map {path.name} holds {type(tensor).__name__}, not a tensor")
    name = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if name not in DTYPES or tensor.ndim != 4 or shape[0] != 2 or tensor.numel() == 0:
        raise UnusableImage(
            f"token-label map {path.name} has shape {shape} and type {name}, "
            f"not (2, k, rows, columns) and {' or '.join(DTYPES)}"
        )
    return tensor.numpy()


def _check(values: np.ndarray, num_classes: int) -> None:
    """Refuse what no teacher of these classes says.

    Raises:
        UnusableImage: a logit that is not finite, or classes that don't exist or come twice in a cell.
    """
    if not np.isfinite(values).all():
        raise UnusableImage("token-label map with NaN or infinite values")
    classes = values[1].astype(np.float64)
    broken = classes[classes != np.rint(classes)]
    if broken.size:
        raise UnusableImage(
            f"token-label map with class {broken[0]:g}, which is no whole number; it has k logits first, then k classes"
        )
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UnusableImage(
            f"token-label map with class {classes.min():g} to {classes.max():g}, there are {num_classes} classes"
        )
    if (np.diff(np.sort(classes, axis=0), axis=0) == 0).any():
        raise UnusableImage("token-label map that names a class twice in one cell")


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()
