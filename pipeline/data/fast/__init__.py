"""The fast path from encoded bytes to 8-bit batches: libjpeg-turbo, and loops compiled by Numba.

It draws what the plain path of `pipeline.data.augment` draws, with the same code, and does it faster. The plain path
stays as the reference (`data.augment_by: reference`) that tests compare with, operation by operation.
"""

from pathlib import Path

from data_prep.compiled import find_cache

find_cache(Path(__file__))

# What compiles when it is imported, or reads what was compiled before, and imports the others that do.
COMPILED = tuple(
    f"pipeline.data.fast.{name}"
    for name in ("randaugment", "resize", "color", "hashes", "segments", "scan", "upsample")
)
