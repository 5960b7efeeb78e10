"""Libraries that are imported at their first use.

torchvision and timm take longer to import than torch. The processes that train, and the command that starts them, build
transforms but leave their work to loader processes, so they never need either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

TORCHVISION = "torchvision.transforms.functional"
TIMM = "timm.data.auto_augment"


class LazyModule:
    """Stands for a module and imports it when an attribute is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # found without this detour from now on
        return value


def lazy_function(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at the first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call
