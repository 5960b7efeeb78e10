"""The training loop: every run goes through `train`, on every process."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.resolve import resolve
from pipeline.train.checkpoint import Checkpoint, CheckpointStore
from pipeline.train.determinism import use_deterministic_kernels
from pipeline.train.distributed import World
from pipeline.train.engines import Engine
from pipeline.train.garbage import collected_by_hand
from pipeline.train.meters import StepMeter
from pipeline.train.profile import open_profiler
from pipeline.train.quarantine import Quarantine
from pipeline.train.recorder import Recorder
from pipeline.train.saver import Saver
from pipeline.train.setup import check_same_command
from pipeline.train.spikes import WINDOWS, is_spike, roll_back
from pipeline.train.state import State
from pipeline.train.step import seed_step
from pipeline.train.stop import Stopped, StopRequest
from pipeline.train.trace import open_trace
from pipeline.train.walltime import leave_at
from pipeline.train.watchdog import Watchdog


def train(config: RunConfig, world: World) -> dict[str, Any]:
    """Train from the newest checkpoint, or from scratch, to the end; collective.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: the data, the run directory or a checkpoint does not allow it.
        Stopped: a signal or a job's time limit asked for it; a checkpoint is saved.
    """
    run = resolve(config, world.size)
    config, plan, task = run.config, run.plan, run.task
    check_same_command(run, world)
    use_deterministic_kernels(config.train.deterministic)
    with ExitStack() as stack:
        recorder = Recorder.open(run, world, stack)
        work = task.begin(run, world)
        # Before the engine: the loaders' fork server does its imports while the model is built.
        validation = work.eval_batches()
        store = CheckpointStore(Path(config.out, config.name, "checkpoints"), config.checkpoint.keep_last)
        newest = world.on_main(store.newest)
        saver = stack.enter_context(Saver(store, world, config.checkpoint.asynchronous))
        engine = task.make_engine(world, newest is not None)
        state = restore(engine, newest)
        recorder.start(state, world)
        quarantine = Quarantine.open(run, work.source, world, state.step)
        trace = open_trace(config, work.source, world, stack)
        profiler = open_profiler(config, world, state.step, plan.profile_after, stack)
        meter = StepMeter(world, run.order.batch, run.macs)
        batches = work.train_batches(state.step)
        stop = StopRequest(world, leave_at(config.checkpoint.margin_seconds, may_ask=world.is_main))
        stack.enter_context(stop.listening())
        watch = stack.enter_context(Watchdog(world, config.train.hang_minutes))
        collect = stack.enter_context(collected_by_hand())

        while state.step < plan.end_step:
            watch.begin(state.step, "waits for data")
            with meter.waiting():
                batch = next(batches)
            watch.begin(state.step, "trains")
            seed_step(config.seed, state.step, world.rank)
            lr = run.schedule.lr(state.step)
            result = work.step(engine, batch, lr)
            meter.add(result, batch.samples)
            trace.add(state.step, batch.samples)
            quarantine.add(state.step, batch.replaced)
            state.step += 1
            recorder.advance(state.step)
            if profiler is not None and profiler.running:
                with meter.paused():
                    profiler.step()
            if plan.logs(state.step):
                watch.begin(state.step, "logs")
                collect()
                figures, bad = meter.read(state.step, work.source.keys)
                streak = state.note_skipped([step for step, _ in bad])
                recorder.bad_samples(state, quarantine)
                recorder.train(state, lr, figures, bad, len(quarantine.known))
                stop_if_diverged(streak, config.train.max_bad_steps, world)
                if is_spike(figures["loss"], state.losses, config.train.spike_factor):
                    saver.wait()
                    state = roll_back(engine, store, state, plan.log_every, config.train.max_rollbacks, world)
                    recorder.rolled_back(state, figures["loss"])
                elif isfinite(figures["loss"]):
                    state.losses = [*state.losses, figures["loss"]][-WINDOWS:]
            if validation is not None and plan.evaluates(state.step):
                with meter.paused():
                    weights = engine.eval_model(config.eval.weights)
                    seen = watch.over(validation, state.step)
                    figures, confusion = work.evaluate(weights, seen, engine.autocast())
                    state.note(figures, task.best)
                    recorder.evaluation(state, engine, confusion)
                    work.evaluated(state.step, engine)
            status = stop.decided()
            if status is not None or plan.saves(state.step):
                watch.begin(state.step, "saves")
                with meter.paused():
                    recorder.bad_samples(state, quarantine)
                    state.seconds = recorder.seconds()
                    saver.save(state.step, asdict(state), engine, plan.saves_always(state.step))
            if status is not None and state.step < plan.end_step:
                saver.wait()
                raise Stopped(status, agreed=True)
        saver.wait()
        watch.close()  # uploads take the time that they take
        return recorder.finish(state, engine, len(quarantine.known))


def restore(engine: Engine, newest: Checkpoint | None) -> State:
    """Load the newest complete checkpoint into the engine; a new state when there is none."""
    if newest is None:
        return State()
    engine.load(newest.path)
    return State(**newest.progress())


def stop_if_diverged(streak: int, limit: int, world: World) -> None:
    """End a run that skips too many steps in a row, on all processes alike.

    Single ones are no sign of trouble: in fp16 the loss scale grows until a gradient overflows, again and again.

    Raises:
        UserError: more than `limit` steps were skipped in a row.
    """
    if streak > limit:
        world.fail(
            f"{streak} steps in a row had a NaN or infinite gradient, train.max_bad_steps={limit} are tolerated; "
            "lower optim.lr, lengthen optim.schedule.warmup or set train.clip_grad_norm, and begin a new run (name=...)"
        )
