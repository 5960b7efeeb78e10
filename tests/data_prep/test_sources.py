"""What each kind of source lists and reads, and what it says when it can't."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.options import PrepOptions
from data_prep.sources import SOURCES, open_source
from data_prep.sources.base import Listing
from data_prep.sources.folder import FolderSource
from tests.conftest import missing
from tests.data_prep.helpers import TEXT, decoded, encoded, make_folder, pixels


def read_all(listing: Listing) -> list[bytes]:
    return list(listing.reader.read(listing.items(np.arange(len(listing)))))


def test_class_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "birds", ("wren", "crow", "Emu"))
    (root / "crow" / "more" / "deep").mkdir(parents=True)
    (root / "crow" / "more" / "deep" / "z.png").write_bytes(encoded(pixels(1), "PNG"))
    (root / "crow" / ".DS_Store").write_bytes(TEXT)
    (root / ".hidden").mkdir()
    for folder in ("__MACOSX", "crow/__MACOSX"):
        (root / folder / "crow").mkdir(parents=True)
        (root / folder / "crow" / "x.jpg").write_bytes(TEXT)
    (root / "readme.txt").write_bytes(TEXT)
    source = open_source(root)
    listing = source.listing("train")
    assert (source.kind, source.splits(), source.unnamed) == ("folder", ["train"], True)
    assert listing.classes == ["Emu", "crow", "wren"]
    assert Counter(listing.labels.tolist()) == {0: 5, 1: 6, 2: 5}
    assert listing.names[10] == "crow/more/deep/z.png"
    assert listing.items(np.array([10]))[0].key == "00000010_z"
    assert listing.items(np.array([0]))[0].key == "00000000_Emu_0_v1"
    assert read_all(listing) == [(root / name).read_bytes() for name in listing.names]


def test_split_folders_share_their_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", ("a", "b", "c"))
    make_folder(tmp_path / "val", ("b", "d"))
    source = open_source(tmp_path)
    assert source.splits() == ["train", "val"]
    assert source.listing("train").classes == source.listing("val").classes == ["a", "b", "c", "d"]
    assert sorted(set(source.listing("val").labels)) == [1, 3]


@pytest.mark.parametrize("other", ["", "val"])
def test_a_class_in_two_unicode_forms_is_refused(tmp_path: Path, other: str) -> None:
    composed, decomposed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
    make_folder(tmp_path / "train", ("a", composed))
    make_folder(tmp_path / (other or "train"), (decomposed,))
    told = r"train/caf.*\\xe9: the same name .* in two Unicode forms .*one name"
    with pytest.raises(UserError, match=told) as caught:
        open_source(tmp_path).listing("train")
    assert f"{tmp_path / (other or 'train')}/cafe\\u0301" in str(caught.value)


def test_a_split_without_class_folders_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", ("a", "b"))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.jpg").write_bytes(encoded(pixels(1)))
    source = open_source(tmp_path)
    assert len(source.listing("train")) == 10
    with pytest.raises(UserError, match=r"val: no class folders in it"):
        source.listing("val")


def test_folders_may_be_deep(tmp_path: Path) -> None:
    """Deeper than calls may be nested."""
    deep = tmp_path / "a" / "/".join("d" * 150)
    deep.mkdir(parents=True)
    (deep / "x.jpg").write_bytes(TEXT)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        listing = FolderSource(tmp_path, PrepOptions()).listing("train")
    finally:
        sys.setrecursionlimit(limit)
    assert listing.names == [f"{deep.relative_to(tmp_path)}/x.jpg"]


def test_a_dangling_link_is_an_error_and_a_link_is_followed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root", ("a",), per_class=1)
    (root / "b").symlink_to(root / "a")
    assert open_source(root).listing("train").labels.tolist() == [0, 1]
    (root / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jpg: No such file"):
        open_source(root).listing("train")


def test_a_file_that_changes_after_the_listing_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root", ("a",), per_class=2)
    listing = open_source(root).listing("train")
    (root / listing.names[1]).write_bytes(TEXT)
    with pytest.raises(UserError, match=r"when the source was listed, 21 now"):
        read_all(listing)


def test_digits() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits")
    train, test = source.listing("train"), source.listing("test")
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(train.names + test.names) == sorted(f"load_digits#{row}" for row in range(1797))
    fractions = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.abs(fractions - 360 / 1797).max() < 0.004  # stratified: each class gives a fifth
    scans = load_digits()
    for name, label, data in zip(test.names, test.labels, read_all(test), strict=True):
        row = int(name.split("#")[1])
        assert scans.target[row] == label
        np.testing.assert_array_equal(decoded(data), np.floor(scans.images[row] * 255 / 16 + 0.5))


def test_the_word_wins_over_a_folder_and_a_path_over_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "digits", ("a", "b"))
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").kind == "digits"
    assert open_source(tmp_path / "digits").kind == "folder"


def test_nothing_there_lists_what_is_understood(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder") as caught:
        open_source(tmp_path / "nowhere")
    assert all(kind in str(caught.value) for kind in SOURCES)


@pytest.mark.parametrize("content", [b"", TEXT, bytes(2000), b"\x1f\x8b broken gzip"])
def test_an_unknown_file_lists_what_is_understood(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"file: not a source that is understood") as caught:
        open_source(tmp_path / "file")
    assert all(kind in str(caught.value) for kind in SOURCES)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zip", "--kind zip: no such kind of source"),
        ("ilsvrc", "neither ILSVRC2012_img_train.tar nor"),
        ("cifar", "not a CIFAR archive"),
        ("parquet", "no parquet files in it"),
    ],
)
def test_a_forced_kind_that_does_not_fit(tmp_path: Path, kind: str, message: str) -> None:
    make_folder(tmp_path / "root")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "root", PrepOptions(kind=kind))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], ": an empty folder; a source is one of"),
        ([".DS_Store", "__MACOSX"], ": an empty folder; a source is one of"),
        (["a.jpg"], ": a folder with 1 file, but no class folders; a source is one of"),
        (["a.jpg", "b.jpg"], ": a folder with 2 files, but no class folders; a source is one of"),
    ],
)
def test_a_folder_without_class_folders_is_no_source(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=re.escape(str(tmp_path) + message)):
        open_source(tmp_path)


@pytest.mark.parametrize("locked", ["", "ant", "ant/ant 0.v1.jpg"])
def test_no_permission(tmp_path: Path, locked: str) -> None:
    root = make_folder(tmp_path / "root")
    if os.geteuid() == 0:
        _let_others_pass(tmp_path)
    (root / locked).chmod(0)
    try:
        with _unprivileged(), pytest.raises(UserError, match=r"cannot read .*: Permission denied"):
            read_all(open_source(root).listing("train"))
    finally:
        (root / locked).chmod(0o755)


def _let_others_pass(path: Path) -> None:
    for folder in (path, *path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            if "pytest" not in str(folder):
                missing(f"{folder} is closed to other users, so being one of them can't be tried")
            folder.chmod(folder.stat().st_mode | 0o011)


class _unprivileged:
    """Root may read everything; be nobody for a while."""

    def __enter__(self) -> None:
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *error: object) -> None:
        if self.root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "digits",
            {"coarse_labels": True},
            "--coarse-labels is for sources of kind cifar or parquet, and this one is",
        ),
        ("root", {"coarse_labels": True}, "--coarse-labels is for .* this one is folder; leave it out"),
        ("root", {"devkit": Path("kit")}, "--devkit is for sources of kind ilsvrc, and this one is folder"),
        ("digits", {"image_column": "image"}, "--image-column is for sources of kind parquet, and this one is digits"),
        ("digits", {"label_column": "label"}, "--label-column is for sources of kind parquet"),
    ],
)
def test_an_option_of_another_kind_is_refused(
    source: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_folder(tmp_path / "root")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / source if source == "root" else source, PrepOptions(**options))
