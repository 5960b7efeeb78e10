"""GLUE's tasks, and one that is made, by a BERT encoder whose attention may be refined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from data_prep.manifest import Manifest
from pipeline.config import RunConfig
from pipeline.config_errors import ModelMistake
from pipeline.config_task import LanguageConfig
from pipeline.data.order import DataOrder
from pipeline.data.text.batches import EvalBatches, TextBatch, step_batches
from pipeline.data.text.glue import TASKS
from pipeline.data.text.rows import Rows, read_rows
from pipeline.data.text.tokens import TokenSplit, load_tokenizer, token_cache, tokenize, words_tokenizer
from pipeline.errors import UserError
from pipeline.hashing import seed64
from pipeline.models.bert import Bert, bert_config, check_pretrained, count_macs, load_pretrained
from pipeline.models.bert_options import PAPER, REFINER_PAPER, BertOptions
from pipeline.models.errors import ModelError
from pipeline.resolve import Resolved, continues, set_recomputation, updated
from pipeline.tracking.confusion import Confusion
from pipeline.train.distributed import World
from pipeline.train.setup import INIT_STREAM
from pipeline.train.state import Best
from pipeline.train.step import StepResult, accumulated
from pipeline.train.tasks.base import Task, Work
from pipeline.train.tasks.language_figures import evaluate_text, losses

if TYPE_CHECKING:
    from pipeline.train.engines import Engine
    from pipeline.train.eval_worker import EvalJob
    from pipeline.train.predictions import Predictions

TOKENIZER = "tokenizer.json"


class LanguageTask(Task):
    """Sentences or pairs of them, cross-entropy of classes or the squared error of a number."""

    kind = "language"
    unit = "seq"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.task, LanguageConfig)
        self.settings = config.task
        self.text = TASKS[config.task.name]
        self.best = Best(self.text.figure, "max")
        self.figures = self.text.figures

    def on(self, config: RunConfig) -> LanguageTask:
        other = LanguageTask(config)
        kept = ("train", "val", "tokenizer")  # not the sentences, which nobody needs any more
        other.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return other

    @cached_property
    def train(self) -> TokenSplit:
        """The tokenised training split."""
        return self._tokenize(self._rows_of_train, "train")

    @cached_property
    def val(self) -> TokenSplit | None:
        """The tokenised evaluation split."""
        place = self.config.data.val
        return None if place is None else self._tokenize(self._read(place, self.text.split), "val")

    @cached_property
    def tokenizer(self) -> Any:
        """Of `task.tokenizer`, or made of the words of the training split."""
        if self.settings.tokenizer is not None:
            return load_tokenizer(self.settings.tokenizer)
        return words_tokenizer(self._rows_of_train.sentences, self.settings.vocab_size)

    @cached_property
    def _rows_of_train(self) -> Rows:
        return self._read(self.config.data.train, "train")

    def _read(self, place: str, split: str) -> Rows:
        return read_rows(place, self.settings.name, self.text, split)

    def _tokenize(self, rows: Rows, name: str) -> TokenSplit:
        cache = token_cache(self.config.data.cache)
        return tokenize(rows, name, self.tokenizer, self.settings.max_length, cache)

    def splits(self) -> tuple[Manifest, Manifest | None]:
        return self.train.manifest(self.text), None if self.val is None else self.val.manifest(self.text)

    def fit(self, train: Manifest, val: Manifest | None) -> tuple[RunConfig, nn.Module]:
        config, outputs = self.config, self.text.outputs
        if config.model.num_classes not in (None, outputs):
            raise UserError(
                f"model.num_classes={config.model.num_classes}, but task.name={self.settings.name} has {outputs} "
                "outputs; leave model.num_classes out"
            )
        tokens = self.tokenizer.get_vocab_size()
        options = {**config.model.options, "vocab_size": config.model.options.get("vocab_size") or tokens}
        if options["vocab_size"] < tokens:
            raise UserError(
                f"model.options.vocab_size={options['vocab_size']} leaves some of the {tokens} tokens of the "
                "tokenizer without an embedding; leave it out"
            )
        config = updated(config, model={"num_classes": outputs, "options": options})
        model = LanguageTask(config).build_model("meta")
        if self.settings.max_length > model.options.positions:
            raise UserError(
                f"task.max_length={self.settings.max_length} is more than model.options.positions="
                f"{model.options.positions}; lower it"
            )
        if config.model.init is not None and not continues(config):
            check_pretrained(config.model.init, model.options)
        return config, model

    def check(self, model: nn.Module, train: Manifest, order: DataOrder, world_size: int) -> dict[str, Any]:
        return {}

    @property
    def options(self) -> BertOptions:
        """Of the model; outputs and words as far as they are known."""
        model = self.config.model
        return BertOptions.of(model.name, {"num_classes": model.num_classes or self.text.outputs, **model.options})

    def build_model(self, device: str | torch.device) -> Bert:
        try:
            with torch.device(device):
                model = Bert(self.options)
        except ModelError as error:
            raise ModelMistake(error) from error
        set_recomputation(model, self.config)
        return model

    def macs(self, model: nn.Module) -> int:
        return count_macs(cast(Bert, model), self.settings.max_length)

    def summary(self, train: Manifest) -> str:
        outputs = f"{train.num_classes} classes" if train.num_classes else "a number"
        return f"at {self.settings.max_length} tokens, {outputs}"

    def paper(self) -> str:
        return PAPER if self.options.refine is None else REFINER_PAPER

    def try_samples(self, run: Resolved) -> None:
        """`splits` has read all of them."""

    def initial_model(self, world: World, resumed: bool = False) -> nn.Module:
        torch.manual_seed(seed64(self.config.seed, INIT_STREAM))
        model = self.build_model("cpu")
        if self.config.model.init is not None and not resumed:
            load_pretrained(model, self.config.model.init, self.config.model.init_head == "new")
        return model.to(world.device)

    def sum_of_outputs(self, model: nn.Module, samples: int, device: torch.device) -> Tensor:
        ids = torch.zeros(self.input_shape(samples), dtype=torch.int64, device=device)
        return model(ids, ids, torch.ones_like(ids, dtype=torch.bool)).float().sum()

    def input_shape(self, samples: int) -> tuple[int, ...]:
        return samples, self.settings.max_length

    def begin(self, run: Resolved, world: World) -> LanguageWork:
        return LanguageWork(run, world, self)

    def describe(self, classes: list[str], figures: dict[str, Any]) -> dict[str, Any]:
        """The library's own description is part of it: its classes read weights back that have no refiner."""
        return {
            **bert_config(self.options).to_diff_dict(),
            "task": self.kind,
            "model": self.config.model.name,
            "overrides": {"num_classes": self.text.outputs, **self.config.model.options},
            "figures": figures,
            "classes": classes,
            "settings": self.settings.model_dump(mode="json"),
        }

    def write_files(self, directory: Path) -> None:
        (directory / TOKENIZER).write_text(self.tokenizer.to_str())

    @classmethod
    def evaluate_saved(cls, job: EvalJob, world: World) -> tuple[dict[str, Any], Predictions | None]:
        from pipeline.train.tasks.language_eval import evaluate_saved

        return evaluate_saved(job, world)


class LanguageWork(Work):
    """Padded batches of token numbers, one forward per micro-batch, GLUE's figures."""

    source: TokenSplit

    def __init__(self, run: Resolved, world: World, task: LanguageTask) -> None:
        super().__init__(run, world)
        self.task, self.source = task, task.train

    def train_batches(self, start: int) -> Iterator[TextBatch]:
        steps = range(start, self.run.plan.end_step)
        batches = step_batches(self.source, self.run.order, steps, self.world.rank, self.world.size)
        return (batch.to(self.world.device) for batch in batches)

    def step(self, engine: Engine, batch: TextBatch, lr: float) -> StepResult:
        count = self.run.config.train.accumulate
        size = len(batch.samples) // count

        def loss_of(i: int) -> tuple[Tensor, dict[str, Tensor]]:
            part = batch.rows(slice(i * size, (i + 1) * size))
            with engine.autocast():
                logits = engine.model(part.ids, part.types, part.tokens)
            return losses(logits.float(), part.labels, self.task.text).mean(), {}

        loss, parts = accumulated(engine, count, loss_of)
        return StepResult(loss, *engine.step(lr), parts)

    def eval_batches(self) -> Iterable[TextBatch] | None:
        size = self.run.config.eval.batch_size
        return None if self.task.val is None else EvalBatches(self.task.val, size, self.world.rank, self.world.size)

    def evaluate(
        self, model: nn.Module, batches: Iterable[TextBatch], autocast: AbstractContextManager[None]
    ) -> tuple[dict[str, float], Confusion | None]:
        return evaluate_text(model, batches, self.task.text, autocast, self.world)
