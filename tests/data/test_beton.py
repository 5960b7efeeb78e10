"""Training and evaluation get from FFCV shards what they get from WebDataset shards of the same images."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import beton
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from pipeline.data.augment.settings import (
    AugmentConfig,
    EvalTransformConfig,
    MixConfig,
    RandAugmentConfig,
    RandomErasingConfig,
)
from pipeline.data.augment.transforms import build_eval_transform, build_train_transform
from pipeline.data.fast.decode import decode_image
from pipeline.data.ffcv_order import ffcv_indices
from pipeline.data.loader import EvalDataset, StepDataset
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from tests.data.test_loader import assert_equal
from tests.data_prep.helpers import encoded, pixels

# Nothing here needs torchvision or timm, whose imports would take longer than all of these tests.
AUGMENT = AugmentConfig(
    normalize="half", rand_augment=RandAugmentConfig(policy="nest"), random_erasing=RandomErasingConfig(prob=0.5)
)
EVAL = EvalTransformConfig(interpolation="bilinear", antialias=False)
MIX = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode="sample")
MODES = ("jpg", "raw", "proportion")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 JPEGs, colour and greyscale, in four classes, as shards of 25: `webdataset`, `jpg`, `raw`, `proportion`."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(120):
        path = folder / "source" / f"class {number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (48 + number % 7, 40 + number % 5)
        path.write_bytes(encoded(pixels(number, *size, channels=1 if number % 6 == 0 else 3)))
    prepare(folder / "source", folder / "webdataset", PrepOptions(shard_samples=25, workers=1))
    for mode in MODES:
        options = PrepOptions(format="ffcv", write_mode=mode, shard_samples=25, workers=1)
        prepare(folder / "source", folder / mode, options)
    return folder


def training(split: Path, in_chans: int = 3, rank: int = 0, world_size: int = 1) -> StepDataset:
    shards = ShardSet(split)
    sizes = tuple(shard.samples for shard in shards.manifest.shards)
    order = DataOrder(sizes, seed=3, batch=16, lanes=4, window=16)
    transform = build_train_transform(AUGMENT, img_size=32, in_chans=in_chans)
    return StepDataset(shards, order, transform, MIX, 32, in_chans, drop_paths=3, rank=rank, world_size=world_size)


def evaluation(split: Path, in_chans: int = 3) -> EvalDataset:
    transform = build_eval_transform(EVAL, AUGMENT, 32, in_chans)
    return EvalDataset(ShardSet(split), transform, in_chans, 24, rank=1, world_size=2)


def test_the_same_bytes_and_pixels(photos: Path) -> None:
    tars = list(ShardSet(photos / "webdataset" / "train").read(range(120)))
    assert list(ShardSet(photos / "jpg" / "train").read(range(120))) == tars
    kinds = set()
    for mode in ("raw", "proportion"):
        samples = ShardSet(photos / mode / "train").read(range(120))
        for sample, tar in zip(samples, tars, strict=True):
            kinds.add((mode, sample.shape is None))
            assert (sample.key, sample.label) == (tar.key, tar.label)
            assert sample.data == tar.data or sample.shape is not None
            for in_chans in (1, 3):
                image, expected = decode_image(sample.data, in_chans, sample.shape), decode_image(tar.data, in_chans)
                assert (image.mode, image.size) == (expected.mode, expected.size)
                assert image.tobytes() == expected.tobytes()
    assert kinds == {("raw", False), ("proportion", False), ("proportion", True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_chans", [3, 1])
def test_the_same_batches(photos: Path, mode: str, in_chans: int) -> None:
    """Keys of every step and all tensors, bit by bit, for training on one process of two and for evaluation."""
    tars, betons = (training(photos / name / "train", in_chans, 1, 2) for name in ("webdataset", mode))
    for step in (0, 3, 6, 7, 20):
        expected, batch = tars[step], betons[step]
        assert betons.shards.keys(batch.samples.tolist()) == tars.shards.keys(expected.samples.tolist())
        assert_equal(batch, expected)
    tars, betons = (evaluation(photos / name / "train", in_chans) for name in ("webdataset", mode))
    for number in range(len(tars)):
        assert_equal(betons[number], tars[number])


def test_a_shard_that_disagrees_with_its_index(photos: Path, tmp_path: Path) -> None:
    options = PrepOptions(format="ffcv", write_mode="raw", workers=1)
    prepare(photos / "source", tmp_path, options)
    shards = ShardSet(tmp_path / "train")
    path = tmp_path / "train" / shards.manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[beton.ROWS_START + beton.ROW.itemsize + 5] ^= 1
    path.write_bytes(data)
    assert len(list(shards.read([0]))) == 1
    with pytest.raises(UserError, match=r"train-000000.beton: sample \w+: no image at byte \d+, where the index"):
        list(shards.read([1]))


def test_pixels_that_are_too_few() -> None:
    with pytest.raises(UserError, match="can't be decoded"):
        decode_image(bytes(29), 3, (2, 5))


# --- plain FFCV in our order (what its loader does with it: test_beton_ffcv.py)


@pytest.mark.parametrize(("rank", "world_size", "first"), [(0, 1, 0), (1, 4, 0), (2, 4, 3)])
def test_indices_are_the_steps(rank: int, world_size: int, first: int) -> None:
    order = DataOrder((100,), seed=3, batch=16, lanes=4, window=16, repeats=2)
    indices = ffcv_indices(order, 5, rank, world_size, first)
    steps = indices.reshape(-1, 16 // world_size)
    assert len(steps) == order.steps_per_epoch - first
    for step, samples in enumerate(steps, 5 * order.steps_per_epoch + first):
        assert samples.tolist() == order.step(step, rank, world_size).samples.tolist()
    assert ffcv_indices(order, 0, first=order.steps_per_epoch).tolist() == []


def test_indices_are_for_one_file() -> None:
    with pytest.raises(
        UserError, match="opens one file, here are 3 shards; prepare them again with --shard-samples 90"
    ):
        ffcv_indices(DataOrder((30, 40, 20), seed=0, batch=8, lanes=2), 0)
