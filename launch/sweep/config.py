"""What a sweep is: one YAML file, as strict as a recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from pipeline.config_errors import explain
from pipeline.config_load import default_name, read_tree
from pipeline.config_section import Directory, Section, kind_alone
from pipeline.durations import Duration, Epochs
from pipeline.errors import UserError
from pipeline.tracking.metric_names import lower_is_better
from pipeline.tracking.redact import redact

Metric = Literal[
    "top1",
    "top5",
    "loss",
    "accuracy",
    "f1",
    "matthews",
    "spearman",
    "pearson",
    "fid_inception",
    "is_inception",
    "fid_small",
    "is_small",
]
# Of the keys that a recipe has too, these belong to the sweep: its folder, of which the runs are.
_BOTH = ("name", "out")


class Axis(Section):
    """How one key varies: exactly one of grid, choice, uniform, loguniform and randint."""

    grid: list[Any] | None = Field(None, min_length=1, description="every value, with every one of the other grids")
    choice: list[Any] | None = Field(None, min_length=1, description="one of these values, drawn")
    uniform: tuple[float, float] | None = Field(None, description="[low, high], drawn evenly")
    loguniform: tuple[float, float] | None = Field(None, description="[low, high], its logarithm drawn evenly")
    randint: tuple[int, int] | None = Field(None, description="[low, high], whole numbers, both included")
    when: dict[str, Any] = Field(
        default_factory=dict, description="only where keys above it have this value, or one of these"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [name for name in type(self).model_fields if name != "when" and getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError("write exactly one of grid, choice, uniform, loguniform, randint")
        low, high = self.uniform or self.loguniform or self.randint or (0, 1)
        if low >= high:
            raise ValueError(f"{kinds[0]}: [low, high] with low below high, not [{low:g}, {high:g}]")
        if self.loguniform and low <= 0:
            raise ValueError("loguniform: low must be above 0")
        return self

    @property
    def options(self) -> list[Any] | None:
        """The values of a grid or choice."""
        return self.grid or self.choice


class Fifo(Section):
    """Every trial runs to its end."""

    kind: Literal["fifo"] = "fifo"


class Asha(Section):
    """Asynchronous successive halving: at `grace`, `grace * factor`, ... only the best part goes on."""

    kind: Literal["asha"] = "asha"
    grace: Epochs = Field(Duration(1, "ep"), description="no trial is stopped before")
    factor: int = Field(3, ge=2, description="the best 1 / factor go on")


class Hyperband(Section):
    """Successive halving in brackets of several shortest lengths; trials wait for the others of their bracket."""

    kind: Literal["hyperband"] = "hyperband"
    grace: Epochs = Field(Duration(1, "ep"), description="least length of the shortest trials")
    factor: int = Field(3, ge=2, description="the best 1 / factor go on")


class Median(Section):
    """A trial is stopped when its best result is worse than the median of the others' means until then."""

    kind: Literal["median"] = "median"
    grace: Epochs = Field(Duration(1, "ep"), description="no trial is stopped before")
    least: int = Field(3, ge=1, description="other trials that must have got as far")


class Pbt(Section):
    """Population based training: after each round the worst go on from a good one's checkpoint, its values varied."""

    kind: Literal["pbt"] = "pbt"
    every: Epochs = Field(description="length of a round")
    quantile: float = Field(0.25, gt=0, le=0.5, description="part of the trials that takes over, and that gives")
    resample: float = Field(0.25, ge=0, le=1, description="how often a value is drawn anew rather than varied")
    factors: tuple[float, float] = Field((0.8, 1.25), description="what a number is multiplied with")


Scheduler = Annotated[Fifo | Asha | Hyperband | Median | Pbt, Field(discriminator="kind")]


class Searcher(Section):
    """Where the values of a trial come from."""

    kind: Literal["random", "grid", "optuna"] = Field(
        "random", description="random: grids in turn, the rest drawn; grid: grids only; optuna: from the results so far"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of all that is drawn")
    startup: int = Field(10, ge=1, description="optuna: trials that are drawn before results count")


class Resources(Section):
    """What a trial gets from the cluster."""

    nodes: int = Field(1, ge=1, description="nodes of a trial, each another machine")
    nproc: int = Field(1, ge=1, description="training processes on each of them")
    cpus: int = Field(1, ge=1, description="CPU cores of a process: its threads, and loaders beside them")
    gpus: Literal[0, 1] | None = Field(None, description="GPUs of a process; null: 1 where the cluster has any")

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc


class Budget(Section):
    """How much all trials may use together; then they save and the sweep ends. More of it, and the sweep goes on."""

    epochs: float | None = Field(None, gt=0, description="epochs of all trials")
    gpu_hours: float | None = Field(None, gt=0, description="hours of all processes (on CPU nodes too)")


class SweepConfig(Section):
    """A whole sweep."""

    name: str = Field(max_length=150, description="name of its folder")
    out: Directory = Field("runs", description="parent of its folder")
    recipe: str | list[str] = Field(description="recipe that varies, relative to this file; a list is one more grid")
    overrides: list[str] = Field(default_factory=list, description="key=value, the same for all trials")
    space: dict[str, Axis] = Field(default_factory=dict, description="keys of the recipe, and how each varies")
    trials: int | None = Field(None, ge=1, description="how many; null: one for each point of the grids")
    metric: Metric = Field("top1", description="figure of an evaluation that judges")
    goal: Literal["max", "min"] | None = Field(None, description="null: the least loss or FID, the most of the others")
    scheduler: Annotated[Scheduler, BeforeValidator(kind_alone)] = Fifo()
    searcher: Annotated[Searcher, BeforeValidator(kind_alone)] = Searcher()
    resources: Resources = Resources()
    concurrent: int | None = Field(None, ge=1, description="trials at a time; null: as many as fit")
    budget: Budget = Budget()
    failures: int = Field(3, ge=0, description="how often a trial is started again after it, or its node, has died")

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("a name has letters, digits, '.', '_' and '-', and starts with a letter or digit")
        return value

    @field_validator("recipe")
    @classmethod
    def _some_recipe(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("name the recipe that varies")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        conflicts = [*self._about_the_space(), *self._about_the_scheduler()]
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self

    def _about_the_space(self) -> list[str]:
        found = []
        above: dict[str, Axis] = {}
        for key, axis in self.space.items():
            if key in _BOTH:
                found.append(f"space.{key}: the runs are named by the sweep; vary another key")
            for other in axis.when:
                if other not in above:
                    found.append(f"space.{key}.when: {other} is no key of the space above it")
                elif axis.grid and not above[other].grid:
                    found.append(f"space.{key}: a grid can depend on grids only, and {other} is drawn; write choice")
            above[key] = axis
            if _only_credentials_differ(axis.options or []):
                found.append(f"space.{key}: two values differ in credentials alone; leave one out")
        drawn = [key for key, axis in above.items() if not axis.grid]
        if self.searcher.kind == "grid" and (drawn or self.trials):
            reason = f"space.{drawn[0]} is drawn" if drawn else "trials follows from the grids"
            found.append(f"searcher=grid: {reason}; use searcher=random, or write a grid and leave trials out")
        if not above and isinstance(self.recipe, str):
            found.append("space is empty: name the keys that vary")
        if self.trials is None and (drawn or self.searcher.kind == "optuna"):
            found.append("trials is missing: say how many trials to draw")
        return found

    def _about_the_scheduler(self) -> list[str]:
        found = []
        # Tune makes a trial only when another one is over, and one that waits is not.
        waits = isinstance(self.scheduler, Pbt | Hyperband)
        from launch.sweep.space import axes, grid_points  # which needs this module

        trials = self.trials or len(grid_points(axes(self)))
        if waits and self.concurrent is not None and self.concurrent < trials:
            found.append(
                f"scheduler={self.scheduler.kind} lets trials wait for each other, and with "
                f"concurrent={self.concurrent} most would never meet: leave concurrent out, or raise it to the "
                "number of trials; as many as fit run at a time, so larger resources let fewer"
            )
        if not isinstance(self.scheduler, Pbt):
            return found
        found += [
            f"scheduler=pbt varies values again and again: space.{key} can't be a grid or have a `when`"
            for key, axis in self.space.items()
            if axis.grid or axis.when
        ]
        if isinstance(self.recipe, list):
            found.append("scheduler=pbt moves weights from trial to trial: all must have one recipe")
        if self.searcher.kind != "random":
            found.append("scheduler=pbt chooses by itself: leave the searcher out")
        if self.trials is not None and self.trials < 2:
            found.append("scheduler=pbt needs several trials")
        return found

    @property
    def is_max(self) -> bool:
        """Whether a higher metric is better."""
        return (self.goal or ("min" if lower_is_better(self.metric) else "max")) == "max"

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep and apply `key=value` overrides: keys of a sweep change it, all others its recipe.

    Raises:
        UserError: unreadable file, unknown key, a value or combination that can't be.
    """
    own = [o for o in overrides if re.split(r"[.=]", o, maxsplit=1)[0].strip() in SweepConfig.model_fields]
    recipe = [o for o in overrides if o not in own]
    tree, places = read_tree(path, own)
    in_file = {keys[0] for keys, place in places.items() if place != "override"}
    if "model" in in_file and not in_file & {"recipe", "space"}:
        raise UserError(f"{path}: this is a recipe: rookery train {path}; a sweep names one as its recipe")
    tree.setdefault("name", default_name(Path(path)))
    if isinstance(written := tree.get("overrides") or [], list):  # anything else is a mistake to be told of
        tree["overrides"] = [*written, *recipe]
    try:
        config = SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, tree, str(path), places, SweepConfig)) from error
    for override in config.overrides:
        key = override.partition("=")[0]
        if key in config.space:
            raise UserError(f"override {override!r}: space.{key} varies this key; change that")
        if key in _BOTH:
            raise UserError(f"override {override!r}: the runs are named by the sweep; set {key} in it")
    return config.model_copy(update={"recipe": _beside(Path(path), config.recipe)})


def _only_credentials_differ(options: list[Any]) -> bool:
    return len({repr(option) for option in options}) > len({repr(redact(option)) for option in options})


def _beside(path: Path, recipe: str | list[str]) -> str | list[str]:
    """Recipes as paths from here."""
    if isinstance(recipe, list):
        return [os.path.relpath(path.parent / one) for one in recipe]
    return os.path.relpath(path.parent / recipe)
