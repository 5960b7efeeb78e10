"""The same images in the forms that contenders read: shards of both formats, class folders, one FFCV file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.betonshard import BetonShardWriter
from data_prep.images import RAW, Usable
from data_prep.manifest import Manifest, Shard
from data_prep.shardwriter import ShardWriter
from data_prep.tarshard import TarShardWriter
from pipeline.data.shards import Sample, ShardSet

_NO_JPEG = "FFCV holds JPEG files and pixels, not what these shards hold"
_NO_FILES = "the shards hold pixels, no files"


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
        missing: why a form is None.
    """

    own: Path
    images: int
    tars: Path | None
    betons: Path | None
    files: Path | None
    beton: Path | None
    missing: str = ""


def set_up(split: Path, folder: Path, samples: int) -> Scene:
    """Lay the first shards of `split` with at least `samples` images out below `folder`, which is empty.

    Raises:
        UserError: no shards there, or they can't be read.
    """
    own = folder / "own"
    part = _first_shards(split, own, samples)
    shards = ShardSet(own)
    found = Scene(own, len(shards), None, None, None, None)
    if part.format == "webdataset":
        beton = _write(shards, part, folder / "betons", "ffcv")
        betons = beton and beton.parent
        return replace(
            found, tars=own, files=_write_files(shards, folder), betons=betons, beton=beton, missing=_NO_JPEG
        )
    one = len(part.shards) == 1
    beton = own / part.shards[0].file if one else _write(shards, part, folder / "betons", "ffcv")
    tar = _write(shards, part, folder / "tars", "webdataset")
    files = None if tar is None else _write_files(shards, folder)
    return replace(found, tars=tar and tar.parent, files=files, betons=own, beton=beton, missing=_NO_FILES)


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


def _write(shards: ShardSet, part: Manifest, folder: Path, form: str) -> Path | None:
    """One shard of the other format, and its manifest; None where that format can't hold the images."""
    folder.mkdir()
    kind: type[ShardWriter] = BetonShardWriter if form == "ffcv" else TarShardWriter
    path = folder / f"train-000000{kind.suffix}"
    writer = kind(path, path.with_suffix(".idx.npy"), len(shards))
    try:
        for sample, image in _usable(shards, pixels=form == "ffcv"):
            writer.add(sample.key, image, sample.label)
        writer.close()
    except ValueError:
        return None
    finally:
        writer.abort()
    shard = Shard(path.name, len(shards), writer.bytes, writer.sha256, writer.index_sha256)
    # Reading asks it whether all of them are JPEG files.
    options = {"write_mode": part.options.get("write_mode") or "jpg"} if form == "ffcv" else {}
    replace(part, format=form, shards=[shard], options=options).save(folder)
    return path


def _usable(shards: ShardSet, pixels: bool) -> Iterator[tuple[Sample, Usable]]:
    """Raises ValueError at a sample that is not stored as a JPEG file, nor as pixels where those will do."""
    import simplejpeg

    for sample in shards.read(range(len(shards))):
        if sample.shape is not None:
            if not pixels:
                raise ValueError(_NO_FILES)
            height, width = sample.shape
            yield sample, Usable(sample.data, RAW, width=width, height=height)
            continue
        height, width, *_ = simplejpeg.decode_jpeg_header(sample.data)
        yield sample, Usable(sample.data, "jpg", width=width, height=height)
