"""A trial as Ray Tune sees it: an actor on the trial's first node, which starts `rookery train` on all of them.

Tune asks it for one result after the other; a result is an evaluation of the run. What a trial has done is in its run
directory, on storage that all nodes share: an actor anywhere goes on with it.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import ray
from ray import tune
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.sweep.config import Metric, Pbt, SweepConfig
from launch.sweep.milestones import Length, Milestone
from launch.sweep.processes import LOGS, Evaluations, NodeProcess, end_of
from launch.sweep.space import TRIALS, Values, arguments_of, revealed
from launch.sweep.take_over import can_give, give, take_over
from pipeline.tracking.files import read_json
from pipeline.tracking.run_dir import RESULT_NAME, is_locked
from pipeline.train.again import most_telling
from pipeline.train.status import INTERRUPTED, MISTAKE, RESUBMIT

LEAVE = "leave"

_LOOK_SECONDS = 0.25
# How long the nodes of a trial may differ in having ended, and how long a run may take to save and leave.
_GRACE_SECONDS = 120.0
_SAVE_SECONDS = 300.0
# How long a process on a lost node may seem to hold the run directory.
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep share.

    Attributes:
        config: the sweep.
        gpus: of each process.
        milestones: where runs wait for the scheduler, in epochs.
        forget: milestone (its `time`) before which results are not reported again after a restart of the sweep.
        folder: working directory of the sweep, the same on every node.
        environment: what trials need of the sweep's environment.
    """

    config: SweepConfig
    gpus: int
    milestones: tuple[Milestone, ...]
    forget: int
    folder: str
    environment: dict[str, str]

    @property
    def sweep(self) -> Path:
        """The sweep's folder."""
        return Path(self.folder, self.config.folder)

    def bundle(self) -> dict[str, float]:
        """What a trial takes of a node."""
        resources = self.config.resources
        return {"CPU": resources.nproc * resources.cpus, "GPU": resources.nproc * self.gpus}


class Trial(tune.Trainable):
    """See the module; `driver.tune_config` makes its config."""

    # Step of the newest evaluation that an earlier start of the sweep has heard of.
    told = 0
    # The evaluation at the end of a part, until its checkpoint and weights are written too.
    _held: dict[str, Any] | None = None

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # Tune adds the job
        self.job = job
        os.chdir(job.folder)  # Tune has a folder for each trial; recipes and shards are named from the sweep's
        self.run_dir = job.sweep / TRIALS / self.trial_name
        own = config["trial"]
        self.values: Values = revealed(job.config, own["values"])
        self.length = Length(*own["length"])
        self.is_over: bool = own["over"]
        self.take_over: dict[str, Any] | None = own.get("take_over")
        steps = [(max(1, round(m.epochs * self.length.steps_per_epoch)), m.time) for m in job.milestones]
        self.milestones: list[tuple[int, int]] = steps
        forgotten = [step for step, number in steps if number < job.forget]
        self.told = own.get("told", 0)
        self.evaluations = self._evaluations(seen=max(forgotten, default=0))
        self._held = None
        self.nodes: Nodes | None = None
        self.ids = [ray.get_runtime_context().get_node_id()]
        self.last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """The next evaluation; starts what has to run for it.

        Raises:
            RuntimeError: the run died; Tune starts the trial again, here or elsewhere.
        """
        while True:
            status = None if self.nodes is None else self.nodes.poll()
            figures = self._held or self.evaluations.next()
            self._held = figures if figures is not None and self._is_open(figures["step"], status) else None
            if figures is not None and self._held is None:
                return self._evaluated(figures, status)
            if self.nodes is None:
                if self.is_over or self._reached() >= self.length.end_step:
                    return self._last("stopped" if self.is_over else "finished")
                if self._is_to_leave():
                    return self._last("left")
                self._start()
            elif status is None:
                if self._is_to_leave():
                    self.nodes.send(signal.SIGTERM)
                time.sleep(_LOOK_SECONDS)
            else:
                return self._ended(status)

    def _is_open(self, step: int, status: int | None) -> bool:
        """Whether an evaluation ends a part of which something is still to be written.

        The run does that, or, where it was killed before, the next start of it.
        """
        if status is not None or step != self._end_of_part(step - 1) or self.is_over:
            return False
        reached = self._reached()
        return (
            self.nodes is not None
            or reached < step
            or (reached == step and self._gives(step) and not can_give(self.run_dir, step))
        )

    def _gives(self, step: int) -> bool:
        """Whether others may take over what a step leaves."""
        return isinstance(self.job.config.scheduler, Pbt) and any(step == end for end, _ in self.milestones)

    def _evaluated(self, figures: dict[str, Any], status: int | None) -> dict[str, Any]:
        """The result of an evaluation."""
        if status:
            return self._ended(status)
        if status == 0:
            self.nodes = None
        if self.nodes is None and self._gives(figures["step"]) and self._reached() == figures["step"]:
            give(self.run_dir, figures["step"])
        return self._result(figures)

    def _start(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while is_locked(self.run_dir) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if self.take_over is not None:
            take_over(self.job.config, self.run_dir, self.values, **self.take_over)
        part = self._end_of_part(self.evaluations.seen if self._held is None else self._held["step"] - 1)
        arguments = arguments_of(self.job.config, self.trial_name, self.values)
        if part < self.length.end_step:
            arguments.append(f"train.stop_after={part}steps")
        self.nodes = Nodes(self.job, self.run_dir, arguments)
        self.ids = self.nodes.ids

    def _end_of_part(self, step: int) -> int:
        """The next milestone after a step, or the end, in steps."""
        return next((end for end, _ in self.milestones if end > step), self.length.end_step)

    def _reached(self) -> int:
        """Step at which the run last ended as it should."""
        return int((read_json(self.run_dir / RESULT_NAME) or {}).get("step", 0))

    def _is_to_leave(self) -> bool:
        return (self.job.sweep / LEAVE).exists()

    def _ended(self, status: int) -> dict[str, Any]:
        """What an end of the processes before the next evaluation means."""
        assert self.nodes is not None
        log, was_asked, self.nodes = self.nodes.log, self.nodes.was_asked, None
        # One that is asked before it listens is ended by the signal itself.
        if status in (INTERRUPTED, RESUBMIT) or (was_asked and status == -signal.SIGTERM):
            return self._last("left", status=status)
        if status == MISTAKE:
            return self._last("failed", fault=end_of(log))
        raise RuntimeError(f"exit status {status}; the end of {log}:\n{end_of(log)}")

    def _result(self, figures: dict[str, Any]) -> dict[str, Any]:
        metric = self.job.config.metric
        if metric not in figures:
            self.cleanup()
            self.nodes = None
            there = ", ".join(name for name in get_args(Metric) if name in figures)
            return self._last("failed", fault=f"metric={metric}: the evaluations of this run measure {there}")
        if math.isnan(figures[metric]):  # which Tune would take for better than anything
            figures = figures | {metric: self._worst}
        done = self.nodes is None and figures["step"] >= self.length.end_step
        self.last = figures | {"time": self._time(figures["step"]), "nodes": self.ids}
        is_passed = figures["step"] < self.told
        return self.last | {"done": done, "ended": "finished" if done else "", "is_passed": is_passed}

    def _last(self, ended: str, **more: Any) -> dict[str, Any]:
        """A result that says only how the trial ended."""
        nothing = {self.job.config.metric: self._worst, "time": 0, "step": 0, "nodes": self.ids}
        return nothing | self.last | {"done": True, "ended": ended, "is_passed": False} | more

    @property
    def _worst(self) -> float:
        """Of the metric."""
        return -math.inf if self.job.config.is_max else math.inf

    def _time(self, step: int) -> float:
        """How far a step is, as the scheduler counts."""
        if self.milestones:
            return max((number for end, number in self.milestones if end <= step), default=0)
        return step / self.length.steps_per_epoch

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """How far results were reported; everything else is in the run directory."""
        return {"seen": self.evaluations.seen, "last": self.last}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.evaluations = self._evaluations(checkpoint["seen"])
        self.last = checkpoint["last"]

    def _evaluations(self, seen: int) -> Evaluations:
        # What its run measured after it was stopped, until it had saved, was told to nobody and is not now.
        return Evaluations(self.run_dir, seen, until=self.told if self.is_over else math.inf)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, or the same one after a pause: a new process would import everything once more."""
        self.cleanup()
        self.setup(new_config)  # type: ignore[call-arg]  # Tune adds the job
        return True

    def cleanup(self) -> None:
        """The scheduler stopped the trial: its run saves and ends."""
        if self.nodes is not None:
            self.nodes.send(signal.SIGTERM)
            self.nodes.wait(_SAVE_SECONDS)
            self.nodes.send(signal.SIGKILL)


class Nodes:
    """The processes of a trial's run on all of its nodes: here, and by an actor in each other bundle.

    Attributes:
        log: of the first node.
        ids: of the nodes, as Ray names them.
    """

    def __init__(self, job: Job, run: Path, arguments: list[str]) -> None:
        resources = job.config.resources
        command = [*arguments, "--nproc", str(resources.nproc), "--threads", str(resources.cpus)]
        if resources.nodes > 1:
            self._meeting = held_port()
            place = f"{get_node_ip_address()}:{self._meeting.getsockname()[1]}"
            command += ["--nodes", str(resources.nodes), "--rendezvous", place]
        self._first = NodeProcess(job.folder, job.environment)
        self._others = [_remote(job, i) for i in range(1, resources.nodes)]
        self.ids = [ray.get_runtime_context().get_node_id()]
        self.ids += ray.get([other.node_id.remote() for other in self._others])
        logs = [run / LOGS / f"node-{i}.log" for i in range(resources.nodes)]
        self.log = logs[0]
        self._first.start(command, str(logs[0]))
        ray.get([o.start.remote(command, str(log)) for o, log in zip(self._others, logs[1:], strict=True)])
        self._asked: set[int] = set()
        self._since: float | None = None

    def poll(self) -> int | None:
        """The exit status of all together; None while some run.

        Raises:
            RayActorError: a node is lost; the processes here are killed first.
        """
        try:
            statuses = [self._first.poll(), *ray.get([other.poll.remote() for other in self._others])]
        except ray.exceptions.RayActorError:
            self._first.send(signal.SIGKILL)
            raise
        ended = [status for status in statuses if status is not None]
        if len(ended) == len(statuses):
            failed = [status for status in ended if status]
            return most_telling(failed, failed[0]) if failed else 0
        if ended:
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since > _GRACE_SECONDS:
                self.send(signal.SIGKILL)
        return None

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status; None if they still run after so many seconds."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (status := self.poll()) is None and (deadline is None or time.monotonic() < deadline):
            time.sleep(_LOOK_SECONDS)
        return status

    @property
    def was_asked(self) -> bool:
        """Whether they were asked to save and end."""
        return signal.SIGTERM in self._asked

    def send(self, number: int) -> None:
        """Send all a signal; each only once."""
        if number in self._asked:
            return
        self._asked.add(number)
        self._first.send(number)
        ray.get([other.send.remote(number) for other in self._others])


class _Remote(NodeProcess):
    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


def _remote(job: Job, index: int) -> Any:
    """An actor that holds the trial's bundle with this index."""
    bundle = job.bundle()
    group = get_current_placement_group()
    assert group is not None, "Tune puts every trial into a placement group"
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    options = {"num_cpus": bundle["CPU"], "num_gpus": bundle["GPU"], "scheduling_strategy": place}
    return ray.remote(_Remote).options(**options).remote(job.folder, job.environment)


def held_port() -> socket.socket:
    """A socket that keeps a free port for a process which is still to listen there, until it is closed.

    To others the port is taken: nobody is given it, or can bind it, as between looking for a port and using it. Those
    who ask to share an address, as torch's store does, can, and the first to listen has it.
    """
    holder = socket.socket()
    holder.bind(("", 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # before, others like it could be given the same
    return holder
