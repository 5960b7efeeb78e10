"""What is said before a run about the cache of a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.store import open_store
from launch.cache_line import cache_line, size_text
from launch.workers import Nodes
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.resolve import resolve
from tests.train.conftest import digits, recipe

__all__ = ["digits", "recipe"]


@pytest.fixture
def stored(digits: Path) -> str:
    """The digits in the memory of this process: 16 shards, 3 MB, and 5 of 0.7 MB to evaluate."""
    for split in ("train", "test"):
        store = open_store(f"memory://digits/{split}")
        for path in (digits / split).glob("[!.]*"):
            store.write(path.name, path.read_bytes())
    return "memory://digits"


def line(recipe: Path, job: Nodes, *overrides: str) -> str | None:
    return cache_line(resolve(load_config(recipe, overrides), job.world_size), job)


@pytest.mark.parametrize(
    ("gigabytes", "said"),
    [
        ("0.004", "at most 4.0 MB: a node reads 3.0 MB an epoch and 0.7 MB to evaluate, all of which stays there"),
        ("0.003", "at most 3.0 MB: a node reads 3.0 MB an epoch and 0.7 MB to evaluate, of which 81% stays there"),
        ("0.0005", "of which 14% stays there; at any time it reads from 3.0 MB, which has no room: shards will be "),
        ("0.0005", "Set data.cache_gb to 0.003 or more, take more nodes, or a smaller data.window"),
        ("null", " as its disk is now: a node reads 3.0 MB an epoch and 0.7 MB to evaluate, all of which stays"),
    ],
)
def test_room_and_need(gigabytes: str, said: str, recipe: Path, stored: str) -> None:
    places = (f"data.train={stored}/train", f"data.val={stored}/test", "data.cache=/nowhere/x")
    told = line(recipe, Nodes(1), *places, f"data.cache_gb={gigabytes}")
    assert told is not None and told.startswith("/nowhere/x, at most ") and said in told


def test_only_what_has_an_address_needs_room(recipe: Path, stored: str) -> None:
    assert line(recipe, Nodes(1)) is None
    told = line(recipe, Nodes(1), f"data.val={stored}/test", "data.cache_gb=1")
    assert told is not None and "a node reads 0.0 MB an epoch and 0.7 MB to evaluate, all" in told
    told = line(recipe, Nodes(2, 3), f"data.train={stored}/train", "data.cache_gb=0.0003", "data.window=4")
    assert told is not None and "a node reads 1.5 MB an epoch, of which 20% stays there; at any time" in told


def test_a_cache_without_room_for_a_shard(recipe: Path, stored: str) -> None:
    with pytest.raises(UserError, match=r"data.cache_gb=0.0001 has no room for a shard of data.val=memory://digits/te"):
        resolve(load_config(recipe, [f"data.val={stored}/test", "data.cache_gb=0.0001"]), 1)
    with pytest.raises(UserError, match=r"data.cache_gb"):
        load_config(recipe, ["data.cache_gb=0"])


def test_sizes() -> None:
    assert [size_text(size) for size in (0, 99_000_000, 100_000_000, 145e9)] == [
        "0.0 MB",
        "99.0 MB",
        "0.1 GB",
        "145.0 GB",
    ]
