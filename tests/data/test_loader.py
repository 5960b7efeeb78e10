"""Batches: a pure function of the step, the same over any number of processes, and every evaluation image once."""

from __future__ import annotations

import io
import multiprocessing
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import pipeline.data.batches as batches_module
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from pipeline.data.augment.settings import (
    AugmentConfig,
    EvalTransformConfig,
    MixConfig,
    RandomErasingConfig,
)
from pipeline.data.augment.transforms import build_eval_transform, build_train_transform
from pipeline.data.fast.decode import decode_image
from pipeline.data.loader import Batches, EvalDataset, StepDataset, TrainBatch
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from tests.data.trainer_to_kill import load_until_killed

CPU = torch.device("cpu")
# Nothing here needs torchvision or timm, whose imports would take longer than all of these tests.
AUGMENT = AugmentConfig(normalize="half", random_erasing=RandomErasingConfig(prob=0.5))
WHOLE_PICTURE = EvalTransformConfig(resize="none", interpolation="bilinear", antialias=False)
MIXES = {
    "sample": MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode="sample", label_smoothing=0.1),
    "batch": MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode="batch"),
    "off": MixConfig(),
}


def step_dataset(
    split: Path, rank: int = 0, world_size: int = 1, repeats: int = 1, mix: str = "sample", shuffle: str = "window"
) -> StepDataset:
    shards = ShardSet(split)
    sizes = tuple(shard.samples for shard in shards.manifest.shards)
    order = DataOrder(sizes, seed=5, batch=32, lanes=4, shuffle=shuffle, window=64, repeats=repeats)
    transform = build_train_transform(AUGMENT, img_size=16, in_chans=1)
    return StepDataset(shards, order, transform, MIXES[mix], 16, 1, drop_paths=5, rank=rank, world_size=world_size)


def assert_equal(a: Any, b: Any) -> None:
    """Equal bit by bit, through nested tuples."""
    assert type(a) is type(b)
    if isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def presentations(batch: TrainBatch) -> list[tuple[Any, ...]]:
    """Everything that happens to each sample of a batch, its mixing partner by its id."""
    mix = batch.mix
    columns = zip(
        batch.samples.tolist(),
        batch.labels.tolist(),
        [image.numpy().tobytes() for image in batch.images],
        [row.numpy().tobytes() for row in batch.drop_path],
        batch.samples[mix.partner].tolist(),
        batch.labels[mix.partner].tolist(),
        [image.numpy().tobytes() for image in batch.images[mix.partner]],
        mix.box.tolist(),
        mix.inside.tolist(),
        mix.outside.tolist(),
        mix.label.tolist(),
        strict=True,
    )
    return list(columns)


@pytest.fixture(autouse=True, scope="module")
def light_loader_processes() -> Iterator[None]:
    """Loader processes import what these tests need and no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "_PRELOAD", batches_module._PRELOAD[:1])
        yield


# --- training batches


def test_batch_holds_what_it_says(digits: Path) -> None:
    dataset = step_dataset(digits / "train")
    batch = dataset[3]
    assert isinstance(batch, TrainBatch)
    assert batch.images.shape == (32, 1, 16, 16) and batch.images.dtype == torch.float32
    assert batch.drop_path.shape == (32, 5) and batch.drop_path.min() >= 0 and batch.drop_path.max() < 1
    assert batch.samples.tolist() == dataset.order.step(3).samples.tolist()
    assert batch.labels.tolist() == [sample.label for sample in dataset.shards.read(batch.samples.tolist())]
    for i, sample in enumerate(dataset.shards.read(batch.samples.tolist())):
        expected = dataset.transform(decode_image(sample.data, 1), 5, 0, int(batch.samples[i]))
        assert torch.equal(batch.images[i], expected)
    assert (batch.mix.partner // 8 == torch.arange(32) // 8).all()  # partners come from the same lane chunk


@pytest.mark.parametrize("repeats", [1, 3])
def test_batch_is_a_function_of_the_step(digits: Path, repeats: int) -> None:
    dataset, other = (step_dataset(digits / "train", repeats=repeats) for _ in range(2))
    steps = [7, 0, 50, 44, 7, 45]
    forward = {step: dataset[step] for step in steps}
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    for step in reversed(steps):
        assert_equal(other[step], forward[step])
    images = {step: batch.images for step, batch in forward.items()}
    assert not torch.equal(images[44], images[45])  # the last step of an epoch and the first of the next


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("repeats", "mix"), [(1, "sample"), (1, "batch"), (3, "batch"), (1, "off")])
def test_any_number_of_processes_trains_on_the_same(digits: Path, world_size: int, repeats: int, mix: str) -> None:
    alone = step_dataset(digits / "train", repeats=repeats, mix=mix)
    parts = [step_dataset(digits / "train", rank, world_size, repeats, mix) for rank in range(world_size)]
    for step in (0, 44, 45):
        together = [presentation for part in parts for presentation in presentations(part[step])]
        assert len(together) == 32 and len(parts[0][step].labels) == 32 // world_size
        assert sorted(together) == sorted(presentations(alone[step]))


def test_a_sample_looks_different_in_every_epoch_and_copy(digits: Path) -> None:
    dataset = step_dataset(digits / "train", repeats=2, mix="off")
    batch = dataset[0]
    looks: dict[int, list[bytes]] = {}
    for sample, image, noise in zip(batch.samples.tolist(), batch.images, batch.drop_path, strict=True):
        looks.setdefault(sample, []).append(image.numpy().tobytes() + noise.numpy().tobytes())
    assert all(len(set(copies)) == 2 for copies in looks.values())
    dataset = step_dataset(digits / "train", mix="off", shuffle="none")
    first, second = dataset[0], dataset[dataset.order.steps_per_epoch]
    assert torch.equal(first.samples, second.samples)
    assert not torch.equal(first.images, second.images) and not torch.equal(first.drop_path, second.drop_path)


def test_drop_path_noise_is_uniform(digits: Path) -> None:
    dataset = step_dataset(digits / "train", mix="off")
    noise = torch.cat([dataset[step].drop_path for step in range(40)]).numpy()
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    assert ((counts - noise.size / 20) ** 2 / (noise.size / 20)).sum() < 43.8  # 19 degrees of freedom: 99.9 %
    correlation = np.corrcoef(noise.T) - np.eye(5)
    assert abs(correlation).max() < 4 / np.sqrt(len(noise))


def test_processes_that_can_not_share_the_lanes(digits: Path) -> None:
    with pytest.raises(UserError, match=r"3 processes can't share data.lanes=4 evenly"):
        step_dataset(digits / "train", 0, 3)


# --- loader processes


def batches(dataset: Any, positions: range, workers: int, prefetch: int = 2) -> list[Any]:
    return list(Batches(dataset, positions, workers, prefetch, CPU))


def test_loader_processes_change_nothing(digits: Path) -> None:
    dataset = step_dataset(digits / "train", repeats=2)
    expected = batches(dataset, range(0, 50), 0)
    for step, batch in enumerate(expected):
        assert_equal(batch, dataset[step])
    for i, batch in enumerate(batches(dataset, range(0, 50), 2)):
        assert_equal(batch, expected[i])
    # A resumed run starts in the middle.
    for start in (1, 43, 49):
        for i, batch in enumerate(batches(dataset, range(start, 50), 2), start):
            assert_equal(batch, expected[i])
    assert batches(dataset, range(50, 50), 2) == []


def test_can_be_iterated_again_and_left_early(digits: Path) -> None:
    loader = Batches(step_dataset(digits / "train"), range(0, 6), 1, 2, CPU)
    first = next(iter(loader))
    for _ in range(2):
        again = list(loader)
        assert len(again) == 6
        assert_equal(again[0], first)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_step_s_generator_is_left_alone(digits: Path, workers: int) -> None:
    dataset = step_dataset(digits / "train")
    state = torch.get_rng_state()
    batches(dataset, range(2), workers)
    assert torch.equal(torch.get_rng_state(), state)


def damaged_split(digits: Path, folder: Path, sample: int) -> Path:
    """The test split with an image that is none any more, file sizes unchanged."""
    split = folder / "test"
    split.mkdir(parents=True)
    for path in (digits / "test").iterdir():
        if path.is_file():
            (split / path.name).write_bytes(path.read_bytes())
    data = next(iter(ShardSet(split).read([sample]))).data
    shard = split / "test-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(data, bytes(len(data)), 1))
    return split


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_bad_sample_is_one_clear_message_in_its_turn(digits: Path, tmp_path: Path, workers: int) -> None:
    dataset = step_dataset(damaged_split(digits, tmp_path, 17), shuffle="none", mix="off")
    bad_step = next(step for step in range(11) if 17 in dataset.order.step(step).samples)
    assert bad_step >= 2
    arrived = []
    with pytest.raises(UserError) as caught:
        for batch in Batches(dataset, range(11), workers, 2, CPU):
            arrived.append(batch)
    assert len(arrived) == bad_step
    key = dataset.shards.keys([17])[0]
    assert str(caught.value).startswith(f"{tmp_path / 'test' / 'test-000000.tar'}: sample {key}: can't be decoded (")
    assert str(caught.value).endswith("check the shards with `rookery verify`") and "\n" not in str(caught.value)


def test_picture_that_does_not_fit_is_named(digits: Path) -> None:
    transform = build_eval_transform(WHOLE_PICTURE, AUGMENT, 16, 1)
    dataset = EvalDataset(ShardSet(digits / "test"), transform, 1, 50, 0, 1)
    key = dataset.shards.keys([0])[0]
    with pytest.raises(UserError, match=rf"test: sample {key}: a 8x8 picture can't give a 16x16 input"):
        batches(dataset, range(len(dataset)), 0)


class Buggy:
    """A transform with a bug."""

    def __call__(self, image: Image.Image, *_: int) -> torch.Tensor:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_not_mistaken_for_dead_processes(digits: Path, workers: int) -> None:
    dataset = step_dataset(digits / "train")
    dataset.transform = Buggy()
    with pytest.raises(RuntimeError, match="a bug"):
        batches(dataset, range(2), workers)


class Pictures(Dataset[torch.Tensor]):
    """Batches of so many bytes: what doesn't fit into a pipe keeps a loader process in the middle of sending it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((self.size,), i % 256, dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 200_000, 1_000_000], ids=["between two", "sending a", "a shared"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.timeout(60)
def test_loader_process_that_dies_is_reported(size: int, workers: int) -> None:
    running = {process.pid for process in psutil.Process().children(recursive=True)}
    loader = iter(Batches(Pictures(size), range(10_000), workers, 2, CPU))
    for i in range(5):
        assert next(loader).tolist() == [i] * size
    # The fork server may be new as well; it is the parent of the loader processes.
    started = [process for process in psutil.Process().children(recursive=True) if process.pid not in running]
    loaders = [process for process in started if process.parent() != psutil.Process()]
    assert len(loaders) == workers
    time.sleep(0.5)  # as far ahead as they go
    loaders[0].kill()
    with pytest.raises(UserError, match=r"a loader process died, .* lower data.workers or data.prefetch"):
        list(loader)
    assert not psutil.wait_procs(loaders, timeout=10)[1]


def test_loader_processes_end_with_a_killed_trainer() -> None:
    """Killed without notice, a trainer must not leave processes behind that hold memory and shared memory."""
    context = multiprocessing.get_context("forkserver")
    receiving, sending = context.Pipe(duplex=False)
    trainer = context.Process(target=load_until_killed, args=(sending,))
    trainer.start()
    try:
        assert receiving.poll(120)
        started = [psutil.Process(pid) for pid in receiving.recv()]
    finally:
        trainer.kill()
        trainer.join()
    assert len(started) >= 3  # a fork server and two loader processes
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_a_trainer_that_leaves_early_does_not_wait_for_its_loaders() -> None:
    """They do not hear the SIGTERM with which multiprocessing ends them."""
    command = [sys.executable, "-m", "tests.data.trainer_that_leaves"]
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run(command, cwd=root, timeout=120).returncode == 3


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned(digits: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("pinned memory not tried: no CUDA device")
    dataset = step_dataset(digits / "train")
    for i, batch in enumerate(Batches(dataset, range(3), 1, 2, torch.device("cuda"))):
        tensors = [*batch[:4], *batch.mix[:5]]
        assert all(tensor.is_pinned() for tensor in tensors)
        assert_equal(batch, dataset[i])


# --- evaluation batches


def eval_datasets(split: Path, batch_size: int, world_size: int) -> list[EvalDataset]:
    transform = build_eval_transform(WHOLE_PICTURE, AUGMENT, 8, 1)
    return [EvalDataset(ShardSet(split), transform, 1, batch_size, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_has_every_sample_once(digits: Path, world_size: int, batch_size: int) -> None:
    shards = ShardSet(digits / "test")
    transform = build_eval_transform(WHOLE_PICTURE, AUGMENT, 8, 1)
    everything = Counter(
        (sample.label, transform(decode_image(sample.data, 1)).numpy().tobytes()) for sample in shards.read(range(360))
    )
    datasets = eval_datasets(digits / "test", batch_size, world_size)
    # Every process has to take part in the same number of equal forwards.
    assert len({len(dataset) for dataset in datasets}) == 1
    seen: Counter[tuple[int, bytes]] = Counter()
    for dataset in datasets:
        for i in range(len(dataset)):
            images, labels, real = dataset[i]
            assert images.shape == (batch_size, 1, 8, 8) and labels.dtype == torch.int64
            assert not labels[~real].any() and not images[~real].any()
            seen.update(zip(labels[real].tolist(), [im.numpy().tobytes() for im in images[real]], strict=True))
    assert sum(seen.values()) == 360 and seen == everything


def test_evaluation_in_loader_processes(digits: Path) -> None:
    [dataset] = eval_datasets(digits / "test", 50, 1)
    loader = Batches(dataset, range(len(dataset)), 2, 2, CPU)
    for _ in range(2):
        for i, batch in enumerate(loader):
            assert_equal(batch, dataset[i])


# --- decoding


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str, color: Any) -> Image.Image:
    return Image.new(mode, (24, 20), color)


def sixteen_bit(value: int) -> Image.Image:
    return Image.fromarray(np.full((20, 24), value, np.uint16))


# One colour per picture: kind, picture, expected RGB, largest difference (JPEG is lossy)
PICTURES: dict[str, tuple[str, Callable[[], Image.Image], tuple[int, int, int], int]] = {
    "grey jpeg": ("JPEG", lambda: flat("L", 100), (100, 100, 100), 1),
    "rgb jpeg": ("JPEG", lambda: flat("RGB", (200, 60, 20)), (200, 60, 20), 3),
    "cmyk jpeg": ("JPEG", lambda: flat("CMYK", (0, 128, 255, 0)), (255, 127, 0), 3),
    "rgb png": ("PNG", lambda: flat("RGB", (200, 60, 20)), (200, 60, 20), 0),
    "16-bit png": ("PNG", lambda: sixteen_bit(0x40FF), (64, 64, 64), 0),
    "rgba png": ("PNG", lambda: flat("RGBA", (200, 60, 20, 10)), (200, 60, 20), 0),
    "grey and alpha png": ("PNG", lambda: flat("LA", (77, 10)), (77, 77, 77), 0),
    "palette png": ("PNG", lambda: flat("RGB", (200, 60, 20)).quantize(), (200, 60, 20), 0),
    "one-bit png": ("PNG", lambda: flat("1", 1), (255, 255, 255), 0),
    "rgb webp": ("WEBP", lambda: flat("RGB", (200, 60, 20)), (200, 60, 20), 4),
    "gif": ("GIF", lambda: flat("L", 90), (90, 90, 90), 0),
    "tiff": ("TIFF", lambda: flat("RGB", (200, 60, 20)), (200, 60, 20), 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of PICTURES as a class of one, prepared."""
    root = tmp_path_factory.mktemp("pictures")
    for name, (kind, make, _, _) in PICTURES.items():
        (root / "raw" / name).mkdir(parents=True)
        (root / "raw" / name / f"image.{kind.lower()}").write_bytes(encode(make(), kind))
    prepare(root / "raw", root / "shards", PrepOptions(workers=1), "val")
    return root / "shards" / "val"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind_become_rgb_or_grey(pictures: Path, name: str) -> None:
    shards = ShardSet(pictures)
    [sample] = [s for s in shards.read(range(len(shards))) if shards.manifest.classes[s.label] == name]
    _, _, rgb, tolerance = PICTURES[name]
    color = decode_image(sample.data, 3)
    assert color.mode == "RGB" and color.size == (24, 20)
    assert abs(np.asarray(color).astype(int) - rgb).max() <= tolerance
    grey = decode_image(sample.data, 1)
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    assert grey.mode == "L" and abs(np.asarray(grey).astype(int) - luma).max() <= tolerance + 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_are_a_user_error_or_a_picture(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    good, draw, refused = encode(Image.fromarray(noise), kind), random.Random(0), 0
    for _ in range(300):
        data = bytearray(good[: draw.randint(0, len(good))] if draw.random() < 0.3 else good)
        for _ in range(draw.randint(1, 8)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            assert decode_image(bytes(data), 3).mode == "RGB"
        except UserError as error:
            refused += 1
            assert str(error).startswith("can't be decoded (")
    assert refused > 30


def test_formats_that_start_other_programs_are_refused() -> None:
    with pytest.raises(UserError, match="can't be decoded"):
        decode_image(encode(flat("RGB", 0), "EPS"), 3)
