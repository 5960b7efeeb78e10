"""What figures are called and how they are written: accuracies in percent, losses as they are."""

from __future__ import annotations

_TITLES = {"top1": "top-1 %", "top5": "top-5 %", "loss": "eval loss", "accuracy": "accuracy %", "f1": "F1 %"}
_TITLES |= {"fid_inception": "FID", "is_inception": "IS", "fid_small": "FID, small net", "is_small": "IS, small net"}
_PERCENT = ("top1", "top5", "accuracy", "f1")


def title(metric: str) -> str:
    """Heading of a column or an axis."""
    return _TITLES.get(metric, metric)


def scale(metric: str) -> float:
    """What a figure is multiplied by before it is shown: 100 for fractions that are shown in percent."""
    return 100.0 if metric in _PERCENT else 1.0


def digits(metric: str) -> int:
    """Digits after the point."""
    return 2 if metric in _PERCENT else 4


def lower_is_better(metric: str) -> bool:
    """Whether the best value of a metric is the lowest."""
    return "loss" in metric or "error" in metric or metric.startswith("fid_")


def written(metric: str, value: float | None) -> str | None:
    """A figure as text, without its unit; None stays None."""
    return None if value is None else f"{scale(metric) * value:.{digits(metric)}f}"
