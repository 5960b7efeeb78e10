"""Sweeps and what lies outside: stores that are out of reach, credentials for them, figures that a recipe measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import cloudpickle
import pytest

from launch.sweep.config import SweepConfig, load_sweep
from launch.sweep.milestones import Length
from launch.sweep.plan import plan_trial
from launch.sweep.records import FILE, Records
from launch.sweep.schedulers import make_scheduler
from launch.sweep.search import OptunaSearch
from launch.sweep.space import arguments_of, drawn_trials, shown
from pipeline.errors import Unreachable, UserError
from tests.launch.test_sweep import ROOT, write
from tests.test_recipes import SMALL, shards

__all__ = ["shards"]


def test_credentials_are_used_and_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.sweep.driver import tune_config
    from launch.sweep.trial import Job, Trial

    def sweep(host: str = "host", secret: str = "SECRET") -> SweepConfig:
        grid = ["/local", f"s3://KEY:{secret}@bucket/train"]
        return load_sweep(
            write(tmp_path, space={"data.train": {"grid": grid}}, overrides=["train.epochs=2"]),
            [f"data.val=http://me:{secret}@{host}/val?sig={secret}"],
        )

    records = Records(sweep())
    for values in drawn_trials(sweep()):
        records.add(values)
    records.save()
    told = [tune_config(record, Length(10, 5.0)) for record in records.all()]
    for written in [(records.folder / FILE).read_text(), json.dumps(told), *(shown(r.values) for r in records.all())]:
        assert "SECRET" not in written
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    trial = object.__new__(Trial)
    trial._trial_info = SimpleNamespace(trial_name="x")
    trial.setup({"trial": told[1]}, Job(sweep(), 0, (), 0, str(Path.cwd()), {}))
    again = Records(sweep("host", "NEW"))
    assert trial.values == {"data.train": "s3://KEY:SECRET@bucket/train"}
    assert [r.values["data.train"] for r in again.all()] == ["/local", "s3://KEY:NEW@bucket/train"]
    assert "data.val=http://me:NEW@host/val?sig=NEW" in arguments_of(again.config, "x", {})
    with pytest.raises(UserError, match="holds a sweep with another overrides"):
        Records(sweep("other"))


@pytest.mark.parametrize("options", [{"scheduler": {"kind": "pbt", "every": "1ep"}}, {"searcher": "optuna"}])
def test_what_tune_keeps_of_a_sweep_has_no_credentials(options: dict[str, Any], tmp_path: Path) -> None:
    """It pickles its searcher and scheduler into the sweep's folder."""
    changes: dict[str, Any] = {"overrides": ["train.epochs=4", "data.val=http://me:SECRET@host/val"], "trials": 2}
    changes["space"] = {"optim.lr": {"uniform": [1e-3, 2e-3]}}
    sweep = load_sweep(write(tmp_path, **(changes | options)))
    kept: Any = make_scheduler(sweep, 4.0, 1)
    if "searcher" in options:
        kept = OptunaSearch(sweep, Records(sweep), lambda record: {}, lambda error: False)
    assert b"SECRET" in cloudpickle.dumps(sweep) and b"SECRET" not in cloudpickle.dumps(kept)


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/train", "/none"])
def test_a_trial_is_tried_again_after_an_outage_and_not_after_a_mistake(
    place: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is the real one; Tune starts a trial again when `step` raises."""
    from launch.sweep.trial import Job, Trial

    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr("ray.get", lambda references: references)
    own = [f"data.train={place}", f"data.val={shards}/val", *SMALL]
    sweep = load_sweep(write(tmp_path, recipe=str(ROOT / "configs" / "demo.yaml"), overrides=own))
    environment = {"PYTHONPATH": str(ROOT), "ROOKERY_STORE_TRIES": "1", "ROOKERY_STORE_SECONDS": "5"}
    trial = object.__new__(Trial)
    trial._trial_info = SimpleNamespace(trial_name="x")
    told = {"name": "x", "values": {"optim.lr": 1e-3}, "length": [10, 5.0], "over": False}
    trial.setup({"trial": told}, Job(sweep, 0, (), 0, str(Path.cwd()), environment))
    if place == "/none":
        result = trial.step()
        assert (result["done"], result["ended"]) == (True, "failed") and "/none" in result["fault"]
    else:
        with pytest.raises(RuntimeError, match=r"exit status 1; .*\n.*127\.0\.0\.1:9/train.*: no success in 1 tries"):
            trial.step()


def test_an_outage_while_optuna_proposes_costs_no_trial(tmp_path: Path) -> None:
    from launch.sweep.search import OptunaSearch

    space = {"optim.lr": {"uniform": [0.0, 1.0]}}
    config = load_sweep(write(tmp_path, space=space, searcher="optuna", trials=2))
    prepare = Mock(side_effect=[Unreachable("gone"), {"trial": "first"}, {"trial": "second"}])
    search = OptunaSearch(config, Records(config), prepare, lambda error: False)
    assert [search.suggest(name) for name in "abc"] == [None, {"trial": "first"}, {"trial": "second"}]
    one, again, other = (call.args[0] for call in prepare.call_args_list)
    assert one is again and again.values != other.values
    assert [record.name for record in search._records.all()] == ["sweep-000", "sweep-001"]


def test_an_outage_while_planning_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_STORE_TRIES", "1")
    own = ["data.train=http://127.0.0.1:9/train"]
    sweep = load_sweep(write(tmp_path, recipe=str(ROOT / "configs" / "demo.yaml"), overrides=own))
    with pytest.raises(Unreachable, match=r"trial x \(lr=0\.001\): .*no success in 1 tries") as error:
        plan_trial(sweep, "x", {"optim.lr": 1e-3})
    assert error.value.status == 1


@pytest.mark.parametrize(
    ("recipe", "metric", "measured"),
    [
        ("demo.yaml", "f1", "top1, top5, loss"),
        ("nlp/demo.yaml", "top1", "accuracy, loss"),
        ("generate/nest_digits32.yaml", "fid_inception", "fid_small, is_small"),
    ],
)
def test_a_metric_is_one_that_the_recipe_measures(
    recipe: str, metric: str, measured: str, shards: Path, tmp_path: Path
) -> None:
    data = ["data.train=made:64", "data.val=made:16@1", f"data.cache={tmp_path}", "train.global_batch_size=2"]
    if not recipe.startswith("nlp/"):
        data = [f"data.train={shards}/train", f"data.val={shards}/val", "model.in_chans=3", *SMALL]
    if recipe.startswith("generate/"):
        data.append("task.discriminator.group=0")
    place = {"recipe": str(ROOT / "configs" / recipe), "overrides": data}
    said = f"metric={metric}: the evaluations of this run measure {measured}; choose one of them"
    with pytest.raises(UserError) as error:
        plan_trial(load_sweep(write(tmp_path, metric=metric, **place)), "x", {"seed": 1})
    assert str(error.value) == f"trial x (seed=1): {said}"
    for name in measured.split(", "):
        plan_trial(load_sweep(write(tmp_path, metric=name, **place)), "x", {"seed": 1})
