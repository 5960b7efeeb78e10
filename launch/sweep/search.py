"""Optuna as a searcher of Tune: it proposes values from the results so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from launch.sweep.config import SweepConfig
from launch.sweep.records import Record, Records
from launch.sweep.space import Values, axes, draw
from pipeline.errors import Unreachable, UserError


class OptunaSearch(Searcher):
    """Proposes the trials that the sweep has already, then new ones.

    A sweep that is started again asks for its old trials first, with the values that they have; their results come
    anew, out of their run directories.

    Args:
        config: the sweep.
        records: its trials; new ones are added.
        prepare: makes Tune's config of a trial, or says why it can't run; `Unreachable` where that isn't known now.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, config: SweepConfig, records: Records, prepare: Callable[[Record], dict[str, Any]]) -> None:
        super().__init__(metric=config.metric, mode="max" if config.is_max else "min")
        optuna = _optuna()
        sampler = optuna.samplers.TPESampler(
            seed=config.searcher.seed, n_startup_trials=config.searcher.startup, constant_liar=True
        )
        direction = "maximize" if config.is_max else "minimize"
        self._study = optuna.create_study(sampler=sampler, direction=direction)
        self._config, self._records, self._prepare = config, records, prepare
        self._asked: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        known, count = self._records.all(), len(self._asked)
        if count < len(known):
            self._study.enqueue_trial(_as_params(self._config, known[count].values))
        asked = self._asked[trial_id] = self._study.ask()
        values = draw(axes(self._config), _Asking(asked), {})
        record = known[count] if count < len(known) else self._records.add(values)
        try:
            return self._prepare(record)
        except Unreachable:  # Tune asks again later, and gets the same trial
            self._study.tell(self._asked.pop(trial_id), state=_optuna().trial.TrialState.FAIL)
            return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked = self._asked[trial_id]
        value = None if result is None or result.get("ended") in ("failed", "left") else result.get(self._config.metric)
        if error or value is None:
            self._study.tell(asked, state=_optuna().trial.TrialState.FAIL)
        else:
            self._study.tell(asked, value)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing either: Tune would keep a copy, and with it the credentials of addresses."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""


class _Asking:
    """A `Chooser` that asks Optuna."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def option(self, key: str, count: int) -> int:
        return self._trial.suggest_categorical(key, list(range(count)))

    def number(self, key: str, low: float, high: float, log: bool) -> float:
        return self._trial.suggest_float(key, low, high, log=log)

    def integer(self, key: str, low: int, high: int) -> int:
        return self._trial.suggest_int(key, low, high)


def _as_params(config: SweepConfig, values: Values) -> dict[str, Any]:
    """Values as Optuna knows them: of options their place."""
    space = axes(config)
    options = {key: space[key].options for key in values}
    return {key: value if (known := options[key]) is None else known.index(value) for key, value in values.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("searcher=optuna needs Optuna: pip install 'rookery[ray]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
