"""Weights as other tools read them: `model.safetensors` and a `config.json` that rebuilds the model."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.hashes import file_sha256
from pipeline.config import RunConfig
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.errors import UserError
from pipeline.models import ImageModel, create_model
from pipeline.train.engines import Engine
from pipeline.train.tasks import Task, make_task

WEIGHTS = "model.safetensors"
MODEL_CONFIG = "config.json"
# Its key for the hash of the weights beside it.
SHA256 = "sha256"
# What the weights of other tasks are for.
_INSTEAD = {
    "language": "transformers reads the directory as it is (BertForSequenceClassification, without refiners), and "
    "`rookery eval` its run",
    "generate": "`rookery generate` draws with them",
}
# How often weights are read that others replace meanwhile.
_READS = 5
_NEEDED = ("model", "overrides", "classes", "augment", "eval_transform")


def save_weights(directory: Path, engine: Engine, task: Task, classes: list[str], figures: dict[str, Any]) -> None:
    """Write the weights that the run evaluates; collective, rank 0 writes.

    The directory appears, or replaces an earlier one, as a whole.

    Raises:
        UserError: on rank 0: no space, or no permission.
    """
    weights = engine.full_weights(task.config.eval.weights)
    if not weights:
        return
    with whole_directory(directory, replace=True) as part:
        write_weights(part, weights, task.describe(classes, figures))
        task.write_files(part)


def describe(config: RunConfig, classes: list[str], figures: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json` for the model of a run.

    Args:
        config: the resolved config.
        classes: names of the outputs.
        figures: how well the weights do, from the run's own evaluation; empty where they weren't evaluated.
    """
    return make_task(config).describe(classes, figures)


def write_weights(directory: Path, weights: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, and `config.json` with its hash, into a directory."""
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
    whole = {**described, SHA256: file_sha256(directory / WEIGHTS)}
    (directory / MODEL_CONFIG).write_text(json.dumps(whole, indent=1) + "\n")
    # safetensors lets only the owner read its file; others may use the model as well as its config.
    shutil.copymode(directory / MODEL_CONFIG, directory / WEIGHTS)


def read_weights(directory: Path, described: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that `write_weights` wrote into a directory.

    Args:
        described: its `config.json`; one that was written by others need have no hash.

    Raises:
        OSError, SafetensorError: they can't be read.
        UserError: they have other bytes than they were written with.
    """
    tensors: dict[str, torch.Tensor] = load_file(directory / WEIGHTS)
    check_weights(directory, described)
    return tensors


def check_weights(directory: Path, described: Mapping[str, Any]) -> None:
    """Raise UserError if the weights have other bytes than they were written with; arguments as `read_weights`."""
    wanted = described.get(SHA256)
    if wanted is not None and file_sha256(directory / WEIGHTS) != wanted:
        raise UserError(
            f"{directory / WEIGHTS}: changed since it was written ({MODEL_CONFIG} has another {SHA256}); of a run take "
            f"other weights, any others fetch or export again; if the change is meant, take {SHA256} out there"
        )


@contextmanager
def whole_directory(directory: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to write files into, flushed and renamed to `directory` at the end; removed if anything fails.

    Raises:
        UserError: no space, no permission, or `directory` holds something and `replace` is false.
    """
    part, old = (directory.with_name(f".{directory.name}.{end}") for end in ("part", "old"))
    try:
        if replace and old.exists() and not directory.exists():  # killed between two renames
            old.rename(directory)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if replace and directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)  # to remove it takes longer, and others may be looking for it
        part.rename(directory)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{directory}: can't be written ({reason}); free space, then start again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def exported_task(directory: Path) -> str:
    """Kind of the run that weights were exported by; a damaged description is `load_weights`'s to tell of."""
    try:
        return json.loads((directory / MODEL_CONFIG).read_text()).get("task", "classify")
    except (OSError, ValueError, AttributeError):
        return "classify"


def load_weights(directory: Path) -> tuple[ImageModel, dict[str, Any]]:
    """The model of an exported directory with its weights, and the content of its `config.json`.

    A run that trains may put better ones in their place at any moment: what was read of two is read again.

    Raises:
        UserError: the directory holds no exported model, or its weights don't fit the model it names.
    """
    for _ in range(_READS - 1):
        before = _identity(directory)
        try:
            return _load_weights(directory)
        except UserError:
            after = _identity(directory)
            if after is None:
                time.sleep(0.05)  # between the renames of `whole_directory`, or there is none
            elif after == before:
                raise
    return _load_weights(directory)


def _identity(directory: Path) -> tuple[int, int] | None:
    """Tells a directory from the one that takes its place, which may get its number."""
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _load_weights(directory: Path) -> tuple[ImageModel, dict[str, Any]]:
    try:
        described = json.loads((directory / MODEL_CONFIG).read_text())
        weights = read_weights(directory, described if isinstance(described, dict) else {})
    except FileNotFoundError as error:
        # safetensors says which file is missing in its text only.
        name = Path(error.filename).name if error.filename else WEIGHTS
        raise UserError(f"{directory}: no exported model here ({name} is missing)") from error
    except (OSError, ValueError, SafetensorError) as error:
        # Of the two files one is JSON, whose mistakes are ValueErrors.
        name = MODEL_CONFIG if isinstance(error, ValueError) else WEIGHTS
        raise UserError(
            f"{directory / name}: damaged or incomplete ({error}); of a run take other weights (--weights last or "
            "best), any others fetch or export again"
        ) from error
    if not isinstance(described, dict):
        raise UserError(f"{directory / MODEL_CONFIG}: not the description of a model; export the model again")
    if (task := described.get("task", "classify")) != "classify":
        instead = f"; {_INSTEAD[task]}" if task in _INSTEAD else ""
        raise UserError(
            f"{directory}: weights of task={task}; this works on picture classifiers (task=classify){instead}"
        )
    missing = [key for key in _NEEDED if key not in described]
    if missing:
        raise UserError(f"{directory / MODEL_CONFIG}: {missing[0]!r} is missing; export the model again")
    try:
        model = create_model(described["model"], **described["overrides"])
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: the weights don't fit the model that {MODEL_CONFIG} names: {error}") from error
    kinds: dict[str, type[BaseModel]] = {"augment": AugmentConfig, "eval_transform": EvalTransformConfig}
    for key, kind in kinds.items():
        try:
            kind.model_validate(described[key])
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, (key, *fault["loc"])))
            raise UserError(f"{directory / MODEL_CONFIG}: {place}: {fault['msg']}; export the model again") from error
    described.pop(SHA256, None)
    return model, described
