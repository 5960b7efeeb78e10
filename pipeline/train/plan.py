"""When a run does what: all durations of the config in global steps."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.durations import Duration


@dataclass(frozen=True)
class Plan:
    """The calendar of a run, in global steps.

    Attributes:
        steps_per_epoch: whole batches in an epoch.
        total_steps: length that the schedule spans.
        end_step: where the run ends; below `total_steps` with `train.stop_after`.
        warmup_steps, delay_steps, cooldown_steps: of the learning rate.
        log_every, eval_every, save_every: intervals.
        profile_after: steps of a start before the first one that is traced.
    """

    steps_per_epoch: int
    total_steps: int
    end_step: int
    warmup_steps: int
    delay_steps: int
    cooldown_steps: int
    log_every: int
    eval_every: int
    save_every: int
    profile_after: int = 0

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> Plan:
        batch = config.train.global_batch_size

        def steps(duration: Duration) -> int:
            return duration.steps(steps_per_epoch, batch)

        total = max(1, steps(config.train.epochs))
        stop = config.train.stop_after
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            end_step=total if stop is None else min(total, max(1, steps(stop))),
            warmup_steps=steps(config.optim.schedule.warmup),
            delay_steps=steps(config.optim.schedule.delay),
            cooldown_steps=steps(config.optim.schedule.cooldown),
            log_every=max(1, steps(config.train.log_every)),
            eval_every=max(1, steps(config.eval.every)),
            save_every=max(1, steps(config.checkpoint.every)),
            profile_after=steps(config.profile.after),
        )

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    @property
    def is_whole(self) -> bool:
        """Whether the run goes to the end of its schedule."""
        return self.end_step == self.total_steps

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.end_step

    def evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.end_step

    def saves(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.end_step

    def saves_always(self, step: int) -> bool:
        """Whether a run saves after this step however it is stopped and started again."""
        return step % self.save_every == 0 or step == self.total_steps
