"""A trained generator, read from a run, one of its checkpoints or exported weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from pipeline.config_load import parse_tree
from pipeline.errors import UserError
from pipeline.models.generate import Generator, make_gan
from pipeline.tracking.run_dir import CONFIG_NAME, RunDir
from pipeline.train.engines import saved_weights
from pipeline.train.export import MODEL_CONFIG, read_weights
from pipeline.train.tasks import make_task
from pipeline.train.trained import find_weights


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator with its weights: on the CPU, float32, set to evaluate.

    Attributes:
        path: the weights' directory.
        name: of the table of generators.
        generator: the generator.
    """

    path: Path
    name: str
    generator: Generator


def load_generator(path: Path, weights: str | None = None) -> TrainedGenerator:
    """The generator that `path` stands for; arguments as `find_weights`.

    Raises:
        UserError: there is none, or it can't be read.
    """
    place = find_weights(path, weights)
    try:
        if (place / MODEL_CONFIG).is_file():
            described = json.loads((place / MODEL_CONFIG).read_text())
            tensors = read_weights(place, described)
        else:
            run = place.resolve().parent.parent
            config = parse_tree(RunDir.saved_config(run) or {}, str(run / CONFIG_NAME))
            described = make_task(config).describe([], {})
            tensors = dict(saved_weights(place, config.eval.weights))
        if described.get("task", "classify") != "generate":
            raise UserError(f"{place}: weights of task={described.get('task', 'classify')}, which makes no images")
        gan = make_gan(described["model"], described["overrides"], described["discriminator"])
        gan.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place}: can't be read as weights of a generator: {error}") from error
    return TrainedGenerator(place, described["model"], gan.generator.float().eval())
