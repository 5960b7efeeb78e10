"""The ffcv package itself opens our shards: same pixels, same labels, and our order if it is asked for it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import beton
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from pipeline.data.fast.decode import decode_image
from pipeline.data.ffcv_order import ffcv_indices
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from tests.conftest import missing
from tests.data_prep.helpers import make_folder

pytestmark = pytest.mark.ffcv
SAMPLES = 48
MODES = ("jpg", "raw", "proportion")
ORDER = DataOrder((SAMPLES,), seed=7, batch=8, lanes=2, window=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one size, each in a class of its own so that the label tells the sample; one file per write mode."""
    folder = tmp_path_factory.mktemp("ffcv")
    source = make_folder(folder / "source", [f"{number:02d}" for number in range(SAMPLES)], per_class=1, size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton, "PAGE", 4096)  # several pages to a file, and pages that grow: a raw image has 9,216 bytes
        for mode in MODES:
            options = PrepOptions(format="ffcv", write_mode=mode, shard_samples=SAMPLES, workers=1)
            prepare(source, folder / mode, options)
    return folder


def file(folder: Path, mode: str) -> Path:
    return folder / mode / "train" / "train-000000.beton"


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, np.ndarray]:
    """What `plain_ffcv.py` got: (batches, batch, ...) images and labels of each file."""
    if importlib.util.find_spec("ffcv") is None:
        missing("plain FFCV left out: pip install 'rookery[ffcv]' needs libopencv-dev and libturbojpeg0-dev")
    everything: dict[str, Any] = {"batch": 8, "epochs": [None], "os_cache": True}
    epochs = [ffcv_indices(ORDER, 3, rank=1, world_size=2, first=2), ffcv_indices(ORDER, 4, rank=1, world_size=2)]
    in_order = {"batch": 4, "epochs": [indices.tolist() for indices in epochs]}
    images = sorted(str(path) for path in (folder / "source").rglob("*.jpg"))
    jobs = {
        "write": {"file": str(folder / "theirs.beton"), "images": images, "labels": [*range(48)], "page_size": 2**21},
        "load": {
            "jpg": everything | {"file": str(file(folder, "jpg"))},
            "raw": everything | {"file": str(file(folder, "raw")), "os_cache": False},
            "proportion": everything | in_order | {"file": str(file(folder, "proportion")), "os_cache": False},
        },
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [sys.executable, "-m", "tests.data.plain_ffcv", folder / "jobs.json", folder / "out.npz"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_every_pixel_and_label(folder: Path, plain: dict[str, np.ndarray], mode: str) -> None:
    samples = list(ShardSet(folder / mode / "train").read(range(SAMPLES)))
    expected = np.stack([np.asarray(decode_image(sample.data, 3, sample.shape)) for sample in samples]).astype(int)
    images = plain[f"{mode}.images"].reshape(expected.shape)
    assert plain[f"{mode}.labels"].ravel().tolist() == [sample.label for sample in samples]
    if mode == "raw":
        assert (images == expected).all()
    else:  # FFCV decodes with libjpeg's fast transform, Pillow with the exact one
        assert np.abs(images - expected).max() <= 4
        assert np.abs(images - expected).mean() < 1.5


def test_our_order(folder: Path, plain: dict[str, np.ndarray]) -> None:
    """Process 1 of 2 from the third step of one epoch to the end of the next: the keys of a batch are our step's."""
    shards = ShardSet(folder / "proportion" / "train")
    key_of = {sample.label: sample.key for sample in shards.read(range(SAMPLES))}
    assert len(key_of) == SAMPLES
    batches = plain["proportion.labels"]
    steps = range(3 * ORDER.steps_per_epoch + 2, 5 * ORDER.steps_per_epoch)
    assert len(batches) == len(steps) == 4 + 6
    for step, labels in zip(steps, batches, strict=True):
        assert [key_of[label] for label in labels.tolist()] == shards.keys(ORDER.step(step, 1, 2).samples)


def test_both_writers_agree(folder: Path, plain: dict[str, np.ndarray]) -> None:
    """Headers, rows and images of FFCV's own writer are those of ours, but for where the images start."""
    theirs, ours = (path.read_bytes() for path in (folder / "theirs.beton", file(folder, "raw")))
    assert plain  # it was written along with the reading
    heads = [np.frombuffer(data, beton.HEADER, 1)[0] for data in (theirs, ours)]
    assert all(heads[0][name] == heads[1][name] for name in ("version", "num_fields", "num_samples"))
    assert theirs[beton.HEADER.itemsize : beton.ROWS_START] == ours[beton.HEADER.itemsize : beton.ROWS_START]
    found = []
    for data in (theirs, ours):
        rows = np.frombuffer(data, beton.ROW, SAMPLES, beton.ROWS_START)
        images = [data[at : at + 9216] for at in rows["image"]["data_ptr"].tolist()]
        head = rows["image"][["mode", "width", "height"]].tolist()
        found.append(sorted(zip(rows["label"].tolist(), head, images, strict=True)))
    assert found[0] == found[1]
    with open(folder / "theirs.beton", "rb") as stream:
        index = beton.scan(stream.fileno())
    assert index["label"].tolist() == list(range(SAMPLES)) and set(index["size"].tolist()) == {9216}


def test_our_description_is_theirs(plain: dict[str, np.ndarray]) -> None:
    theirs = json.loads(str(plain["layout"]))
    ours = (beton.HEADER, beton.FIELD, beton.ALLOCATION, beton.IMAGE, beton.ROW)
    assert theirs["types"] == [[[kind.fields[n][1] for n in kind.names], kind.itemsize] for kind in ours]
    assert (theirs["version"], theirs["fields"]) == (beton.VERSION, beton.FIELDS["type_id"].tolist())
