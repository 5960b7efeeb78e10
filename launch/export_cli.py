"""`rookery export`: trained models for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError


class Format(StrEnum):
    """What other programs read."""

    safetensors = "safetensors"
    onnx = "onnx"
    timm = "timm"


class Weights(StrEnum):
    """Which weights of a run."""

    final = "final"
    best = "best"
    last = "last"


def export(
    source: Annotated[Path, typer.Argument(help="run directory, checkpoint, or directory with exported weights")],
    out: Annotated[Path, typer.Argument(help="directory to write; it must not exist")],
    format: Annotated[Format, typer.Option(help="what to write")] = Format.safetensors,
    img_size: Annotated[
        int | None, typer.Option(min=1, max=8192, help="for images of this side; position embeddings are interpolated")
    ] = None,
    batch: Annotated[str, typer.Option(help="onnx: a fixed batch size, or dynamic")] = "dynamic",
    opset: Annotated[int | None, typer.Option(help="onnx: version of the operator set")] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(help="of a run; last: its newest checkpoint; default: final, else last"),
    ] = None,
) -> None:
    """Write trained weights as safetensors, ONNX or for timm, run them there, and compare.

    Exit status: 0 written, 1 the written model computes something else (then nothing is kept), 2 a mistake in the
    arguments.
    """
    fixed = _check(out, format, batch, opset)
    # Imported here because torch takes seconds, which every other command and `--help` would pay.
    from pipeline.export.check import CheckFailed
    from pipeline.export.onnx_file import require_packages
    from pipeline.export.source import load_source
    from pipeline.export.write import write

    if format is Format.onnx:
        require_packages()
    try:
        model = load_source(source, weights)
        typer.echo(f"loaded {model.name} from {model.path}")
        if img_size is not None:
            model = model.at(img_size)
        write(model, out, format, fixed, opset, typer.echo)
    except CheckFailed as error:
        typer.echo(f"rookery: {error}", err=True)
        raise typer.Exit(1) from error


def _check(out: Path, format: Format, batch: str, opset: int | None) -> int | None:
    """Find mistakes before anything is loaded.

    Returns:
        The fixed batch size, None for any.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a directory that doesn't, or remove it")
    if out.suffix in (".onnx", ".safetensors", ".pth", ".pt"):
        raise UserError(f"{out}: --format {format} writes a directory of files; name it without {out.suffix}")
    if format is not Format.onnx and (batch != "dynamic" or opset is not None):
        raise UserError(f"--batch and --opset belong to --format onnx, not to {format}; leave them out")
    if batch == "dynamic":
        return None
    if not batch.isdecimal() or int(batch) < 1:
        raise UserError(f"--batch {batch}: give a number of at least 1, or dynamic")
    return int(batch)
