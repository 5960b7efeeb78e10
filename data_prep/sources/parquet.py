"""Hugging Face image datasets as parquet: a file, or a folder of {split}.parquet or {split}-00000-of-000NN.parquet.

The image column is a struct<bytes, path> (or plain binary), the label column an integer whose class names stand in the
schema's metadata. Row groups are read lazily and whole, so they are the blocks that the shuffle keeps together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import MAX_BYTES
from data_prep.options import PrepOptions
from data_prep.sources.base import SPLIT_NAMES, Item, Listing, reading

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "target")
COARSE = "coarse_label"
SHARD_NAME = re.compile(r"(?P<split>[A-Za-z]\w*)(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:-\w+)?)?\.parquet")
MAX_CLASSES = 1_000_000
ROWS_AT_ONCE = 256  # bounds the memory of a reader, whatever the size of a row group


class ParquetSource:
    """A parquet file, or a folder with the files of each split in it or one level below."""

    kind = "parquet"

    def __init__(self, path: Path, options: PrepOptions) -> None:
        self.path = path
        self.name = path.resolve().name
        self._options = options
        with reading(path):
            files = _parquet_files(path)
        if not files:
            raise UserError(f"{path}: no parquet files in it")
        self._files = _by_split(files)
        self.unnamed = list(self._files) == ["train"] and not any(file.name.startswith("train") for file in files)

    @classmethod
    def matches(cls, path: Path) -> bool:
        with reading(path):
            return bool(_parquet_files(path))

    def splits(self) -> list[str]:
        return sorted(self._files, key=SPLIT_NAMES.index)

    def listing(self, split: str) -> Listing:
        import pyarrow.compute as pc

        files = self._files[split]
        image, label = self._columns(files[0])
        classes = self._classes(label)
        digest = hashlib.sha256()
        labels, sizes, at, names, stems = [], [], [], [], []
        blocks: list[np.ndarray] = []
        for number, file in enumerate(files):
            with _opened(file) as parquet:
                table = parquet.read(columns=[label, *([f"{image}.path"] if _has_path(parquet, image) else [])])
                column = table.column(label)
                if column.null_count:
                    raise UserError(f"{file}: {column.null_count} rows have no {label}")
                labels.append(column.to_numpy())
                paths = pc.struct_field(table.column(image), "path").to_pylist() if table.num_columns == 2 else None
                stems += [PurePosixPath(path or "").stem for path in paths or [""] * table.num_rows]
                for group in range(parquet.num_row_groups):
                    meta = parquet.metadata.row_group(group)
                    if not 0 <= meta.total_byte_size <= MAX_BYTES * max(1, meta.num_rows):
                        raise UserError(
                            f"{file}: row group {group} unpacks to {meta.total_byte_size} bytes in {meta.num_rows} "
                            f"rows, but images have {MAX_BYTES} at most; leave it out, or fetch it again"
                        )
                    sizes.append(np.full(meta.num_rows, meta.total_byte_size // max(1, meta.num_rows)))
                    rows = np.arange(meta.num_rows)
                    at.append(np.stack([np.full_like(rows, number), np.full_like(rows, group), rows], axis=1))
                    blocks.append(np.full(meta.num_rows, len(blocks)))
                if sum(map(len, blocks)) != sum(map(len, labels)):
                    raise ValueError("row groups that don't add up")
            names += [f"{file.name}#{row}" for row in range(table.num_rows)]
            digest.update(_footer(file))
        column = np.concatenate(labels).astype(np.int64)
        _check_labels(self.path, split, label, column, len(classes))
        return Listing(
            classes,
            names,
            column,
            np.concatenate(sizes),
            np.concatenate(at),
            ParquetReader([str(file) for file in files], image),
            stems=stems if any(stems) else None,
            blocks=np.concatenate(blocks),
            content=digest.hexdigest(),
        )

    def _columns(self, file: Path) -> tuple[str, str]:
        import pyarrow as pa

        def is_image(kind: Any) -> bool:
            binary = (
                kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            )
            return pa.types.is_binary(binary) or pa.types.is_large_binary(binary)

        with _opened(file) as parquet:
            schema = parquet.schema_arrow
        images = [field.name for field in schema if is_image(field.type)]
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        if self._options.coarse_labels and (self._options.label_column or COARSE not in integers):
            why = "--label-column names another column" if self._options.label_column else f"no {COARSE} column in it"
            raise UserError(f"{file}: {why}; leave --coarse-labels out")
        labels = (COARSE,) if self._options.coarse_labels else LABEL_COLUMNS
        return (
            _pick(file, "image", self._options.image_column, images, IMAGE_COLUMNS),
            _pick(file, "label", self._options.label_column, integers, labels),
        )

    def _classes(self, label: str) -> list[str]:
        """Class names from the metadata; else the labels 0 ... largest over all splits."""
        import pyarrow.compute as pc

        largest = -1
        for file in (file for files in self._files.values() for file in files):
            with _opened(file) as parquet:
                names = _names(parquet, label)
                if names:
                    return names
                if label in parquet.schema_arrow.names:
                    largest = max(largest, pc.max(parquet.read(columns=[label]).column(label)).as_py() or 0)
        if largest >= MAX_CLASSES:
            raise UserError(f"{self.path}: {label} goes up to {largest}, so it can't be the label; name --label-column")
        return [str(number) for number in range(largest + 1)]


class ParquetReader:
    """Reads rows; `at` is (file, row group, row of the group). Holds the images of one call in memory."""

    def __init__(self, files: list[str], column: str) -> None:
        self.files = files
        self.column = column

    def read(self, items: Sequence[Item]) -> Iterator[bytes]:
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for order, item in enumerate(items):
            file, group, row = item.at
            wanted[file, group].append((row, order))
        found: dict[int, bytes] = {}
        for (file, group), rows in sorted(wanted.items()):
            with _opened(Path(self.files[file])) as parquet:
                self._read_group(parquet, group, sorted(rows), found)
        for order in range(len(items)):
            yield found.pop(order, b"")

    def _read_group(self, parquet: Any, group: int, rows: list[tuple[int, int]], found: dict[int, bytes]) -> None:
        leaf = f"{self.column}.bytes" if _has_path(parquet, self.column) else self.column
        start = 0
        waiting = iter(rows)
        row, order = next(waiting)
        for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[leaf], use_threads=False):
            values = batch.column(0)
            if leaf != self.column:
                values = values.field("bytes")
            while row < start + batch.num_rows:
                found[order] = values[row - start].as_py() or b""
                row, order = next(waiting, (2**62, -1))
            start += batch.num_rows
            if order < 0:
                return


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(file):
        try:
            with pq.ParquetFile(file) as parquet:
                yield parquet
        except (pa.ArrowException, KeyError, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{file}: not a readable parquet file ({error}); fetch it again") from error


def _has_path(parquet: Any, column: str) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(parquet.schema_arrow.field(column).type)


def _names(parquet: Any, label: str) -> list[str]:
    """Class names from the metadata that Hugging Face's library writes; none where there are no such."""
    metadata = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(metadata)["info"]["features"][label]["names"]
        return [str(name) for name in names or ()]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return []


def _footer(file: Path) -> bytes:
    """The parquet footer: where every column chunk lies, how long it is, and its statistics."""
    with reading(file), open(file, "rb") as stream:
        stream.seek(-8, 2)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, 2)
        return stream.read(length)


def _parquet_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.suffix == ".parquet" else []
    folders = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    likely = folders if len(folders) == 1 else [f for f in folders if f.name in (*SPLIT_NAMES, "data")]
    return sorted(path.glob("*.parquet")) or sorted(file for folder in likely for file in folder.glob("*.parquet"))


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Group files by the split that their name, else their folder, gives; without either they are `train`."""
    splits: dict[str, list[Path]] = defaultdict(list)
    counts: dict[str, int] = {}
    for file in files:
        match = SHARD_NAME.fullmatch(file.name)
        name = match["split"] if match else ""
        split = next((known for known in (name, file.parent.name) if known in SPLIT_NAMES), "train")
        splits[split].append(file)
        if match and match["count"]:
            counts[split] = int(match["count"])
    for split, count in counts.items():
        if len(splits[split]) != count:
            raise UserError(
                f"{splits[split][0].parent}: {len(splits[split])} parquet files of the split {split}, "
                f"but their names say {count}; fetch the others"
            )
    return dict(splits)


# What a column has to be, said where none is.
_NONE_FITS = {
    "image": "none of its columns holds the bytes of images (binary, or a struct with bytes); write them into one",
    "label": "none of its columns holds whole numbers, which labels are here; number the classes, in datasets with "
    "data.class_encode_column(NAME), and write the file again",
}


def _pick(file: Path, what: str, chosen: str | None, fitting: list[str], usual: Sequence[str]) -> str:
    if not fitting:
        raise UserError(f"{file}: no {what} column: {_NONE_FITS[what]}")
    if chosen is not None:
        if chosen in fitting:
            return chosen
        raise UserError(f"{file}: {chosen!r} is no {what} column; those that can be one: {', '.join(fitting)}")
    pick = next((name for name in usual if name in fitting), fitting[0] if len(fitting) == 1 else None)
    if pick is None:
        raise UserError(
            f"{file}: can't tell the {what} column (those that can be one: {', '.join(fitting)}); "
            f"name it with --{what}-column"
        )
    return pick


def _check_labels(path: Path, split: str, column: str, labels: np.ndarray, classes: int) -> None:
    if not len(labels):
        raise UserError(f"{path}: the split {split} has no rows")
    if labels.max() < 0:
        raise UserError(
            f"{path}: the split {split} is unlabelled ({column} is {labels[0]}); choose others with --split"
        )
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise UserError(f"{path}: {column} {wrong} in the split {split}, but there are {classes} classes")
