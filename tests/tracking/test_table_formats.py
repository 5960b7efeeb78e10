"""The comparison for other programs: values, escaping, where each form goes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from launch.compare_cli import with_files
from pipeline.errors import UserError
from pipeline.tracking.record import RunSummary, summarize_all
from pipeline.tracking.table_formats import latex, to_csv, to_json, to_latex
from tests.tracking.made_runs import write_run
from tests.tracking.test_compare import invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "runs"
    for seed, value in enumerate([0.81, 0.82]):
        write_run(folder / f"a{seed}", [0.5, value], seed=seed, settings={"optim.name": "lamb_&_co"})
        write_run(folder / f"b{seed}", [0.5, value + 0.01 + seed / 100], seed=seed, settings={"optim.name": "50%"})
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[RunSummary]:
    return summarize_all([folder])[0]


LATEX = r"""
\begin{tabular}{lrrrrrr}
\toprule
name & params & GMACs & top-1 \% & n & img/s & GPU-h \\
\midrule
lamb\_\&\_co & 17.1M & 5.81 & $81.50 \pm 0.71$ & 2 & 2815 & 1.6 \\
50\% & 17.1M & 5.81 & $\mathbf{83.00} \pm 1.41$ & 2 & 2815 & 1.6 \\
\bottomrule
\end{tabular}
"""


def test_latex(runs: list[RunSummary]) -> None:
    assert to_latex(runs, "top1", None) == LATEX.lstrip()
    assert "& 4.00 \\\\\n" in to_latex(runs, "top1", 2.5)
    assert r"\begin{tabular}{lrrrrr}" in to_latex(runs[:1], "top1", None)


def test_latex_counts_runs_that_came_to_their_end(folder: Path, tmp_path: Path) -> None:
    killed = write_run(tmp_path / "a2", [0.9] * 8, seed=2, settings={"optim.name": "lamb_&_co"}, status=None)
    assert to_latex(summarize_all([folder, killed])[0], "top1", None) == LATEX.lstrip()


@pytest.mark.parametrize(
    ("words", "escaped"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        ("{#$}", r"\{\#\$\}"),
        ("\\~^", r"\textbackslash{}\textasciitilde{}\textasciicircum{}"),
    ],
)
def test_latex_escapes(words: str, escaped: str) -> None:
    assert latex(words) == escaped


def test_csv_of_another_metric_and_with_a_price(runs: list[RunSummary]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(runs, "loss", 10.0))))
    assert [row["name"] for row in rows] == ["a0", "a1", "b0", "b1"]
    assert (rows[0]["final_loss"], rows[0]["best_loss"], rows[0]["cost"]) == ("1.19", "1.19", "16.0")
    assert (rows[0]["gpu_hours"], rows[0]["optim.name"], rows[1]["seed"]) == ("1.6", "lamb_&_co", "1")


def test_json_has_groups_and_tests(runs: list[RunSummary]) -> None:
    whole = json.loads(to_json(runs, "top1", 1.0, ["x is damaged"]))
    assert whole["differing"] == ["seed", "optim.name"]
    assert [(group["runs"], group["n"]) for group in whole["groups"]] == [([0, 1], 2), ([2, 3], 2)]
    assert whole["groups"][0]["final"] == pytest.approx({"mean": 0.815, "sd": 0.0070711, "n": 2}, abs=1e-6)
    (test,) = whole["tests"]
    assert (test["group"], test["reference"], test["difference"]) == (0, 1, pytest.approx(-0.015))
    assert whole["left_out"] == ["x is damaged"]
    assert (whole["runs"][0]["cost"], whole["runs"][0]["evals"]["top1"]) == (1.6, [0.5, 0.81])
    assert "train" not in whole["runs"][0]


@pytest.mark.parametrize(
    ("args", "filled"),
    [
        (["R", "--json"], ["R", "--json", "-"]),
        (["R", "--csv", "x.csv"], ["R", "--csv", "x.csv"]),
        (["R", "--latex", "--metric", "loss"], ["R", "--latex", "-", "--metric", "loss"]),
        (["--json", "-", "R"], ["--json", "-", "R"]),
        (["--json", ".", "R"], ["--json", "-", ".", "R"]),
    ],
)
def test_options_for_files_may_stand_alone(args: list[str], filled: list[str]) -> None:
    assert with_files(args) == filled


def test_each_form_goes_to_its_file(folder: Path, tmp_path: Path) -> None:
    names = {"--html": "r.html", "--json": "r.json", "--csv": "r.csv", "--latex": "r.tex"}
    files = {option: tmp_path / name for option, name in names.items()}
    assert invoke(str(folder), *(str(word) for pair in files.items() for word in pair)) == ""
    assert files["--html"].read_text().startswith("<!doctype html>")
    assert len(json.loads(files["--json"].read_text())["runs"]) == 4
    assert files["--csv"].read_text() == invoke(str(folder), "--csv", "-")
    assert files["--latex"].read_text() == invoke(str(folder), "--latex") == LATEX.lstrip()


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run measured --metric top3; there are: top1, top5, loss"):
        invoke(str(folder), "--metric", "top3")
    with pytest.raises(UserError, match="can't be written"):
        invoke(str(folder), "--html", str(tmp_path / "none" / "r.html"))
    with pytest.raises(UserError, match=f"r.csv can't be written: no such folder {tmp_path}/none; make it, or name"):
        invoke(str(folder), "--csv", str(tmp_path / "none" / "r.csv"))
    assert "± 0.71" in invoke(str(folder))
