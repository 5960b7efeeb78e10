"""Dense label maps: found by the image's path, checked, stored beside it, and found again without a scan."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_prep.errors import UserError
from data_prep.images import UnusableImage
from data_prep.manifest import Manifest, TokenLabels, load_index, token_labels_offset
from data_prep.prepare import prepare, prepare_splits
from data_prep.sources.base import Item
from data_prep.token_labels import TokenMaps, map_file
from data_prep.verify import verify
from launch import cli
from tests.data_prep.helpers import digests, encoded, make_folder, make_tar, options, pixels, read_plain, tar_bytes
from tests.data_prep.label_maps import SHAPE, label_map, make_maps


@pytest.fixture
def maps(source: Path, tmp_path: Path) -> Path:
    return make_maps(tmp_path / "maps", source)


def stored(out: Path) -> dict[str, np.ndarray]:
    """The map of every key, read as a trainer does: index, computed place, one positioned read."""
    manifest = Manifest.load(out)
    labels = manifest.token_labels
    assert labels is not None
    found = {}
    for shard in manifest.shards:
        with open(out / shard.file, "rb") as file:
            for row in load_index(out, shard):
                start = token_labels_offset(int(row["offset"]), int(row["size"]))
                data = os.pread(file.fileno(), labels.bytes, start)
                found[row["key"].decode()] = np.load(io.BytesIO(data))
    return found


def test_every_image_gets_its_own_map(source: Path, maps: Path, tmp_path: Path) -> None:
    manifest = prepare(source, tmp_path / "out", options(token_labels=maps))
    assert manifest.token_labels == TokenLabels(SHAPE, "float16", 128 + 2 * 3 * 4 * 5 * 2)
    assert manifest.options["token_labels"]["maps"] == "maps"
    found = stored(tmp_path / "out" / "train")
    expected = {
        key: label_map(number).numpy()
        for number, image in enumerate(sorted(source.rglob("*.jpg")))
        for key in found
        if key.endswith(image.stem.replace(" ", "_").replace(".", "_"))
    }
    assert found.keys() == expected.keys() and len(found) == 15
    for key, values in expected.items():
        assert found[key].dtype == np.float16 and np.array_equal(found[key], values)
    assert verify(tmp_path / "out") == []


def test_plain_webdataset_decodes_it(source: Path, maps: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", options(token_labels=maps))
    found = stored(tmp_path / "out" / "train")
    samples = read_plain(tmp_path / "out" / "train", "pil")
    assert len(samples) == 15
    for sample in samples:
        assert np.array_equal(sample["tokens.npy"], found[sample["__key__"]])
        assert sample["jpg"].size == (40, 30) and 0 <= sample["cls"] < 3


def test_the_same_bytes_whatever_the_workers(source: Path, maps: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(source, tmp_path / str(workers), options(token_labels=maps, workers=workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    prepare(source, tmp_path / "without", options())
    assert "token_labels" not in Manifest.load(tmp_path / "without" / "train").options
    assert Manifest.load(tmp_path / "without" / "train").token_labels is None


def test_only_training_splits_have_maps(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in ("train", "val"):
        make_folder(images / split, classes=("ant", "bee"), per_class=2)
    maps = make_maps(tmp_path / "maps", images / "train")
    for path in maps.rglob("*.pt"):
        torch.save(label_map(0, classes=2, shape=(2, 2, 4, 5)), path)
    manifests = prepare_splits(images, tmp_path / "out", options(token_labels=maps))
    assert manifests["train"].token_labels == TokenLabels((2, 2, 4, 5), "float16", 128 + 160)
    assert manifests["val"].token_labels is None
    assert verify(tmp_path / "out") == []
    with pytest.raises(UserError, match=r"label maps are for splits named train\*, .* none in val; leave it out"):
        prepare_splits(images, tmp_path / "other", options(token_labels=maps), ["val"])


def test_maps_of_the_official_archive_and_of_sources_without_names(tmp_path: Path) -> None:
    jpeg = encoded(pixels(0))
    tars = {
        "n00000002.tar": tar_bytes({"n00000002_7.JPEG": jpeg}),
        "n00000001.tar": tar_bytes({"n00000001_5.JPEG": jpeg}),
    }
    archive = make_tar(tmp_path / "ILSVRC2012_img_train.tar", tars)
    for number, name in enumerate(("n00000001/n00000001_5.pt", "n00000002/n00000002_7.pt")):
        (tmp_path / "maps" / name).parent.mkdir(parents=True)
        torch.save(label_map(number, classes=2, shape=(2, 1, 3, 3)), tmp_path / "maps" / name)
    prepare(archive, tmp_path / "out", options(token_labels=tmp_path / "maps"))
    found = stored(tmp_path / "out" / "train")
    for number, key in enumerate(("00000000_n00000001_5", "00000001_n00000002_7")):
        assert np.array_equal(found[key], label_map(number, classes=2, shape=(2, 1, 3, 3)).numpy())

    unnamed = Item("load_digits#3", "00000003", 2, (3,))
    assert map_file(["zero", "one", "two"], unnamed) == "two/00000003.pt"


def save(value: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def twice() -> torch.Tensor:
    values = label_map(0)
    values[1, 0] = values[1, 1]
    return values


BAD_MAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "no token-label map: .*/bee/bee 2.pt is missing"),
    "empty": (lambda path: path.write_bytes(b""), r"unreadable token-label map bee 2.pt \("),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-200]), r"unreadable token-label map bee 2.pt \("),
    "no tensor": (save([1, 2]), "holds list, not a tensor"),
    "code": (save(Path("x")), r"unreadable token-label map bee 2.pt \(it holds more than tensors\)$"),
    "flat": (save(label_map(0)[0]), r"has shape \(3, 4, 5\) and type float16, not \(2, k, rows, columns\)"),
    "whole numbers": (save(label_map(0).int()), r"and type int32, not .* float16 or float32"),
    "another grid": (save(label_map(0)[..., :4]), r"shape \(2, 3, 4, 4\) and type float16, the others have"),
    "another type": (save(label_map(0).float()), "and type float32, the others have"),
    "class 3 of 3": (save(label_map(0) + 1), "class 1 to .*, there are 3 classes"),
    "class 0.5": (save(label_map(0) * 0.5), r"with class \d\.5, which is no whole number; it has k logits first"),
    "infinite": (save(label_map(0) / 0), "with NaN or infinite values"),
    "a class twice": (save(twice()), "names a class twice in one cell"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_an_image_without_a_good_map_is_quarantined(name: str, source: Path, maps: Path, tmp_path: Path) -> None:
    do, reason = BAD_MAPS[name]
    do(maps / "bee" / "bee 2.pt")
    manifest = prepare(source, tmp_path / "out", options(token_labels=maps))
    [bad] = manifest.quarantine
    assert bad.source == "bee/bee 2.v1.jpg" and bad.action == "dropped"
    assert re.search(reason, bad.reason), bad.reason
    assert manifest.num_samples == 14 and verify(tmp_path / "out") == []
    with pytest.raises(UserError, match=r"1 of 15 images"):
        prepare(source, tmp_path / "strict", options(token_labels=maps, max_bad=0))


@pytest.mark.parametrize(
    ("directory", "said"),
    [
        ("nowhere", "--token-labels .*nowhere: no such directory"),
        ("empty", "none of 15 images looked at has a usable map; the first: .*empty/ant/ant 0.pt: no token-label map"),
    ],
)
def test_a_wrong_directory_is_noticed_before_any_work(directory: str, said: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        prepare(source, tmp_path / "out", options(token_labels=tmp_path / directory))
    assert not (tmp_path / "out").exists()


def test_shards_with_and_without_maps_are_not_mixed(source: Path, maps: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "with", options(token_labels=maps))
    prepare(source, tmp_path / "without", options())
    with pytest.raises(UserError, match=r"made otherwise \(token_labels was {.*'maps': 'maps'.*}, is None\)"):
        prepare(source, tmp_path / "with", options())
    with pytest.raises(UserError, match=r"made otherwise \(token_labels was None, is {"):
        prepare(source, tmp_path / "without", options(token_labels=maps))


def test_verify_finds_a_map_out_of_place(source: Path, maps: Path, tmp_path: Path) -> None:
    """A manifest that says another size than the members have, with all hashes right."""
    prepare(source, tmp_path / "out", options(token_labels=maps))
    out = tmp_path / "out" / "train"
    manifest = Manifest.load(out)
    manifest.options["token_labels"]["bytes"] += 1
    manifest.save(out)
    problems = verify(out)
    assert len(problems) == len(manifest.shards) and all("is followed by Member" in p.what for p in problems)


def test_the_command_s_option(source: Path, maps: Path, tmp_path: Path) -> None:
    arguments = ["prep", str(source), str(tmp_path / "out"), "--token-labels", str(maps), "--workers", "1"]
    done = CliRunner().invoke(cli._commands, arguments)
    assert done.exit_code == 0, done.output
    labels = Manifest.load(tmp_path / "out" / "train").token_labels
    assert labels is not None and labels.shape == SHAPE


@pytest.mark.parametrize("name", ["../elsewhere", "{elsewhere}"])
def test_no_map_is_read_outside_the_folder(name: str, maps: Path, tmp_path: Path) -> None:
    """Names of classes come from the source."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(maps / "ant", elsewhere)
    classes = ["ant", name.format(elsewhere=elsewhere), "cat"]
    own, other = (Item("x", "k", label, (), "ant 0") for label in (0, 1))
    reader = TokenMaps(maps, classes, SHAPE, "float16")
    assert len(reader.read(own)) > 100
    with pytest.raises(UnusableImage, match="would lie elsewhere"):
        reader.read(other)
