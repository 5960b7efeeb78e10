"""Which image goes into which shard, and what it is called."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_prep import plan as planning
from data_prep.manifest import KEY_BYTES
from data_prep.options import PrepOptions
from data_prep.plan import make_plan, shard_count, shuffled
from data_prep.sources.base import Listing, sample_key
from data_prep.sources.digits import DigitsReader

GOLDEN_ORDER = [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]


def listing(images: int, size: int = 1000, blocks: int | None = None) -> Listing:
    return Listing(
        classes=["a", "b"],
        names=[f"image {i}" for i in range(images)],
        labels=np.arange(images) % 2,
        sizes=np.full(images, size),
        at=np.arange(images)[:, None],
        reader=DigitsReader(np.zeros((1, 8, 8), np.uint8)),
        blocks=None if blocks is None else np.arange(images) * blocks // images,
    )


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    assert shuffled(listing(12), seed=0).tolist() == GOLDEN_ORDER
    assert shuffled(listing(12), seed=1).tolist() != GOLDEN_ORDER


@pytest.mark.parametrize("blocks", [None, 1, 7])
def test_the_shuffle_is_a_permutation_and_mixes_well(blocks: int | None) -> None:
    order = shuffled(listing(10_000, blocks=blocks), seed=3)
    assert sorted(order) == list(range(10_000))
    # Mean of a tenth of the order: a uniform permutation gives 4999.5 with a standard deviation of 87.
    means = order.reshape(10, 1000).mean(axis=1)
    assert np.abs(means - 4999.5).max() < 5 * 87


def test_blocks_are_mixed_within_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 blocks of 100 images, windows of 10 blocks: each tenth of the order holds exactly 10 whole blocks."""
    monkeypatch.setattr(planning, "WINDOW_BYTES", 10 * 100 * 1000)
    table = listing(10_000, blocks=100)
    assert table.blocks is not None
    order = shuffled(table, seed=0)
    windows = [table.blocks[part] for part in order.reshape(10, 1000)]
    contents = [sorted(set(window.tolist())) for window in windows]
    assert [len(content) for content in contents] == [10] * 10
    assert sorted(block for content in contents for block in content) == list(range(100))
    assert any(content != list(range(content[0], content[0] + 10)) for content in contents)  # blocks are permuted ...
    assert len(set(windows[0][:100].tolist())) > 5  # ... and mixed inside the window


@pytest.mark.parametrize(
    ("images", "size", "options", "shards"),
    [
        (1_281_167, 110_000, {}, 1102),  # ImageNet: about 128 MB and 1,163 images each
        (50_000, 2300, {}, 16),
        (1437, 64, {}, 16),
        (360, 64, {}, 5),
        (50, 64, {}, 1),
        (2, 10**9, {}, 2),
        (50_000, 2300, {"shard_mb": 1}, 115),
        (50_000, 2300, {"shard_samples": 1000}, 50),
        (50_001, 2300, {"shard_samples": 1000}, 51),
        (10, 2300, {"shard_samples": 1000}, 1),
    ],
)
def test_shard_count(images: int, size: int, options: dict[str, int], shards: int) -> None:
    table = dataclasses.replace(listing(0), names=[""] * images, sizes=np.full(images, size))
    assert shard_count(table, PrepOptions(**options)) == shards  # type: ignore[arg-type]


def test_shards_partition_the_split_evenly() -> None:
    plan = make_plan(listing(1003), "folder", "f", "train", PrepOptions(shard_samples=100))
    lengths = [len(shard) for shard in plan.shards]
    assert sorted(np.concatenate(plan.shards)) == list(range(1003))
    assert (len(lengths), max(lengths) - min(lengths)) == (11, 1)
    assert max(lengths) <= 100


@pytest.mark.parametrize(
    ("split", "options", "in_order"),
    [
        ("train", {}, False),
        ("train2", {}, False),
        ("val", {}, True),
        ("train", {"shuffle": False}, True),
        ("val", {"shuffle": True}, False),
    ],
)
def test_training_splits_are_shuffled_by_default(split: str, options: dict[str, bool], in_order: bool) -> None:
    plan = make_plan(listing(1000), "folder", "f", split, PrepOptions(**options))  # type: ignore[arg-type]
    assert (np.concatenate(plan.shards).tolist() == list(range(1000))) == in_order


def test_the_fingerprint_sees_what_changes_the_bytes_and_nothing_else() -> None:
    def fingerprint(table: Listing, **options: object) -> str:
        return make_plan(table, "folder", "f", "train", PrepOptions(**options)).fingerprint  # type: ignore[arg-type]

    base = fingerprint(listing(100))
    same = [fingerprint(listing(100), workers=3, max_bad=5, overwrite=True, repair=True)]
    relabelled, renamed, resized = listing(100), listing(100), listing(100)
    relabelled.labels[3] = 1 - relabelled.labels[3]
    renamed.names[3] = "other"
    resized.sizes[3] += 1
    other = [fingerprint(listing(100), **{name: 7}) for name in ("shard_samples", "shard_mb", "resize", "quality")]
    other += [fingerprint(table) for table in (relabelled, renamed, resized, listing(101))]
    other += [fingerprint(listing(100), shuffle_seed=1), fingerprint(listing(100), shuffle=False)]
    assert set(same) == {base}
    assert len({base, *other}) == 1 + len(other)


@pytest.mark.parametrize(
    ("position", "stem", "key"),
    [
        (7, "n01440764_10026", "00000007_n01440764_10026"),
        (7, "", "00000007"),
        (7, "a b.c/ä", "00000007_a_b_c__"),
        (123_456_789, "x" * 100, "123456789_" + "x" * (KEY_BYTES - 10)),
    ],
)
def test_sample_keys(position: int, stem: str, key: str) -> None:
    assert sample_key(position, stem) == key
