"""Seeds taken together: which runs belong together, mean and spread, Welch's test, Holm's correction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from scipy import stats

from launch.sweep.config import Metric
from pipeline.tracking.compare import group_columns, repeats
from pipeline.tracking.files import json_line
from pipeline.tracking.groups import Spread, best_group, compare_groups, group_runs, holm, spread, welch
from pipeline.tracking.metric_names import lower_is_better
from pipeline.tracking.record import RunSummary, summarize_all
from pipeline.tracking.report.data import page_data
from pipeline.tracking.table_formats import to_json
from tests.tracking.made_runs import IMAGENET, write_run

A, B, C = [0.812, 0.815, 0.811], [0.823, 0.826, 0.82, 0.827], [0.8, 0.8, 0.8]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunSummary]:
    """Two settings of three and four seeds, one of them with a killed run, and one of a single run."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed, value in enumerate(A):
        places = {"data.workers": seed, "data.train": f"disk{seed}", "tracking.experiment": f"e{seed}"}
        write_run(folder / f"a{seed}", [0.5, value], seed=seed, settings={"optim.lr": 0.1} | places)
    for seed, value in enumerate(B):
        write_run(folder / f"b{seed}", [0.9, value], seed=seed, settings={"optim.lr": 0.2})
    write_run(folder / "b-killed", [0.1], seed=9, settings={"optim.lr": 0.2}, status=None)
    write_run(folder / "c", [0.7, 0.8], settings={"optim.lr": 0.1}, dataset=IMAGENET | {"fingerprint": "beef"})
    return summarize_all([folder])[0]


def test_runs_equal_but_for_seed_name_and_place_belong_together(runs: list[RunSummary]) -> None:
    groups = group_runs(runs, "top1")
    assert [[run.name for run in group.members] for group in groups] == [
        ["a0", "a1", "a2"],
        ["b-killed", "b0", "b1", "b2", "b3"],
        ["c"],
    ]
    assert [group.settings for group in groups] == [
        {"optim.lr": 0.1, "data.train": "disk0"},
        {"optim.lr": 0.2, "data.train": None},
        {"optim.lr": 0.1, "data.train": None},
    ]


def test_only_runs_that_came_to_their_end_count(runs: list[RunSummary]) -> None:
    a, b, c = group_runs(runs, "top1")
    assert (a.values, b.values, c.values) == (A, B, [0.8])
    assert a.final == Spread(pytest.approx(2.438 / 3), pytest.approx(0.0020817, abs=1e-7), 3)
    assert b.best == Spread(0.9, 0.0, 4)
    assert c.final == Spread(0.8, None, 1)


def test_folders_of_data_count_where_its_contents_are_unknown_or_differ(tmp_path: Path) -> None:
    """Of runs on the same contents the folder isn't compared, of all others it is."""
    unknown = IMAGENET | {"fingerprint": None}
    for name, dataset, folder in (("a", IMAGENET, "x"), ("b", IMAGENET, "y"), ("c", unknown, "x"), ("d", unknown, "y")):
        write_run(tmp_path / name, [0.5], settings={"data.train": folder}, dataset=dataset)
    runs = summarize_all([tmp_path])[0]
    assert [[run.name for run in group.members] for group in group_runs(runs, "top1")] == [["a", "b"], ["c"], ["d"]]
    assert group_runs(runs[:2], "top1")[0].settings == {}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([2.0], Spread(2.0, None, 1)), ([1.0, 3.0], Spread(2.0, pytest.approx(2**0.5), 2))],
)
def test_spread(values: list[float], expected: Spread | None) -> None:
    assert spread(values) == expected


@pytest.mark.parametrize(("a", "b"), [(A, B), (B, A), (A, [0.8, 0.8, 0.8001]), ([0.1, 0.2], [0.1, 0.9, 0.5])])
def test_welch_is_scipys(a: list[float], b: list[float]) -> None:
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = welch(a, b)
    assert found == pytest.approx((sum(a) / len(a) - sum(b) / len(b), interval.low, interval.high, expected.pvalue))


@pytest.mark.parametrize(("a", "b"), [([0.5], A), (A, []), (C, [0.9, 0.9])])
def test_no_test_without_two_values_and_a_spread(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [([], []), ([0.04], [0.04]), ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.9, 0.6], [1.0, 1.0])],
)
def test_holm(ps: list[float], adjusted: list[float]) -> None:
    assert holm(ps) == pytest.approx(adjusted)


def test_groups_are_compared_with_the_best_of_several_seeds(runs: list[RunSummary]) -> None:
    groups = group_runs(runs, "top1")
    assert best_group(groups, "top1") == 1
    (test,) = compare_groups(groups, 1)
    assert (test.group, test.reference, test.difference) == (0, 1, pytest.approx(2.438 / 3 - 0.824))
    assert test.p == test.p_holm == pytest.approx(stats.ttest_ind(A, B, equal_var=False).pvalue)
    # Of losses the lowest is the best: 2 - top-1 here.
    assert best_group(group_runs(runs, "loss"), "loss") == 1
    low = {name for name in get_args(Metric) if lower_is_better(name)}
    assert low == {"loss", "fid_inception", "fid_small"}


def test_table_over_seeds(runs: list[RunSummary]) -> None:
    columns = {column.title: column.cells for column in group_columns(group_runs(runs, "top1"), "top1")}
    assert columns == {
        "runs": ["a0, a1, a2", "b-killed, b0, b1 and 2 more", "c"],
        "lr": ["0.1", "0.2", "0.1"],
        "train": ["disk0", "-", "-"],
        "n": ["3", "4", "1"],
        "top-1 %": ["81.27 ± 0.21", "82.40 ± 0.32", "80.00"],
        "best": ["81.27 ± 0.21", "90.00 ± 0.00", "80.00"],
        "to the best [95 %]": ["-1.13 [-1.64, -0.62]", "best", "-"],
        "p": ["0.0023", "-", "-"],
    }


DATES = {"a0": 1, "a0-copy": 1, "a0-again": 3, "a1": 1, "a1-killed": 9, "a1-newer": 5}


@pytest.fixture
def repeated(tmp_path: Path) -> list[RunSummary]:
    """One setting with two seeds, each of several runs; `DATES` has the day on which each ended."""
    for i, (name, day) in enumerate(DATES.items()):
        run = write_run(tmp_path / name, [0.1 * i], seed=int(name[1]), status=None if "killed" in name else "finished")
        sessions = [{"event": "start", "time": 86_400.0 * day + 2e6}]
        if "killed" not in name:
            sessions.append({"event": "end", "time": 86_400.0 * day + 2e6 + 60, "status": "finished"})
        (run / "sessions.jsonl").write_bytes(b"".join(map(json_line, sessions)))
    return summarize_all([tmp_path])[0]


def test_of_runs_with_one_seed_the_newest_counts(repeated: list[RunSummary]) -> None:
    (group,) = group_runs(repeated, "top1")
    assert [run.name for run in group.counted] == ["a0-again", "a1-newer"]
    assert (group.values, group.final) == ([0.2, 0.5], Spread(0.35, pytest.approx(0.3 / 2**0.5), 2))
    assert [(run.name, newest.name) for run, newest in group.repeats] == [
        ("a0", "a0-again"),
        ("a0-copy", "a0-again"),
        ("a1", "a1-newer"),
    ]
    assert repeats([group], repeated) == [
        "left out of n: a0, a0-copy (same seed 0 as a0-again); a1 (same seed 1 as a1-newer); "
        "of runs with one seed and equal settings the newest counts"
    ]


def test_every_form_counts_a_seed_once(repeated: list[RunSummary]) -> None:
    (group,) = json.loads(to_json(repeated, "top1", None))["groups"]
    names = [run.name for run in repeated]
    assert [names[i] for i in group["complete"]] == ["a0-again", "a1-newer"]
    assert [names[i] for i in group["repeats"]] == ["a0", "a0-copy", "a1"]
    assert (group["n"], group["values"], len(group["runs"])) == (2, [0.2, 0.5], 6)
    page = page_data(repeated, "top1", None, [])
    assert page["groups"][0]["n"] == 2
    assert any("Left out of n: a0, a0-copy (same seed 0 as a0-again)" in note for note in page["notes"])
    columns = {column.title: column.cells for column in group_columns(group_runs(repeated, "top1"), "top1")}
    assert columns["n"] == ["2"]


@pytest.mark.parametrize(("seed", "n"), [(0, 1), (None, 3)])
def test_runs_that_do_not_say_their_seed_count_each(seed: int | None, n: int, tmp_path: Path) -> None:
    for name in "abc":
        config = write_run(tmp_path / name, [0.5], seed=0) / "config.yaml"
        if seed is None:
            config.write_text(config.read_text().replace('"seed": 0, ', ""))
    (group,) = group_runs(runs := summarize_all([tmp_path])[0], "top1")
    assert (len(group.values), len(group.repeats), len(repeats([group], runs))) == (n, 3 - n, int(n == 1))
