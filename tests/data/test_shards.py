"""Random access to shards: what is read is what the tars hold, and damage is named."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pipeline.data.files as files_module
import pipeline.data.shards as shards_module
from data_prep.manifest import Manifest, load_index
from pipeline.data.loader import load_sample
from pipeline.data.shards import Sample, ShardSet
from pipeline.data.substitute import BadSample, Retries
from pipeline.errors import UserError

Damage = Callable[[str, Callable[[Path], object]], Path]


def tar_samples(split: Path) -> list[Sample]:
    """All samples, read with Python's tarfile."""
    samples = []
    for shard in Manifest.load(split).shards:
        with tarfile.open(split / shard.file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            key, _, extension = name.partition(".")
            if extension != "cls":
                samples.append(Sample(key, data, int(members[f"{key}.cls"])))
    return samples


def open_files() -> int:
    """Tars and indexes that this process has open; it has files of others open, which come and go."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            count += any(part in str(descriptor.readlink()) for part in (".tar", ".idx.npy", "memfd:index"))
    return count


@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_the_tars_hold(digits: Path, split: str) -> None:
    expected = tar_samples(digits / split)
    shards = ShardSet(digits / split)
    assert len(shards) == len(expected) == {"train": 1437, "test": 360}[split]
    assert list(shards.read(range(len(shards)))) == expected
    assert shards.keys(range(len(shards))) == [sample.key for sample in expected]


def test_reads_cifar(cifar_test: Path) -> None:
    expected = tar_samples(cifar_test)
    shards = ShardSet(cifar_test)
    assert len(shards) == 10_000 and list(shards.read(range(10_000))) == expected
    assert np.bincount([sample.label for sample in expected]).tolist() == [1000] * 10


def test_reads_in_any_order(digits: Path) -> None:
    expected, shards = tar_samples(digits / "train"), ShardSet(str(digits / "train"))
    order = random.Random(0).choices(range(len(shards)), k=500)
    assert list(shards.read(order)) == [expected[i] for i in order]
    assert list(shards.read(np.array(order[:20]))) == [expected[i] for i in order[:20]]


@pytest.mark.parametrize("sample", [-1, 360])
def test_there_are_no_other_samples(digits: Path, sample: int) -> None:
    shards = ShardSet(digits / "test")
    with pytest.raises(IndexError, match=f"sample {sample} of 360"):
        list(shards.read([sample]))


def test_few_files_stay_open(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN", 3)
    expected, shards = tar_samples(digits / "train"), ShardSet(digits / "train")
    gc.collect()
    before, most = open_files(), 0
    for i in random.Random(1).choices(range(len(shards)), k=300):
        assert list(shards.read([i])) == [expected[i]]
        most = max(most, open_files() - before)
    assert len(shards.manifest.shards) == 8 and most == 2 * 3  # a tar and its index each
    shards.close()
    assert open_files() == before
    assert list(shards.read([0])) == expected[:1]


def test_files_close_with_the_set(digits: Path) -> None:
    gc.collect()
    before = open_files()
    shards = ShardSet(digits / "train")
    list(shards.read(range(0, len(shards), 100)))
    assert open_files() > before
    del shards
    gc.collect()
    assert open_files() == before


def test_pickle_carries_no_files(digits: Path) -> None:
    shards = ShardSet(digits / "test")
    expected = list(shards.read(range(5)))
    copy = pickle.loads(pickle.dumps(shards))
    gc.collect()
    before = open_files()
    assert list(copy.read(range(5))) == expected == list(shards.read(range(5)))
    assert open_files() == before + 2  # the copy opened a tar and an index of its own


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(position: int) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return do


def short(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def relabel(path: Path) -> None:
    rows = np.load(path)
    rows["label"][7] += 1
    np.save(path, rows)


def rename(path: Path) -> None:
    rows = np.load(path)
    rows["key"][7] = b"another"
    np.save(path, rows)


@pytest.mark.parametrize(
    ("file", "do", "said"),
    [
        ("test-000001.tar", Path.unlink, r"test-000001.tar: shard missing \(No such file"),
        ("test-000001.tar", cut, r"test-000001.tar: \d+ bytes, the manifest says \d+; restore it, or rebuild it with"),
        ("test-000001.tar", lambda p: p.write_bytes(p.read_bytes() + b"\0"), r"test-000001.tar: \d+ bytes, the"),
        ("manifest.json", Path.unlink, r"manifest.json: no such manifest"),
        ("manifest.json", flip(100), r"manifest.json: damaged or edited by hand"),
    ],
)
def test_damage_that_shows_at_once(damage: Damage, file: str, do: Callable[[Path], object], said: str) -> None:
    split = damage(file, do)
    with pytest.raises(UserError, match=said):
        ShardSet(split)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (Path.unlink, r"test-000000.idx.npy: the index of test-000000.tar is missing"),
        (cut, r"test-000000.idx.npy: unreadable index"),
        (lambda p: p.write_bytes(b""), r"test-000000.idx.npy: unreadable index"),
        (short, r"test-000000.idx.npy: index of shape \(\d+,\)"),
        (flip(-20), r"test-000000.idx.npy: not the index that the manifest describes; restore it, or rebuild it"),
        (relabel, r"test-000000.idx.npy: not the index that the manifest describes"),
        (rename, r"test-000000.idx.npy: not the index that the manifest describes"),
    ],
)
def test_damaged_index(damage: Damage, do: Callable[[Path], object], said: str) -> None:
    shards = ShardSet(damage("test-000000.idx.npy", do))
    with pytest.raises(BadSample, match=said) as error:
        list(shards.read([0]))
    assert error.value.lost and not error.value.passing
    assert shards.keys([0, 7]) == ["test-000000.tar#0", "test-000000.tar#7"]
    # The other shard is whole.
    assert len(list(shards.read([len(shards) - 1]))) == 1


def test_shard_lost_or_cut_while_training(damage: Damage) -> None:
    split = damage("test-000000.tar", lambda path: None)
    shards = ShardSet(split)
    key = next(shards.read([100])).key
    os.truncate(split / "test-000000.tar", 600)
    with pytest.raises(BadSample, match=rf"test-000000.tar: sample {key}: the file ends inside it, at byte \d+") as cut:
        list(shards.read([100]))
    (split / "test-000001.tar").unlink()
    with pytest.raises(
        BadSample, match=r"test-000001.tar: sample \w+: can't be read \(No such file.*rookery verify"
    ) as lost:
        list(shards.read([len(shards) - 1]))
    assert (cut.value.lost, lost.value.lost) == (False, True)
    assert [*ShardSet(split, check_files=False).missing()] == [
        f"{split / 'test-000000.tar'}: 600 bytes, the manifest says {shards.manifest.shards[0].bytes}",
        f"{split / 'test-000001.tar'}: shard missing (No such file or directory)",
    ]
    # Keys stand in the index, whatever happened to the tar.
    assert shards.keys([100]) == [key]


@pytest.mark.parametrize("spoil", [lambda file: os.truncate(file, 600), lambda file: file.write_bytes(bytes(10**6))])
def test_a_shard_that_was_mended_is_opened_again(spoil: Callable[[Path], object], damage: Damage, digits: Path) -> None:
    """What replaces a file is another file, which a reader that keeps the old one open would never see."""
    split = damage("test-000000.tar", lambda path: None)
    shards, file = ShardSet(split), split / "test-000000.tar"
    whole = load_sample(shards, 100, 1)
    spoil(file)
    with pytest.raises(BadSample):
        load_sample(shards, 100, 1)
    mended = file.with_name("mended")
    mended.write_bytes((digits / "test" / file.name).read_bytes())
    mended.replace(file)
    assert load_sample(shards, 100, 1).picture == whole.picture


def vouched(split: Path, column: str, value: int) -> ShardSet:
    """The shards of a split whose first index has another value in row 7, as a faulty writer would leave it."""
    manifest = Manifest.load(split)
    first = manifest.shards[0]
    rows = np.array(load_index(split, first))
    rows[column][7] = value
    np.save(split / first.index_file, rows)
    sha256 = hashlib.sha256((split / first.index_file).read_bytes()).hexdigest()
    replace(manifest, shards=[replace(first, index_sha256=sha256), *manifest.shards[1:]]).save(split)
    return ShardSet(split)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("offset", 10**9, r"it can't be where its index says, at bytes 1000000000 to \d+ of \d+"),
        ("offset", 2**64 - 1, r"it can't be where its index says, at bytes 18446744073709551615 to \d+ of"),
        ("size", 2**63, r"it can't be where its index says"),
        ("label", 10, "its label is 10, but there are 10 classes"),
        ("label", -1, "its label is -1, but there are 10 classes"),
    ],
)
def test_rows_that_can_not_be_true(column: str, value: int, said: str, damage: Damage) -> None:
    shards = vouched(damage("test-000000.tar", lambda path: None), column, value)
    with pytest.raises(BadSample, match=said) as error:
        list(shards.read([7]))
    assert not error.value.lost and error.value.key == shards.keys([7])[0]
    assert len(list(shards.read([6, 8]))) == 2


def test_a_read_that_fails_once_is_no_bad_sample(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a file server fails over: its files have to be opened anew, too."""
    shards, pread, failures = ShardSet(digits / "test"), os.pread, [errno.EIO, errno.ESTALE]
    [expected] = shards.read([3])

    def fails(*arguments: int) -> bytes:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(BadSample, match=r"can't be read \(Input/output error\)") as error:
        list(shards.read([3]))
    assert error.value.passing and not error.value.lost
    assert Retries().load(3, lambda sample: next(shards.read([sample]))) == expected and not failures


def test_want_of_descriptors_is_not_bad_data(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(digits / "test")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(files_module, "open", refuse, raising=False)
    with pytest.raises(UserError, match="Too many open files") as error:
        list(shards.read([0]))
    assert not isinstance(error.value, BadSample)


def test_index_names_the_image_bytes(digits: Path) -> None:
    """The rows that training trusts, against the file itself."""
    manifest = Manifest.load(digits / "test")
    data = (digits / "test" / manifest.shards[0].file).read_bytes()
    for row in load_index(digits / "test", manifest.shards[0]):
        image = data[row["offset"] : row["offset"] + row["size"]]
        assert image.startswith(b"\x89PNG") and image.endswith(b"IEND\xaeB`\x82")


def test_other_formats_and_places(digits: Path, damage: Damage) -> None:
    with pytest.raises(UserError, match=r"no such manifest, but the directory holds the splits test, train; name one"):
        ShardSet(digits)
    split = damage("manifest.json", lambda path: None)
    manifest = Manifest.load(split)
    Manifest("zip", "test", manifest.classes, manifest.shards).save(split)
    with pytest.raises(UserError, match="format 'zip', there is webdataset and ffcv"):
        ShardSet(split)
