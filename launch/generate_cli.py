"""`rookery generate`: images from a trained generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.export_cli import Weights
from pipeline.errors import UserError

GRID_NAME, LINES_NAME = "grid.png", "interpolations.png"
_GRID, _LINES = 256, 8


def generate(
    run: Annotated[Path, typer.Argument(help="run directory of task=generate, checkpoint, or exported weights")],
    out: Annotated[Path, typer.Argument(help="folder for the images")],
    count: Annotated[int, typer.Option(min=1, help="images")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="of the latents; image i of a seed is always the same")] = 0,
    interpolate: Annotated[
        int, typer.Option(min=0, help=f"also draw images between images, in so many steps, as {LINES_NAME}; 0: none")
    ] = 0,
    weights: Annotated[
        Weights | None, typer.Option(help="of a run; last: its newest checkpoint; default: final, else last")
    ] = None,
) -> None:
    """Write images of a trained generator as 000000.png ..., and a grid of them.

    Exit status: 0 written, 2 a mistake in the arguments.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another place for the images")
    if interpolate == 1:
        raise UserError("--interpolate 1: it has two ends; give at least 2 steps")
    # torch takes seconds to import.
    import numpy as np
    import torch

    from pipeline.generate.latents import fixed_latents
    from pipeline.generate.pictures import generated, interpolations, sheet
    from pipeline.train.tasks.generate_saved import load_generator

    trained = load_generator(run, weights)
    typer.echo(f"loaded {trained.name} from {trained.path}")
    generator = trained.generator.to("cuda" if torch.cuda.is_available() else "cpu")
    columns = min(16, max(1, round(min(count, _GRID) ** 0.5)))
    shown: list[Any] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for start in range(0, count, _GRID):
            numbers = np.arange(start, min(start + _GRID, count))
            pictures = generated(generator, fixed_latents(generator.latent_dim, seed, numbers))
            for number, picture in zip(numbers.tolist(), pictures, strict=True):
                picture.save(out / f"{number:06d}.png")
            shown = shown or pictures
        sheet(shown, columns).save(out / GRID_NAME)
        if interpolate:
            sheet(interpolations(generator, _LINES, interpolate, seed), interpolate).save(out / LINES_NAME)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror}); choose another folder") from error
    typer.echo(f"wrote {count} images and {out / GRID_NAME}" + (f", {out / LINES_NAME}" if interpolate else ""))
