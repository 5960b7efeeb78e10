"""One run as a record: positions, hours of work, operations, cost; damaged runs among many."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.models import list_models, model_info
from pipeline.models.facts import model_facts
from pipeline.tracking.compare import cost, table_columns
from pipeline.tracking.files import write_json
from pipeline.tracking.published import dataset_name, published_points
from pipeline.tracking.record import metrics_of, summarize, summarize_all
from pipeline.tracking.run_dir import RunDir
from pipeline.tracking.work_clock import WorkClock
from tests.tracking.made_runs import IMAGENET, write_run


def test_figures(tmp_path: Path) -> None:
    run = summarize(write_run(tmp_path / "a", [0.5, 0.75, 0.7]))
    assert (run.samples, run.macs, run.train_flops) == (307_200, 5_807_152_128, 6 * 5_807_152_128 * 307_200)
    assert (run.memory_gb, run.processes, run.wall_hours, run.gpu_hours) == (20.0, 8, 0.3, pytest.approx(2.4))
    assert (run.dataset, run.fingerprint, run.images_per_second) == ("ImageNet-1k", "f00d", 2810.0)
    assert run.evals["epoch"] == [1.0, 2.0, 3.0] and run.evals["hours"] == pytest.approx([0.1, 0.2, 0.3])
    assert run.train["loss"] == pytest.approx([3.5, 1.75, 2.1])
    assert metrics_of([run]) == ["top1", "top5", "loss"]
    assert [(run.final(name), run.best(name)) for name in ("top1", "top5", "loss")] == [
        (0.7, 0.75),
        (pytest.approx(0.85), 0.9),
        (1.3, 1.25),
    ]
    assert (cost(run, 2.5), cost(run, None)) == (pytest.approx(6.0), None)


def test_the_table_shows_another_metric_and_the_cost(tmp_path: Path) -> None:
    run = summarize(write_run(tmp_path / "a", [0.5, 0.75, 0.7]))
    cells = {column.title: column.cells[0] for column in table_columns([run], "loss", price=2.5)}
    assert (cells["eval loss"], cells["best"]) == ("1.3000", "1.2500")
    assert (cells["mem GB"], cells["GPU-h"], cells["cost"]) == ("20.00", "2.40", "6.00")


SESSIONS = [
    {"event": "start", "time": 1000.0, "world_size": 2},
    {"event": "end", "time": 1360.0, "status": "interrupted"},
    {"event": "start", "time": 5000.0, "world_size": 4},
]


@pytest.mark.parametrize(
    ("time", "seconds"), [(900.0, 0), (1090.0, 90), (1360.0, 360), (4000.0, 360), (5100.0, 460), (9999.0, 540)]
)
def test_hours_of_work_leave_pauses_out(time: float, seconds: float) -> None:
    clock = WorkClock.of(SESSIONS, [{"time": 1200.0}, {"time": 5180.0}])
    assert clock.at(time) == pytest.approx(seconds / 3600)


def test_hours_of_several_sessions_count_their_processes() -> None:
    clock = WorkClock.of(SESSIONS, [{"time": 5180.0}])
    assert clock.hours == pytest.approx(540 / 3600)
    assert clock.process_hours == pytest.approx((2 * 360 + 4 * 180) / 3600)
    assert WorkClock.of([], []).hours is None
    assert WorkClock.of([{"event": "start", "time": 1.0}], []).process_hours is None


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (IMAGENET, "ImageNet-1k"),
        ({"path": "s3://b/c/train", "samples": 1_281_000, "classes": 1000}, "ImageNet-1k"),
        ({"path": "shards/small/train", "samples": 126_689, "classes": 1000}, "small"),
        ({"path": "x", "samples": 50_000, "classes": 10}, "CIFAR-10"),
        ({"path": "x", "samples": 50_000, "classes": 100}, "CIFAR-100"),
        ({"path": "shards/flowers", "samples": 100, "classes": 3}, "flowers"),
        (None, None),
    ],
)
def test_data_sets_of_papers_are_recognised(split: dict[str, Any] | None, name: str | None) -> None:
    assert dataset_name(split) == name


def test_published_figures_agree_with_the_registry() -> None:
    points = published_points({"ImageNet-1k", "CIFAR-10", "CIFAR-100"})
    assert published_points({"digits"}) == []
    assert all(point["model"] in list_models() and point["source"] for point in points)
    rows = {(point["model"], point["dataset"], point["img_size"]): point for point in points[::-1]}
    for name in list_models():
        info = model_info(name)
        if info.top1 is not None:
            assert rows[name, info.dataset, info.img_size]["top1"] == pytest.approx(info.top1 / 100), name
    for name in ("nest_tiny", "hvt_s_4", "deit_tiny"):
        point, facts = rows[name, "ImageNet-1k", 224], model_facts(name)
        assert (point["params"], point["macs"]) == (facts.params, facts.macs)


DAMAGE = {
    "facts.json": b"{",
    "config.yaml": b"a: [",
    "metrics.jsonl": b'{"kind": "train"}\n',
    "sessions.jsonl": b'{"time": 1}\n',
    "result.json": b"[1, 2]",
}


def test_damaged_and_empty_runs_are_named_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "good", [0.5])
    for name, content in DAMAGE.items():
        (write_run(tmp_path / "runs" / f"bad-{name}", [0.5]) / name).write_bytes(content)
    (write_run(tmp_path / "runs" / "binary", [0.5]) / "config.yaml").write_bytes(b"\xff\xfe\x00")
    text = write_run(tmp_path / "runs" / "text", [0.5, 0.6]) / "metrics.jsonl"
    text.write_text(text.read_text().replace('"top1":0.6', '"top1":"high"'))
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "empty" / "metrics.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    runs, left_out = summarize_all([tmp_path / "runs", tmp_path / "nothing", tmp_path / "runs" / "good"])
    assert [run.name for run in runs] == ["good"]
    assert len(left_out) == len(DAMAGE) + 4
    named = ("bad-facts.json", "bad-config.yaml", "binary", "top1='high' at step", "empty is empty")
    for part in (*named, "nothing is no run directory"):
        assert sum(part in reason for reason in left_out) == 1, (part, left_out)


RANDOM = bytes(value for value in Random(0).randbytes(400) if value != 10)[:300]


@pytest.mark.parametrize("metrics", [b"", RANDOM, b'{"kind": "tr', None], ids=["empty", "random", "torn", "none"])
@pytest.mark.parametrize(
    ("status", "result", "damaged"),
    [
        ("finished", {"step": 100}, True),
        ("finished", None, True),
        ("stopped", None, True),
        ("failed", {"step": 100}, True),
        ("failed", {"step": 0}, False),
        ("failed", None, False),
        ("interrupted", None, False),
        (None, None, False),  # just started, or killed before its first line
    ],
)
def test_a_run_that_trained_has_metrics(
    metrics: bytes | None, status: str | None, result: Any, damaged: bool, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "a", [0.5], status=status)
    if metrics is None:  # without a result too nothing says that it trained
        (run / "metrics.jsonl").unlink()
        damaged = damaged and result is not None
    else:
        (run / "metrics.jsonl").write_bytes(metrics)
    if result is not None:
        write_json(run / "result.json", result)
    runs, left_out = summarize_all([tmp_path / "a", write_run(tmp_path / "good", [0.5])])
    assert [run.name for run in runs] == (["good"] if damaged else ["a", "good"])
    assert ["metrics.jsonl is damaged: the run is" in reason for reason in left_out] == [True] * damaged


def test_a_run_that_is_training_may_have_no_metrics_yet(tmp_path: Path) -> None:
    """Though an earlier one left its result there."""
    run = write_run(tmp_path / "a", [])
    write_json(run / "result.json", {"step": 100})
    with RunDir.open(run, {}, {}):
        assert summarize(run).state == "running"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("facts.json", 5, "it has no keys"),
        ("facts.json", [], "it has no keys"),
        ("facts.json", {"datasets": 5}, "datasets=5"),
        ("facts.json", {"datasets": {"train": 5}}, "datasets.train=5"),
        ("facts.json", {"total_steps": "x" * 99}, 'total_steps="' + "x" * 36 + "..."),
        ("facts.json", {"total_epochs": "many"}, 'total_epochs="many"'),
        ("result.json", {"best": 5}, "best=5"),
        ("result.json", {"top1": "high"}, 'top1="high"'),
        ("result.json", {"step": [1]}, "step=[1]"),
    ],
)
def test_a_file_that_no_run_wrote_is_named(name: str, content: Any, reason: str, tmp_path: Path) -> None:
    write_json(write_run(tmp_path / "a", [0.5]) / name, content)
    with pytest.raises(UserError) as error:
        summarize(tmp_path / "a")
    expected = f"{tmp_path / 'a' / name} isn't what a run wrote ({reason}); restore it or leave the run out"
    assert str(error.value) == expected


def test_none_left_is_an_error(tmp_path: Path) -> None:
    (write_run(tmp_path / "bad", [0.5]) / "facts.json").write_text("{")
    with pytest.raises(UserError, match=r"facts\.json can't be read as JSON"):
        summarize_all([tmp_path])
    with pytest.raises(UserError, match="nowhere doesn't exist"):
        summarize_all([write_run(tmp_path / "good", [0.5]), tmp_path / "nowhere"])
