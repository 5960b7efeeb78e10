"""Every damage is found, named, and can be mended as the message says."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME, Manifest, load_index
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from data_prep.verify import split_directories, verify
from tests.data_prep.helpers import TEXT, digests, make_folder

TAR, INDEX = "train-000001.tar", "train-000001.idx.npy"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def swap(out: Path) -> None:
    other = out / "train-000000.idx.npy"
    mine = (out / INDEX).read_bytes()
    (out / INDEX).write_bytes(other.read_bytes())
    other.write_bytes(mine)


DAMAGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "flipped pixel": (lambda out: flip(out / TAR, 700), {TAR: "contents have changed"}),
    "flipped header": (lambda out: flip(out / TAR, 3), {TAR: "contents have changed"}),
    "flipped end mark": (lambda out: flip(out / TAR, -1), {TAR: "contents have changed"}),
    "truncated tar": (lambda out: cut(out / TAR, 1000), {TAR: "1000 bytes, the manifest says"}),
    "empty tar": (lambda out: cut(out / TAR, 0), {TAR: "0 bytes, the manifest says"}),
    "longer tar": (lambda out: append(out / TAR), {TAR: "bytes, the manifest says"}),
    "missing shard": (lambda out: (out / TAR).unlink(), {TAR: "missing"}),
    "missing index": (lambda out: (out / INDEX).unlink(), {INDEX: "missing"}),
    "flipped index": (lambda out: flip(out / INDEX, 200), {INDEX: "contents have changed"}),
    "truncated index": (lambda out: cut(out / INDEX, 90), {INDEX: "contents have changed"}),
    "swapped indexes": (swap, {INDEX: "contents have changed", "train-000000.idx.npy": "contents have changed"}),
    "extra shard": (lambda out: (out / "more.tar").write_bytes(TEXT), {"more.tar": "not in the manifest"}),
    "extra index": (lambda out: (out / "x.idx.npy").write_bytes(TEXT), {"x.idx.npy": "not in the manifest"}),
    "missing manifest": (lambda out: (out / MANIFEST_NAME).unlink(), {MANIFEST_NAME: "no such manifest"}),
    "empty manifest": (lambda out: cut(out / MANIFEST_NAME, 0), {MANIFEST_NAME: "damaged"}),
    "truncated manifest": (lambda out: cut(out / MANIFEST_NAME, 400), {MANIFEST_NAME: "damaged"}),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    prepare(make_folder(tmp_path / "source"), tmp_path / "out", PrepOptions(workers=1, shard_samples=4))
    return tmp_path / "out" / "train"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_mended(out: Path, damage: str) -> None:
    assert verify(out) == verify(out.parent) == []
    before = digests(out)
    break_it, expected = DAMAGES[damage]
    break_it(out)
    problems = verify(out.parent, workers=2)
    assert {problem.file for problem in problems} == set(expected)
    assert all(expected[problem.file] in problem.what for problem in problems)
    for problem in problems:
        if "delete it" in problem.mend:
            (out / problem.file).unlink()
    repair = any("--repair" in problem.mend for problem in problems)
    prepare(out.parents[1] / "source", out.parent, PrepOptions(workers=1, shard_samples=4, repair=repair))
    assert digests(out) == before
    assert verify(out) == []


def test_every_flipped_byte_of_the_manifest_is_found(out: Path) -> None:
    path = out / MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(0, len(whole), 11):
        flip(path, position)
        assert [problem.file for problem in verify(out)][:1] == [MANIFEST_NAME], whole[position - 9 : position + 9]
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("column", "row", "value"), [("offset", 1, 512), ("size", 3, 7), ("label", 0, 4), ("key", 2, b"other")]
)
def test_a_wrong_index_with_a_right_hash_is_found(out: Path, column: str, row: int, value: object) -> None:
    """As a faulty writer would leave it: the manifest vouches for an index that disagrees with its tar."""
    manifest = Manifest.load(out)
    index = np.array(load_index(out, manifest.shards[1]))
    right = index[column][row].item()
    index[column][row] = value
    _vouch(out, manifest, index)
    [problem] = verify(out)
    assert (problem.file, problem.what) == (INDEX, f"row {row}: {column} is {value}, in the tar it is {right}")


def test_an_index_with_a_row_missing_is_found(out: Path) -> None:
    manifest = Manifest.load(out)
    _vouch(out, manifest, np.array(load_index(out, manifest.shards[1]))[:-1])
    [problem] = verify(out)
    assert "the manifest says (4,)" in problem.what


def _vouch(out: Path, manifest: Manifest, index: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, index)
    (out / INDEX).write_bytes(buffer.getvalue())
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    replace(manifest, shards=shards).save(out)


def test_several_problems_are_all_listed(out: Path) -> None:
    flip(out / TAR, 700)
    (out / "train-000002.tar").unlink()
    (out / "extra.tar").write_bytes(TEXT)
    assert {problem.file for problem in verify(out)} == {TAR, "train-000002.tar", "extra.tar"}


def test_an_unfinished_preparation_is_reported(out: Path) -> None:
    (out / MANIFEST_NAME).unlink()
    [problem] = verify(out)
    assert "run the same `rookery prep` command again" in problem.mend


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(TEXT)])
def test_nothing_to_verify(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"no such directory|: a file|nothing here was made by"):
        split_directories(tmp_path / "x")


def test_a_folder_of_data_sets_names_them(out: Path, tmp_path: Path) -> None:
    top = tmp_path / "shards"
    for place in ("pets", "old/pets", ".hidden"):
        shutil.copytree(out, top / place / "train")
    shutil.copytree(out, top / "pets" / "val")
    (top / "notes").mkdir()
    with pytest.raises(UserError, match="it holds 2 data sets") as caught:
        split_directories(top)
    assert f"{top / 'old/pets'} (train), {top / 'pets'} (train, val); name one of them" in str(caught.value)
    with pytest.raises(UserError, match=r"it holds 1 data set: .*old/pets \(train\); name it"):
        split_directories(top / "old")


def test_the_manifest_says_what_the_contract_asks(out: Path) -> None:
    content = json.loads((out / MANIFEST_NAME).read_text())
    assert content["source"] == {
        "kind": "folder", "name": "source", "images": 15, "fingerprint": content["source"]["fingerprint"]
    }  # fmt: skip
    assert content["options"] == {
        "shard_samples": 4,
        "shard_mb": None,
        "shuffle_seed": 0,
        "resize": None,
        "quality": 90,
    }
    assert (content["format"], content["split"], content["classes"]) == ("webdataset", "train", ["ant", "bee", "cat"])
