"""The official ImageNet archives, rebuilt small: a tar of tars, the val tar, and the development kit."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.options import PrepOptions
from data_prep.prepare import prepare, prepare_splits
from data_prep.sources import open_source
from data_prep.verify import verify
from tests.data_prep.helpers import TEXT, encoded, image_of, make_tar, pixels, read_plain, tar_bytes

WNIDS = ["n01440764", "n01443537", "n02091134", "n15075141"]
# The devkit numbers the classes in an order of its own, and inner nodes of the hierarchy after them.
ILSVRC_IDS = {"n02091134": 1, "n15075141": 2, "n01440764": 3, "n01443537": 4, "n00001740": 5}
TRUTH = [2, 4, 1, 3, 1, 1, 2]


def train_tar(path: Path, per_class: int = 3) -> Path:
    tars = {}
    for label, wnid in enumerate(reversed(WNIDS)):
        images = {f"{wnid}_{n}.JPEG": encoded(pixels(10 * label + n)) for n in range(per_class)}
        tars[f"{wnid}.tar"] = tar_bytes(images)
    return make_tar(path, tars)


def val_tar(path: Path, count: int = len(TRUTH)) -> Path:
    order = np.random.default_rng(0).permutation(count) + 1
    return make_tar(path, {f"ILSVRC2012_val_{n:08d}.JPEG": encoded(pixels(1000 + int(n))) for n in order})


def devkit(folder: Path, archive: bool, truth: list[int] = TRUTH) -> Path:
    """`ILSVRC2012_devkit_t12` with the two files that matter, meta.mat as MATLAB's struct array `synsets`."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("children", "O")]
    synsets = np.empty((len(ILSVRC_IDS), 1), dtype=fields)
    for row, (wnid, number) in enumerate(ILSVRC_IDS.items()):
        inner = wnid == "n00001740"
        synsets[row, 0] = (float(number), wnid, f"words of {wnid}", 4.0 if inner else 0.0, [1.0] if inner else [])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    files = {
        "ILSVRC2012_devkit_t12/readme.txt": TEXT,
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }
    if archive:
        return make_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", files, "w:gz")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / "ILSVRC2012_devkit_t12"


def test_the_train_tar_is_read_in_place(tmp_path: Path) -> None:
    path = train_tar(tmp_path / "any name.tar")
    source = open_source(path)
    listing = source.listing("train")
    assert (source.kind, source.splits()) == ("ilsvrc", ["train"])
    assert listing.classes == WNIDS
    assert listing.labels.tolist() == [label for label in range(4) for _ in range(3)]
    assert listing.names[4] == "n01443537.tar!n01443537_1.JPEG"
    assert listing.items(np.array([4]))[0].key == "00000004_n01443537_1"
    images = list(listing.reader.read(listing.items(np.array([4, 0]))))
    assert images == [encoded(pixels(21)), encoded(pixels(30))]


@pytest.mark.parametrize("archive", [True, False])
def test_val_labels_are_positions_in_the_sorted_wordnet_ids(tmp_path: Path, archive: bool) -> None:
    wnid_of = {number: wnid for wnid, number in ILSVRC_IDS.items()}
    options = PrepOptions(devkit=devkit(tmp_path / "elsewhere" if not archive else tmp_path, archive))
    listing = open_source(val_tar(tmp_path / "val.tar"), options).listing("val")
    assert listing.classes == WNIDS
    assert [WNIDS[label] for label in listing.labels] == [wnid_of[number] for number in TRUTH]
    assert list(listing.reader.read(listing.items(np.arange(7)))) == [encoded(pixels(1001 + n)) for n in range(7)]


def test_a_folder_with_all_three(tmp_path: Path) -> None:
    source_folder = tmp_path / "imagenet"
    source_folder.mkdir()
    train_tar(source_folder / "ILSVRC2012_img_train.tar")
    val_tar(source_folder / "ILSVRC2012_img_val.tar")
    devkit(source_folder, archive=True)
    manifests = prepare_splits(source_folder, tmp_path / "out", PrepOptions(workers=1))
    assert {split: manifest.num_samples for split, manifest in manifests.items()} == {"train": 12, "val": 7}
    assert manifests["train"].classes == manifests["val"].classes == WNIDS


def test_val_without_a_devkit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name it with --devkit ILSVRC2012_devkit_t12\.tar\.gz"):
        open_source(val_tar(tmp_path / "val.tar")).listing("val")


@pytest.mark.parametrize(
    ("count", "truth", "message"),
    [(6, TRUTH, "6 images, but .* holds 7 labels"), (7, [9] * 7, "not a readable development kit")],
)
def test_a_devkit_of_another_release(tmp_path: Path, count: int, truth: list[int], message: str) -> None:
    options = PrepOptions(devkit=devkit(tmp_path, True, truth))
    with pytest.raises(UserError, match=message):
        open_source(val_tar(tmp_path / "val.tar", count), options).listing("val")


def test_a_wrong_devkit(tmp_path: Path) -> None:
    options = PrepOptions(devkit=make_tar(tmp_path / "kit.tar.gz", {"data/other.txt": TEXT}, "w:gz"))
    with pytest.raises(UserError, match=r"no data/ILSVRC2012_validation_ground_truth\.txt in it"):
        open_source(val_tar(tmp_path / "val.tar"), options).listing("val")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95, 0.99])
def test_a_truncated_archive(tmp_path: Path, keep: float) -> None:
    path = train_tar(tmp_path / "train.tar")
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    path.write_bytes(data[: int(end * keep)])
    with pytest.raises(UserError, match=r"train\.tar: .*truncated.*fetch the archive again"):
        open_source(path, PrepOptions(kind="ilsvrc")).listing("train")


def test_a_damaged_class_tar_is_named(tmp_path: Path) -> None:
    good = tar_bytes({"n01440764_1.JPEG": encoded(pixels(1))})
    path = make_tar(tmp_path / "t.tar", {"n01440764.tar": good, "n01443537.tar": good[:700] + b"x" * 1024})
    with pytest.raises(UserError, match=r"n01443537\.tar: truncated|n01443537\.tar: damaged header"):
        open_source(path).listing("train")


def test_long_and_pax_names(tmp_path: Path) -> None:
    """A rebuilt archive may use GNU or pax extensions for names over 100 bytes."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = f"{'deep/' * 30}n01440764_ü.JPEG"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            info = tarfile.TarInfo(name)
            info.size = len(TEXT)
            archive.addfile(info, io.BytesIO(TEXT))
        path = make_tar(tmp_path / "t.tar", {"n01440764.tar": buffer.getvalue()})
        listing = open_source(path).listing("train")
        assert listing.names == [f"n01440764.tar!{name}"]
        assert list(listing.reader.read(listing.items(np.array([0])))) == [TEXT]


def add_bad_files(tars: dict[str, dict[str, bytes]]) -> None:
    """One truncated image, one of zero bytes and one text, into three of the class tars."""
    first, second, third, *_ = tars
    whole = next(iter(tars[first].values()))
    tars[first]["bad_truncated.JPEG"] = whole[: len(whole) * 2 // 3]
    tars[second]["bad_empty.JPEG"] = b""
    tars[third]["bad_text.JPEG"] = TEXT


@pytest.mark.parametrize("real", [False, True], ids=["made", "imagenet-sample"])
def test_bad_images_go_to_quarantine(tmp_path: Path, real: bool, request: pytest.FixtureRequest) -> None:
    tars: dict[str, dict[str, bytes]] = {}
    if real:
        for folder in sorted((request.getfixturevalue("real_data") / "imagenet-sample").iterdir()):
            tars[folder.name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    else:
        for label, wnid in enumerate(WNIDS):
            tars[wnid] = {f"{wnid}_{n}.JPEG": encoded(pixels(10 * label + n)) for n in range(5)}
    good = {(wnid, data) for wnid, images in tars.items() for data in images.values()}
    add_bad_files(tars)
    path = make_tar(tmp_path / "train.tar", {f"{wnid}.tar": tar_bytes(images) for wnid, images in tars.items()})
    manifest = prepare(path, tmp_path / "out", PrepOptions(workers=2))
    assert manifest.num_samples == len(good) == (500 if real else 20)
    reasons = {re.sub(r".*!", "", bad.source): bad.reason for bad in manifest.quarantine}
    assert reasons.pop("bad_truncated.JPEG").startswith("truncated")
    assert reasons == {
        "bad_empty.JPEG": "zero bytes",
        "bad_text.JPEG": "not an image (JPEG, PNG, WEBP, GIF, BMP, TIFF)",
    }
    assert {bad.action for bad in manifest.quarantine} == {"dropped"}
    samples = read_plain(tmp_path / "out" / "train")
    assert {(manifest.classes[int(s["cls"])], image_of(s)) for s in samples} == good
    assert verify(tmp_path / "out") == []


def test_stray_files_beside_the_class_tars_are_recorded(tmp_path: Path) -> None:
    tars = {"n01440764.tar": tar_bytes({"a.JPEG": encoded(pixels(1))}), "notes.txt": TEXT}
    manifest = prepare(make_tar(tmp_path / "t.tar", tars), tmp_path / "out", PrepOptions(workers=1))
    assert manifest.num_samples == 1
    [bad] = manifest.quarantine
    assert (bad.source, bad.reason, bad.action) == ("t.tar!notes.txt", "not the tar of a class", "dropped")
