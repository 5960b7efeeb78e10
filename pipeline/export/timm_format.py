"""A trained model in timm's format: weights and a config that timm's own loaders read.

NesT and DeiT become timm's own `nest_*` and `deit_*`, which need nothing of this package. What timm doesn't know keeps
its names and is built through timm's registry, once `pipeline.models` is imported.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.export.check import compare, difference, images
from pipeline.export.source import Preprocessing, Source
from pipeline.models import model_info
from pipeline.models.nest import Nest
from pipeline.models.timm_registry import PREFIX
from pipeline.models.timm_weights import to_timm
from pipeline.train.export import MODEL_CONFIG, WEIGHTS, write_weights

_SHARED = ("img_size", "in_chans", "num_classes")
_DROPS = ("drop_path_rate", "drop_rate", "attn_drop_rate")
# What may differ between a NesT and timm's: it has the same meaning there, or none for a trained model.
_NEST_FREE = {*_SHARED, "patch_size", "mlp_ratio", "embed_dims", "depths", "num_heads", "gelu", "pool_pad", "init"}
_NEST_FREE |= {*_DROPS}
_NEST_SIZES = ("nest_tiny", "nest_small", "nest_base")
_DEIT_ARGS = (*_SHARED, "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
_DEIT_FREE = {*_DEIT_ARGS, *_DROPS}


@dataclass(frozen=True)
class TimmModel:
    """A model as `timm.create_model(name, **args)` builds it.

    Attributes:
        name: timm's name.
        args: arguments of `timm.create_model`.
        weights: its state dict.
        tanh_gelu: the model approximates GELU with tanh, timm's computes it exactly.
    """

    name: str
    args: dict[str, Any]
    weights: dict[str, Tensor]
    tanh_gelu: bool = False


def write_timm(directory: Path, source: Source, say: Callable[[str], None] = lambda line: None) -> float:
    """Write `model.safetensors` and `config.json` into a directory, and compare the model that timm makes of them.

    Args:
        directory: an empty directory.
        source: the model.
        say: told what is done, and what to know about the result.

    Returns:
        The largest difference between the logits, relative to the largest logit.

    Raises:
        CheckFailed: it is above 1e-4.
    """
    import timm

    native = NATIVE_FORMS.get(model_info(source.name).family, lambda _: None)(source)
    known = native or TimmModel(PREFIX + source.name, source.overrides, source.model.state_dict())
    say(f"building timm's {known.name}")
    model = timm.create_model(known.name, **known.args).eval()
    if not native:
        say(f"timm has no model like this one: load it as {known.name} after `import pipeline.models`")
    write_weights(directory, known.weights, _config(source, known, model) if native else source.described)
    timm.models.load_checkpoint(model, str(directory / WEIGHTS))
    say("comparing timm's model with ours")
    if known.tanh_gelu:
        say(_approximate_gelu(model, source))
    return compare(source.model, model, (1, 3), f"timm's {known.name}")


def usage(source: Source, directory: Path) -> str:
    """The Python that loads what `write_timm` wrote."""
    described = json.loads((directory / MODEL_CONFIG).read_text())
    if "architecture" in described:
        return f'timm.create_model("local-dir:{directory}", pretrained=True)'
    given = "".join(f", {key}={value!r}" for key, value in source.overrides.items())
    return f'timm.create_model("{PREFIX}{source.name}", checkpoint_path="{directory / WEIGHTS}"{given})'


@torch.no_grad()
def _approximate_gelu(model: nn.Module, source: Source) -> str:
    """Give timm's model the GELU of ours, after measuring what the difference amounts to."""
    x = images(source.model, 3)
    found = difference(model(x), source.model(x))
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
    return (
        f"timm computes the exact GELU, this model the tanh approximation, so timm's logits differ by {found:.1e} of "
        "the largest one. The same to rounding with "
        "timm.create_model(..., act_layer=functools.partial(torch.nn.GELU, approximate='tanh')), or train with "
        "model.options.gelu=erf"
    )


def _nest(source: Source) -> TimmModel | None:
    model, options = source.model, _options(source)
    assert isinstance(model, Nest)
    if _switched(source, _NEST_FREE):
        return None
    widths = [_as_given(options[key]) for key in ("embed_dims", "depths", "num_heads")]
    for name in _NEST_SIZES:
        config = model_info(name).config
        if widths == [_as_given(config[key]) for key in ("embed_dims", "depths", "num_heads")]:
            suffix = "_jx" if options["pool_pad"] == "same" else ""
            args = {key: options[key] for key in (*_SHARED, "patch_size", "mlp_ratio")}
            return TimmModel(name + suffix, args, to_timm(model), options["gelu"] == "tanh")
    return None


def _deit(source: Source) -> TimmModel | None:
    options = _options(source)
    if _switched(source, _DEIT_FREE):
        return None
    weights = {name.removeprefix("vit."): tensor for name, tensor in source.model.state_dict().items()}
    return TimmModel(f"{source.name}_patch16_224", {key: options[key] for key in _DEIT_ARGS}, weights)


NATIVE_FORMS: dict[str, Callable[[Source], TimmModel | None]] = {"nest": _nest, "deit": _deit}


def _defaults(source: Source) -> dict[str, Any]:
    parameters = inspect.signature(model_info(source.name).build).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _switched(source: Source, free: set[str]) -> bool:
    """Whether an option that timm's model lacks has another value than its default."""
    options, default = _options(source), _defaults(source)
    return any(options[key] != default[key] for key in options.keys() - free)


def _options(source: Source) -> dict[str, Any]:
    """Every argument of the model."""
    return _defaults(source) | dict(model_info(source.name).config) | source.overrides


def _as_given(value: Any) -> Any:
    # JSON knows no tuples.
    return tuple(value) if isinstance(value, list) else value


def _config(source: Source, known: TimmModel, model: Any) -> dict[str, Any]:
    """The `config.json` of timm's model directories."""
    preprocessing = Preprocessing.of(source)
    transform = preprocessing.transform
    whole = transform.resize != "crop_pct"
    size = [source.model.in_chans, preprocessing.img_size, preprocessing.img_size]
    return {
        "architecture": known.name,
        "num_classes": source.model.num_classes,
        "num_features": model.num_features,
        "label_names": source.described["classes"],
        "model_args": known.args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": transform.interpolation,
            "crop_pct": 1.0 if whole else transform.crop_pct,
            "crop_mode": "squash" if whole else "center",
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "num_classes": source.model.num_classes,
            "pool_size": None,
            "first_conv": model.pretrained_cfg["first_conv"],
            "classifier": model.pretrained_cfg["classifier"],
        },
    }
