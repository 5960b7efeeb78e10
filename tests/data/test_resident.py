"""A split on the device: the loader's batches to the bit, whatever the augmentation, with bad samples too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from pipeline.data.augment.finish import Erased, Finish
from pipeline.data.augment.randaugment import POLICIES, DrawnOp
from pipeline.data.augment.settings import AugmentConfig, MixConfig
from pipeline.data.batches import Batches
from pipeline.data.fast import randaugment
from pipeline.data.fast.transform import FastTransform
from pipeline.data.loader import EvalBatch, StepDataset, TrainBatch
from pipeline.data.order import DataOrder
from pipeline.data.resident.augment import DeviceAugment
from pipeline.data.resident.dataset import KeptBatches, PlanDataset
from pipeline.data.resident.plan import Planner
from pipeline.data.resident.split import decode_split
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.train.copies import on_device
from tests.data.test_loader import CPU, assert_equal

CROPS: dict[str, tuple[Any, tuple[int, int], int]] = {
    "padded with 0": ({"kind": "pad", "padding": 2}, (32, 32), 32),
    "padded by reflection": ({"kind": "pad", "padding": 4, "fill": "reflect"}, (20, 33), 24),
    "padded more than its side": ({"kind": "pad", "padding": 9, "fill": "reflect"}, (5, 4), 16),
    "a part": ({"kind": "pad", "padding": 1}, (40, 37), 31),
    "the middle": ("center", (40, 37), 30),
    "whole": ("none", (16, 16), 16),
    "tiny": ("none", (2, 2), 2),
    "one pixel": ({"kind": "pad", "padding": 1, "fill": "reflect"}, (1, 1), 3),
}
OPS: dict[str, dict[str, Any]] = {
    "nothing more": {"hflip": 0.0},
    "all of it": {
        "rand_augment": {"policy": "nest", "layers": 3, "magnitude": 7, "std": 3.0, "prob": 0.8},
        "random_erasing": {"prob": 0.5, "placement": "clipped"},
    },
    "erased to a colour": {"random_erasing": {"prob": 0.7, "mode": "const"}},
}
KINDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield torch.device(request.param)


def some_pictures(count: int, size: tuple[int, int], channels: int) -> np.ndarray:
    """Noise, some of few values, and one of a single colour: what histograms find hard."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)
    pictures[: count // 4] //= 64
    pictures[count // 4 : count // 2] |= 0xC0
    pictures[0] = 77
    return pictures


def config(crop: object, options: dict[str, Any]) -> AugmentConfig:
    return AugmentConfig.model_validate({"crop": crop, "normalize": "half", **options})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("crop", CROPS)
def test_equals_the_loader_to_the_bit(crop: str, ops: str, channels: int, device: torch.device) -> None:
    kind, size, side = CROPS[crop]
    augment = config(kind, OPS[ops])
    pictures, ids = some_pictures(40, size, channels), np.arange(1000, 1400)
    chosen = ids % 40
    wanted = FastTransform(augment, side, channels)([pictures[i] for i in chosen], 3, 5, ids)
    plan, erased = Planner(augment, *size, side, channels)(3, 5, ids, chosen)
    on_it = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().to(device)
    got = DeviceAugment(on_it, augment, side)(plan.to(device))
    assert got.shape == (400, channels, side, side)
    assert torch.equal(got.permute(0, 2, 3, 1).cpu(), torch.from_numpy(wanted.pixels))
    assert_equal(tuple(map(torch.from_numpy, erased)), tuple(map(torch.from_numpy, wanted.erased)))

    finish = Finish(augment, channels)
    finished = finish(got, erased._replace(noise=torch.from_numpy(erased.noise).to(device)))
    assert torch.equal(finished.cpu(), finish.on_host(wanted.pixels, wanted.erased))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES["nest"])
def test_every_operation(name: str, channels: int) -> None:
    op, side = POLICIES["nest"][name], 24
    augment = config("none", {"rand_augment": {"policy": "nest", "layers": 1}})
    planner = Planner(augment, side, side, side, channels)
    pictures = some_pictures(8, (side, side), channels)
    device_augment = DeviceAugment(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), augment, side)
    plan, _ = planner(0, 0, np.arange(8), np.arange(8))
    stays = plan._replace(mirror=torch.zeros(8, dtype=torch.bool))
    changed = False
    for level in (0.0, 0.013, 0.1, 0.45, 0.77, 1.0):
        for sign in (1, -1):
            arg = None if op.to_arg is None else op.to_arg(level, sign, side)
            drawn = DrawnOp(name, op, arg, Image.Resampling.NEAREST)
            warp, factor, source, table = planner._parts(drawn)
            one = stays._replace(
                warps=torch.tensor([65536, 0, 0, 65536, 32768, 32768] if warp is None else warp).expand(8, 1, 6),
                factors=torch.tensor([arg if factor == i else 1.0 for i in range(3)]).expand(8, 1, 3),
                source=torch.full((8, 1), source, dtype=torch.uint8),
                tables=torch.from_numpy(np.arange(256, dtype=np.uint8) if table is None else table).expand(8, 1, 256),
            )
            got = device_augment(one).permute(0, 2, 3, 1).numpy()
            for i, picture in enumerate(pictures):
                wanted, _ = randaugment.apply_op(
                    picture.copy(), np.empty_like(picture), drawn, np.full(channels, 128, np.uint8)
                )
                assert np.array_equal(got[i], wanted), f"{name} {arg} of picture {i}"
                changed |= not np.array_equal(wanted, picture)
    assert changed or name == "Identity" or (name, channels) == ("Color", 1)


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_boxes_are_erased_at_once_as_one_by_one(mode: str) -> None:
    finish = Finish(config("none", {"random_erasing": {"mode": mode}}), 3)
    boxes = np.array([[1, 0, 0, 4, 5], [3, 2, 1, 1, 1], [4, 7, 6, 0, 3], [6, 5, 0, 3, 8]])
    sizes = 3 * boxes[:, 3] * boxes[:, 4]
    noise = torch.randn(int(sizes.sum()) if mode == "pixel" else 0)
    images = torch.rand(7, 3, 8, 8)
    wanted = finish._erase(images.clone(), Erased(boxes, noise))
    assert torch.equal(finish.erase_all(images.clone(), Erased(boxes, noise)), wanted)
    assert not torch.equal(wanted, images)
    nothing = Erased(np.empty((0, 5), np.int64), torch.empty(0))
    assert torch.equal(finish.erase_all(images.clone(), nothing), images)


AUGMENT = {
    "crop": {"kind": "pad", "padding": 1},
    "rand_augment": {"policy": "nest"},
    "random_erasing": {"prob": 0.5},
}
MIX = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0)


def both(split: Path, rank: int = 0, world_size: int = 1, repeats: int = 1) -> tuple[StepDataset, PlanDataset, Any]:
    """The loader's dataset, the one with plans, and what carries these out."""
    augment, side = config(**{"crop": AUGMENT["crop"], "options": {k: v for k, v in AUGMENT.items() if k != "crop"}}), 8
    shards = ShardSet(split)
    order = DataOrder(
        tuple(shard.samples for shard in shards.manifest.shards), seed=5, batch=32, lanes=4, repeats=repeats
    )
    usual = StepDataset(
        *(shards, order, FastTransform(augment, side, 1), MIX, side, 1, 3, rank, world_size),
        finish=False,
        replace_bad=True,
    )
    held = decode_split(shards, 1, 0, 2, CPU)
    height, width = held.pictures.shape[2:]
    planned = PlanDataset(
        *(shards, held.labels, held.faults, order, Planner(augment, height, width, side, 1), MIX, side, 3),
        *(rank, world_size, True),
    )
    return usual, planned, DeviceAugment(held.pictures, augment, side)


def same(batch: TrainBatch, wanted: TrainBatch, augment: DeviceAugment) -> None:
    assert batch.plan is not None and wanted.erased is not None
    assert torch.equal(augment(batch.plan), wanted.images)
    assert_equal(batch[1:6], wanted[1:6])
    assert_equal(tuple(map(torch.as_tensor, batch.erased)), tuple(map(torch.as_tensor, wanted.erased)))
    assert batch.replaced == wanted.replaced


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_batches_are_those_of_the_loader(digits: Path, rank: int, world_size: int, repeats: int) -> None:
    usual, planned, augment = both(digits / "train", rank, world_size, repeats)
    steps = range(40, 50)  # over the end of an epoch
    for step, batch in zip(steps, Batches(planned, steps, 2, 2, CPU), strict=True):
        same(batch, usual[step], augment)
    finish = Finish(config("none", {"random_erasing": {}}), 1)
    [first] = on_device(Batches(planned, range(3, 4), 0, 2, CPU), CPU, finish, augment)
    [plain] = on_device(Batches(usual, range(3, 4), 0, 2, CPU), CPU, finish)
    assert torch.equal(first.images, plain.images) and first.plan is None and first.erased is None


def test_others_stand_in_for_bad_samples(digits: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(digits / "train", tmp_path / "train"))
    shards = ShardSet(split)
    bad = [3, 4, 250, 251, 1436]
    for sample in bad:
        [read] = shards.read([sample])
        path = Path(shards.path_of(sample))
        path.write_bytes(path.read_bytes().replace(read.data, bytes(len(read.data)), 1))
    sizes = [shard.samples for shard in shards.manifest.shards]
    (split / shards.manifest.shards[2].index_file).write_bytes(b"no index")
    usual, planned, augment = both(split)
    assert sum(sizes[:2]) > 251 and sum(sizes[:3]) < 1436
    assert planned.faults.keys() == {3, 4, 250, 251, 1436, *range(sum(sizes[:2]), sum(sizes[:3]))}
    met = set()
    for step in range(2 * usual.order.steps_per_epoch):
        batch, wanted = planned[step], usual[step]
        assert isinstance(batch, TrainBatch) and isinstance(wanted, TrainBatch)
        same(batch, wanted, augment)
        met |= {replaced.sample for replaced in batch.replaced or ()}
    assert met == planned.faults.keys()
    with pytest.raises(UserError, match="can't be decoded"):
        PlanDataset(
            *(shards, planned.labels, {3: planned.faults[3]}, planned.order, planned.planner, MIX, 8, 3, 0, 1, False)
        )


def folder_of(tmp_path: Path, sizes: list[tuple[int, int]]) -> Path:
    for i, size in enumerate(sizes):
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i, 10, 200)).save(path)
    prepare(tmp_path / "pictures", tmp_path / "out", PrepOptions(shard_samples=4, workers=1, shuffle=False), "train")
    return tmp_path / "out" / "train"


@pytest.mark.parametrize("count", [1024, 4])
def test_pictures_of_several_sizes_are_refused(tmp_path: Path, count: int) -> None:
    split = folder_of(tmp_path, [(8, 6)] * 9 + [(6, 8)])
    with pytest.raises(UserError, match="has 6x8 pixels, those before it 8x6") as caught:
        decode_split(ShardSet(split), 3, 0, 2, CPU, count)
    assert "data.resident=false" in str(caught.value)


@pytest.mark.parametrize(("count", "workers"), [(1024, 0), (3, 0), (4, 2)])
def test_all_pictures_are_decoded(tmp_path: Path, count: int, workers: int) -> None:
    split = folder_of(tmp_path, [(8, 6)] * 10)
    shards = ShardSet(split)
    held = decode_split(shards, 3, workers, 2, CPU, count)
    assert held.pictures.shape == (10, 3, 6, 8) and not held.faults
    keys = shards.keys(range(10))
    for i, key in enumerate(keys):
        number = int(key.partition("_")[2])
        assert held.pictures[i].flatten(1).unique(dim=1).flatten().tolist() == [number, 10, 200]
        assert held.labels[i] == number % 2


def test_nothing_that_can_be_decoded(tmp_path: Path) -> None:
    split = folder_of(tmp_path, [(8, 6)] * 3)
    for path in split.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="can't be decoded"):
        decode_split(ShardSet(split), 3, 0, 2, CPU)


def test_too_many_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a made one: what is free is asked of CUDA."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    shards = ShardSet(folder_of(tmp_path, [(8, 6)] * 10))
    with pytest.raises(UserError, match=r"10 pictures of 8x6 take 0\.0 GB, and cuda has 0\.0 GB free"):
        decode_split(shards, 3, 0, 2, torch.device("cuda"))


def test_evaluation_batches_stay() -> None:
    loads = []

    class Loaded:
        def __iter__(self) -> Iterator[EvalBatch]:
            loads.append(1)
            for i in range(3):
                yield EvalBatch(torch.full((2, 1), i), torch.tensor([i, i]), torch.tensor([True, i < 2]))

    kept = KeptBatches(Loaded(), CPU)
    assert next(iter(kept)).labels.tolist() == [0, 0]  # left before its end: nothing is kept
    rounds = [[tuple(tensor.tolist() for tensor in batch) for batch in kept] for _ in range(3)]
    assert rounds[0] == rounds[1] == rounds[2] and len(rounds[0]) == 3
    assert len(loads) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"crop": "rrc"}, "augment.crop=rrc"),
        ({"crop": "none", "resize": 40}, "augment.resize"),
        ({"crop": "none", "affine": {}}, "augment.affine"),
        ({"crop": "none", "color_jitter": {}}, "augment.color_jitter"),
        ({"crop": "none", "crop_last": True}, "augment.crop_last"),
        ({"crop": "none", "rand_augment": {"policy": "timm-inc"}}, "augment.rand_augment.policy=timm-inc"),
        ({"crop": "none", "rand_augment": {"policy": "nest"}}, None),
    ],
)
def test_what_it_can_not_do_is_said(options: dict[str, Any], expected: str | None) -> None:
    said = AugmentConfig.model_validate(options).off_device()
    assert said is None if expected is None else said is not None and said.startswith(expected)


def test_pictures_too_small_for_the_crop() -> None:
    for crop, size in (({"kind": "pad", "padding": 1}, (5, 9)), ("center", (7, 9)), ("none", (8, 9))):
        with pytest.raises(UserError, match=f"a 9x{size[0]} picture can't give a 8x8 input"):
            Planner(config(crop, {}), *size, 8, 3)
