"""The stage runner: the same bytes every time, and what it refuses."""

from __future__ import annotations

import io
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.manifest import Manifest, load_index
from data_prep.options import PrepOptions
from data_prep.prepare import prepare, prepare_splits
from data_prep.progress import BarProgress, LineProgress
from data_prep.verify import verify
from tests.data_prep.helpers import TEXT, decoded, digests, encoded, image_of, make_folder, options, pixels, read_plain


def test_every_image_arrives_once_with_its_label(source: Path, tmp_path: Path) -> None:
    manifest = prepare(source, tmp_path / "out", options())
    out = tmp_path / "out" / "train"
    expected = {
        (f"{name}/{path.name}", path.read_bytes())
        for name in ("ant", "bee", "cat")
        for path in (source / name).iterdir()
    }
    names = sorted(name for name, _ in expected)
    samples = read_plain(out)
    assert len(samples) == manifest.num_samples == 15
    positions = [int(sample["__key__"][:8]) for sample in samples]
    assert {(names[p], image_of(s)) for p, s in zip(positions, samples, strict=True)} == expected
    assert all(
        manifest.classes[int(s["cls"])] == names[p].split("/")[0] for p, s in zip(positions, samples, strict=True)
    )
    assert positions != sorted(positions)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 4, 3]
    for shard in manifest.shards:
        data, index = (out / shard.file).read_bytes(), load_index(out, shard)
        for row in index:
            image = data[row["offset"] : row["offset"] + row["size"]]
            assert (names[int(row["key"][:8])], image) in expected
    assert Manifest.load(out) == manifest


@pytest.mark.parametrize("changes", [{}, {"resize": 20, "quality": 70}, {"shuffle": False}])
def test_workers_and_time_change_no_byte(source: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    (source / "ant" / "bad.jpg").write_bytes(TEXT)
    (source / "cat" / "cmyk.jpg").write_bytes(encoded(pixels(1), mode="CMYK"))
    prepare(source, tmp_path / "one", options(**changes))
    os.utime(source / "ant" / "bad.jpg", (1, 1))
    prepare(source, tmp_path / "three", options(**changes, workers=3))
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert len(digests(tmp_path / "one")) == 2 * 5 + 1


def test_options_and_contents_change_the_fingerprint(source: Path, tmp_path: Path) -> None:
    variants = [
        {},
        {"shuffle_seed": 1},
        {"shuffle": False},
        {"resize": 20},
        {"resize": 20, "quality": 50},
        {"shard_samples": 5},
    ]
    prints = [prepare(source, tmp_path / str(i), options(**v)).fingerprint() for i, v in enumerate(variants)]
    assert len(set(prints)) == len(variants)


def test_a_finished_directory_is_left_alone(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "out", options())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    text = io.StringIO()
    assert prepare(source, tmp_path / "out", options(), progress=LineProgress(text)) == first
    assert "complete already, nothing to do" in text.getvalue()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": 20}, "resize was None, is 20"),
        ({"shuffle_seed": 4}, "shuffle_seed was 0, is 4"),
        ({"shard_samples": 5, "quality": 80}, "quality was 90, is 80; shard_samples was 4, is 5"),
    ],
)
def test_other_options_are_refused(source: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    prepare(source, tmp_path / "out", options())
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        prepare(source, tmp_path / "out", options(**changes))
    assert "--overwrite" in str(caught.value)
    assert digests(tmp_path / "out") == before
    prepare(source, tmp_path / "out", options(**changes, overwrite=True))
    prepare(source, tmp_path / "new", options(**changes))
    assert digests(tmp_path / "out") == digests(tmp_path / "new")


def test_a_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", options())
    (source / "bee" / "new.jpg").write_bytes(encoded(pixels(9)))
    with pytest.raises(UserError, match="the source has changed since"):
        prepare(source, tmp_path / "out", options())
    other = make_folder(tmp_path / "other")
    with pytest.raises(UserError, match=r"from folder source"):
        prepare(other, tmp_path / "out", options())


@pytest.mark.parametrize("name", ["manifest.json", "something.tar", "train-000000.idx.npy"])
def test_a_directory_with_other_shards_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / name).write_bytes(TEXT)
    with pytest.raises(UserError, match=f"holds {name}"):
        prepare(source, tmp_path / "out", options())
    assert (tmp_path / "out" / "train" / name).read_bytes() == TEXT


def test_damaged_pieces_alone_are_made_again(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", options())
    out, before = tmp_path / "out" / "train", digests(tmp_path / "out")
    kept = (out / "train-000003.tar").stat().st_mtime_ns
    (out / "train-000000.tar").unlink()
    (out / "train-000001.idx.npy").write_bytes(TEXT)
    prepare(source, tmp_path / "out", options())
    assert digests(tmp_path / "out") == before
    _flip(out / "train-000002.tar", 600)
    prepare(source, tmp_path / "out", options())
    assert digests(tmp_path / "out") != before  # same size: only hashing notices
    prepare(source, tmp_path / "out", options(repair=True))
    assert digests(tmp_path / "out") == before
    assert (out / "train-000003.tar").stat().st_mtime_ns == kept
    (out / "manifest.json").write_text("{}")
    prepare(source, tmp_path / "out", options())
    assert digests(tmp_path / "out") == before


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_images(source: Path, tmp_path: Path, workers: int) -> None:
    for number in range(11):
        (source / "ant" / f"bad{number:02d}.jpg").write_bytes(TEXT)
    with pytest.raises(UserError, match="11 of 26 images bad, 10 tolerated") as caught:
        prepare(source, tmp_path / "out", options(workers=workers))
    assert all(f"ant/bad{number:02d}.jpg: not an image" in str(caught.value) for number in range(11))
    assert "--max-bad 11" in str(caught.value)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    made = (tmp_path / "out" / "train" / "train-000000.tar").stat().st_mtime_ns
    manifest = prepare(source, tmp_path / "out", options(max_bad=11))
    assert (manifest.num_samples, len(manifest.quarantine)) == (15, 11)
    assert (tmp_path / "out" / "train" / "train-000000.tar").stat().st_mtime_ns == made
    assert verify(tmp_path / "out") == []


def test_repairs_are_recorded_but_tolerated(source: Path, tmp_path: Path) -> None:
    (source / "ant" / "cmyk.jpg").write_bytes(encoded(pixels(1), mode="CMYK"))
    (source / "ant" / "png.JPEG").write_bytes(encoded(pixels(1), "PNG"))
    manifest = prepare(source, tmp_path / "out", options(max_bad=0))
    [bad] = manifest.quarantine
    assert (bad.source, bad.reason, bad.action) == ("ant/cmyk.jpg", "JPEG with CMYK pixels", "converted to RGB")
    samples = {sample["__key__"][9:]: sample for sample in read_plain(tmp_path / "out" / "train")}
    assert samples["png"]["png"] == encoded(pixels(1), "PNG")
    assert Image.open(io.BytesIO(samples["cmyk"]["jpg"])).mode == "RGB"


def test_dropped_images_move_no_other(source: Path, tmp_path: Path) -> None:
    """A shard of nothing but bad images disappears; the others stay byte for byte."""
    everything = prepare(source, tmp_path / "all", options(shuffle=False))
    for path in list((source / "ant").iterdir())[:4]:
        path.write_bytes(b"\0" * path.stat().st_size)
    fewer = prepare(source, tmp_path / "fewer", options(shuffle=False))
    assert (everything.num_samples, fewer.num_samples) == (15, 11)
    assert everything.shards[2:] == fewer.shards[-2:]
    for path in (source / "ant").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    gone = prepare(source, tmp_path / "gone", options(shuffle=False))
    assert [shard.file for shard in gone.shards] == [shard.file for shard in everything.shards[1:]]
    assert verify(tmp_path / "gone") == []


def test_no_usable_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "x.jpg").write_bytes(TEXT)
    with pytest.raises(UserError, match=r"none of the images is usable \(1 image\)"):
        prepare(tmp_path / "source", tmp_path / "out", options())


def test_resized_shards_hold_the_resized_pixels(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=2, size=80)
    prepare(source, tmp_path / "out", options(resize=30, quality=95))
    for sample in read_plain(tmp_path / "out" / "train"):
        name = sample["__key__"][9:12]
        original = Image.open(next(p for p in (source / name).iterdir() if p.name[4] == sample["__key__"][13]))
        expected = np.asarray(original.resize((40, 30), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(decoded(image_of(sample)) - expected).mean() < 3


def test_all_splits_and_some(tmp_path: Path) -> None:
    make_folder(tmp_path / "source" / "train")
    make_folder(tmp_path / "source" / "val", per_class=2)
    with pytest.raises(UserError, match="it has the splits train, val"):
        prepare(tmp_path / "source", tmp_path / "a", options())
    both = prepare_splits(tmp_path / "source", tmp_path / "a", options())
    assert {split: manifest.num_samples for split, manifest in both.items()} == {"train": 15, "val": 6}
    assert prepare(tmp_path / "source", tmp_path / "b", options(), split="val") == both["val"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["val"]
    with pytest.raises(UserError, match="no split 'test' in it; it has train, val"):
        prepare(tmp_path / "source", tmp_path / "b", options(), split="test")


def test_classes_that_a_split_has_no_image_of_are_told(tmp_path: Path) -> None:
    make_folder(tmp_path / "source" / "train", ("ant", "bee", "cat"))
    make_folder(tmp_path / "source" / "val", ("ant", "bee", *(f"other\x1b{n}" for n in range(6))), per_class=1)
    (tmp_path / "source" / "train" / "dog").mkdir()
    text = io.StringIO()
    made = prepare_splits(tmp_path / "source", tmp_path / "out", options(), progress=LineProgress(text))
    assert made["train"].num_classes == made["val"].num_classes == 10
    warned = [line.partition("; ")[0] for line in text.getvalue().splitlines() if "warning" in line]
    others = ", ".join(rf"other\x1b{n}" for n in range(4))
    assert warned == [
        f"train: warning: no images of 7 classes: dog, {others} and 2 more",
        "val: warning: no images of 2 classes: cat, dog",
    ]


@pytest.mark.parametrize(
    ("below", "doubt"),
    [
        (("Train/ant", "Train/bee", "Test/ant"), "all images of the class Test lie in folders in it, such as Test/ant"),
        (("training/ant", "dev/ant"), "all images of the class dev lie in folders in it, such as dev/ant"),
        (("all/train/ant", "all/val/ant"), "all images of the class all lie in folders in it, such as all/train"),
        (("one/train/ant", "two/val/ant"), "all images of the class one lie in folders in it, such as one/train"),
        (
            ("train/ant", "tset/ant", "x\x1b/a"),
            r"left out, being no split (train, val, validation, valid, test): tset, x\x1b",
        ),
        (("ant/images", "bee/images"), None),
        (("ant/2019", "ant/2020", "bee/2019", "bee/2020"), None),
        (
            ("train/ant/images", "val/ant/images"),
            "all images of the class ant lie in folders in it, such as ant/images",
        ),
        (("train/ant", "train/bee", "val/ant", "val/bee"), None),
        (("ant",), None),
    ],
)
def test_folders_that_look_like_other_folders_are_told(
    tmp_path: Path, below: tuple[str, ...], doubt: str | None
) -> None:
    make_folder(tmp_path / "source", below, per_class=1)
    text = io.StringIO()
    prepare_splits(tmp_path / "source", tmp_path / "out", options(), ["train"], LineProgress(text))
    warned = [line.partition("; ")[0] for line in text.getvalue().splitlines() if "warning" in line]
    assert warned == ([f"train: warning: {doubt}"] if doubt else [])


@pytest.mark.parametrize("split", ["../x", "", ".hidden"])
def test_split_names_stay_below_out(source: Path, tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        prepare_splits(source, tmp_path / "out", options(), [split])
    assert not (tmp_path / "out").exists()


def test_an_unnamed_source_takes_the_name_it_is_given(source: Path, tmp_path: Path) -> None:
    manifest = prepare(source, tmp_path / "out", options(), split="val2")
    assert (manifest.split, manifest.shards[0].file) == ("val2", "val2-000000.tar")
    assert manifest.options["shuffle_seed"] is None


def test_out_inside_the_source_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match="lies inside the class folders"):
        prepare(source, source / "shards", options())
    assert not (source / "shards").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "--workers is 0"),
        ({"shard_samples": 0}, "--shard-samples is 0"),
        ({"quality": 101}, "--quality is 101"),
        ({"max_bad": -1}, "--max-bad is -1"),
        ({"shuffle_seed": -1}, "--shuffle-seed is -1"),
    ],
)
def test_impossible_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrepOptions(**changes)


def test_an_unknown_format(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format zip: no such format; there are webdataset and ffcv"):
        prepare(source, tmp_path / "out", options(format="zip"))


def test_progress_lines(source: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    progress = LineProgress(text, seconds=0)
    prepare(source, tmp_path / "out", options(), progress=progress)
    lines = text.getvalue().splitlines()
    assert lines[0] == "train: listing source (folder)"
    assert lines[1] == "train: 15 images, 3 classes, 4 shards"
    assert lines[2].startswith("train: 1/15 images")
    assert " img/s" in lines[5]
    assert " left" in lines[5]
    assert lines[-1].startswith("train: 15/15 images")
    (tmp_path / "out" / "train" / "train-000001.tar").unlink()
    prepare(source, tmp_path / "out", options(), progress=progress)
    again = text.getvalue().splitlines()[len(lines) :]
    assert again[1] == "train: 15 images, 3 classes, 4 shards, 3 of them finished"
    assert again[2].startswith("train: 12/15 images")


@pytest.mark.parametrize(("reports", "told"), [([], ""), ([50], ", 25 img/s"), ([20, 30], ", 30 img/s")])
def test_the_rate_in_the_last_line(reports: list[int], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since the first report, but since the beginning where all was done by then."""
    now, text = [100.0], io.StringIO()
    monkeypatch.setattr("data_prep.progress.time.monotonic", lambda: now[0])
    with LineProgress(text).task("train", 50, 50 - sum(reports)) as advance:
        now[0] += 1
        for images in reports:
            advance(images)
        now[0] += 1
    assert text.getvalue() == f"train: 50/50 images{told}\n"


def test_the_bar_of_a_terminal(source: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    progress = BarProgress(text)
    progress.say("[not markup]")
    prepare(source, tmp_path / "out", options(), progress=progress)
    lines = text.getvalue().splitlines()
    assert lines[0] == "[not markup]"
    assert re.search(r"train .*15/15 .*img/s", lines[-1])


def test_a_listing_of_a_million_is_planned_in_seconds(tmp_path: Path) -> None:
    """ImageNet's size: what the parent does before the first image is read."""
    from data_prep.plan import make_plan
    from tests.data_prep.test_plan import listing

    table = listing(1_281_167, size=110_000)
    start = time.monotonic()
    plan = make_plan(table, "folder", "imagenet", "train", PrepOptions())
    items = table.items(plan.shards[0])
    assert (len(plan.shards), len(items)) == (1102, 1163)
    assert time.monotonic() - start < 10
