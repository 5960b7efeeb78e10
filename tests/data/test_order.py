"""The data order: a pure function of manifest, seed and batch, complete, uniform, local and the same for ever."""

from __future__ import annotations

import hashlib
import pickle
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pipeline.data.order import DataOrder, default_lanes
from pipeline.errors import UserError

# (shards, batch, lanes, shuffle, window, repeats): remainders, shards of one sample, windows that don't divide a lane
ORDERS = {
    "window": ((37, 50, 11, 60, 3), 16, 4, "window", 10, 1),
    "window, uneven": ((29, 1, 1, 40, 7), 12, 6, "window", 4, 1),
    "window larger than a lane": ((64, 64), 8, 2, "window", 8192, 1),
    "one lane": ((100,), 7, 1, "window", 16, 1),
    "chunks of one": ((33, 34), 8, 8, "window", 3, 1),
    "full": ((37, 50, 11, 60, 3), 16, 4, "full", 10, 1),
    "none": ((37, 50, 11, 60, 3), 16, 4, "none", 10, 1),
    "repeats": ((37, 50, 11, 60, 3), 16, 4, "window", 10, 2),
    "repeats that do not divide": ((37, 50, 11, 60, 3), 32, 4, "full", 10, 3),
    "more repeats than the chunk": ((37, 50, 11), 8, 4, "window", 10, 5),
}


def make(name: str, seed: int = 0) -> DataOrder:
    shards, batch, lanes, shuffle, window, repeats = ORDERS[name]
    return DataOrder(shards, seed, batch, lanes, shuffle, window, repeats)


def whole_step(order: DataOrder, step: int, world_size: int = 1) -> list[tuple[int, int, int]]:
    """(sample, copy, lane) of a global step, sorted."""
    parts = [order.step(step, rank, world_size) for rank in range(world_size)]
    assert {part.epoch for part in parts} == {step // order.steps_per_epoch}
    return sorted(
        (int(sample), int(copy), int(lane))
        for part in parts
        for sample, copy, lane in zip(part.samples, part.copies, np.repeat(part.lanes, order.chunk), strict=True)
    )


def epoch_samples(order: DataOrder, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([order.step(step).samples for step in steps])


@pytest.mark.parametrize("name", ORDERS)
def test_a_step_is_the_same_for_every_number_of_processes(name: str) -> None:
    order = make(name)
    worlds = [w for w in range(1, order.lanes + 1) if order.lanes % w == 0]
    for step in range(2 * order.steps_per_epoch + 1):
        expected = whole_step(order, step)
        assert len(expected) == order.batch
        for world_size in worlds[1:]:
            assert whole_step(order, step, world_size) == expected
            sizes = {len(order.step(step, rank, world_size).samples) for rank in range(world_size)}
            assert sizes == {order.batch // world_size}


@pytest.mark.parametrize("name", ORDERS)
def test_chunks_do_not_depend_on_the_number_of_processes(name: str) -> None:
    order = make(name)
    alone = order.step(3)
    chunks = {int(lane): chunk for lane, chunk in zip(alone.lanes, alone.samples.reshape(-1, order.chunk), strict=True)}
    for world_size in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        for rank in range(world_size):
            part = order.step(3, rank, world_size)
            assert part.lanes.tolist() == list(range(rank, order.lanes, world_size))
            for lane, chunk in zip(part.lanes, part.samples.reshape(-1, order.chunk), strict=True):
                assert chunk.tolist() == chunks[int(lane)].tolist()


@pytest.mark.parametrize("name", [name for name, order in ORDERS.items() if order[-1] == 1])
def test_an_epoch_has_every_sample_once_but_for_less_than_a_batch(name: str) -> None:
    order = make(name)
    for epoch in range(5):
        samples = epoch_samples(order, epoch)
        assert len(samples) == order.steps_per_epoch * order.batch > order.num_samples - order.batch
        assert len(set(samples.tolist())) == len(samples)
        assert samples.min() >= 0 and samples.max() < order.num_samples


@pytest.mark.parametrize("name", [name for name, order in ORDERS.items() if order[-1] > 1])
def test_repeats_come_as_different_copies_of_one_lane(name: str) -> None:
    order = make(name)
    for epoch in range(3):
        seen: list[tuple[int, int, int]] = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            seen += whole_step(order, step)
        assert len(seen) == order.steps_per_epoch * order.batch == len(set(seen))
        copies = Counter(sample for sample, _, _ in seen)
        # Only the last samples of a lane can be short of copies, where the epoch ends.
        assert max(copies.values()) == order.repeats
        assert sum(count < order.repeats for count in copies.values()) <= order.lanes
        assert all(copy < order.repeats for _, copy, _ in seen)
        lanes: dict[int, set[int]] = {}
        for sample, _, lane in seen:
            lanes.setdefault(sample, set()).add(lane)
        assert all(len(of_sample) == 1 for of_sample in lanes.values())


@pytest.mark.parametrize(("batch", "repeats"), [(64, 2), (64, 3), (64, 4), (60, 3), (36, 4), (1024, 3)])
def test_mirrored_pairs_are_never_copies_of_one_sample(batch: int, repeats: int) -> None:
    """Mixing pairs the first sample of a chunk with the last, the second with the last but one."""
    order = DataOrder((3000,), 0, batch, 4, repeats=repeats)
    for step in range(20):
        for chunk in order.step(step).samples.reshape(-1, order.chunk):
            half = order.chunk // 2
            assert (chunk[:half] != chunk[::-1][:half]).all()


# First samples of step 25 with seed 1234, and the hash of three epochs.
GOLDEN: dict[str, tuple[list[int], str]] = {
    "window": ([91, 95, 97, 96, 135, 136, 138, 132, 50, 57, 56, 55], "29b4fcd6f0e8b179"),
    "window, uneven": ([24, 21, 77, 30, 40, 42, 53, 54, 65, 64, 3, 6], "9de2c35331783f3b"),
    "full": ([134, 12, 10, 148, 50, 119, 88, 35, 143, 147, 43, 138], "4d7a9f8723757a58"),
    "repeats that do not divide": ([34, 34, 34, 121, 77, 77, 121, 121, 156, 156, 156, 24], "c4916998dc4f47e1"),
}


# If a value here changes, runs that were started before can't be resumed: change the order only with a new option.
@pytest.mark.parametrize("name", GOLDEN)
def test_the_order_never_changes(name: str) -> None:
    order = make(name, seed=1234)
    steps = range(3 * order.steps_per_epoch)
    everything = b"".join(order.step(step).samples.astype("<i8").tobytes() for step in steps)
    found = (order.step(25).samples[:12].tolist(), hashlib.sha256(everything).hexdigest()[:16])
    assert found == GOLDEN[name]


@pytest.mark.parametrize("name", ["window", "full", "repeats"])
def test_seeds_and_epochs_give_other_orders(name: str) -> None:
    orders = [tuple(epoch_samples(make(name, seed), epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_no_shuffle_is_the_order_of_the_manifest() -> None:
    order = DataOrder((10, 10, 5), 0, batch=8, lanes=2, shuffle="none")
    assert order.step(0).samples.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert order.step(2).samples.tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    assert order.step(3).samples.tolist() == order.step(0).samples.tolist()


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_what_an_epoch_leaves_out_is_uniform(shuffle: str) -> None:
    """One sample of 41 is left out of each epoch: chi-square with 40 degrees of freedom, 99.9 % lie below 73.4."""
    order = DataOrder((20, 4, 17), 3, batch=10, lanes=2, shuffle=shuffle, window=8)
    epochs, everything = 41 * 60, set(range(41))
    left_out = Counter(
        sample for epoch in range(epochs) for sample in everything - set(epoch_samples(order, epoch).tolist())
    )
    counts = np.array([left_out[sample] for sample in range(41)])
    assert counts.sum() == epochs
    assert ((counts - 60) ** 2 / 60).sum() < 73.4


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_the_step_a_sample_comes_in_is_uniform(shuffle: str) -> None:
    """Where sample 5 of 48 comes over 1,200 epochs of 6 steps: 5 degrees of freedom, 99.9 % lie below 20.5."""
    order = DataOrder((9, 30, 9), 0, batch=8, lanes=2, shuffle=shuffle, window=8)
    epochs = 1200
    steps = [int(np.flatnonzero(epoch_samples(order, epoch) == 5)[0]) // 8 for epoch in range(epochs)]
    counts = np.bincount(steps, minlength=6)
    assert ((counts - epochs / 6) ** 2 / (epochs / 6)).sum() < 20.5


def test_a_lane_reads_few_shards_at_a_time() -> None:
    """`window` samples in a row lie in at most 2 + (window - 2) // smallest shard shards; a window has no others."""
    sizes = tuple(int(size) for size in np.random.default_rng(0).integers(50, 70, 60))
    order = DataOrder(sizes, 0, batch=32, lanes=4, window=128)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    bound = 2 + (128 - 2) // min(sizes)
    assert bound == 4
    for epoch in range(3):
        lanes = epoch_samples(order, epoch).reshape(-1, order.lanes, order.chunk).swapaxes(0, 1)
        for lane in lanes.reshape(order.lanes, -1):
            shards = shard_of[lane]
            windows = [set(shards[start : start + 128].tolist()) for start in range(0, len(lane), 128)]
            assert max(map(len, windows)) <= bound
            # A shard that a lane has left does not come back, but for the one cut in two by the turning of the line.
            visits = [shard for before, now in zip([set(), *windows], windows, strict=False) for shard in now - before]
            assert len(visits) - len(set(visits)) <= 1
    with_full = DataOrder(sizes, 0, batch=32, lanes=4, shuffle="full")
    assert len(set(shard_of[epoch_samples(with_full, 0)[:128]].tolist())) > 30


def test_imagenet_is_quick_and_small() -> None:
    """1,281,167 samples in 1,281 shards, 64 lanes in one process: the most a process ever has to compute."""
    shards = (1000,) * 1280 + (1167,)
    for shuffle in ("window", "full"):
        order = DataOrder(shards, 0, batch=1024, lanes=64, shuffle=shuffle)
        tracemalloc.start()
        start = time.perf_counter()
        order.step(order.steps_per_epoch * 7)
        seconds = time.perf_counter() - start
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # 0.1 to 0.2 s on an idle core; the bound leaves room for a busy machine.
        assert seconds < 3, f"first step of an epoch took {seconds:.2f} s"
        assert kept < 12e6 and peak < 80e6
        start = time.perf_counter()
        for step in range(1000):
            order.step(order.steps_per_epoch * 7 + step)
        assert time.perf_counter() - start < 2, "1,000 steps of an epoch"
    order.step(0, rank=3, world_size=8)
    assert sum(lanes.nbytes for lanes in order._cache.values()) < 1.3e6


def test_steps_can_be_asked_for_in_any_order() -> None:
    order, again = make("window"), make("window")
    steps = list(range(0, 35))
    backwards = {step: order.step(step).samples.tolist() for step in reversed(steps)}
    assert {step: again.step(step).samples.tolist() for step in steps} == backwards


def test_pickle_carries_no_megabytes() -> None:
    order = DataOrder((100_000,), 0, batch=64, lanes=8)
    expected = order.step(5).samples
    data = pickle.dumps(order)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy == order and (copy.step(5).samples == expected).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 64, "lanes": 5}, "data.lanes=5 does not divide train.global_batch_size=64; set data.lanes to a"),
        ({"batch": 128, "lanes": 8}, "train.global_batch_size=128 is more than the 100 samples of data.train"),
    ],
)
def test_impossible_orders(fields: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DataOrder((60, 40), 0, **fields)


@pytest.mark.parametrize(
    ("batch", "lanes", "world_size", "said"),
    [
        (64, 8, 3, r"3 processes can't share data.lanes=8 evenly; use 1, 2, 4 or 8, or start a new run with "
                   r"train.global_batch_size a multiple of 3, which 64 is not"),
        (64, 8, 16, r"use 1, 2, 4 or 8, or start a new run with data.lanes=16 \(lanes are part of the data"),
        (96, 8, 6, r"use 1, 2, 4 or 8, or start a new run with data.lanes=6 "),
        (10, 1, 2, r"use 1, or start a new run with data.lanes=2 "),
    ],
)  # fmt: skip
def test_processes_that_can_not_share_the_lanes(batch: int, lanes: int, world_size: int, said: str) -> None:
    order = DataOrder((1000,), 0, batch=batch, lanes=lanes)
    with pytest.raises(UserError, match=said):
        order.check_world_size(world_size)
    with pytest.raises(UserError, match=said):
        order.step(0, 0, world_size)


@pytest.mark.parametrize(
    ("batch", "lanes"),
    [(1, 1), (4, 2), (7, 1), (16, 4), (64, 8), (128, 16), (192, 24), (250, 25), (509, 1), (512, 64), (4096, 64)],
)
def test_default_lanes(batch: int, lanes: int) -> None:
    assert default_lanes(batch) == lanes


def test_default_lanes_always_fit() -> None:
    for batch in range(1, 2000):
        lanes = default_lanes(batch)
        assert batch % lanes == 0 and 1 <= lanes <= 64
        assert batch // lanes >= min(8, np.ceil(np.sqrt(batch)))
