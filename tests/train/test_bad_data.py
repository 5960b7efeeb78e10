"""Data that went bad: other samples stand in for it, the same after any kill and on any number of processes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from data_prep.manifest import Manifest
from launch import prep_cli
from pipeline.config_load import load_config
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import Replaced, Substitutes
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.tracking.files import read_lines
from pipeline.tracking.metrics import read_metrics
from pipeline.tracking.run_dir import QUARANTINE_NAME
from pipeline.train.again import newest_step
from pipeline.train.distributed import World
from pipeline.train.export import WEIGHTS
from pipeline.train.quarantine import Quarantine, tolerated
from pipeline.train.trace import read_trace
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer

# Steps whose samples are spoiled, one each; the same step twice where two processes meet one.
SPOILED_STEPS = (1, 6, 6, 9, 13, 22)


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    """A copy of the shards that may be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "data"))


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    """24 steps on the copy."""
    return write_recipe(data, tmp_path, augment=False)


def spoil(split: Path, samples: list[int]) -> None:
    """Write zeros over the images of some samples; all sizes stay."""
    shards = ShardSet(split)
    for sample in samples:
        [read] = shards.read([sample])
        path = Path(shards.path_of(sample))
        path.write_bytes(path.read_bytes().replace(read.data, bytes(len(read.data)), 1))


def of_steps(recipe: Path, steps: tuple[int, ...] = SPOILED_STEPS) -> list[int]:
    """A sample of each of these steps; of a step that comes twice also the last one."""
    order = resolve(load_config(recipe), 1).order
    seen: set[int] = set()
    chosen = []
    for step in steps:
        chosen.append(int(order.step(step).samples[-1 if step in seen else 0]))
        seen.add(step)
    return chosen


def listed(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / QUARANTINE_NAME)


def test_killed_and_resumed_as_if_left_alone(recipe: Path, data: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    """Where a checkpoint comes between two lines of the log as well."""
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    bad = of_steps(recipe)
    spoil(data / "train", bad)
    options = ("train.log_every=4steps", "checkpoint.every=3steps", "eval.every=100steps", "train.epochs=36steps")
    fork_server.train(recipe, *options, "name=whole", nproc=2)
    seed = random.SystemRandom().randrange(10**6)
    print(f"kill moments from seed {seed}")
    moments = random.Random(seed)
    job = fork_server.start(recipe, *options, "name=cut", nproc=2)
    wait_for(lambda: newest_step(cut) >= 9)
    time.sleep(moments.uniform(0, 0.05))
    job.kill()
    assert set(job.wait()) == {-9}
    # What the committed steps met is on the list, and at most what later steps met besides.
    met = {sample for sample, step in zip(bad, SPOILED_STEPS, strict=True) if step < 9}
    assert {line["sample"] for line in listed(cut)[: len(met)]} == met
    fork_server.train(recipe, *options, "name=cut", nproc=2)
    assert (cut / "final" / WEIGHTS).read_bytes() == (whole / "final" / WEIGHTS).read_bytes()
    assert read_trace(cut) == read_trace(whole)
    assert (cut / QUARANTINE_NAME).read_bytes() == (whole / QUARANTINE_NAME).read_bytes()
    counts = [[(line["step"], line["bad_samples"]) for line in of_training(run)] for run in (cut, whole)]
    assert counts[0] == counts[1] and counts[0][0] == (4, 1) and counts[0][-1] == (36, len(bad))
    results = [json.loads((run / "result.json").read_text()) for run in (cut, whole)]
    assert [result["bad_samples"] for result in results] == [len(bad)] * 2


def of_training(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["kind"] == "train"]


def test_the_same_at_1_2_and_3_processes(recipe: Path, data: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    """And what they are is what the functions of order and replacement say."""
    bad = of_steps(recipe)
    spoil(data / "train", bad)
    for nproc in (1, 2, 3):
        fork_server.train(recipe, "train.epochs=40steps", "eval.every=100steps", f"name=on{nproc}", nproc=nproc)
    runs = [tmp_path / "runs" / f"on{nproc}" for nproc in (1, 2, 3)]
    trace = read_trace(runs[0])
    assert read_trace(runs[1]) == trace == read_trace(runs[2])
    assert listed(runs[1]) == listed(runs[0]) == listed(runs[2])

    run = resolve(load_config(recipe), 1)
    shards, order = ShardSet(data / "train"), run.order
    substitutes: Substitutes[None] = Substitutes(order.shard_samples, 0, replace=True)
    first: dict[int, tuple[int, int]] = {}
    for step in range(40):  # the second epoch begins after 29
        wanted = order.step(step)
        used = list(wanted.samples.tolist())
        for place, sample in enumerate(used):
            if sample in bad:
                used[place] = next(i for i in substitutes.candidates(sample, wanted.epoch) if i not in bad)
                first.setdefault(sample, (step, used[place]))
        assert trace[step] == sorted(shards.keys(used))
    assert listed(runs[0]) == [
        {
            "shard": Path(shards.path_of(sample)).name,
            "key": shards.keys([sample])[0],
            "sample": sample,
            "reason": "can't be decoded (no JPEG, PNG or WebP)",
            "step": step + 1,
            "epoch": step // order.steps_per_epoch,
            "replacement": shards.keys([other])[0],
        }
        for sample, (step, other) in sorted(first.items(), key=lambda item: (item[1][0], item[0]))
    ]
    # Every good sample once an epoch, but for those that stood in for a bad one, which come twice.
    for epoch in (range(29), range(29, 40)):
        used_keys = Counter(key for step in epoch for key in trace[step])
        assert not used_keys.keys() & set(shards.keys(bad))
        assert sum(count - 1 for count in used_keys.values()) <= len(bad)


def test_a_shard_that_disappears_while_training(
    recipe: Path, data: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Two lanes that read the shards in their order come to the last but one in step 26."""
    run = tmp_path / "runs" / "run"
    options = ("train.epochs=1ep", "eval.every=1ep", "data.max_bad_samples=100", "data.shuffle=none", "data.lanes=2")
    lost = Manifest.load(data / "train").shards[14].file
    job = fork_server.start(recipe, *options, nproc=2)
    wait_for(lambda: len(of_training(run)) >= 2)
    (data / "train" / lost).unlink()
    assert len(of_training(run)) < 20
    assert job.wait() == [0, 0], fork_server.log.read_text()[-3000:]
    shards = ShardSet(data / "train", check_files=False)
    of_shard = [i for i in range(len(shards)) if Path(shards.path_of(i)).name == lost]
    assert sorted(line["sample"] for line in listed(run)) == of_shard
    assert [line["key"] for line in sorted(listed(run), key=lambda line: line["sample"])] == shards.keys(of_shard)
    assert {line["reason"] for line in listed(run)} == {"can't be read (No such file or directory)"}
    trace = read_trace(run)
    assert list(trace) == list(range(29)) and {len(keys) for keys in trace.values()} == {48}
    assert not {key for keys in trace.values() for key in keys} & set(shards.keys(of_shard))


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_shard_that_is_lost_between_two_starts(
    recipe: Path, data: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    """A run that goes on takes it as it would have in the middle; one that begins does not."""
    options = ("eval.every=100steps", "data.max_bad_samples=100")
    for nproc in (1, 2):
        fork_server.train(recipe, *options, f"name=on{nproc}", "train.stop_after=7steps", nproc=nproc)
    lost = Manifest.load(data / "train").shards[2].file
    (data / "train" / lost).unlink()
    for nproc in (1, 2):
        fork_server.train(recipe, *options, f"name=on{nproc}", nproc=3 - nproc)
    one, two = (tmp_path / "runs" / f"on{nproc}" for nproc in (1, 2))
    assert read_trace(one) == read_trace(two) and len(read_trace(one)) == 24
    assert listed(one) == listed(two) and {line["shard"] for line in listed(one)} == {lost}
    assert min(line["step"] for line in listed(one)) > 7
    assert f"1 shard can't be used, samples of others stand in: {data}/train/{lost}: shard missing" in (
        fork_server.log.read_text()
    )
    for refused in ((*options, "name=new"), (options[0], "data.max_bad_samples=0", "name=on1")):
        with pytest.raises(UserError, match=rf"{lost}: shard missing .*; restore it, or .*rookery prep --repair"):
            resolve(load_config(recipe, refused), 1)


def test_the_limit(recipe: Path, data: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    """All processes stop, one says why, and the same command goes on once more are tolerated."""
    run = tmp_path / "runs" / "run"
    spoil(data / "train", of_steps(recipe))
    options = ("eval.every=100steps", "checkpoint.every=2steps")
    said = fails(fork_server, recipe, "data.max_bad_samples=2", *options, nproc=2)
    assert said.count("rookery: 3 bad samples in ") == 1
    assert "data.max_bad_samples=2 are tolerated: train-0000" in said
    assert f"`rookery verify --quarantine {run}`" in said
    assert "step 2: 1 bad sample so far, replaced by others: train-0000" in said
    # Both bad samples of that step count.
    assert [line["step"] for line in listed(run)] == [2, 7, 7]
    before = len(fork_server.log.read_text())
    fork_server.train(recipe, "data.max_bad_samples=6", *options)
    assert [line["step"] for line in listed(run)] == [step + 1 for step in SPOILED_STEPS]
    lines = fork_server.log.read_text()[before:].splitlines()
    assert f"continuing {run} after step 6" in lines
    assert f"6 bad samples replaced by others, listed in {run}/quarantine.jsonl; " in lines[-2]
    assert json.loads((run / "result.json").read_text())["bad_samples"] == 6


def fails(server: ForkServer, recipe: Path, *overrides: str, nproc: int = 1) -> str:
    """What a training says whose processes all end with status 2."""
    before = len(server.log.read_text()) if server.log.exists() else 0
    assert server.start(recipe, *overrides, nproc=nproc).wait() == [2] * nproc
    said = server.log.read_text()[before:]
    assert "Traceback" not in said
    return said


def test_none_tolerated(recipe: Path, data: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    [sample] = of_steps(recipe, (3,))
    spoil(data / "train", [sample])
    shards = ShardSet(data / "train")
    said = fails(fork_server, recipe, "data.max_bad_samples=0")
    assert f"rookery: {shards.path_of(sample)}: sample {shards.keys([sample])[0]}: can't be decoded" in said
    assert not (tmp_path / "runs" / "run" / QUARANTINE_NAME).exists()


def test_a_bad_sample_of_the_evaluation(recipe: Path, data: Path, fork_server: ForkServer) -> None:
    """Nothing can stand in for it: top-1 of other samples is another figure."""
    spoil(data / "test", [17])
    shards = ShardSet(data / "test")
    said = fails(fork_server, recipe, "eval.every=2steps")
    assert f"{shards.path_of(17)}: sample {shards.keys([17])[0]}: can't be decoded (no JPEG, PNG or WebP)" in said
    assert "evaluation leaves no sample out" in said and "rookery verify" in said


def test_replayed(recipe: Path, data: Path, digits: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    run, shards = tmp_path / "runs" / "run", ShardSet(data / "train")
    bad = of_steps(recipe, (1,))
    order = resolve(load_config(recipe), 1).order
    bad += [next(i for i in order.step(4).samples.tolist() if shards.path_of(i) != shards.path_of(bad[0]))]
    spoil(data / "train", bad)
    fork_server.train(recipe, "train.stop_after=6steps", "eval.every=100steps")
    replayed = verify("--quarantine", run)
    assert replayed.exit_code == 1
    for sample in bad:
        key = shards.keys([sample])[0]
        assert f"{shards.path_of(sample)}: {key}: still bad: can't be decoded (no JPEG" in replayed.stdout
    assert replayed.stdout.endswith(
        f"--repair: it makes only what is damaged\n{run}: 2 bad samples listed, 2 still bad\n"
    )
    first, second = (Path(shards.path_of(sample)) for sample in bad)
    shutil.copy(digits / "train" / first.name, first)
    second.unlink()
    one_left = verify("--quarantine", run, "--json")
    assert one_left.exit_code == 1
    found = json.loads(one_left.stdout)
    assert (found["ok"], found["data"]) == (False, str(data / "train"))
    assert [sample["now"] for sample in found["samples"]] == [None, "can't be read (No such file or directory)"]
    # The data may have moved, and may be whole there.
    moved = verify("--quarantine", run, digits / "train")
    assert moved.exit_code == 0 and moved.stdout.endswith(f"{run}: 2 bad samples listed, 0 still bad\n")
    assert moved.stdout.count("fine now (it was: can't be decoded") == 2
    for arguments, said in (
        (["--quarantine", run, data / "test"], f"{data / 'test'}: not the shards that {run} was trained on"),
        (["--quarantine", data], "no run directory"),
        ([], "name a folder with shards, or a run"),
    ):
        assert said in str(verify(*arguments).exception)


def verify(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(prep_cli.verify)
    return CliRunner().invoke(app, list(map(str, arguments)))


# --- the list itself

ALONE = World(0, 1, 0, torch.device("cpu"))


def fault(sample: int, reason: str = "torn") -> Replaced:
    return Replaced(sample, f"train-{sample // 10:06d}.tar", f"k{sample}", reason, sample + 1, f"k{sample + 1}")


def quarantine(folder: Path, limit: int = 10, world: World = ALONE) -> Quarantine:
    return Quarantine(folder / QUARANTINE_NAME, world, "shards/train", limit, steps_per_epoch=10)


def test_each_is_listed_once_at_its_first_step(tmp_path: Path) -> None:
    kept = quarantine(tmp_path)
    kept.add(3, [fault(20), fault(20), fault(5)])
    kept.add(4, None)
    kept.add(12, [fault(5), fault(70)])
    news = kept.collect()
    assert news == (
        "3 bad samples so far, replaced by others: train-000000.tar: k5: torn; train-000002.tar: k20: torn; "
        f"train-000007.tar: k70: torn; listed in {tmp_path}/quarantine.jsonl"
    )
    kept.add(15, [fault(70), fault(5)])
    assert kept.collect() is None
    assert [(line["sample"], line["step"], line["epoch"]) for line in listed(tmp_path)] == [
        (5, 4, 0),
        (20, 4, 0),
        (70, 13, 1),
    ]


def test_few_lines_are_said(tmp_path: Path) -> None:
    kept = quarantine(tmp_path, limit=1000)
    said = []
    for step in range(200):
        kept.add(step, [fault(step)])
        said.append(kept.collect() is not None)
    assert [step + 1 for step, spoken in enumerate(said) if spoken] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert len(listed(tmp_path)) == 200


def test_too_many(tmp_path: Path) -> None:
    class Other(World):
        """Two processes; the other one has met samples of its own."""

        def any(self, flag: bool) -> bool:
            return True

        def gather(self, item: Any) -> list[Any]:
            return [item, [(2, fault(4)), (2, fault(5)), (1, fault(6))]]

    kept = quarantine(tmp_path, limit=3, world=Other(0, 2, 0, torch.device("cpu")))
    kept.add(2, [fault(5), fault(7)])
    with pytest.raises(
        UserError, match=r"^4 bad samples in shards/train, data.max_bad_samples=3 are tolerated: "
    ) as error:
        kept.collect()
    assert "train-000000.tar: k6: torn" in str(error.value) and "and 1 more" in str(error.value)
    assert [line["sample"] for line in listed(tmp_path)] == [6, 4, 5, 7]


def test_a_full_disk_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = quarantine(tmp_path)
    kept.add(0, [fault(7)])
    kept.collect()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        kept.add(1, [fault(1), fault(2)])
        assert kept.collect() is not None and len(listed(tmp_path)) == 1
    for _ in range(2):
        kept.collect()
        assert [line["sample"] for line in listed(tmp_path)] == [7, 1, 2]


@pytest.mark.parametrize(("step", "stay"), [(0, []), (4, [5, 20]), (12, [5, 20]), (13, [5, 20, 70])])
def test_the_list_goes_back_with_the_run(step: int, stay: list[int], recipe: Path, data: Path, tmp_path: Path) -> None:
    run = resolve(load_config(recipe), 1)
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    kept = quarantine(folder)
    kept.add(3, [fault(5), fault(20)])
    kept.add(12, [fault(70)])
    kept.collect()
    with open(folder / QUARANTINE_NAME, "ab") as file:
        file.write(b'{"shard": "tor')  # killed in the middle of a line
    again = Quarantine.open(run, ShardSet(data / "train"), ALONE, step)
    assert again.known == set(stay) and [line["sample"] for line in listed(folder)] == stay
    again.add(13, [fault(70), fault(20)])
    again.collect()
    assert [line["sample"] for line in listed(folder)] == [*dict.fromkeys([*stay, 20, 70])]


@pytest.mark.parametrize(
    ("setting", "samples", "limit"), [(None, 1_281_167, 1281), (None, 1437, 10), (0, 1437, 0), (7, 10**7, 7)]
)
def test_how_many_are_tolerated(setting: int | None, samples: int, limit: int) -> None:
    assert tolerated(setting, samples) == limit
