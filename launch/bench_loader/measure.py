"""One run of `rookery bench loader`: lay the images out, let the contenders take turns, collect the figures."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.bench_loader.contender import Settings
from launch.bench_loader.ours import bytes_per_image, split
from launch.bench_loader.report import rows
from launch.bench_loader.rounds import contenders, measure
from launch.bench_loader.scene import set_up
from launch.bench_loader.waiting import waiting
from pipeline.errors import UserError
from pipeline.tracking.environment import device_name, key_versions
from pipeline.train.cores import num_cores


def bench_loader(
    shards: Path,
    recipe: str,
    side: int,
    batch: int,
    workers: int | None,
    samples: int,
    repeats: int,
    peers: bool,
    target: float | None,
) -> dict[str, Any]:
    """The report; arguments as in `rookery bench loader --help`.

    Raises:
        UserError: the shards can't be used, or hold too few images for the batch.
    """
    with tempfile.TemporaryDirectory(prefix="rookery-") as folder:
        _tell(f"laying out images below {folder}")
        workers = workers or num_cores()
        scene = set_up(shards, Path(folder), samples, workers, peers)
        images = scene.images
        settings = Settings(scene, recipe, side, batch, workers, prefetch=4, warmup=2 * workers)
        if images // batch < 2 * settings.warmup:
            raise UserError(
                f"{shards}: {images} images give {images // batch} batches of {batch}, {workers} workers need "
                f"{2 * settings.warmup}; set a smaller --batch or more --samples"
            )
        chosen, left_out = contenders(recipe, scene, peers)
        found = measure(settings, chosen, repeats, _tell)
        table = rows(found, workers)
        report = {
            "command": shlex.join(["rookery", *sys.argv[1:]]),
            "recipe": recipe,
            "side": side,
            "batch": batch,
            "workers": workers,
            "repeats": repeats,
            "samples": images,
            "stored_kilobytes": bytes_per_image(settings) / 1000,
            "device": device_name(),
            "versions": key_versions(),
            "loaders": table,
            "left_out": left_out,
            "split_ms": split(settings),
            "target_images_per_second": target,
        }
        if "failed" not in table[0]:
            _tell("waiting of a step as long as the loader takes")
            report |= waiting(settings, 3 * repeats)
        return report


def _tell(text: str) -> None:
    print(f"bench loader: {text}", file=sys.stderr, flush=True)
