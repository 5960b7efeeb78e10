"""A trained model: where its weights are, and what is needed to evaluate it."""

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
from pipeline.tracking.run_dir import CONFIG_NAME, RunDir
from pipeline.tracking.runs import exists
from pipeline.train.checkpoint import COMMIT, CheckpointStore
from pipeline.train.engines import saved_weights
from pipeline.train.export import MODEL_CONFIG, load_weights


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


def find_weights(path: Path, weights: str | None = None) -> Path:
    """The directory with exported weights, or the checkpoint, that `path` stands for.

    Args:
        path: a run directory, one of its checkpoints, or a directory with `model.safetensors` and `config.json`.
        weights: of a run: `final`, `best` or `last`, the newest checkpoint. None: final, before there are any last.

    Raises:
        UserError: there is none.
    """
    there = exists(path)  # asked first, since a name that is too long for a file can't be asked for what is below it
    if there and ((path / MODEL_CONFIG).is_file() or (path / COMMIT).is_file()):
        if weights is not None:
            raise UserError(f"{path}: no run, there is nothing to choose from with --weights {weights}; leave it out")
        return path
    if not there or not (path / CONFIG_NAME).is_file():
        raise UserError(
            f"{path}: no model here; name a run directory ({CONFIG_NAME}), one of its checkpoints ({COMMIT}) or a "
            f"directory with exported weights ({MODEL_CONFIG})"
        )
    exported = [name for name in ("final", "best") if (path / name / MODEL_CONFIG).is_file()]
    wanted = weights or ("final" if "final" in exported else "last")
    if wanted in exported:
        return path / wanted
    store = CheckpointStore(path / "checkpoints")
    newest = store.newest()
    if wanted == "last" and newest is not None:
        return newest.path
    found = exported + ([] if newest is None else ["last"])
    mend = f"the run has {' and '.join(found)}, choose with --weights {found[0]}" if found else "train the run first"
    damage = store.damage() if newest is None and (wanted == "last" or not found) else None
    if damage is not None:
        other = f"choose --weights {found[0]}" if found else "train the run again, which begins anew"
        mend = f"{damage}; restore its files from a copy, or {other}"
    raise UserError(f"{path}: no {wanted} weights; {mend}")
