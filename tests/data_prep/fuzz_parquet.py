"""Parquet files that are damaged, or hold something else than images and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.data_prep.fuzz_folders import Make, single
from tests.data_prep.helpers import encoded, pixels
from tests.fuzzing import damaged, generator


def _parquet(
    columns: Callable[[], Mapping[str, Any]], metadata: bytes | None = None, name: str = "train.parquet"
) -> Make:
    def make(top: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(dict(columns()))
        if metadata is not None:
            table = table.replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(table, top / name, row_group_size=4)
        return top / name

    return make


def _images(count: int = 8) -> Any:
    import pyarrow as pa

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": encoded(pixels(i)), "path": f"i{i}.jpg"} for i in range(count)], kind)


def _labelled(labels: Callable[[], Any], metadata: bytes | None = None) -> Make:
    return _parquet(lambda: {"image": _images(), "label": labels()}, metadata)


def _array(values: list[Any], kind: str) -> Any:
    import pyarrow as pa

    return pa.array(values, getattr(pa, kind)())


_RANGE = [0, 1, 2, 0, 1, 2, 0, 1]
_NAMES = b'{"info": {"features": {"label": {"names": %s}}}}'


def _parquet_damaged(how: str, top: Path) -> Path:
    path = _labelled(lambda: _array(_RANGE, "int64"))(top)
    data, draw = path.read_bytes(), generator(f"parquet {how}")
    if how.startswith("footer"):  # where its structure stands
        length = int.from_bytes(data[-8:-4], "little") + 8
        path.write_bytes(data[:-length] + damaged(data[-length:], "flipped", draw))
    else:
        path.write_bytes(damaged(data, how.split()[0], draw))
    return path


def _one_of_two(top: Path) -> Path:
    _labelled(lambda: _array(_RANGE, "int64"))(top).rename(top / "train-00000-of-00002.parquet")
    return top


def _two_kinds(top: Path) -> Path:
    """The second file of a split has other columns."""
    _labelled(lambda: _array(_RANGE, "int64"))(top).rename(top / "train-00000-of-00002.parquet")
    _parquet(lambda: {"picture": _images(), "kind": _array(_RANGE, "int64")}, name="train-00001-of-00002.parquet")(top)
    return top


def _bytes_of(*values: bytes | None) -> Make:
    return _parquet(lambda: {"image": _array([*values], "binary"), "label": _array([0] * len(values), "int64")})


PARQUET: dict[str, Make] = {
    **{
        f"parquet {how}": partial(_parquet_damaged, how)
        for how in (
            *("cut", "cut again", "flipped", "flipped again", "flipped once more", "zeroed", "spliced"),
            *(f"footer {number}" for number in range(10)),
        )
    },
    "parquet of text": single(lambda p: p.write_bytes(b"not parquet" * 100), "train.parquet"),
    "parquet of nothing": single(lambda p: p.write_bytes(b""), "train.parquet"),
    "parquet of its magic": single(lambda p: p.write_bytes(b"PAR1PAR1"), "train.parquet"),
    "footer of 4 GB": single(lambda p: p.write_bytes(b"PAR1" + bytes(50) + b"\xff\xff\xff\xffPAR1"), "train.parquet"),
    "labels as words": _labelled(lambda: _array(["a"] * 8, "string")),
    "labels between numbers": _labelled(lambda: _array([0.5] * 8, "float64")),
    "labels missing": _labelled(lambda: _array([*_RANGE[:7], None], "int64")),
    "label below nothing": _labelled(lambda: _array([*_RANGE[:7], -2], "int64")),
    "label of 10^12": _labelled(lambda: _array([*_RANGE[:7], 10**12], "int64")),
    "label of 2^64 - 1": _labelled(lambda: _array([*_RANGE[:7], 2**64 - 1], "uint64")),
    "label beyond the names": _labelled(lambda: _array([*_RANGE[:7], 3], "int64"), _NAMES % b'["a", "b", "c"]'),
    "names that lead up": _labelled(lambda: _array(_RANGE, "int64"), _NAMES % b'["../../a", "/etc", "c"]'),
    "names as a number": _labelled(lambda: _array(_RANGE, "int64"), _NAMES % b"7"),
    "metadata that is no JSON": _labelled(lambda: _array(_RANGE, "int64"), b"{not json"),
    "metadata that is a list": _labelled(lambda: _array(_RANGE, "int64"), b"[1, 2]"),
    "metadata in 100,000 brackets": _labelled(lambda: _array(_RANGE, "int64"), b"[" * 100_000),
    "no label column": _parquet(lambda: {"image": _images()}),
    "no image column": _parquet(lambda: {"label": _array(_RANGE, "int64")}),
    "images as words": _parquet(lambda: {"image": _array(["x"] * 8, "string"), "label": _array(_RANGE, "int64")}),
    "images in lists": _parquet(
        lambda: {"image": [[encoded(pixels(1))]] * 8, "label": _array(_RANGE, "int64")}
    ),
    "images missing": _bytes_of(encoded(pixels(1)), None, b"", encoded(pixels(2))),
    "no rows": _parquet(lambda: {"image": _images(0), "label": _array([], "int64")}),
    "image of 80 MB": _parquet(lambda: {"image": _array([bytes(8 * 10**7)], "binary"), "label": _array([0], "int64")}),
    "one of two files": _one_of_two,
    "files of two kinds": _two_kinds,
}  # fmt: skip
