"""What stands in for a bad sample: a pure function, near and even, that takes over the place and nothing else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.data.batches as batches_module
from pipeline.data.batches import Batches
from pipeline.data.fast.decode import decode_image
from pipeline.data.loader import StepDataset, TrainBatch
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import FAR, NEAR, BadSample, Retries, Substitutes
from pipeline.errors import UserError
from tests.data.test_loader import assert_equal, presentations, step_dataset

SIZES = (50, 1, 200, 30)
STARTS = (0, 50, 51, 251, 281)
GOLDEN = {
    (60, 0): [61, 182, 217, 179, 110, 222, 265, 20, 68, 17, 142, 242, 74, 181, 219, 99],
    (60, 1): [204, 104, 109, 232, 232, 153, 275, 3, 77, 249, 157, 248, 203, 95, 182, 115],
    (280, 0): [256, 253, 253, 272, 251, 129, 94, 100, 47, 14, 215, 1, 172, 7, 194, 163],
}


def substitutes(seed: int = 5) -> Substitutes[int]:
    return Substitutes(SIZES, seed, replace=True)


def bad(*samples: int, lost: bool = False, passing: bool = False) -> Callable[[int], int]:
    """A `load` that finds these bad; of the others it gives ten times the position."""

    def load(sample: int) -> int:
        if sample in samples:
            raise BadSample(Path("x.tar"), "torn", "mend it", f"key{sample}", lost=lost, passing=passing)
        return 10 * sample

    return load


def test_golden_values() -> None:
    """They keep replacements from changing between releases."""
    candidates = substitutes().candidates
    assert list(candidates(60, 0)) == GOLDEN[60, 0]
    assert list(candidates(60, 1)) == GOLDEN[60, 1]
    assert list(candidates(280, 0)) == GOLDEN[280, 0]
    assert list(substitutes(6).candidates(60, 0)) != GOLDEN[60, 0]


@pytest.mark.parametrize("sample", [0, 49, 50, 51, 150, 250, 251, 280])
def test_of_the_same_shard_first_and_never_itself(sample: int) -> None:
    shard = next(i for i in range(4) if sample < STARTS[i + 1])
    alone = SIZES[shard] == 1
    for epoch in range(50):
        near, far = (list(substitutes().candidates(sample, epoch, lost)) for lost in (False, True))
        assert sample not in near and len(far) == FAR and len(near) == FAR + (0 if alone else NEAR)
        assert near[-FAR:] == far
        assert all(STARTS[shard] <= other < STARTS[shard + 1] for other in near[:-FAR])
        assert all(0 <= other < 281 for other in far)


@pytest.mark.parametrize("lost", [False, True])
def test_all_others_are_equally_likely(lost: bool) -> None:
    epochs, sample = 6_000, 60
    drawn = [next(substitutes().candidates(sample, epoch, lost)) for epoch in range(epochs)]
    others = [i for i in (range(281) if lost else range(51, 251)) if i != sample]
    counts = np.array([Counter(drawn)[i] for i in others])
    assert counts.sum() == epochs
    expected = epochs / len(others)
    # 99.99 % of a chi-square with so many degrees of freedom, by its normal approximation.
    assert ((counts - expected) ** 2 / expected).sum() < len(others) + 3.8 * (2 * len(others)) ** 0.5


def test_the_first_good_one_is_taken() -> None:
    order = list(substitutes().candidates(60, 3))
    for broken in range(6):
        used, value, fault = substitutes().load(60, 3, bad(60, *order[:broken]))
        assert used == next(other for other in order if other not in order[:broken]) and value == 10 * used
        assert fault is not None and (fault.reason, fault.key) == ("torn", "key60")
    assert substitutes().load(61, 3, bad(60)) == (61, 610, None)
    assert substitutes().load(60, 3, bad(60, lost=True))[0] == order[NEAR]


def test_a_bounded_number_is_tried() -> None:
    tried = []

    def load(sample: int) -> int:
        tried.append(sample)
        raise BadSample(Path("x.tar"), "torn", "mend it", "k")

    with pytest.raises(UserError, match=r"^x.tar: sample k: torn; mend it; nor could any of the 16 samples be read"):
        substitutes().load(60, 0, load)
    assert tried == [60, *substitutes().candidates(60, 0)]
    with pytest.raises(BadSample, match=r"^x.tar: sample key60: torn; mend it$"):
        Substitutes(SIZES, 5, replace=False).load(60, 0, bad(60))


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    failures = iter([True, True, False, True, True, True])

    def load(sample: int) -> int:
        if next(failures, True):
            raise BadSample(Path("x.tar"), "no answer", "look", passing=True)
        return sample

    retries = Retries()
    assert retries.load(7, load) == 7 and pauses == [0.1, 1.0]
    for _ in range(3):  # the file is gone for good: not waited for again
        with pytest.raises(BadSample):
            retries.load(7, load)
    assert pauses == [0.1, 1.0] * 2
    with pytest.raises(BadSample):
        Retries().load(7, bad(7))
    assert pauses == [0.1, 1.0] * 2


# --- in batches

BAD = (3, 210, 211, 640, 1000)


def spoiled(dataset: StepDataset) -> StepDataset:
    """The dataset, with samples that can't be decoded any more."""
    return make_bad(dataset, BAD)


def make_bad(dataset: StepDataset, samples: tuple[int, ...]) -> StepDataset:
    """Write over the images of some samples of a dataset whose shards may be changed."""
    shards = dataset.shards
    for sample in samples:
        [read] = shards.read([sample])
        path = Path(shards.path_of(sample))
        path.write_bytes(path.read_bytes().replace(read.data, bytes(len(read.data)), 1))
    return dataset


@pytest.fixture
def broken(digits: Path, tmp_path: Path) -> Path:
    """A copy of the training split with the samples `BAD` spoiled."""
    split = tmp_path / "train"
    split.mkdir()
    for path in (digits / "train").iterdir():
        if path.is_file():
            (split / path.name).write_bytes(path.read_bytes())
    spoiled(step_dataset(split))
    return split


def tolerant(split: Path, *args: int, **options: int) -> StepDataset:
    dataset = step_dataset(split, *args, **options)  # type: ignore[arg-type]
    dataset._samples = Substitutes(dataset.order.shard_samples, dataset.order.seed, replace=True)
    return dataset


def test_a_replacement_takes_the_place_and_nothing_else(digits: Path, broken: Path) -> None:
    clean, dataset = step_dataset(digits / "train"), tolerant(broken)
    met = []
    for step in range(dataset.order.steps_per_epoch):
        batch, expected = dataset[step], clean[step]
        assert isinstance(batch, TrainBatch) and isinstance(expected, TrainBatch)
        places = [i for i, sample in enumerate(expected.samples.tolist()) if sample in BAD]
        good = [i for i in range(32) if i not in places]
        for field in ("images", "labels", "samples"):
            assert torch.equal(getattr(batch, field)[good], getattr(expected, field)[good])
        assert_equal((batch.drop_path, batch.mix), (expected.drop_path, expected.mix))
        assert len(batch.replaced or []) == len(places)
        for place, fault in zip(places, batch.replaced or [], strict=True):
            sample = int(expected.samples[place])
            other = next(i for i in dataset._samples.candidates(sample, 0) if i not in BAD)
            [read] = dataset.shards.read([other])
            assert int(batch.samples[place]) == other and int(batch.labels[place]) == read.label
            # Augmented as the sample whose place it has.
            assert torch.equal(batch.images[place], dataset.transform(decode_image(read.data, 1), 5, 0, sample))
            assert (fault.sample, fault.by, fault.by_key) == (sample, other, read.key)
            assert fault.shard == Path(dataset.shards.path_of(sample)).name
            assert [fault.key] == dataset.shards.keys([sample])
            assert fault.reason == "can't be decoded (no JPEG, PNG or WebP)"
            met.append(sample)
    left_out = set(range(1437)) - {i for s in range(44) for i in dataset.order.step(s).samples.tolist()}
    assert set(met) == set(BAD) - left_out and len(met) == len(set(met)) >= 4


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_any_number_of_processes_takes_the_same(broken: Path, world_size: int, repeats: int) -> None:
    alone = tolerant(broken, repeats=repeats)
    parts = [tolerant(broken, rank, world_size, repeats) for rank in range(world_size)]
    met = 0
    for step in range(repeats * alone.order.steps_per_epoch):
        if not set(alone.order.step(step).samples.tolist()) & set(BAD):
            continue
        whole, batches = alone[step], [part[step] for part in parts]
        assert isinstance(whole, TrainBatch) and whole.replaced is not None
        together = [presentation for batch in batches for presentation in presentations(batch)]  # type: ignore[arg-type]
        assert sorted(together) == sorted(presentations(whole))
        faults = [fault for batch in batches for fault in batch.replaced or []]  # type: ignore[union-attr]
        assert sorted(faults, key=str) == sorted(whole.replaced, key=str)
        assert len({(fault.sample, fault.by) for fault in faults}) == len({fault.sample for fault in faults})
        met += 1
    assert met >= 2


def test_through_loader_processes(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_PRELOAD", batches_module._PRELOAD[:2])
    dataset = tolerant(broken)
    step = next(step for step in range(44) if set(dataset.order.step(step).samples.tolist()) & set(BAD))
    [batch] = Batches(dataset, range(step, step + 1), 1, 2, torch.device("cpu"))
    assert_equal(batch, dataset[step])
    assert batch.replaced


def test_a_lost_shard_is_left_alone(digits: Path, broken: Path) -> None:
    dataset = tolerant(broken)
    lost = range(200, 400)  # the second shard
    Path(dataset.shards.path_of(200)).unlink()
    shards = ShardSet(digits / "train")
    for step in range(10):
        batch = dataset[step]
        assert isinstance(batch, TrainBatch)
        wanted, used = dataset.order.step(step).samples.tolist(), batch.samples.tolist()
        assert not set(used) & set(lost)
        assert {fault.sample for fault in batch.replaced or []} == set(wanted) & {*lost, *BAD}
        assert batch.labels.tolist() == [sample.label for sample in shards.read(used)]
