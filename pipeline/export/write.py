"""One format into one directory, checked before it appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.export.check import compare
from pipeline.export.onnx_file import write_onnx
from pipeline.export.source import Source
from pipeline.export.timm_format import usage, write_timm
from pipeline.train.export import load_weights, whole_directory, write_weights


def write(
    source: Source,
    out: Path,
    format: str,
    batch: int | None = None,
    opset: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Write a model in another program's format.

    Args:
        source: the model.
        out: directory that appears when everything in it is written and checked.
        format: `safetensors`, `onnx` or `timm`.
        batch, opset: of ONNX; see `write_onnx`.
        say: told what is done.

    Returns:
        The largest difference between the logits of what was written and of the model, relative to the largest logit.

    Raises:
        CheckFailed: it is above 1e-4.
        UserError: the directory can't be written, or the format can't hold this model.
    """
    with whole_directory(out) as part:
        if format == "onnx":
            found = write_onnx(part, source, batch, opset, say)
        elif format == "timm":
            found = write_timm(part, source, say)
        else:
            found = _write_safetensors(part, source)
        files = ", ".join(f"{file.name} {_size(file)}" for file in sorted(part.iterdir()))
    say(f"{out}: {files}; logits as the model's to {found:.1e} of the largest")
    if format == "timm":
        say(f"load it with {usage(source, out)}")
    return found


def _write_safetensors(directory: Path, source: Source) -> float:
    write_weights(directory, source.model.state_dict(), source.described)
    model, _ = load_weights(directory)
    return compare(source.model, model.eval(), (1, 3), "the written model")


def _size(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
