"""The four CIFAR archives, made small in the official layout: the same pixels and labels out of each."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.options import PrepOptions
from data_prep.sources import open_source
from tests.data_prep.helpers import decoded, make_tar

ROWS = 12
RNG = np.random.default_rng(0)
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
PIXELS = {name: RNG.integers(0, 256, (ROWS, 3072), dtype=np.uint8) for name in [*BATCHES, "test"]}
LABELS = {name: RNG.integers(0, 10, ROWS) for name in [*BATCHES, "test"]}
COARSE = {name: LABELS[name] // 2 for name in LABELS}
TEN = [f"class{label}" for label in range(10)]
FIVE = [f"group{label}" for label in range(5)]


def _pickled(**table: Any) -> bytes:
    """As Python 2 wrote them: protocol 2, every string as bytes."""

    def old(value: Any) -> Any:
        if isinstance(value, dict):
            return {old(key): old(item) for key, item in value.items()}
        if isinstance(value, list):
            return [old(item) for item in value]
        return value.encode() if isinstance(value, str) else value

    return pickle.dumps(old(table), protocol=2)


def _batch(name: str, **labels: Any) -> bytes:
    names = [f"{name}_s_{row:06d}.png" for row in range(ROWS)]
    return _pickled(data=PIXELS[name], filenames=names, **labels)


def files(layout: str) -> dict[str, bytes]:
    fine = {name: LABELS[name].tolist() for name in LABELS}
    coarse = {name: COARSE[name].tolist() for name in COARSE}
    if layout == "cifar-10-batches-py":
        made = {name: _batch(name, labels=fine[name]) for name in BATCHES}
        made["test_batch"] = _batch("test", labels=fine["test"])
        made["batches.meta"] = _pickled(label_names=TEN, num_vis=3072)
    elif layout == "cifar-10-batches-bin":
        made = {f"{name}.bin": _records(name, LABELS[name][:, None]) for name in BATCHES}
        made["test_batch.bin"] = _records("test", LABELS["test"][:, None])
        made["batches.meta.txt"] = ("\n".join(TEN) + "\n\n").encode()
    elif layout == "cifar-100-python":
        made = {
            "train": _batch(BATCHES[0], fine_labels=fine[BATCHES[0]], coarse_labels=coarse[BATCHES[0]]),
            "test": _batch("test", fine_labels=fine["test"], coarse_labels=coarse["test"]),
            "meta": _pickled(fine_label_names=TEN, coarse_label_names=FIVE),
        }
    else:
        made = {
            f"{split}.bin": _records(name, np.stack([COARSE[name], LABELS[name]], axis=1))
            for split, name in (("train", BATCHES[0]), ("test", "test"))
        }
        made["fine_label_names.txt"] = ("\n".join(TEN) + "\n").encode()
        made["coarse_label_names.txt"] = ("\n".join(FIVE) + "\n").encode()
    return {f"{layout}/{name}": data for name, data in made.items()}


def _records(name: str, labels: np.ndarray) -> bytes:
    return np.concatenate([labels.astype(np.uint8), PIXELS[name]], axis=1).tobytes()


def place(tmp_path: Path, layout: str, form: str) -> Path:
    """The dataset as its archive, its extracted folder, or the folder around that."""
    if form == "archive":
        return make_tar(tmp_path / f"{layout}.tar.gz", files(layout), "w:gz")
    for name, data in files(layout).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path / layout if form == "folder" else tmp_path


LAYOUTS = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]


@pytest.mark.parametrize("form", ["archive", "folder", "around"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_labels_and_names(tmp_path: Path, layout: str, form: str) -> None:
    source = open_source(place(tmp_path, layout, form))
    assert (source.kind, source.splits()) == ("cifar", ["train", "test"])
    for split, batches in (("train", BATCHES if "10-" in layout else BATCHES[:1]), ("test", ["test"])):
        listing = source.listing(split)
        assert listing.classes == TEN
        assert listing.labels.tolist() == np.concatenate([LABELS[name] for name in batches]).tolist()
        expected = np.concatenate([PIXELS[name] for name in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        order = np.random.default_rng(1).permutation(len(listing))
        images = [decoded(data) for data in listing.reader.read(listing.items(order))]
        np.testing.assert_array_equal(np.stack(images), expected[order])
    key = listing.items(np.array([3]))[0].key
    assert key == ("00000003_test_s_000003" if layout.endswith(("py", "python")) else "00000003")


def test_bytes_without_a_letter(tmp_path: Path) -> None:
    """Python 3 writes them for Python 2 as a call of `bytes`, which gets no size to allocate."""
    folder = place(tmp_path, LAYOUTS[0], "folder")
    labels = LABELS["test"].tolist()
    (folder / "test_batch").write_bytes(_batch("test", labels=labels, batch_label=""))
    assert open_source(folder).listing("test").labels.tolist() == labels
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Sized()}, protocol=2))
    with pytest.raises(UserError, match=r"damaged batch file \(TypeError: .*_no_bytes"):
        open_source(folder).listing("test")


class Sized:
    def __reduce__(self) -> Any:
        return (bytes, (10**13,))


@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_coarse_labels(tmp_path: Path, layout: str) -> None:
    listing = open_source(place(tmp_path, layout, "archive"), PrepOptions(coarse_labels=True)).listing("test")
    assert (listing.classes, listing.labels.tolist()) == (FIVE, COARSE["test"].tolist())


def test_cifar_10_has_no_coarse_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no coarse labels"):
        open_source(place(tmp_path, LAYOUTS[0], "archive"), PrepOptions(coarse_labels=True))


class Intruder:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("intruder-was-here"), "x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Intruder()}, protocol=2), "damaged batch file .*it asks for"),
        (b"\x80\x02}q", "damaged batch file"),
        (_pickled(labels=[1]), "test_batch is not a CIFAR batch"),
        (_pickled(data=PIXELS["test"], labels=[1]), "12 images, but 1 labels"),
        (_batch("test", labels=[11] * ROWS), "label 11 in test, but there are 10 classes"),
    ],
)
def test_damaged_python_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = place(tmp_path, LAYOUTS[0], "folder")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(folder).listing("test")
    assert not Path("intruder-was-here").exists()


def test_damaged_binary_batch(tmp_path: Path) -> None:
    folder = place(tmp_path, LAYOUTS[1], "folder")
    (folder / "test_batch.bin").write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(UserError, match=r"test_batch\.bin has 6145 bytes, not a whole number of 3073-byte records"):
        open_source(folder).listing("test")


def test_a_truncated_archive(tmp_path: Path) -> None:
    path = place(tmp_path, LAYOUTS[0], "archive")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged archive"):
        open_source(path).listing("test")


def test_an_archive_without_a_batch(tmp_path: Path) -> None:
    kept = {name: data for name, data in files(LAYOUTS[0]).items() if not name.endswith("data_batch_3")}
    path = make_tar(tmp_path / "c.tar.gz", kept, "w:gz")
    assert tarfile.is_tarfile(path)
    with pytest.raises(UserError, match="data_batch_3 is missing in it"):
        open_source(path).listing("train")
