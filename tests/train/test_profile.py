"""`profile.steps`: a trace of the steps that it names, and not a bit of the training changes."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.train.export import WEIGHTS
from tests.train.conftest import TWO_LEVELS, Rookery, write_recipe


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


PLAIN = (*TWO_LEVELS, "data.val=null")


def test_steps_are_traced_and_the_weights_stay(digits: Path, tmp_path: Path, rookery: Rookery) -> None:
    recipe, runs = write_recipe(digits, tmp_path, augment=False), tmp_path / "runs"
    rookery("train", recipe, *PLAIN, "train.stop_after=4steps", "name=plain")
    rookery("train", recipe, *PLAIN, "train.stop_after=4steps", "profile.steps=2", "profile.after=1steps")
    weights = [(runs / name / "final" / WEIGHTS).read_bytes() for name in ("plain", "run")]
    assert weights[0] == weights[1]
    folder = runs / "run" / "profile"
    first = folder / "step-00000001-rank0.json.gz"
    assert sorted(folder.iterdir()) == [first, folder / "step-00000001-rank0.txt"]
    names = Counter(event["name"] for event in events(first))
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert names["Optimizer.step#AdamW.step"] == 2 and names["aten::addmm"] % 2 == 0 < names["aten::addmm"]
    table = (folder / "step-00000001-rank0.txt").read_text()
    assert "aten::addmm" in table and "Self CPU %" in table

    # Of a start that goes on, counted from there, by both processes; the run ends before the last of the steps.
    later = ("train.stop_after=6steps", "profile.steps=9", "profile.after=1steps", "profile.all_processes=true")
    rookery("train", recipe, *PLAIN, *later, "--nproc", 2)
    for rank in (0, 1):
        names = Counter(event["name"] for event in events(folder / f"step-00000005-rank{rank}.json.gz"))
        assert names["Optimizer.step#AdamW.step"] == 1 and any("allreduce" in name for name in names)


def test_a_trace_that_can_not_be_written_ends_nothing(digits: Path, tmp_path: Path, rookery: Rookery) -> None:
    recipe, run = write_recipe(digits, tmp_path, augment=False), tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "profile").write_text("in the way")
    done = rookery("train", recipe, *PLAIN, "train.stop_after=3steps", "profile.steps=1", "profile.after=1steps")
    assert "profile" in done.stderr and "training goes on" in done.stderr
    assert (run / "final" / WEIGHTS).is_file()
