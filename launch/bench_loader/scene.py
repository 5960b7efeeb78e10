"""The same images in the forms that contenders read: some shards of the user's, their files, an FFCV file."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from data_prep.betonshard import BetonShardWriter
from data_prep.images import Usable
from data_prep.manifest import Manifest, Shard
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError


def set_up(split: Path, folder: Path, samples: int) -> tuple[Path, Path, Path | None, int]:
    """Lay the first shards of `split` with at least `samples` images out below `folder`.

    Returns:
        Directory of the shards, of class folders, the FFCV file (None where ffcv is not installed), number of images.

    Raises:
        UserError: no WebDataset shards there.
    """
    whole = Manifest.load(split)
    if whole.format != "webdataset":
        raise UserError(f"{split}: bench loader starts from webdataset shards, these are {whole.format}")
    chosen: list[Shard] = []
    for shard in whole.shards:
        if sum(other.samples for other in chosen) >= samples:
            break
        chosen.append(shard)
    shards, files = folder / "shards", folder / "files"
    shards.mkdir()
    for shard in chosen:
        for name in (shard.file, shard.index_file):
            (shards / name).symlink_to((split / name).resolve())
    part = replace(whole, shards=chosen)
    part.save(shards)
    opened = ShardSet(shards)
    for label in range(part.num_classes):
        (files / f"{label:05d}").mkdir(parents=True)
    for sample in opened.read(range(len(opened))):
        (files / f"{sample.label:05d}" / f"{sample.key}.jpg").write_bytes(sample.data)
    for empty in [path for path in files.iterdir() if not any(path.iterdir())]:
        empty.rmdir()
    return shards, files, _write_beton(opened, folder), len(opened)


def _write_beton(shards: ShardSet, folder: Path) -> Path | None:
    """One FFCV file with the same encoded bytes; None where ffcv is not installed, or can't read them."""
    import simplejpeg

    if importlib.util.find_spec("ffcv") is None:
        return None
    path = folder / "all.beton"
    writer = BetonShardWriter(path, folder / "all.idx.npy", len(shards))
    try:
        for sample in shards.read(range(len(shards))):
            height, width, *_ = simplejpeg.decode_jpeg_header(sample.data)
            writer.add(sample.key, Usable(sample.data, "jpg", width=width, height=height), sample.label)
        writer.close()
    except ValueError:  # a PNG or WebP
        return None
    finally:
        writer.abort()
    return path
