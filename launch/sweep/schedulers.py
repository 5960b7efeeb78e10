"""The schedulers: Tune's own, and population based training in rounds."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from launch.sweep.config import Asha, Axis, Hyperband, Median, Pbt, SweepConfig
from launch.sweep.milestones import hyperband_halvings
from launch.sweep.rounds import write_round
from launch.sweep.space import Hashed, Values, choose

_OVER = ("TERMINATED", "ERROR")


def make_scheduler(config: SweepConfig, epochs: float, first_round: int) -> TrialScheduler:
    """The scheduler of a sweep.

    Args:
        epochs: length of a trial.
        first_round: the round that the trials are in, for population based training; 1 at the beginning.
    """
    wanted = config.scheduler
    judged: dict[str, Any] = {"time_attr": "time", "metric": config.metric, "mode": "max" if config.is_max else "min"}
    if isinstance(wanted, Asha):
        lengths: dict[str, Any] = {"grace_period": wanted.grace.value, "max_t": epochs}
        return _Asha(**judged, **lengths, reduction_factor=wanted.factor)
    if isinstance(wanted, Hyperband):
        # Rounded down there, where a power of the factor may come out a little too small.
        longest = wanted.factor ** hyperband_halvings(wanted, epochs) + 1e-6
        return HyperBandScheduler(**judged, max_t=longest, reduction_factor=wanted.factor)
    if isinstance(wanted, Median):
        # Without yielding to others in between: a pause costs a start.
        never: Any = float("inf")
        return _Median(
            **judged, grace_period=wanted.grace.value, min_samples_required=wanted.least, min_time_slice=never
        )
    return Rounds(config, wanted, first_round) if isinstance(wanted, Pbt) else FIFOScheduler()


class _Asha(AsyncHyperBandScheduler):
    """Stops no trial at a result of an earlier start after which it went on: then fewer had come there."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get("is_passed") else action


class _Median(MedianStoppingRule):
    """Likewise."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        if result.get("is_passed"):
            self._stopped_trials.discard(trial)
            return TrialScheduler.CONTINUE
        return action


class Rounds(FIFOScheduler):
    """Population based training: who has finished a round waits for all others; then the worst take over.

    Who takes over from whom, and the values that come out, are a function of the sweep's seed, the round and the
    trials' results, so that a sweep which is killed before it has written a round down decides the same.

    Args:
        config: the sweep.
        wanted: its scheduler.
        first_round: see `make_scheduler`.
    """

    def __init__(self, config: SweepConfig, wanted: Pbt, first_round: int) -> None:
        super().__init__()
        self._config, self._wanted = config, wanted
        self._round = first_round
        self._done: dict[str, int] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune would keep a copy, and with it the credentials of addresses."""
        return {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._done.setdefault(str(trial), self._round - 1)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = str(trial)
        if result["time"] <= self._done[name]:
            return TrialScheduler.CONTINUE
        self._done[name], self._results[name] = result["time"], result
        self._end_round(tune_controller.get_trials())
        return TrialScheduler.PAUSE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if not trial.should_recover():
            self._end_round([other for other in tune_controller.get_trials() if other is not trial])

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._end_round([other for other in tune_controller.get_trials() if other is not trial])

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        waiting = [t for t in tune_controller.get_trials() if t.status in ("PENDING", "PAUSED")]
        return next((trial for trial in waiting if self._done[str(trial)] < self._round), None)

    def _end_round(self, trials: list[Any]) -> None:
        """Once all trials that are left have finished it."""
        left = [trial for trial in trials if trial.status not in _OVER]
        if not left or any(self._done[str(trial)] < self._round for trial in left):
            return
        sign = 1 if self._config.is_max else -1
        ranked = sorted(left, key=lambda trial: (sign * self._results[str(trial)][self._config.metric], str(trial)))
        count = min(max(1, round(len(ranked) * self._wanted.quantile)), len(ranked) // 2)
        best = ranked[len(ranked) - count :]
        takes = {}
        for number, trial in enumerate(ranked[:count]):
            draws = Hashed(self._config.searcher.seed, self._round, number)
            donor = best[draws.option("donor", count)]
            takes[str(trial)] = self._taken(donor, draws)
        write_round(self._config.folder, self._round, self._results[str(ranked[0])]["step"], takes)
        for trial in ranked[:count]:
            trial.set_config({"trial": trial.config["trial"] | takes[str(trial)]})
        self._round += 1

    def _taken(self, donor: Any, draws: Hashed) -> dict[str, Any]:
        step = self._results[str(donor)]["step"]
        values = varied(donor.config["trial"]["values"], self._config.space, self._wanted, draws)
        return {
            "values": values,
            "take_over": {"donor": str(donor), "step": step, "ticket": f"round {self._round}"},
        }


def varied(values: Values, space: dict[str, Axis], wanted: Pbt, draws: Hashed) -> Values:
    """Values near the given ones: numbers times a factor, within their range, choices one place on; or new ones."""
    new = {}
    for key, axis in space.items():
        old = values[key]
        if draws.uniform(f"{key} anew") < wanted.resample:
            new[key] = choose(key, axis, draws)
        elif axis.options is not None:
            place = axis.options.index(old) + (1 if draws.option(f"{key} side", 2) else -1)
            new[key] = axis.options[min(max(place, 0), len(axis.options) - 1)]
        else:
            factor = wanted.factors[draws.option(f"{key} side", 2)]
            low, high = axis.uniform or axis.loguniform or axis.randint or (old, old)
            moved = min(max(float(f"{old * factor:.4g}"), low), high)
            new[key] = round(moved) if axis.randint else moved
    return new
