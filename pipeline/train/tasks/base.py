"""What runs of different kinds differ in; the loop, the engines and the record ask for it and assume nothing.

A `Task` is known from the config alone: what is checked before a process starts, the model, what its figures mean. A
`Work` is one process's part in a training: its batches, its steps, its evaluations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from data_prep.manifest import Manifest
from pipeline.config import RunConfig
from pipeline.data.order import DataOrder
from pipeline.data.substitute import Replaced
from pipeline.tracking.confusion import Confusion
from pipeline.train.distributed import World
from pipeline.train.state import Best

if TYPE_CHECKING:
    from pipeline.resolve import Resolved
    from pipeline.train.engines import Engine
    from pipeline.train.eval_worker import EvalJob
    from pipeline.train.predictions import Predictions
    from pipeline.train.step import StepResult


class Batch(Protocol):
    """What the loop sees of one process's part of a global step.

    Attributes:
        samples: (b,) int64 on the host, positions in the training split.
        replaced: the bad samples among those that the order asks for; None: all are good.
    """

    @property
    def samples(self) -> Tensor: ...

    @property
    def replaced(self) -> list[Replaced] | None: ...


class Source(Protocol):
    """The training split, as the record names its samples."""

    def keys(self, samples: Sequence[int]) -> list[str]:
        """Names of samples."""

    def missing(self) -> Iterable[str]:
        """Files that can't be used, each with the reason."""


class Task(ABC):
    """A kind of run: `task.kind` of the config.

    Attributes:
        kind: its name.
        unit: what a sample is, for rates: `img/s`.
        config: of the run; methods say where it must be a resolved one.
        best: the figure of an evaluation that tells which weights are the best.
        figures: names of all that an evaluation measures, `count` left out.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    best: Best
    figures: tuple[str, ...]

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on(self, config: RunConfig) -> Self:
        """The same task with what `fit` has filled in; may keep what was read for that."""
        return type(self)(config)

    # --- before a process is started; the model is on the meta device

    @abstractmethod
    def splits(self) -> tuple[Manifest, Manifest | None]:
        """Training and evaluation split; a task without shards describes its data as one shard of each.

        Raises:
            UserError: the data are not there.
        """

    @abstractmethod
    def fit(self, train: Manifest, val: Manifest | None) -> tuple[RunConfig, nn.Module]:
        """The config with what it leaves open filled in from the data and the model, and that model.

        Raises:
            UserError: data and model don't fit together; the message names the key to change.
        """

    @abstractmethod
    def check(self, model: nn.Module, train: Manifest, order: DataOrder, world_size: int) -> dict[str, Any]:
        """Make sure that model, data and batch can serve the task; asked of the filled-in config.

        Returns:
            Fields of `Resolved` that only this task fills.

        Raises:
            UserError: they can't.
        """

    @abstractmethod
    def build_model(self, device: str | torch.device) -> nn.Module:
        """The model, with random weights; the caller seeds torch.

        Raises:
            UserError: no such model, or arguments that it can't take.
        """

    @abstractmethod
    def macs(self, model: nn.Module) -> int:
        """Multiply-accumulates of one forward of one sample."""

    @abstractmethod
    def summary(self, train: Manifest) -> str:
        """The model's input and outputs, for the reader: `at 224 px, 1,000 classes`."""

    @abstractmethod
    def paper(self) -> str:
        """Where the architecture comes from."""

    @abstractmethod
    def try_samples(self, run: Resolved) -> None:
        """Read one sample of every split, as the run would.

        Raises:
            UserError: it can't.
        """

    # --- the model and its engine, on one process

    @abstractmethod
    def initial_model(self, world: World, resumed: bool = False) -> nn.Module:
        """The model that a run starts from, on this process's device, equal on all of them.

        Args:
            resumed: a checkpoint will replace the weights.
        """

    def make_engine(self, world: World, resumed: bool = False) -> Engine:
        """Model and optimizer, spread as `engine.name` says.

        A task of several networks with an optimizer each makes an engine for each of them and hands the loop one that
        holds these: what the loop asks for is a snapshot, loading one, and the weights to evaluate and to export.
        """
        from pipeline.train.engines import make_engine

        return make_engine(self.initial_model(world, resumed), self.config, world)

    @abstractmethod
    def sum_of_outputs(self, model: nn.Module, samples: int, device: torch.device) -> Tensor:
        """A number whose backward reaches every parameter that the loss will reach, from made samples; 0-D.

        Args:
            model: what an engine calls for a training forward, maybe a wrapper of the plain model.
        """

    def sample_loss(
        self,
        run: Resolved,
        model: nn.Module,
        samples: int,
        device: torch.device,
        autocast: AbstractContextManager[None],
    ) -> Tensor:
        """A loss of made samples that keeps for its backward what the run's own does; 0-D."""
        with autocast:
            return self.sum_of_outputs(model, samples, device)

    @abstractmethod
    def input_shape(self, samples: int) -> tuple[int, ...]:
        """Shape of the model's input."""

    # --- training

    @abstractmethod
    def begin(self, run: Resolved, world: World) -> Work:
        """This process's part in a training."""

    # --- afterwards

    @abstractmethod
    def describe(self, classes: list[str], figures: dict[str, Any]) -> dict[str, Any]:
        """What `config.json` beside exported weights says; enough to build the model again and to evaluate it.

        Args:
            classes: names of the outputs.
            figures: how well the weights do; empty where they weren't evaluated.
        """

    def write_files(self, directory: Path) -> None:  # noqa: B027  (most need none)
        """Write what else belongs beside exported weights."""

    @classmethod
    @abstractmethod
    def evaluate_saved(cls, job: EvalJob, world: World) -> tuple[dict[str, Any], Predictions | None]:
        """Evaluate weights of a finished run or of a checkpoint; collective.

        Returns:
            What `rookery eval` says besides where weights and data are; and what was predicted, if the job asks for it.

        Raises:
            UserError: no such weights or data, or they don't fit each other.
        """


class Work(ABC):
    """One process's part in a training.

    Attributes:
        run: the resolved run.
        world: this process among the others.
        source: the training split.
    """

    source: Source

    def __init__(self, run: Resolved, world: World) -> None:
        self.run, self.world = run, world

    @abstractmethod
    def train_batches(self, start: int) -> Iterator[Batch]:
        """This process's batches from global step `start` to the end of the run, on its device.

        Which samples a step has is `run.order`'s to say, so that any number of processes gets the same ones.
        """

    @abstractmethod
    def step(self, engine: Engine, batch: Any, lr: float) -> StepResult:
        """One global step on this process's batch: `pipeline.train.step.accumulated` and the engine's update.

        A step of several phases does that for one network after the other, and gives the parts of all losses. Nothing
        here waits for the device; torch's generators are seeded from (seed, step, rank) before.
        """

    @abstractmethod
    def eval_batches(self) -> Iterable[Any] | None:
        """Batches of an evaluation, equally many on every process, iterated again and again; None: nothing to do."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, batches: Iterable[Any], autocast: AbstractContextManager[None]
    ) -> tuple[dict[str, float], Confusion | None]:
        """Figures of the weights, `count` among them, in the order in which they are printed; collective.

        The confusion matrix is that of classes; None where there are none.
        """

    def evaluated(self, step: int, engine: Engine) -> None:  # noqa: B027  (most have nothing to draw)
        """An evaluation was recorded: the place for pictures; collective. Must not change what training computes."""
