"""Optuna as a searcher of Tune: it proposes values from the results so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from launch.sweep.config import SweepConfig
from launch.sweep.records import Record, Records
from launch.sweep.space import Values, axes, draw
from pipeline.errors import Unreachable, UserError
from pipeline.hashing import hash64


class OptunaSearch(Searcher):
    """Proposes the trials that the sweep has already, then new ones.

    A sweep that is started again asks for its old trials first, with the values that they have; their results come
    anew, out of their run directories.

    Args:
        config: the sweep.
        records: its trials; new ones are added.
        prepare: makes Tune's config of a trial, or says why it can't run; `Unreachable` where that isn't known now.
        gives_up: whether no trial is to be started any more after such an outage.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(
        self,
        config: SweepConfig,
        records: Records,
        prepare: Callable[[Record], dict[str, Any]],
        gives_up: Callable[[Unreachable], bool],
    ) -> None:
        super().__init__(metric=config.metric, mode="max" if config.is_max else "min")
        direction = "maximize" if config.is_max else "minimize"
        self._study = _optuna().create_study(direction=direction)
        self._config, self._records = config, records
        self._prepare, self._gives_up = prepare, gives_up
        self._asked: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> Any:
        """Tune's config of the next trial; None: not now; `FINISHED`: no more of them."""
        known, count = self._records.all(), len(self._asked)
        record = known[count] if count < len(known) else self._records.add(self._proposed(count))
        # New ones too: the study is to know the values that trials have, which are shorter than those it proposes.
        self._study.enqueue_trial(_as_params(self._config, record.values))
        asked = self._asked[trial_id] = self._study.ask()
        draw(axes(self._config), _Asking(asked), {})
        try:
            return self._prepare(record)
        except Unreachable as error:  # Tune asks again later, and gets the same trial
            self._study.tell(self._asked.pop(trial_id), state=_optuna().trial.TrialState.FAIL)
            return Searcher.FINISHED if self._gives_up(error) else None

    def _proposed(self, number: int) -> Values:
        """The values of a new trial: a function of the seed, its number, and the results so far.

        The generator of one study for all would begin anew when the sweep does, and propose its first trials again.
        """
        searcher, optuna = self._config.searcher, _optuna()
        self._study.sampler = optuna.samplers.TPESampler(
            seed=int(hash64(searcher.seed, number) % 2**32), n_startup_trials=searcher.startup, constant_liar=True
        )
        asked = self._study.ask()
        values = draw(axes(self._config), _Asking(asked), {})
        self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return values

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
