"""FFCV shards survive what tars survive: kills, and damage that `rookery verify` finds and `--repair` mends."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import beton
from data_prep.manifest import Manifest, load_index
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from data_prep.verify import verify
from tests.data_prep.helpers import TEXT, digests, kill, make_folder, wait_for
from tests.data_prep.test_restart import die_at
from tests.data_prep.test_verify import append, cut, flip

OPTIONS = PrepOptions(format="ffcv", write_mode="proportion", workers=1, shard_samples=4)
SHARD, INDEX = "train-000001.beton", "train-000001.idx.npy"


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: these tests make thousands of fsyncs."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_death_at_file_system_calls(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", ("ant", "bee"), per_class=3)
    (source / "ant" / "bad.jpg").write_bytes(TEXT)
    prepare(source, tmp_path / "whole", OPTIONS)
    expected = digests(tmp_path / "whole")
    step = 1
    while die_at(step, source, out := tmp_path / f"out{step}", OPTIONS):
        prepare(source, out, OPTIONS)
        assert digests(out) == expected, f"killed at call {step}"
        step += 2
    assert step > 20


def test_death_while_tars_are_replaced(tmp_path: Path) -> None:
    """The two formats have shards and indexes of the same names but for the ending."""
    source = make_folder(tmp_path / "source", ("ant", "bee"), per_class=3)
    new = replace(OPTIONS, overwrite=True)
    prepare(source, tmp_path / "whole", new)
    expected = digests(tmp_path / "whole")
    step, out = 1, tmp_path / "out"
    while True:
        prepare(source, out, PrepOptions(workers=1, shard_samples=3, overwrite=True))
        if not die_at(step, source, out, new):
            break
        prepare(source, out, new)
        assert digests(out) == expected, f"killed at call {step}"
        step += 5
    assert step > 20


@pytest.mark.chaos
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """kill -9 of the parent alone, whose workers must follow, and of the whole group, in turn."""
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    source, out = make_folder(tmp_path / "source", per_class=40, size=400), tmp_path / "out"
    arguments = "format='ffcv', write_mode='proportion', workers=2, shard_samples=6, resize=200"
    code = (
        "from data_prep.options import PrepOptions; from data_prep.prepare import prepare; "
        f"prepare({str(source)!r}, {str(out)!r}, PrepOptions({arguments}))"
    )
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        wait_for(out / "train" / ".prep" / "plan.json", process)
        time.sleep(draw.uniform(0, 0.6))
        kill(process, whole_group=number % 2 == 0)
    options = replace(OPTIONS, workers=2, shard_samples=6, resize=200)
    prepare(source, out, options)
    prepare(source, tmp_path / "whole", options)
    assert digests(out) == digests(tmp_path / "whole"), f"seed {seed}"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    prepare(make_folder(tmp_path / "source"), tmp_path / "out", OPTIONS)
    return tmp_path / "out" / "train"


DAMAGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "flipped header": (lambda out: flip(out / SHARD, 8), {SHARD: "contents have changed"}),
    "flipped row": (lambda out: flip(out / SHARD, beton.ROWS_START + 3), {SHARD: "contents have changed"}),
    "flipped image": (lambda out: flip(out / SHARD, 3000), {SHARD: "contents have changed"}),
    "flipped table": (lambda out: flip(out / SHARD, -5), {SHARD: "contents have changed"}),
    "truncated": (lambda out: cut(out / SHARD, 2500), {SHARD: "2500 bytes, the manifest says"}),
    "empty": (lambda out: cut(out / SHARD, 0), {SHARD: "0 bytes, the manifest says"}),
    "longer": (lambda out: append(out / SHARD), {SHARD: "bytes, the manifest says"}),
    "missing": (lambda out: (out / SHARD).unlink(), {SHARD: "missing"}),
    "flipped index": (lambda out: flip(out / INDEX, 200), {INDEX: "contents have changed"}),
    "missing index": (lambda out: (out / INDEX).unlink(), {INDEX: "missing"}),
    "extra": (lambda out: (out / "more.beton").write_bytes(TEXT), {"more.beton": "not in the manifest"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_mended(split: Path, damage: str) -> None:
    assert verify(split) == []
    before = digests(split)
    break_it, expected = DAMAGES[damage]
    break_it(split)
    problems = verify(split.parent)
    assert {problem.file for problem in problems} == set(expected)
    assert all(expected[problem.file] in problem.what for problem in problems)
    for problem in problems:
        if "delete it" in problem.mend:
            (split / problem.file).unlink()
    prepare(split.parents[1] / "source", split.parent, replace(OPTIONS, repair=True))
    assert digests(split) == before


@pytest.mark.parametrize(("column", "row", "value"), [("offset", 1, 512), ("size", 3, 7), ("label", 0, 4)])
def test_a_wrong_index_with_a_right_hash_is_found(split: Path, column: str, row: int, value: int) -> None:
    """As a faulty writer would leave it: the manifest vouches for an index that disagrees with its shard."""
    manifest = Manifest.load(split)
    index = np.array(load_index(split, manifest.shards[1]))
    right = index[column][row].item()
    index[column][row] = value
    buffer = io.BytesIO()
    np.save(buffer, index)
    (split / INDEX).write_bytes(buffer.getvalue())
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    replace(manifest, shards=shards).save(split)
    [problem] = verify(split)
    assert (problem.file, problem.what) == (INDEX, f"row {row}: {column} is {value}, in the beton it is {right}")


def test_a_wrong_shard_with_a_right_hash_is_found(split: Path) -> None:
    manifest = Manifest.load(split)
    flip(split / SHARD, 0)
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], sha256=hashlib.sha256((split / SHARD).read_bytes()).hexdigest())
    replace(manifest, shards=shards).save(split)
    [problem] = verify(split)
    assert (problem.file, problem.what) == (INDEX, "not a .beton of version 2 with 2 fields")
