"""A trained model and what is needed to evaluate it, from exported weights or from a checkpoint of a running run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data_prep.manifest import Manifest
from pipeline.config_load import parse_tree
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.errors import UserError
from pipeline.resolve import build_model
from pipeline.tracking.run_data import data_of_run
from pipeline.tracking.run_dir import RunDir
from pipeline.train.engines import saved_weights
from pipeline.train.export import load_weights


@dataclass(frozen=True)
class Trained:
    """A model with its weights, on the CPU.

    Attributes:
        model: the model.
        name: its registered name.
        img_size, in_chans: its input.
        classes: names of its outputs.
        augment: holds the normalisation.
        transform: how the run evaluated.
    """

    model: nn.Module
    name: str
    img_size: int
    in_chans: int
    classes: list[str]
    augment: AugmentConfig
    transform: EvalTransformConfig

    @classmethod
    def from_export(cls, directory: Path) -> Trained:
        """From `model.safetensors` and `config.json`.

        Raises:
            UserError: they are missing or don't fit each other.
        """
        model, described = load_weights(directory)
        return cls(
            model,
            described["model"],
            model.img_size,
            model.in_chans,
            described["classes"],
            AugmentConfig.model_validate(described["augment"]),
            EvalTransformConfig.model_validate(described["eval_transform"]),
        )

    @classmethod
    def from_checkpoint(cls, run: Path, checkpoint: Path) -> Trained:
        """From a checkpoint of a run that has no exported weights yet: the weights that `eval.weights` names.

        Raises:
            UserError: the run's config or the checkpoint can't be used, or its training manifest is not there.
        """
        config = parse_tree(RunDir.saved_config(run) or {}, str(run / "config.yaml"))
        model = build_model(config, "cpu")
        try:
            model.load_state_dict(saved_weights(checkpoint, config.eval.weights))
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{checkpoint}: can't be read as a checkpoint of {config.model.name}: {error}") from error
        return cls(
            model,
            config.model.name,
            model.img_size,
            config.model.in_chans,
            Manifest.load(data_of_run(run, config.data.train)).classes,
            config.augment,
            config.eval_transform,
        )
