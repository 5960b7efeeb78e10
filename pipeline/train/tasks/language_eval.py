"""`rookery eval` of a run of task=language."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from pipeline.config_load import parse_tree
from pipeline.config_task import LanguageConfig
from pipeline.data.text.batches import EvalBatches
from pipeline.data.text.glue import GLUE, TASKS, TextTask
from pipeline.data.text.rows import Rows, read_rows
from pipeline.data.text.tokens import load_tokenizer, token_cache, tokenize
from pipeline.errors import UserError
from pipeline.models.bert import Bert
from pipeline.models.bert_options import BertOptions
from pipeline.tracking.redact import redact
from pipeline.tracking.run_dir import RunDir
from pipeline.train.distributed import World
from pipeline.train.engines import saved_weights
from pipeline.train.engines.base import PRECISIONS
from pipeline.train.eval_progress import watched
from pipeline.train.export import read_weights
from pipeline.train.predictions import Predictions, short
from pipeline.train.tasks.language import TOKENIZER, LanguageTask
from pipeline.train.tasks.language_figures import TextAnswers, answer_text, judge

if TYPE_CHECKING:
    from pipeline.train.eval_worker import EvalJob


@dataclass(frozen=True)
class TrainedText:
    """A model with its weights, on the CPU.

    Attributes:
        name: of its size.
        settings: task and length of samples.
        tokenizer: a `tokenizers.Tokenizer`.
    """

    model: Bert
    name: str
    settings: LanguageConfig
    tokenizer: Any

    @classmethod
    def from_export(cls, directory: Path) -> TrainedText:
        """From `model.safetensors`, `config.json` and `tokenizer.json`.

        Raises:
            UserError: one of them is missing, damaged, or doesn't fit the others.
        """
        try:
            described = json.loads((directory / "config.json").read_text())
            model = Bert(BertOptions.of(described["model"], described["overrides"]))
            model.load_state_dict(read_weights(directory, described))
            settings = LanguageConfig.model_validate(described["settings"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ValidationError) as error:
            raise UserError(f"{directory}: can't read the exported model: {error}") from error
        return cls(model, described["model"], settings, load_tokenizer(str(directory / TOKENIZER)))

    @classmethod
    def from_checkpoint(cls, run: Path, checkpoint: Path) -> TrainedText:
        """From a checkpoint of a run that has no exported weights yet.

        Raises:
            UserError: the run's config, its data or the checkpoint can't be used.
        """
        config = parse_tree(RunDir.saved_config(run) or {}, str(run / "config.yaml"))
        task = LanguageTask(config)
        model = task.build_model("cpu")
        try:
            model.load_state_dict(saved_weights(checkpoint, config.eval.weights))
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{checkpoint}: can't be read as a checkpoint of {config.model.name}: {error}") from error
        return cls(model, config.model.name, task.settings, task.tokenizer)


def evaluate_saved(job: EvalJob, world: World) -> tuple[dict[str, Any], Predictions | None]:
    """See `LanguageTask.evaluate_saved`."""
    if job.ratios or job.crop_pct is not None:
        world.fail("--crop-pct and --calibrate are about pictures; leave them out for a run of task=language")
    if job.aux_weight is not None:
        world.fail("--aux-weight is of a Refiner's aux head; leave it out for a run of task=language")
    weights = Path(job.weights)
    if job.step is None:
        trained = TrainedText.from_export(weights)
    else:
        trained = TrainedText.from_checkpoint(Path(job.run), weights)
    text = TASKS[trained.settings.name]
    rows = read_rows(job.data, trained.settings.name, text, text.split, unlabelled=bool(job.predictions))
    cache = token_cache(job.cache.directory)
    split = tokenize(rows, "val", trained.tokenizer, trained.settings.max_length, cache)
    batches = EvalBatches(split, job.batch_size, world.rank, world.size)
    seen = watched(batches, "eval", job.batch_size * world.size, len(split), world.is_main)
    dtype = PRECISIONS[job.precision]
    autocast = nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)
    answers = answer_text(trained.model.to(world.device), seen, text, autocast, world)
    if rows.labelled:
        figures, _ = judge(answers, text)
    else:
        figures = {"count": len(split)}
        if world.is_main:
            print(f"{redact(job.data)}: no labels, nothing to measure; only predictions", file=sys.stderr, flush=True)
    submission = trained.settings.name in GLUE and Path(job.predictions).suffix == ".tsv"
    table = (_submission if submission else _table)(answers, rows, text) if job.predictions else None
    return {**figures, "task": trained.settings.name, "model": trained.name}, table


def _submission(answers: TextAnswers, rows: Rows, text: TextTask) -> Predictions:
    """What gluebenchmark.com takes: the numbers of its own rows, and its own words."""
    numbers = rows.numbers or range(len(rows.labels))

    def lines() -> Iterator[tuple[int, str | int | float]]:
        for number, answer in zip(numbers, answers.answers, strict=True):
            yield number, text.submitted(short(answer))

    return Predictions(("index", "prediction"), lines)


def _table(answers: TextAnswers, rows: Rows, text: TextTask) -> Predictions:
    """The row's place and its own number, if it has one; its label, if it has one; and what was predicted."""

    def lines() -> Iterator[list[Any]]:
        for row, (answer, label, _, probability) in enumerate(zip(*answers, strict=True)):
            said = [text.classes[int(x)] if text.classes else short(x) for x in (label, answer)]
            number = [] if rows.numbers is None else [rows.numbers[row]]
            known = said[0] if rows.labelled else None
            yield [row, *number, known, said[1], short(probability) if text.classes else None]

    own = () if rows.numbers is None else ("idx",)
    return Predictions(("key", *own, "label", "prediction", "probability"), lines)
