"""`rookery generate`: images from a trained generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.export_cli import Weights
from launch.generate_folder import Origin, check_folder, claim_folder, weights_sha256
from pipeline.errors import UserError
from pipeline.tracking.files import write_aside

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from pipeline.models.generate import Generator

GRID_NAME, LINES_NAME = "grid.png", "interpolations.png"
_GRID, _LINES, _BATCH = 256, 8, 64
# A page of 64 pixels' images is then 130,000 pixels wide, more than is ever looked at.
_MOST_STEPS = 1000


def generate(
    run: Annotated[Path, typer.Argument(help="run directory of task=generate, checkpoint, or exported weights")],
    out: Annotated[
        Path,
        typer.Argument(
            help="folder for the images; refused if it has pictures of another seed or generator, or ones that this "
            "command doesn't write"
        ),
    ],
    count: Annotated[int, typer.Option(min=1, help="images")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="of the latents; image i of a seed is always the same")
    ] = 0,
    interpolate: Annotated[
        int,
        typer.Option(
            min=0,
            max=_MOST_STEPS,
            help=f"also draw images between images, in so many steps, as {LINES_NAME}; 0: none",
        ),
    ] = 0,
    weights: Annotated[
        Weights | None, typer.Option(help="of a run; last: its newest checkpoint; default: final, else last")
    ] = None,
) -> None:
    """Write images of a trained generator as 000000.png ..., and a grid of them.

    The same command may be repeated, also with a larger --count. Exit status: 0 written, 2 a mistake in the arguments.
    """
    if interpolate == 1:
        raise UserError("--interpolate 1: it has two ends; give at least 2 steps")
    pages = [GRID_NAME, *([LINES_NAME] if interpolate else [])]
    check_folder(out, lambda name: name in pages or _number(name) in range(count))
    # torch takes seconds to import.
    import numpy as np
    import torch

    from pipeline.generate.latents import fixed_latents
    from pipeline.generate.pictures import latents_between, sheet
    from pipeline.train.determinism import use_whole_float32
    from pipeline.train.tasks.generate_saved import load_generator

    trained = load_generator(run, weights)
    typer.echo(f"loaded {trained.name} from {trained.path}")
    origin = Origin(str(trained.path.resolve()), weights_sha256(trained.generator), seed)
    use_whole_float32()
    generator = trained.generator.to("cuda" if torch.cuda.is_available() else "cpu")
    columns = min(16, max(1, round(min(count, _GRID) ** 0.5)))
    parts = (
        fixed_latents(generator.latent_dim, seed, np.arange(start, min(start + _BATCH, count)))
        for start in range(0, count, _BATCH)
    )
    shown: list[Image] = []
    try:
        claim_folder(out, origin)
        for number, picture in enumerate(_drawn(generator, parts, "images", count)):
            _save(picture, out / _name(number))
            if number < _GRID:
                shown.append(picture)
        _save(sheet(shown, columns), out / GRID_NAME)
        if interpolate:
            between = latents_between(generator.latent_dim, _LINES, interpolate, seed)
            lines = [*_drawn(generator, between.split(_BATCH), "images between images", len(between))]
            _save(sheet(lines, interpolate), out / LINES_NAME)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror}); choose another folder") from error
    typer.echo(f"wrote {count} images and {out / GRID_NAME}" + (f", {out / LINES_NAME}" if interpolate else ""))


def _drawn(generator: Generator, parts: Iterable[Tensor], title: str, total: int) -> Iterator[Image]:
    """The pictures of parts of latents, with a word now and then of how far they are."""
    from pipeline.generate.pictures import generated
    from pipeline.train.eval_progress import watched

    for part in watched(parts, title, _BATCH, total, active=True):
        yield from generated(generator, part)


def _save(picture: Image, path: Path) -> None:
    """As a whole: a picture that was cut short would be counted by a FID over the folder, or break it."""
    write_aside(path, partial(picture.save, format="PNG"), sync=False)


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _number(name: str) -> int | None:
    """Of the image with this name."""
    stem = Path(name).stem
    return int(stem) if stem.isdecimal() and name == _name(int(stem)) else None
