"""All 60,000 real CIFAR-10 images: parquet to shards and back through plain `webdataset`, and kills on the way."""

from __future__ import annotations

import io
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.manifest import Manifest
from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from data_prep.verify import verify
from tests.data_prep.helpers import digests, kill, read_plain, wait_for
from tests.train.commands import command, environment

SIZES = {"train": 50_000, "test": 10_000}


@pytest.fixture(scope="module")
def prepared(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Manifest]]:
    """Shards made by two workers, and their manifests."""
    out = tmp_path_factory.mktemp("cifar10") / "two"
    return out, prepare_splits(str(real_data / "cifar10"), out, PrepOptions(workers=2))


def test_every_image_comes_back(real_data: Path, prepared: tuple[Path, dict[str, Manifest]]) -> None:
    import pyarrow.parquet as pq

    out, manifests = prepared
    assert {split: manifest.num_samples for split, manifest in manifests.items()} == SIZES
    assert all(not manifest.quarantine and len(manifest.shards) == 16 for manifest in manifests.values())
    assert verify(out) == []
    for split, manifest in manifests.items():
        table = pq.read_table(real_data / "cifar10" / f"{split}.parquet")
        images = table.column("img").combine_chunks().field("bytes")
        labels = table.column("label").to_numpy()
        assert manifest.classes == [str(label) for label in range(10)]
        seen = np.zeros(len(labels), dtype=int)
        for sample in read_plain(out / split):
            row = int(sample["__key__"][:8])
            seen[row] += 1
            original = images[row].as_py()
            assert sample["jpg"] == original
            assert int(sample["cls"]) == labels[row]
            stored, source_pixels = (np.asarray(Image.open(io.BytesIO(data))) for data in (sample["jpg"], original))
            assert stored.shape == (32, 32, 3) and np.array_equal(stored, source_pixels)
        assert (seen == 1).all()


@pytest.mark.chaos
def test_one_worker_killed_twenty_times(
    real_data: Path, prepared: tuple[Path, dict[str, Manifest]], tmp_path: Path
) -> None:
    """The same bytes as two workers made undisturbed; the command is killed alone and with its group, in turn."""
    expected = digests(prepared[0])
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    kills, rounds = 0, 0
    while kills < 20:
        out = tmp_path / f"out{rounds}"
        arguments = ("prep", real_data / "cifar10", out, "--workers", 1)
        process = subprocess.Popen(
            command(*arguments), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
        )
        wait_for(out / "train" / ".prep" / "plan.json", process)
        time.sleep(draw.uniform(0, 0.8))
        kills += kill(process, whole_group=kills % 2 == 0)
        if all((out / split / "manifest.json").exists() for split in SIZES):
            assert digests(out) == expected, f"seed {seed}, {kills} kills"
            rounds += 1
    subprocess.run(command(*arguments), env=environment(), check=True)
    assert digests(out) == expected, f"seed {seed}"
