"""What is exported: a trained model, where it is found, and how its images are prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config_load import parse_tree
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.models import ImageModel, create_model, resize_pos_embed
from pipeline.tracking.run_dir import CONFIG_NAME, RunDir
from pipeline.train.export import MODEL_CONFIG, describe, load_weights
from pipeline.train.trained import Trained, find_weights

CHOICES = ("final", "best", "last")


@dataclass(frozen=True)
class Source:
    """A model with its weights: on the CPU, float32, set to evaluate.

    Attributes:
        path: where it comes from.
        model: the model.
        described: the content of its `config.json`; see `pipeline.train.export.describe`.
    """

    path: Path
    model: ImageModel
    described: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's registered name."""
        return self.described["model"]

    @property
    def overrides(self) -> dict[str, Any]:
        """Arguments that rebuild the model with its name."""
        return self.described["overrides"]

    def at(self, img_size: int) -> Source:
        """The same weights for another image size, the position embeddings interpolated.

        Raises:
            UserError: the architecture can't take this size.
        """
        if img_size == self.model.img_size:
            return self
        overrides = self.overrides | {"img_size": img_size}
        model = create_model(self.name, **overrides)
        model.load_state_dict(resize_pos_embed(self.model.state_dict(), model))
        # The figures were measured at the size of training.
        described = self.described | {"overrides": overrides, "figures": {}}
        return replace(self, model=model.eval(), described=described)


def load_source(path: Path, weights: str | None = None) -> Source:
    """The trained model at `path`.

    Args:
        path: a run directory, one of its checkpoints, or a directory with `model.safetensors` and `config.json`.
        weights: of a run: `final`, `best` or `last`, the newest checkpoint. None: final, before there are any last.

    Raises:
        UserError: there is no such model, or it can't be read.
    """
    place = find_weights(path, weights)
    return _exported(place) if (place / MODEL_CONFIG).is_file() else _checkpoint(place.resolve().parent.parent, place)


def _exported(directory: Path) -> Source:
    model, described = load_weights(directory)
    return Source(directory, model.float().eval(), described)


def _checkpoint(run: Path, checkpoint: Path) -> Source:
    trained = Trained.from_checkpoint(run, checkpoint)
    config = parse_tree(RunDir.saved_config(run) or {}, str(run / CONFIG_NAME))
    assert isinstance(trained.model, ImageModel)
    return Source(checkpoint, trained.model.float().eval(), describe(config, trained.classes, {}))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input.

    Attributes:
        img_size: side of the input in pixels.
        mean, std: per channel, of pixels in 0..1.
        transform: what is done before.
    """

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: EvalTransformConfig

    @classmethod
    def of(cls, source: Source) -> Preprocessing:
        """As the run evaluated."""
        mean, std = AugmentConfig.model_validate(source.described["augment"]).mean_std(source.model.in_chans)
        transform = EvalTransformConfig.model_validate(source.described["eval_transform"])
        return cls(source.model.img_size, tuple(mean), tuple(std), transform)

    def describe(self) -> dict[str, Any]:
        """As JSON, in words that need no knowledge of this package."""
        side, transform = self.img_size, self.transform
        if transform.resize == "crop_pct":
            shorter = int(side / transform.crop_pct)
            steps = [f"resize the shorter side to {shorter}", f"cut out the central {side}x{side}, black outside"]
        elif transform.resize == "resize_only":
            steps = [f"resize to {side}x{side}"]
        else:
            steps = [f"take images of {side}x{side} as they are"]
        steps += ["divide by 255", "subtract mean, divide by std"]
        return {
            "colors": "RGB" if len(self.mean) == 3 else "gray",
            "mean": self.mean,
            "std": self.std,
            "interpolation": transform.interpolation,
            "antialias": transform.antialias,
            "resize": transform.resize,
            "crop_pct": transform.crop_pct,
            "steps": steps,
        }
