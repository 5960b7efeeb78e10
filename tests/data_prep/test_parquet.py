"""Hugging Face parquet: layouts, columns, class names, and rows read in any order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.options import PrepOptions
from data_prep.sources import open_source
from tests.data_prep.helpers import TEXT


def write(
    path: Path,
    rows: int = 30,
    labels: Sequence[int] | None = None,
    image: str = "image",
    label: str = "label",
    names: Sequence[str] | None = None,
    plain: bool = False,
    paths: bool = True,
    extra: dict[str, Any] | None = None,
) -> Path:
    """A file of `rows` "images" whose bytes say the file and the row, in row groups of 7."""

    data = [f"{path.name} {row}".encode() for row in range(rows)]
    structs = [{"bytes": item, "path": f"dir/im.{row}.png" if paths else None} for row, item in enumerate(data)]
    kind = pa.binary() if plain else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {
            image: pa.array(data if plain else structs, kind),
            label: pa.array([row % 3 for row in range(rows)] if labels is None else labels, pa.int64()),
            **(extra or {}),
        }
    )
    if names:
        features = {label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return path


def test_a_single_file(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "things.parquet"))
    listing = source.listing("train")
    assert (source.kind, source.unnamed, source.splits()) == ("parquet", True, ["train"])
    assert listing.classes == ["0", "1", "2"]
    assert listing.labels.tolist() == [row % 3 for row in range(30)]
    assert listing.names[29] == "things.parquet#29"
    assert listing.items(np.array([29]))[0].key == "00000029_im_29"
    assert listing.blocks is not None
    assert listing.blocks.tolist() == [row // 7 for row in range(30)]


@pytest.mark.parametrize("plain", [False, True])
def test_rows_come_in_the_order_asked_for(tmp_path: Path, plain: bool) -> None:
    for number in range(3):
        write(tmp_path / f"train-{number:05d}-of-00003.parquet", plain=plain)
    listing = open_source(tmp_path).listing("train")
    order = np.random.default_rng(0).permutation(90)[:50]
    expected = [f"train-{row // 30:05d}-of-00003.parquet {row % 30}".encode() for row in order]
    assert list(listing.reader.read(listing.items(order))) == expected


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.parquet", "test.parquet"], {"train": 1, "test": 1}),
        (["data/train-00000-of-00002-0f.parquet", "data/train-00001-of-00002-1a.parquet"], {"train": 2}),
        (["plain_text/validation-00000-of-00001.parquet"], {"validation": 1}),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], {"train": 2, "test": 1}),
        (["part-0.parquet", "part-1.parquet"], {"train": 2}),
    ],
)
def test_layouts(tmp_path: Path, files: list[str], splits: dict[str, int]) -> None:
    for file in files:
        write(tmp_path / file)
    source = open_source(tmp_path)
    assert {split: len(source.listing(split)) // 30 for split in source.splits()} == splits


def test_class_names_from_the_metadata(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "test.parquet", names=("ant", "bee", "cat", "dog")))
    assert (source.splits(), source.unnamed) == (["test"], False)
    assert source.listing("test").classes == ["ant", "bee", "cat", "dog"]


def test_classes_without_names_agree_between_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", labels=[*range(29), 8])
    write(tmp_path / "test.parquet")
    assert open_source(tmp_path).listing("test").classes == [str(label) for label in range(29)]


def test_fine_and_coarse_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", label="fine_label", extra={"coarse_label": [1] * 30})
    assert open_source(path).listing("train").labels.tolist() == [row % 3 for row in range(30)]
    coarse = open_source(path, PrepOptions(coarse_labels=True)).listing("train")
    assert coarse.labels.tolist() == [1] * 30


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {}, "no coarse_label column in it; leave --coarse-labels out"),
        ({"coarse_label": [1] * 30}, {"label_column": "fine_label"}, "--label-column names another column; leave"),
    ],
)
def test_coarse_labels_that_would_be_ignored_are_refused(
    extra: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "train.parquet", label="fine_label", extra=extra)
    with pytest.raises(UserError, match=message):
        open_source(path, PrepOptions(coarse_labels=True, **options)).listing("train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [b""], "label": ["cat"]},
            r"no label column: none of its columns holds whole numbers, .*class_encode",
        ),
        ({"image": ["cat.png"], "label": [0]}, "no image column: none of its columns holds the bytes of images"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_columns_of_other_types(columns: dict[str, list[Any]], message: str, named: bool, tmp_path: Path) -> None:
    """To name another column would help nothing."""
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    options = PrepOptions(image_column="image", label_column="label") if named else PrepOptions()
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "train.parquet", options).listing("train")


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image="scan", label="kind", extra={"year": [1] * 30, "raw": [b""] * 30})
    with pytest.raises(UserError, match=r"can't tell the image column .*scan, raw.*--image-column"):
        open_source(path).listing("train")
    with pytest.raises(UserError, match=r"can't tell the label column .*kind, year.*--label-column"):
        open_source(path, PrepOptions(image_column="scan")).listing("train")
    with pytest.raises(UserError, match=r"'nonsense' is no label column; .*kind, year"):
        open_source(path, PrepOptions(image_column="scan", label_column="nonsense")).listing("train")
    listing = open_source(path, PrepOptions(image_column="scan", label_column="kind")).listing("train")
    assert next(listing.reader.read(listing.items(np.array([4])))) == b"x.parquet 4"


def test_rows_without_bytes_are_empty_images(tmp_path: Path) -> None:

    image = pa.array([{"bytes": None, "path": "a.jpg"}, None], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image, "label": pa.array([0, 1])}), tmp_path / "t.parquet")
    listing = open_source(tmp_path / "t.parquet").listing("train")
    assert list(listing.reader.read(listing.items(np.arange(2)))) == [b"", b""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [-1] * 30}, "the split train is unlabelled"),
        ({"labels": [*range(29), -1]}, "label -1 in the split train"),
        ({"labels": [*range(29), None]}, "1 rows have no label"),
        ({"names": ("a", "b")}, "label 2 in the split train, but there are 2 classes"),
        ({"rows": 0}, "the split train has no rows"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "train.parquet", **changes)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path).listing("train")


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.parquet")
    write(tmp_path / "train-00002-of-00003.parquet")
    with pytest.raises(UserError, match="2 parquet files of the split train, but their names say 3"):
        open_source(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(TEXT)
    with pytest.raises(UserError, match=r"train\.parquet: not a readable parquet file"):
        open_source(tmp_path).listing("train")


def test_the_fingerprint_sees_the_contents(tmp_path: Path) -> None:
    first = open_source(write(tmp_path / "a" / "train.parquet")).listing("train").fingerprint()
    again = open_source(write(tmp_path / "b" / "train.parquet")).listing("train").fingerprint()
    other = open_source(write(tmp_path / "c" / "train.parquet", plain=True)).listing("train").fingerprint()
    assert first == again != other
