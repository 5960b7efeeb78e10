"""Generation of images: a generator and a discriminator, on the pictures of the shards without their labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.manifest import Manifest
from pipeline.config import RunConfig
from pipeline.config_errors import ModelMistake
from pipeline.config_task import GenerateConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import EvalBatch, TrainBatch
from pipeline.data.order import DataOrder
from pipeline.data.pinned import brought
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import Replaced
from pipeline.errors import UserError
from pipeline.generate.features import FeatureNet, inception, small_net
from pipeline.generate.figures import Judge
from pipeline.generate.latents import TRAIN, normal
from pipeline.generate.pictures import interpolations, samples, sheet
from pipeline.hashing import seed64
from pipeline.models.errors import UnknownOption
from pipeline.models.facts import module_macs
from pipeline.models.generate import GENERATORS, Gan, make_gan, total
from pipeline.resolve import Resolved, set_recomputation, training_shards, updated
from pipeline.tracking.confusion import Confusion
from pipeline.tracking.files import write_aside
from pipeline.tracking.run_dir import SAMPLES_NAME
from pipeline.train.distributed import World
from pipeline.train.no_room import no_picture
from pipeline.train.setup import INIT_STREAM, device_batches, eval_batches, try_samples
from pipeline.train.state import Best
from pipeline.train.step import StepResult, accumulated
from pipeline.train.tasks.base import Task, Work

if TYPE_CHECKING:
    from pipeline.train.engines import Engine
    from pipeline.train.eval_worker import EvalJob
    from pipeline.train.predictions import Predictions

log = logging.getLogger("rookery")

# On a page: samples, and interpolations of so many images each.
_SHEET, _COLUMNS, _LINES, _LINE_STEPS = 64, 8, 6, 10


class GanBatch(NamedTuple):
    """One process's part of a global step.

    Attributes:
        step: its number.
        images: (b, C, H, W) real ones in [-1, 1].
        latents: (b, latent_dim), functions of (seed, step, place in the global batch).
        samples: (b,) int64 on the host, positions in the training split.
        replaced: the bad samples among those that the order asks for.
    """

    step: int
    images: Tensor
    latents: Tensor
    samples: Tensor
    replaced: list[Replaced] | None


class GenerateTask(Task):
    """Shards of pictures, a generator of `pipeline.models.generate`, the losses of `Gan`."""

    kind = "generate"
    unit = "img"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.best = Best(f"fid_{self.settings.features}", "min")
        self.figures = (self.best.figure, f"is_{self.settings.features}")

    @property
    def settings(self) -> GenerateConfig:
        assert isinstance(self.config.task, GenerateConfig)
        return self.config.task

    def splits(self) -> tuple[Manifest, Manifest | None]:
        val = self.config.data.val
        return training_shards(self.config).manifest, None if val is None else ShardSet(val).manifest

    def fit(self, train: Manifest, val: Manifest | None) -> tuple[RunConfig, nn.Module]:
        _check(self.config)
        if val is not None and self.settings.features == "small" and train.num_classes < 2:
            raise UserError(
                "task.features=small learns to tell the classes of data.train apart, and there is one; "
                "choose task.features=inception"
            )
        model = self.build_model("meta")
        return updated(self.config, model={"img_size": model.generator.img_size}), model

    def check(self, model: nn.Module, train: Manifest, order: DataOrder, world_size: int) -> dict[str, Any]:
        group = self.settings.discriminator.group
        micro_batch = order.batch // world_size // self.config.train.accumulate
        if group and (order.chunk % group or micro_batch % group):
            raise UserError(
                f"task.discriminator.group={group} takes images of the same lane, of which data.lanes={order.lanes} "
                f"gives {order.chunk} a step, {micro_batch} images to a micro-batch; set it to a divisor of both"
            )
        return {}

    def build_model(self, device: str | torch.device) -> Gan:
        config, judge = self.config.model, self.settings.discriminator
        options = {"img_size": config.img_size, "channels": config.in_chans, **config.options}
        try:
            with torch.device(device):
                model = make_gan(config.name, options, judge.model_dump())
        except UnknownOption as error:
            raise ModelMistake(
                f"{error}. To leave out the options of another model that a recipe comes with, "
                "write model.options=null before your own"
            ) from error
        except (ValueError, TypeError) as error:
            raise ModelMistake(error) from error
        set_recomputation(model, self.config)
        return model

    def macs(self, model: nn.Module) -> int:
        generator, judge = cast(Gan, model).generator, cast(Gan, model).discriminator
        count = max(1, judge.group)
        images, latents = (torch.empty(shape, device="meta") for shape in self._shapes(count, cast(Gan, model)))
        # A step judges one real image, and a generated one for each network.
        return (module_macs(generator, latents) + 3 * module_macs(judge, images)) // count

    def summary(self, train: Manifest) -> str:
        return f"for a generated and a real image of {self.config.model.img_size} px"

    def paper(self) -> str:
        return GENERATORS[self.config.model.name].source

    def try_samples(self, run: Resolved) -> None:
        try_samples(run)

    def initial_model(self, world: World, resumed: bool = False) -> nn.Module:
        torch.manual_seed(seed64(self.config.seed, INIT_STREAM))
        return self.build_model("cpu").to(world.device)

    def sum_of_outputs(self, model: nn.Module, samples: int, device: torch.device) -> Tensor:
        return total(model(*self._made(samples, device), self.settings.r1_weight))

    def sample_loss(
        self,
        run: Resolved,
        model: nn.Module,
        samples: int,
        device: torch.device,
        autocast: AbstractContextManager[None],
    ) -> Tensor:
        # Without the penalty, as it takes a backward: a step with it keeps about the discriminator's part once more.
        with autocast:
            return total(model(*self._made(samples, device), 0.0))

    def _made(self, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images, latents = self._shapes(samples, self.build_model("meta"))
        return torch.zeros(images, device=device), torch.zeros(latents, device=device)

    def input_shape(self, samples: int) -> tuple[int, ...]:
        return self._shapes(samples, self.build_model("meta"))[0]

    def _shapes(self, samples: int, model: Gan) -> tuple[tuple[int, ...], tuple[int, ...]]:
        made = model.generator
        return (samples, made.channels, made.img_size, made.img_size), (samples, made.latent_dim)

    def begin(self, run: Resolved, world: World) -> GenerateWork:
        return GenerateWork(run, world)

    def describe(self, classes: list[str], figures: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        options = {"img_size": config.model.img_size, "channels": config.model.in_chans, **config.model.options}
        return {
            "task": "generate",
            "model": config.model.name,
            "overrides": options,
            "discriminator": self.settings.discriminator.model_dump(),
            "figures": figures,
            "classes": classes,
            "augment": config.augment.model_dump(mode="json"),
            "eval_transform": config.eval_transform.model_dump(mode="json"),
        }

    @classmethod
    def evaluate_saved(cls, job: EvalJob, world: World) -> tuple[dict[str, Any], Predictions | None]:
        from pipeline.train.tasks.generate_eval import evaluate_saved

        return evaluate_saved(job, world)


class GenerateWork(Work):
    """Batches of the loaders with latents, a step of both networks, FID and Inception score, pages of images."""

    source: ShardSet

    def __init__(self, run: Resolved, world: World) -> None:
        super().__init__(run, world)
        config = run.config
        self.source = training_shards(config, config.data.cache_options())
        assert isinstance(config.task, GenerateConfig)
        self.settings = config.task
        self.latent_dim = cast(GenerateTask, run.task).build_model("meta").generator.latent_dim
        self.folder = Path(config.out, config.name)
        self._judge: Judge | None = None

    def train_batches(self, start: int) -> Iterator[GanBatch]:
        # Not part of what iterates: pictures are decoded, if at all, before the first step is waited for.
        return self._with_latents(device_batches(self.run, self.source, self.world, start), start)

    def _with_latents(self, batches: Iterator[TrainBatch], start: int) -> Iterator[GanBatch]:
        config, world, order = self.run.config, self.world, self.run.order
        lanes = np.arange(world.rank, order.lanes, world.size)
        places = (lanes[:, None] * order.chunk + np.arange(order.chunk)).reshape(-1)
        for step, batch in enumerate(batches, start):
            latents = brought(normal(self.latent_dim, config.seed, TRAIN, step, places), world.device)
            yield GanBatch(step, batch.images, latents, batch.samples, batch.replaced)

    def step(self, engine: Engine, batch: GanBatch, lr: float) -> StepResult:
        settings, count = self.settings, self.run.config.train.accumulate
        # A penalty that comes every n steps is n times as heavy, and so is its figure, whose mean is then right.
        times = settings.r1_every if batch.step % settings.r1_every == 0 else 0
        size = len(batch.images) // count

        def loss_of(i: int) -> tuple[Tensor, dict[str, Tensor]]:
            part = slice(i * size, (i + 1) * size)
            with engine.autocast():
                losses = engine.model(batch.images[part], batch.latents[part], settings.r1_weight * times)
            return total(losses), {**losses, "r1": losses["r1"] * times}

        loss, parts = accumulated(engine, count, loss_of)
        norm, skipped = engine.step(lr)
        return StepResult(loss, norm, skipped, parts)

    def eval_batches(self) -> Iterable[EvalBatch] | None:
        return None if self.run.val is None else eval_batches(self.run.config, self.world)

    def evaluate(
        self, model: nn.Module, batches: Iterable[EvalBatch], autocast: AbstractContextManager[None]
    ) -> tuple[dict[str, float], Confusion | None]:
        if self._judge is None:
            self._judge = Judge(feature_net(self.run.config, self.source, self.folder, self.world), self.world)
            self._judge.judge_split(batches)
        generator = cast(Gan, model).generator
        was_training = generator.training
        generator.eval()
        figures = self._judge.judge(generator, self.settings.samples, self.run.config.eval.batch_size, autocast)
        generator.train(was_training)
        return figures, None

    def evaluated(self, step: int, engine: Engine) -> None:
        """Draw what the evaluated weights make of the same latents every time; a failure is told and costs nothing."""
        if not self.world.is_main:
            return
        generator = cast(Gan, engine.eval_model(self.run.config.eval.weights)).generator
        was_training = generator.training
        folder = self.folder / SAMPLES_NAME
        try:
            generator.eval()
            pages = {
                "samples": sheet(samples(generator, _SHEET), _COLUMNS),
                "interpolations": sheet(interpolations(generator, _LINES, _LINE_STEPS), _LINE_STEPS),
            }
            folder.mkdir(exist_ok=True)
            for name, page in pages.items():
                write_aside(folder / f"{name}-{step:08d}.png", lambda file, page=page: page.save(file, "PNG"))  # type: ignore[misc]
            return
        except (OSError, UserError) as error:
            fault = str(error)
        except (torch.OutOfMemoryError, MemoryError) as error:
            fault = no_picture(error)
        finally:
            generator.train(was_training)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("no pictures of step %d: %s; training goes on", step, fault)


def feature_net(config: RunConfig, shards: ShardSet, folder: Path, world: World) -> FeatureNet:
    """The network that `task.features` names; collective.

    Args:
        shards: the training split.
        folder: the run directory.
    """
    assert isinstance(config.task, GenerateConfig) and config.model.img_size is not None
    if config.task.features == "inception":
        return inception(world)
    channels = config.model.in_chans
    transform = build_eval_transform(config.eval_transform, config.augment, config.model.img_size, channels)
    return small_net(folder, shards, transform, channels, world)


def _check(config: RunConfig) -> None:
    """Parts of the config that a generator has no use for.

    Raises:
        UserError: one of them is set.
    """
    model, train, registered = config.model, config.train, config.tracking.register_model
    wrong = {
        f"engine.name={config.engine.name}": (
            config.engine.name != "ddp",
            "the discriminator is differentiated twice, on weights that must be whole; set engine.name=ddp",
        ),
        "train.compile=true": (train.compile, "compiled code can't be differentiated twice; set train.compile=false"),
        f"augment.normalize={config.augment.normalize}": (
            config.augment.normalize != "half",
            "generated images go from -1 to 1, and so must the real ones; set augment.normalize=half",
        ),
        f"mix.prob={config.mix.prob}": (config.mix.active, "mixed pictures would be learnt; set mix.prob=0"),
        "objective.token_labels=true": (config.objective.token_labels, "there are no labels; set it to false"),
        f"optim.layer_decay={config.optim.layer_decay:g}": (
            config.optim.layer_decay != 1,
            "it is for fine-tuning, and two networks have no common order of layers; set it to 1",
        ),
        f"explain.images={config.explain.images}": (config.explain.images > 0, "there are no classes; set it to 0"),
        f"model.init={model.init}": (model.init is not None, "both networks start from random weights; leave it out"),
        f"model.drop_path_rate={model.drop_path_rate}": (bool(model.drop_path_rate), "generators have none; leave it"),
        f"tracking.register_model={registered}": (registered is not None, "classifiers alone are; leave it out"),
    }
    for key, (is_wrong, why) in wrong.items():
        if is_wrong:
            raise UserError(f"{key} doesn't go with task=generate: {why}")
