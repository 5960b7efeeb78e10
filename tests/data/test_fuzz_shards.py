"""Shards that are damaged or made to do harm: training and `rookery verify` say so, and open nothing elsewhere.

`ROOKERY_FUZZ_SEED` draws other damage.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.manifest import MANIFEST_NAME
from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from data_prep.verify import verify
from pipeline.data.augment.settings import AugmentConfig, MixConfig
from pipeline.data.augment.transforms import build_train_transform
from pipeline.data.loader import Failed, StepDataset
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from tests.data.fuzz_shards import CASES
from tests.data_prep.helpers import make_folder
from tests.fuzzing import SEED, bounded, opened_files, tree

# Damage drawn at random may hit pixels, or what nobody reads.
DRAWN = re.compile(r"tar: (flipped|zeroed) \d+$")
SILENT = {
    "index: another label",
    "index: key twice",
    "index: key that is not UTF-8",
    "index: key that leads up",
    "index: key without letters",
    "index: offset of another picture",
    "manifest: another hash",
    "manifest: shard named as the manifest",
    "manifest: label maps that are not there",
    "manifest: no samples",
    "tar: picture named up",
    "tar: picture of an absolute name",
    "tar: label as a word",
    "tar: label of 30 digits",
    "tar: label of another",
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of nine samples."""
    print(f"ROOKERY_FUZZ_SEED={SEED}")
    top = tmp_path_factory.mktemp("whole")
    source = make_folder(top / "source", per_class=12)
    prepare_splits(source, top / "out", PrepOptions(workers=1, shard_samples=9))
    return top / "out" / "train"


def train_on(split: Path, check_files: bool) -> tuple[str, int]:
    """What training says that can't go on, else nothing; and how many bad samples it replaced."""
    try:
        shards = ShardSet(split, check_files=check_files)
        sizes = tuple(shard.samples for shard in shards.manifest.shards)
        order = DataOrder(sizes, seed=0, batch=6, lanes=2, window=9)
        transform = build_train_transform(AugmentConfig(normalize="half"), 16, 3)
        dataset = StepDataset(shards, order, transform, MixConfig(), 16, 3, 1, 0, 1, replace_bad=True)
        replaced = 0
        for step in range(order.steps_per_epoch):
            batch = dataset[step]
            if isinstance(batch, Failed):
                return batch.message, replaced
            assert batch.labels.min() >= 0 and batch.labels.max() < shards.manifest.num_classes
            assert batch.images.isfinite().all()
            replaced += len(batch.replaced or ())
            shards.keys(batch.samples.tolist())
        shards.close()
    except UserError as error:
        return str(error), 0
    return "", replaced


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", CASES)
def test_shards(name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.data.substitute._PAUSES", (0.0, 0.0))
    split = tmp_path / "train"
    shutil.copytree(whole, split)
    (tmp_path / "outside").mkdir()
    CASES[name](split)
    before = tree(tmp_path, without=tmp_path / "none")
    with bounded(), opened_files() as opened:
        try:
            problems = verify(split, workers=1)
        except UserError as error:
            problems = [str(error)]
        said = [train_on(split, check_files) for check_files in (True, False)]
    assert tree(tmp_path, without=tmp_path / "none") == before
    elsewhere = [
        path for path in opened if Path(path).is_relative_to(tmp_path) and not Path(path).is_relative_to(split)
    ]
    assert not elsewhere
    assert problems, "verify finds everything"
    for message, _ in said:
        assert "\0" not in message
    # Of what only its hash tells, and verify alone, training knows nothing.
    heard = any(message or replaced for message, replaced in said)
    assert heard or DRAWN.search(name) or name in SILENT


@pytest.mark.parametrize(
    "name", ["manifest: shard above", "index: offset of 2^64 - 1", f"file: {MANIFEST_NAME} is a pipe"]
)
def test_command(name: str, whole: Path, tmp_path: Path) -> None:
    split = tmp_path / "train"
    shutil.copytree(whole, split)
    (tmp_path / "outside").mkdir()
    CASES[name](split)
    command = [sys.executable, "-c", "from launch.cli import app; app()", "verify", split]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "`rookery prep`" in done.stdout, done
