"""Running a sweep: Tune decides what runs where, this writes down what becomes of it, and ends it in order."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import ray
from ray import tune
from ray.tune.stopper import Stopper

from launch.slurm_script import ENVIRONMENT
from launch.sweep.cluster import ClusterFacts, NodeNames
from launch.sweep.config import Metric, SweepConfig
from launch.sweep.milestones import Calendar, Length
from launch.sweep.plan import plan_trial
from launch.sweep.records import Record, Records
from launch.sweep.rounds import begun_round, left_to_take
from launch.sweep.schedulers import make_scheduler
from launch.sweep.search import OptunaSearch
from launch.sweep.space import hidden, revealed, shown
from launch.sweep.table import Progress
from launch.sweep.take_over import GIVEN
from launch.sweep.trial import LEAVE, Job, Trial
from pipeline.errors import Unreachable, UserError
from pipeline.train.status import FAILED, INTERRUPTED
from pipeline.train.stop import STATUS, catch_signals
from pipeline.wording import counted

_TUNE = "tune"
_VARIABLES = ("MLFLOW_TRACKING_URI", "PYTHONPATH")


def run_sweep(config: SweepConfig, records: Records, calendar: Calendar, facts: ClusterFacts) -> int:
    """Run all trials that are not over.

    Args:
        records: the trials; a searcher that waits for results adds to them.

    Returns:
        The exit status: 0, 1 when trials failed, 130 or 75 when a signal ended it.
    """
    folder = records.folder
    records.save()
    (folder / LEAVE).unlink(missing_ok=True)
    shutil.rmtree(folder / _TUNE, ignore_errors=True)
    lengths = calendar.lengths
    is_pbt = config.scheduler.kind == "pbt"
    first_round = begun_round(records, calendar) if is_pbt else 1
    left = left_to_take(records) if is_pbt else {}
    environment = {k: v for k, v in os.environ.items() if k in _VARIABLES or k.startswith(ENVIRONMENT)}
    job = Job(config, facts.gpus, tuple(calendar.milestones), first_round, str(Path.cwd()), environment)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(records, lengths))
        watch = Watch(config, records, progress, NodeNames(ray))
        searcher = _searcher(config, records, lengths, watch)
        configs = [tune_config(record, lengths[record.name]) | left.get(record.name, {}) for record in records.all()]
        trainable = tune.with_resources(
            tune.with_parameters(Trial, job=job),
            tune.PlacementGroupFactory(
                [job.bundle()] * config.resources.nodes,
                strategy="STRICT_SPREAD" if config.resources.nodes > 1 else "PACK",
            ),
        )
        tuner = tune.Tuner(
            trainable,
            param_space={} if searcher else {"trial": tune.grid_search(configs)},
            tune_config=tune.TuneConfig(
                scheduler=make_scheduler(config, calendar.epochs, first_round),
                search_alg=searcher,
                num_samples=config.trials or 1 if searcher else 1,
                max_concurrent_trials=config.concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["trial"]["name"],
                trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
            ),
            run_config=tune.RunConfig(
                name=_TUNE,
                storage_path=str(folder.resolve()),
                stop=_Stopper(watch),
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=config.failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_frequency=1),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        finally:
            watch.close()
        progress.print_result()
    if all(record.is_over for record in records.all()):
        for name in (_TUNE, GIVEN):
            shutil.rmtree(folder / name, ignore_errors=True)
    return watch.status()


def tune_config(record: Record, length: Length) -> dict[str, Any]:
    """What an actor has to know of its trial. Tune writes it down, so it has no credentials."""
    return {
        "name": record.name,
        "values": hidden(record.values),
        "length": list(length),
        "over": record.is_over,
        "told": int(record.figures.get("step", 0)),
    }


def _searcher(config: SweepConfig, records: Records, lengths: dict[str, Length], watch: Watch) -> OptunaSearch | None:
    if config.searcher.kind != "optuna":
        return None

    def prepare(record: Record) -> dict[str, Any]:
        try:
            lengths[record.name], _ = plan_trial(config, record.name, record.values)
        except Unreachable:
            raise
        except UserError as error:
            # Only this combination can't be; the run says so again, and the searcher learns that it fails.
            watch.progress.say(f"rookery: {error}")
            lengths[record.name] = Length(1, 1)
        watch.note_plan()
        return {"trial": tune_config(record, lengths[record.name])}

    return OptunaSearch(config, records, prepare, watch.gives_up)


class Watch(tune.Callback):
    """Keeps `sweep.json` and the table, and ends the sweep when a signal or the budget says so.

    Ending means: a file tells the actors, wherever they are; their runs save and end; then Tune may end too.
    """

    def __init__(self, config: SweepConfig, records: Records, progress: Progress, nodes: NodeNames) -> None:
        self.progress = progress
        self._nodes = nodes
        self._config, self._records = config, records
        self._leaving: int | None = None
        self._awaited: set[str] = set()
        self._signal: int | None = None
        self._outages, self._has_told = 0, False
        self._is_idle = True
        self._has_given_up = False
        self._before: dict[int, Any] = {}
        self._clock = time.monotonic()

    def setup(self, *_: Any, **__: Any) -> None:
        """After Tune has installed its own handlers."""
        self._before = catch_signals(self._note)

    def close(self) -> None:
        """Put the signal handlers back, and write down what is left."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for record in self._records.all():
            if record.state in ("running", "paused"):
                record.state = "interrupted"
        self._records.save()

    def status(self) -> int:
        """The exit status of the sweep."""
        records = self._records.all()
        if self._leaving is None and self._signal is not None and not all(record.is_over for record in records):
            return STATUS[self._signal]  # it came where the sweep has ended without passing it on
        failed = [record for record in records if record.state == "failed"]
        return self._leaving or (FAILED if failed or self._has_given_up else 0)

    def note_plan(self) -> None:
        """The plan of a new trial could be made."""
        self._outages, self._has_told = 0, False

    def gives_up(self, error: Unreachable) -> bool:
        """Whether the sweep ends because a store is out of reach for the plan of a new trial, for so many tries of it.

        While other trials run, it waits: they go on. A signal ends it too, for Tune itself may be waiting here.
        """
        if self._signal is not None:
            return True
        self._outages += self._is_idle
        if self._outages <= self._config.failures or not self._is_idle:
            if not self._has_told:
                self.progress.say(f"rookery: {error}; it is tried again")
            self._has_told = True
            return False
        if not self._has_given_up:
            tries = counted(self._outages, "time")
            self.progress.say(f"rookery: {error}; tried {tries}, and no trial runs: the same command goes on")
        self._has_given_up = True
        return True

    def all_have_left(self) -> bool:
        """Whether the sweep is to end and no run is left that might still save."""
        return self._leaving is not None and not self._awaited

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def _leave(self, status: int, why: str, trials: list[Any]) -> None:
        if self._leaving is None:
            self._leaving = status
            self._awaited = {str(trial) for trial in trials if trial.status == "RUNNING"}
            (self._records.folder / LEAVE).touch()
            self.progress.say(f"{why}: trials save and end; the same command goes on")

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        running = {str(trial) for trial in trials if trial.status == "RUNNING"}
        self._is_idle = all(trial.status not in ("PENDING", "RUNNING") for trial in trials)
        now = time.monotonic()
        hours = (now - self._clock) / 3600 * len(running) * self._config.resources.world_size
        self._records.gpu_hours += hours
        self._clock = now
        self._awaited &= running
        budget = self._config.budget
        if self._signal is not None:
            self._leave(STATUS[self._signal], signal.Signals(self._signal).name, trials)
        elif budget.epochs is not None and self._records.epochs() >= budget.epochs:
            self._leave(0, f"budget.epochs={budget.epochs:g} is used up", trials)
        elif budget.gpu_hours is not None and self._records.gpu_hours >= budget.gpu_hours:
            self._leave(0, f"budget.gpu_hours={budget.gpu_hours:g} is used up", trials)
        for trial in trials:
            record = self._records.get(str(trial))
            if trial.status == "PAUSED" and record.state == "running":
                record.state = "paused"
        self.progress.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of what it was given, for restarts of its own, which sweeps don't use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._records.get(str(trial))
        values = revealed(self._config, trial.config["trial"]["values"])
        if values != record.values:
            self.progress.say(f"{record.name} takes over, with {shown(values)}")
            record.values = values
        if not record.is_over:
            record.state = "running"
            self._records.save()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self._records.get(str(trial))
        if result["step"] == 0 or record.is_over:
            return
        record.nodes = [self._nodes.name(node) for node in result["nodes"]]
        if result["step"] > record.figures.get("step", -1):
            figures = ("step", "epoch", *get_args(Metric), "images_per_second")
            self._records.note(record, {key: result[key] for key in figures if result.get(key) is not None})
            self.progress.evaluated(record)
        self._records.save()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record, result = self._records.get(str(trial)), trial.last_result or {}
        if record.is_over:
            return
        ended = result.get("ended")
        if ended in ("finished", "failed"):
            record.state = ended
        elif ended == "left" or self._leaving is not None:
            record.state = "interrupted" if record.state != "waiting" else "waiting"
        else:
            record.state = "stopped"
        record.fault = result.get("fault")
        self._records.save()
        about = f": {record.fault}" if record.fault else ""
        if record.state != "waiting":
            self.progress.say(f"{record.name} {record.state} ({shown(record.values)}){about}")
        if ended == "left" and self._leaving is None:
            # Not asked by this sweep: the job that its nodes belong to is ending.
            self._leave(result.get("status", INTERRUPTED), f"{record.name} was asked to leave", trials)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._records.get(str(trial))
        record.failures += 1
        record.state = "waiting"
        self._records.save()
        self.progress.say(f"{record.name} died, goes on from its newest checkpoint: {_reason(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._records.get(str(trial))
        record.failures += 1
        record.state, record.fault = "failed", _reason(trial)
        self._records.save()
        self.progress.say(f"{record.name} failed ({shown(record.values)}): {record.fault}")


class _Stopper(Stopper):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._watch.all_have_left()

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _reason(trial: Any) -> str:
    """Why a trial died, without Ray's stack."""
    try:
        error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    except (OSError, TypeError, pickle.PickleError):
        return "no reason known"
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, RuntimeError) else (str(error).strip() or repr(error)).splitlines()[0]
