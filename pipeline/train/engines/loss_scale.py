"""Dynamic loss scale for fp16, kept on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScale:
    """The rule of `torch.amp.GradScaler`, for an engine that unscales and skips by itself.

    Args:
        enabled: else the scale is 1 for ever.

    Attributes:
        value: what to multiply the loss by.
        streak: updates since it last changed.
    """

    growth_factor, backoff_factor, growth_interval = 2.0, 0.5, 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 65536.0 if enabled else 1.0
        self.streak = 0

    def update(self, skipped: bool) -> None:
        """Halve it after a skipped step, double it after `growth_interval` good ones in a row."""
        if not self.enabled:
            return
        if skipped:
            self.value, self.streak = self.value * self.backoff_factor, 0
        elif self.streak + 1 == self.growth_interval:
            self.value, self.streak = self.value * self.growth_factor, 0
        else:
            self.streak += 1

    def state_dict(self) -> dict[str, Any]:
        """In the form of a `GradScaler`'s, which can load it."""
        if not self.enabled:
            return {}
        return {
            "scale": self.value,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self.streak,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.enabled:
            self.value, self.streak = float(state["scale"]), int(state["_growth_tracker"])
