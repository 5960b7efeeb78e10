"""The same images in the forms that contenders read: shards of both formats, class folders, one FFCV file."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.betonshard import BetonShardWriter
from data_prep.images import RAW, Usable
from data_prep.manifest import INDEX_SUFFIX, Manifest, Shard
from data_prep.shardwriter import ShardWriter
from data_prep.tarshard import TarShardWriter
from pipeline.data.shards import Sample, ShardSet

_NO_JPEG = "FFCV holds JPEG files and pixels, not what these shards hold"
_NO_FILES = "the shards hold pixels, not files alone"


@dataclass(frozen=True)
class Scene:
    """Where the images lie; every form holds the same encoded bytes, or the same pixels.

    Attributes:
        own: the split as the user has it: `tars` or `betons`.
        images: how many there are.
        tars: directory of a WebDataset split.
        betons: directory of a split with FFCV shards.
        files: class folders.
        beton: one FFCV file with all of them.
        missing: why a form is None that was wanted.
    """

    own: Path
    images: int
    tars: Path | None
    betons: Path | None
    files: Path | None
    beton: Path | None
    missing: str = ""


class _Unfit(Exception):
    """A format can't hold an image."""


def set_up(split: Path, folder: Path, samples: int, workers: int, peers: bool = True) -> Scene:
    """Lay the first shards of `split` with at least `samples` images out below `folder`, which is empty.

    Args:
        workers: of loaders that take a tar each; what is made of FFCV shards are as many.
        peers: also what only other loaders read.

    Raises:
        UserError: no shards there, or they can't be read.
    """
    own = folder / "own"
    part = _first_shards(split, own, samples)
    shards = ShardSet(own)
    found = Scene(own, len(shards), None, None, None, None)
    if part.format == "webdataset":
        betons = _write(shards, part, folder / "betons", "ffcv")
        found = replace(found, tars=own, betons=betons, beton=_only_shard(betons), missing=_NO_JPEG)
    else:
        tars = _write(shards, part, folder / "tars", "webdataset", workers)
        found = replace(found, tars=tars, betons=own, beton=_only_shard(own), missing=_NO_FILES)
        if found.beton is None and peers and importlib.util.find_spec("ffcv") is not None:
            found = replace(found, beton=_only_shard(_write(shards, part, folder / "one", "ffcv")))
    return replace(found, files=_write_files(shards, folder)) if peers and found.tars is not None else found


def _only_shard(split: Path | None) -> Path | None:
    """The file of a split that has one shard."""
    if split is None:
        return None
    shards = Manifest.load(split).shards
    return split / shards[0].file if len(shards) == 1 else None


def _first_shards(split: Path, own: Path, samples: int) -> Manifest:
    whole = Manifest.load(split)
    chosen: list[Shard] = []
    for shard in whole.shards:
        if sum(other.samples for other in chosen) >= samples:
            break
        chosen.append(shard)
    own.mkdir()
    for shard in chosen:
        for name in (shard.file, shard.index_file):
            (own / name).symlink_to((split / name).resolve())
    part = replace(whole, shards=chosen)
    part.save(own)
    return part


def _write_files(shards: ShardSet, folder: Path) -> Path:
    files = folder / "files"
    for sample in shards.read(range(len(shards))):
        place = files / f"{sample.label:05d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{sample.key}.jpg").write_bytes(sample.data)  # all of them look at the content
    return files


def _write(shards: ShardSet, part: Manifest, folder: Path, form: str, parts: int = 1) -> Path | None:
    """A split of the other format, of that many shards; None where that format can't hold the images."""
    folder.mkdir()
    kind: type[ShardWriter] = BetonShardWriter if form == "ffcv" else TarShardWriter
    written = []
    for number, samples in enumerate(np.array_split(np.arange(len(shards)), parts)):
        path = folder / f"train-{number:06d}{kind.suffix}"
        writer = kind(path, path.with_suffix(INDEX_SUFFIX), len(samples))
        try:
            for sample, image in _usable(shards, samples, pixels=form == "ffcv"):
                writer.add(sample.key, image, sample.label)
            writer.close()
        except _Unfit:
            writer.abort()
            shutil.rmtree(folder)
            return None
        finally:
            writer.abort()
        written.append(Shard(path.name, len(samples), writer.bytes, writer.sha256, writer.index_sha256))
    # Reading asks it whether all of them are JPEG files.
    options = {"write_mode": part.options.get("write_mode") or "jpg"} if form == "ffcv" else {}
    replace(part, format=form, shards=written, options=options).save(folder)
    return folder


def _usable(shards: ShardSet, samples: Iterable[int], pixels: bool) -> Iterator[tuple[Sample, Usable]]:
    """Raises _Unfit at a sample that is not stored as a JPEG file, nor as pixels where those will do."""
    import simplejpeg

    for sample in shards.read(samples):
        if sample.shape is not None:
            if not pixels:
                raise _Unfit
            height, width = sample.shape
            yield sample, Usable(sample.data, RAW, width=width, height=height)
            continue
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(sample.data)
        except ValueError as error:
            raise _Unfit from error
        yield sample, Usable(sample.data, "jpg", width=width, height=height)
