"""Every registered model under timm's registry as `rookery_<name>`, so that timm's own scripts can use them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from pipeline.models.base import ImageModel
from pipeline.models.errors import ModelError
from pipeline.models.registry import create_model, list_models

PREFIX = "rookery_"
_TIMM = "timm.models"


def register_with_timm() -> None:
    """Register the models with timm now if it is imported, else as soon as something imports it.

    timm takes longer to import than torch, and most uses of this package never need it.
    """
    if _TIMM in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Waits for the first import of timm.models, lets it run as usual, then registers; it acts once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TIMM:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_all()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_all() -> None:
    from timm.models import register_model

    for name in list_models():
        register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., ImageModel]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **overrides: Any,
    ) -> ImageModel:
        """What `timm.create_model` calls; the arguments about downloads have no meaning here."""
        if pretrained:
            raise ModelError(f"{PREFIX}{name} has no weights to download: use pipeline.models.load_official")
        return create_model(name, **overrides)

    build.__name__ = build.__qualname__ = PREFIX + name
    return build
