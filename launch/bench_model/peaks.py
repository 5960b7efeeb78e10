"""What GPUs can do at most, by their makers' data sheets: dense matrix products, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Limits of one GPU.

    Attributes:
        half: TFLOP/s of its tensor cores in bfloat16 and float16.
        single: TFLOP/s in float32 without TF32, as everything here computes.
        bandwidth: of its memory, TB/s.
    """

    half: float
    single: float
    bandwidth: float

    def tflops(self, precision: str) -> float:
        """TFLOP/s at `fp32`, `bf16` or `fp16`."""
        return self.single if precision == "fp32" else self.half


# The SXM forms; A100 with 80 GB.
PEAKS = {"a100": Peak(312, 19.5, 2.04), "h100": Peak(989, 67, 3.35), "h200": Peak(989, 67, 4.8)}


def peak_of(device: str) -> Peak | None:
    """The limits of a GPU by the name that torch gives it; None for one that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device.lower()), None)
