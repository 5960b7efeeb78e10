"""Models that differ in more than size: one of each, for slow tests of which operations a model is made of."""

from __future__ import annotations

from pipeline.models import list_models, model_info

_SIZES = {"num_heads", "embed_dims", "embed_dim", "depths", "depth", "num_classes", "drop_path_rate", "img_size"}


def one_of_each() -> list[str]:
    """The first name of each structure: family, levels or stages, attention, flavour, patch."""
    first: dict[object, str] = {}
    for name in list_models():
        info = model_info(name)
        first.setdefault((info.family, *sorted((k, str(v)) for k, v in info.config.items() if k not in _SIZES)), name)
    return list(first.values())
