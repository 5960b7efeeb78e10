"""A checkpoint is used whole or not at all."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.distributed import World
from pipeline.train.engines.whole import STATE, WholeState, saved_weights
from tests.conftest import small_disk
from tests.train.test_bad_data import wait_for

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def save(store: CheckpointStore, step: int) -> Path | None:
    return store.save(
        step, {"step": step}, lambda path: torch.save({"w": torch.full((64,), step)}, path / "s.pt"), ALONE
    )


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.newest() is None
    for step in (5, 10, 100):
        save(store, step)
    newest = store.newest()
    assert newest is not None and newest.step == 100 and newest.progress() == {"step": 100}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize(
    ("damage", "seed"), [(damage, seed) for damage in ("cut", "flip", "remove") for seed in range(50)]
)
def test_a_damaged_one_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    last = save(store, 2)
    assert last is not None
    chance = random.Random(seed)
    victim = chance.choice(sorted(last.iterdir()))
    content = bytearray(victim.read_bytes())
    at = chance.randrange(len(content))
    if damage == "cut":
        victim.write_bytes(content[:at])
    elif damage == "flip":
        content[at] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
    else:
        victim.unlink()
    newest = store.newest()
    if newest is not None and newest.step == 2:
        # A bit flipped in the white space of the commit leaves its meaning whole.
        assert victim.name == "commit.json" and damage == "flip"
        assert torch.load(newest.path / "s.pt")["w"].eq(2).all()
    else:
        assert newest is not None and newest.step == 1
        assert "step-00000002" in caplog.text and victim.name in caplog.text


def test_another_layout_is_told(tmp_path: Path) -> None:
    torch.save({"model": {}, "optimizer": {}}, tmp_path / STATE)
    with pytest.raises(UserError, match=r"state\.pt is laid out as another version"):
        saved_weights(tmp_path, "model")


@pytest.mark.parametrize("left", [0, 1, 500, -1])
@pytest.mark.parametrize("parts", [None, 1])
def test_damage_is_told_in_plain_words(left: int, parts: int | None, tmp_path: Path) -> None:
    state = WholeState({"w": torch.zeros(400_000)}, {}, {}, None, 0)
    state.write(tmp_path, parts)
    assert torch.equal(saved_weights(tmp_path, "model")["w"], state.model["w"])
    last = max(path for path in tmp_path.iterdir() if path.suffix != ".parts")
    last.write_bytes(last.read_bytes()[:left])
    with pytest.raises(RuntimeError, match=r"^state\.pt is damaged or incomplete; choose another checkpoint$"):
        saved_weights(tmp_path, "model")


def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12")

    WholeState({"w": torch.zeros(4)}, {}, {}, None, 0).write(tmp_path)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        saved_weights(tmp_path, "model")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "200k") as disk:
        yield disk


def test_a_full_disk_costs_one_checkpoint(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(disk / "checkpoints")
    assert save(store, 1) is not None
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    assert save(store, 2) is None
    assert "step 2 is not saved" in caplog.text and "(0 MB free" in caplog.text
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert not list((disk / "checkpoints").glob(".part-*"))
    filler.unlink()
    assert save(store, 3) is not None
    newest = store.newest()
    assert newest is not None and newest.step == 3


@pytest.mark.chaos
def test_killed_while_saving(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from pipeline.train.checkpoint import CheckpointStore
        from tests.train.test_checkpoint import ALONE
        store = CheckpointStore(Path(sys.argv[1]))
        print("ready", flush=True)
        for step in range(1, 10**6):
            big = {"w": torch.full((200_000,), float(step))}
            store.save(step, {"step": step}, lambda path: torch.save(big, path / "s.pt"), ALONE)
        """
    )
    chance = random.Random(7)
    last = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        # However slow the disk is: there is one to find from then on.
        wait_for(lambda: any(tmp_path.glob("step-*")))
        time.sleep(chance.uniform(0.05, 0.4))
        process.kill()
        process.wait()
        store = CheckpointStore(tmp_path)
        newest = store.newest()
        assert newest is not None
        assert torch.load(newest.path / "s.pt")["w"].eq(newest.step).all() and newest.progress()["step"] == newest.step
        last = max(last, newest.step)
    store.clear_parts()
    assert not list(tmp_path.glob(".part-*"))
    assert last > 1
