"""All 60,000 real CIFAR-10 images: parquet to shards and back through plain `webdataset`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.options import PrepOptions
from data_prep.prepare import prepare, prepare_splits
from data_prep.verify import verify
from tests.data_prep.helpers import digests, read_plain


def test_cifar_parquet(real_data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    source = real_data / "cifar10"
    manifests = prepare_splits(source, tmp_path / "two", PrepOptions(workers=2))
    assert {split: manifest.num_samples for split, manifest in manifests.items()} == {"train": 50_000, "test": 10_000}
    assert all(not manifest.quarantine and len(manifest.shards) == 16 for manifest in manifests.values())
    assert verify(tmp_path / "two") == []
    for split, manifest in manifests.items():
        table = pq.read_table(source / f"{split}.parquet")
        images = table.column("img").combine_chunks().field("bytes")
        labels = table.column("label").to_numpy()
        assert manifest.classes == [str(label) for label in range(10)]
        seen = np.zeros(len(labels), dtype=int)
        for sample in read_plain(tmp_path / "two" / split):
            row = int(sample["__key__"][:8])
            seen[row] += 1
            original = images[row].as_py()
            assert sample["jpg"] == original
            assert int(sample["cls"]) == labels[row]
            stored, source_pixels = (np.asarray(Image.open(io.BytesIO(data))) for data in (sample["jpg"], original))
            assert stored.shape == (32, 32, 3) and np.array_equal(stored, source_pixels)
        assert (seen == 1).all()
    prepare(source, tmp_path / "one", PrepOptions(workers=1), split="test")
    assert digests(tmp_path / "one" / "test") == digests(tmp_path / "two" / "test")
