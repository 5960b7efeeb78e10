"""Receptive-field calibration: which crop ratio suits trained weights best, found without training (Refiner, 2021).

The ratio of input size to resized shorter side decides how large objects look to the model. The random crops of
training make them look larger than a standard evaluation does, so another ratio may fit better, also one above 1 with a
black frame around the picture. A ratio chosen on the samples that it is reported on flatters itself; so it is chosen on
one part of the split and measured on the other, and a hash of its key decides which part a sample belongs to.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.data.augment.settings import EvalTransformConfig
from pipeline.errors import UserError
from pipeline.wording import counted

Figures = dict[str, float]
MAX_RATIOS = 200


@dataclass(frozen=True)
class Ratio:
    """One crop ratio and what was measured with it.

    Attributes:
        crop_pct: the ratio.
        whole: figures of the whole split, as a single evaluation gives them.
        search: of the part that the choice is made on.
        holdout: of the other part; None when nothing was held out.
    """

    crop_pct: float
    whole: Figures
    search: Figures
    holdout: Figures | None


def parse_ratios(text: str) -> list[float]:
    """`0.8:1.2:0.05` (first, last, step; both ends count) or `0.9,1,1.1`, as ascending ratios without repetition.

    Raises:
        UserError: it is neither, or names a ratio that no evaluation takes.
    """
    try:
        if ":" in text:
            first, last, step = (Decimal(part.strip()) for part in text.split(":"))
            numbers = [first + i * step for i in range(min(MAX_RATIOS, int((last - first) / step)) + 1)]
        else:
            numbers = [Decimal(part.strip()) for part in text.split(",")]
        ratios = sorted({float(number) for number in numbers})
        if not 0 < len(ratios) <= MAX_RATIOS or not all(0 < ratio < math.inf for ratio in ratios):
            raise ValueError
    except (ValueError, ArithmeticError) as error:
        raise UserError(
            f"--calibrate {text}: write FIRST:LAST:STEP, such as 0.8:1.2:0.05, or a list, such as 0.9,1,1.1; "
            f"at most {MAX_RATIOS} ratios, all above 0"
        ) from error
    return ratios


def with_ratio(settings: EvalTransformConfig, crop_pct: float) -> EvalTransformConfig:
    """The same evaluation with another crop ratio; a run that did not crop does so now.

    Raises:
        UserError: a ratio out of range, or above 1 where the run evaluates without antialiasing.
    """
    try:
        return EvalTransformConfig.model_validate(settings.model_dump() | {"resize": "crop_pct", "crop_pct": crop_pct})
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(
            f"crop ratio {crop_pct:g}: {reason[0].lower()}{reason[1:]}; give one such as 0.875 or 1.1"
        ) from error


def own_ratio(settings: EvalTransformConfig) -> float | None:
    """The ratio that the run itself evaluates with; None if it doesn't crop."""
    return settings.crop_pct if settings.resize == "crop_pct" else None


def held_out(keys: Sequence[str], fraction: float) -> np.ndarray:
    """(n,) bool: which samples are held out, about `fraction` of them; a pure function of each sample's key.

    Raises:
        UserError: nothing would be left on one side.
    """
    values = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
    chosen = np.array(values, dtype=np.uint64) < np.uint64(int(fraction * 2**64))
    if fraction and chosen.all() | ~chosen.any():
        raise UserError(
            f"--holdout {fraction:g} of {len(keys)} samples leaves nothing on one side; evaluate on a larger split"
        )
    return chosen


def search(
    ratios: Sequence[float], measure: Callable[[float], tuple[Figures, list[Figures]]], done: Callable[[Ratio], None]
) -> list[Ratio]:
    """Measure every ratio once.

    Args:
        measure: figures of the whole split and of its parts (searched, held out); one part means nothing held out.
        done: called after each.
    """
    results = []
    for crop_pct in ratios:
        whole, parts = measure(crop_pct)
        results.append(Ratio(crop_pct, whole, parts[0], parts[1] if len(parts) > 1 else None))
        done(results[-1])
    return results


def best_of(results: Sequence[Ratio]) -> Ratio:
    """The ratio with the highest top-1 on the searched part; among equals the one with the lowest loss."""
    return max(results, key=lambda ratio: (ratio.search["top1"], -ratio.search["loss"]))


def report(results: Sequence[Ratio], own: float | None, fraction: float) -> dict[str, Any]:
    """What the JSON says: the best ratio with its figures on the held-out part, the run's own, and all of them."""
    best = best_of(results)
    own_figures = next(({"crop_pct": own, **(r.holdout or r.whole)} for r in results if r.crop_pct == own), None)
    return {
        "crop_pct": best.crop_pct,
        **(best.holdout or best.whole),
        "holdout": fraction,
        "own": own_figures,
        "ratios": [asdict(ratio) for ratio in results],
    }


def table(results: Sequence[Ratio], own: float | None) -> str:
    """The search for a reader: figures of the searched part, the best ratio marked, then what was held out."""
    best = best_of(results)
    lines = [
        f"{'crop_pct':>8}  {'top1':>7}  {'top5':>7}  {'loss':>8}   on {counted(int(best.search['count']), 'sample')}"
    ]
    for ratio in results:
        figures = ratio.search
        marks = ["best"] * (ratio is best) + ["the run's own"] * (ratio.crop_pct == own)
        row = f"{ratio.crop_pct:>8g}  {figures['top1']:>7.4f}  {figures['top5']:>7.4f}  {figures['loss']:>8.4f}"
        lines.append(f"{row}   {'* ' if ratio is best else '  '}{', '.join(marks)}".rstrip())
    lines.append(_verdict(best, next((ratio for ratio in results if ratio.crop_pct == own), None)))
    return "\n".join(lines)


def _verdict(best: Ratio, own: Ratio | None) -> str:
    measured = best.holdout or best.whole
    held = counted(int(measured["count"]), "sample")
    where = f"on {held} held out" if best.holdout else f"on the same {held} that it was chosen on"
    text = f"best ratio {best.crop_pct:g}: top1 {measured['top1']:.4f} {where}"
    if own is None or own is best:
        return text
    before = (own.holdout or own.whole)["top1"]
    return f"{text}; {measured['top1'] - before:+.4f} against the run's own {own.crop_pct:g}"
