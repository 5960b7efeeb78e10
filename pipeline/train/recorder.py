"""Rank 0's side of a run: the run directory, metrics.jsonl, the MLflow mirror and what is printed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.kernels import asked_for
from pipeline.resolve import Resolved
from pipeline.tracking.background import BackgroundMirror
from pipeline.tracking.confusion import BEST_NAME, NEWEST_NAME, Confusion
from pipeline.tracking.files import file_reference
from pipeline.tracking.metrics import METRICS_NAME, Kind, MetricsLog
from pipeline.tracking.mirror_state import STATE_NAME
from pipeline.tracking.redact import redact
from pipeline.tracking.run_dir import QUARANTINE_NAME, EndStatus, RunDir, has_begun
from pipeline.tracking.system import SystemSampler
from pipeline.train.distributed import World
from pipeline.train.engines import Engine
from pipeline.train.export import WEIGHTS, save_weights
from pipeline.train.meters import BadStep
from pipeline.train.progress import Reporter
from pipeline.train.quarantine import Quarantine
from pipeline.train.same_run import check_same_run, facts
from pipeline.train.state import State
from pipeline.wording import counted

log = logging.getLogger("rookery")

# How long the end waits for MLflow: for what is left of the metrics, and for a model to be traced and uploaded.
_UPLOAD_SECONDS, _MODEL_SECONDS = 30.0, 180.0
# Samples of a bad step that a line names.
_NAMED = 3


class Recorder:
    """Writes down and prints what happens, on rank 0; on other ranks every method does nothing.

    Use `Recorder.open`.
    """

    def __init__(self, run: Resolved, run_dir: RunDir | None, metrics: MetricsLog | None) -> None:
        self.run, self.run_dir, self.metrics = run, run_dir, metrics
        self.path = Path(run.config.out) / run.config.name
        self._report = Reporter(run_dir is not None, run.plan.end_step, run.task.unit)
        self._before, self._began = 0.0, time.monotonic()

    @classmethod
    def open(cls, run: Resolved, world: World, stack: ExitStack) -> Recorder:
        """Lock the run directory and start the background work of the record; collective. `stack` ends both.

        Raises:
            UserError: another process writes the directory, or it holds another run.
        """
        opened: list[Recorder] = []

        def on_main() -> None:
            check_same_run(Path(run.config.out) / run.config.name, run)
            opened.append(stack.enter_context(_open(run)))

        world.on_main(on_main)
        return opened[0] if opened else cls(run, None, None)

    def start(self, state: State, world: World) -> None:
        """Say that training starts, or goes on, at the state's step."""
        self._before = state.seconds
        if self.run_dir is None or self.metrics is None:
            return
        self.metrics.rewind(state.step)
        self.run_dir.start_session(world_size=world.size, resumed_from=state.step or None)
        self._report.begin(state.step)
        if state.step:
            self._report.say(f"continuing {self.path} after step {state.step}")
        if state.step >= self.run.plan.log_every and not self.metrics.step:
            lost = f"{METRICS_NAME} has nothing about the {state.step:,} steps so far"
            self._report.say(f"{lost}; if it was moved away, stop, put it back and start again")
        if world.device.type == "cpu" and asked_for(self.run.config.model.options):
            self._report.say("kernels=triton: this is no GPU, so PyTorch computes the same by its own operations")

    def advance(self, step: int) -> None:
        self._report.advance(step)

    def seconds(self) -> float:
        """Time spent on the run, over all starts."""
        return self._before + time.monotonic() - self._began

    def bad_samples(self, state: State, quarantine: Quarantine) -> None:
        """Bad samples that were met since the last call; collective.

        Raises:
            UserError: there are more than tolerated.
        """
        news = quarantine.collect()
        if news is not None:
            self._report.say(f"step {state.step}: {news}")

    def train(self, state: State, lr: float, figures: dict[str, float], bad: list[BadStep], bad_samples: int) -> None:
        """One window of steps: figures for metrics.jsonl and a line for the reader."""
        self._log("train", state.step, lr=lr, skipped=state.skipped, bad_samples=bad_samples, **figures)
        self._report.step(state.step, self.run.plan.epoch(state.step), lr, figures)
        if bad:
            # The log counts steps from 1: "step 5" is the one that makes them five.
            named = [(step + 1, by_rank) for step, by_rank in bad]
            causes = [{"step": step, "rank": rank, "keys": keys} for step, by in named for rank, keys in by.items()]
            self._log("event", state.step, event="skipped", steps=[step for step, _ in named], causes=causes)
            for step, by_rank in named:
                self._report.say(_skipped(step, by_rank))

    def rolled_back(self, state: State, loss: float) -> None:
        """The loss spiked; where training went back to, if it did so now."""
        if state.rollbacks and state.rollbacks[-1][1] == state.step:
            checkpoint = state.rollbacks[-1][0]
            self._log("event", state.step, event="rolled_back", loss=loss, checkpoint=checkpoint)
            self._report.say(
                f"step {state.step}: the loss spiked ({loss:.4f}); back to the checkpoint of step {checkpoint}, and on "
                f"with the samples after step {state.step}"
            )

    def evaluation(self, state: State, engine: Engine, confusion: Confusion | None) -> None:
        """Figures of the evaluation at the state's step; the weights too, when they are the best so far. Collective."""
        assert state.last is not None, "called after an evaluation"
        figures = {k: v for k, v in state.last.items() if k != "step"}
        self._log("eval", state.step, **figures)
        measured = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name != "count")
        self._report.say(f"step {state.step}  {measured}  of {counted(int(figures['count']), 'sample')}")
        is_best = state.best == state.last
        if confusion is not None:
            self._save_confusion(confusion, state.step, is_best)
        if is_best:
            try:
                save_weights(self.path / "best", engine, self.run.task, self.run.train.classes, figures)
            except UserError as error:
                log.warning(
                    "the best weights so far, of step %d, are not saved: %s; training goes on", state.step, error
                )

    def _save_confusion(self, confusion: Confusion, step: int, is_best: bool) -> None:
        if self.run_dir is None:
            return
        for name in (NEWEST_NAME, BEST_NAME) if is_best else (NEWEST_NAME,):
            try:
                confusion.save(self.path / name, self.run.train.classes, step)
            except UserError as error:
                log.warning("the confusion matrix of step %d is not saved: %s; training goes on", step, error)

    def finish(self, state: State, engine: Engine, bad_samples: int) -> dict[str, Any]:
        """Write the final weights and `result.json`; collective."""
        config = self.run.config
        # An older evaluation says nothing of these weights.
        last = state.last if state.last is not None and state.last["step"] == state.step else {}
        save_weights(self.path / "final", engine, self.run.task, self.run.train.classes, last)
        result = {
            **{k: v for k, v in last.items() if k != "step"},
            "step": state.step,
            "samples": state.step * self.run.order.batch,
            **({} if state.best is None else {"best": state.best}),
            "params": self.run.params,
            "skipped": state.skipped,
            "bad_samples": bad_samples,
            "wall_seconds": state.seconds,
        }
        if self.run_dir is not None:
            self.run_dir.write_result(result)
            names = ["final"] + (["best"] if (self.path / "best" / WEIGHTS).exists() else [])
            self.run_dir.write_checkpoints({name: file_reference(self.path / name / WEIGHTS) for name in names})
            best = self.run.task.best.figure
            measured = f" {best}={last[best]:.4f}" if last else ""
            self._report.end()
            if not self.run.plan.is_whole:
                self._report.say(
                    f"stopped after step {state.step} of {self.run.plan.total_steps}, as train.stop_after="
                    f"{config.train.stop_after} says; the same command with a later one, or without it, goes on"
                )
            if bad_samples:
                self._report.say(
                    f"{counted(bad_samples, 'bad sample')} replaced by others, listed in "
                    f"{self.path / QUARANTINE_NAME}; `rookery verify --quarantine {self.path}` tries them again"
                )
            self._report.say(f"run={self.path}{measured}")
        return result

    def _log(self, kind: Kind, step: int, **values: Any) -> None:
        if self.metrics is not None:
            samples = step * self.run.order.batch
            self.metrics.log(kind, step, samples=samples, epoch=self.run.plan.epoch(step), **values)


@contextmanager
def _open(run: Resolved) -> Iterator[Recorder]:
    config = run.config
    tree = config.model_dump(mode="json")
    path = Path(config.out) / config.name
    takes_over = RunDir.saved_config(path) not in (None, redact(tree)) and not has_begun(path)
    with ExitStack() as stack:
        run_dir = stack.enter_context(RunDir.open(path, tree, facts(run)))
        if takes_over:  # MLflow's run has the parameters of the config that was here, and keeps them
            (path / STATE_NAME).unlink(missing_ok=True)
        mirror = _start_mirror(run, run_dir)
        metrics = MetricsLog(run_dir.path)
        sampler = SystemSampler(partial(_log_system, metrics), config.tracking.system_seconds)
        recorder = Recorder(run, run_dir, metrics)
        status: EndStatus = "failed"
        try:
            yield recorder
            status = "finished" if run.plan.is_whole else "stopped"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            sampler.close()
            recorder._report.end()
            metrics.close()
            run_dir.end_session(status)
            if mirror is not None:
                registers = status == "finished" and config.tracking.register_model is not None
                mirror.close(status, _MODEL_SECONDS if registers else _UPLOAD_SECONDS)
        run_dir.close(status)


def _skipped(step: int, causes: dict[int, list[str]]) -> str:
    """A line about a step without an update."""
    if not causes:
        return f"skipped step {step}: a gradient was NaN or infinite, the losses were not"
    owners = (f"rank {rank} ({_few(keys)})" for rank, keys in causes.items())
    return f"skipped step {step}: the loss was NaN or infinite on {', '.join(owners)}; metrics.jsonl names all samples"


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _log_system(metrics: MetricsLog, figures: dict[str, Any]) -> None:
    metrics.log("system", **figures)


def _start_mirror(run: Resolved, run_dir: RunDir) -> BackgroundMirror | None:
    tracking = run.config.tracking
    if not tracking.mlflow:
        return None
    tags = {
        "model": run.config.model.name,
        "dataset": redact(run.config.data.train),
        "dataset_fingerprint": run.train.fingerprint()[:16],
    }
    return BackgroundMirror(run_dir.path, tracking.uri, tracking.experiment, run.config.name, tags)
