"""Reads and writes `.beton` files with the ffcv package alone, none of this project's code.

A program of its own: the threads of what numba compiles and the forks of other tests don't go together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write(file: str, images: list[str], labels: list[int], page_size: int) -> None:
    """What FFCV's own writer makes of these images, as raw pixels."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    samples = [(np.asarray(Image.open(path).convert("RGB")), label) for path, label in zip(images, labels, strict=True)]
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(file, fields, page_size=page_size, num_workers=1).from_indexed_dataset(samples)


def load(file: str, batch: int, epochs: list[list[int] | None], os_cache: bool) -> dict[str, np.ndarray]:
    """All whole batches: (batches, batch, height, width, 3) uint8 images and (batches, batch) labels.

    `epochs` are the samples of each, None for all in the order of the file.
    """
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor

    loader = Loader(
        file,
        batch_size=batch,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        indices=epochs[0],
        os_cache=os_cache,
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    batches = []
    for indices in epochs:
        if indices is not None:
            loader.traversal_order.indices = loader.first_traversal_order = np.array(indices)
        batches += [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    return {"images": np.stack([b[0] for b in batches]), "labels": np.stack([b[1].reshape(-1) for b in batches])}


def layout() -> str:
    """Offsets of the records of a file, its version and the numbers of the two kinds of field, as JSON."""
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    rows = types.get_metadata_type([RGBImageField(), IntField()])
    kinds = (types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE, RGBImageField().metadata_type, rows)
    number_of = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
    content = {
        "types": [[[kind.fields[name][1] for name in kind.names], kind.itemsize] for kind in kinds],
        "version": types.CURRENT_VERSION,
        "fields": [number_of[RGBImageField], number_of[IntField]],
    }
    return json.dumps(content)


def main(jobs: str, out: str) -> None:
    content: dict[str, Any] = json.loads(Path(jobs).read_text())
    write(**content["write"])
    found = {f"{name}.{part}": array for name, job in content["load"].items() for part, array in load(**job).items()}
    np.savez(out, layout=np.array(layout()), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
