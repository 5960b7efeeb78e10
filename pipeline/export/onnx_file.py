"""A trained model as ONNX, run with onnxruntime and compared before it is trusted."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export.check import compare, images
from pipeline.export.source import Preprocessing, Source

MODEL = "model.onnx"
SIDECAR = "preprocess.json"
METADATA = "rookery"
# What torch's exporter can write and onnx can convert to.
OPSETS = range(18, 26)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise UserError unless everything that `write_onnx` uses is installed."""
    absent = [name for name in _PACKAGES if find_spec(name) is None]
    if absent:
        raise UserError(f"--format onnx needs {' and '.join(absent)}: install them with uv pip install 'rookery[onnx]'")


def write_onnx(
    directory: Path,
    source: Source,
    batch: int | None = None,
    opset: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Write `model.onnx` and `preprocess.json` into a directory, and compare onnxruntime with PyTorch.

    The graph has one input `images` (B, C, H, W) and one output `logits` (B, classes), float32. How images are
    prepared, and the names of the classes, are in `preprocess.json` and in the graph's metadata under `rookery`.

    Args:
        directory: an empty directory.
        source: the model.
        batch: fixed size of a batch; None: any.
        opset: version of the operator set; None: the exporter's own choice.
        say: told what is done.

    Returns:
        The largest difference between the logits, relative to the largest logit.

    Raises:
        CheckFailed: it is above 1e-4.
        UserError: packages are missing, or the model or the operator set can't be exported.
    """
    require_packages()
    if opset is not None and opset not in OPSETS:
        raise UserError(f"--opset {opset}: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    say(f"exporting {source.name} to ONNX")
    program = _export(source, batch, opset)
    _strip(program.model)
    if batch is None and isinstance(program.model.graph.inputs[0].shape[0], int):
        raise UserError(f"{source.name} computes with a fixed batch size somewhere; export it with --batch N")
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise UserError(f"--opset {opset}: {source.name} can't be converted from version {written}; leave --opset out")
    facts = _facts(source, batch, written)
    program.model.metadata_props[METADATA] = json.dumps(facts)
    program.save(directory / MODEL, external_data=False)
    (directory / SIDECAR).write_text(json.dumps(facts, indent=1) + "\n")
    batches = (1, 3) if batch is None else (batch,)
    say(f"comparing onnxruntime with PyTorch on batches of {' and '.join(map(str, batches))}")
    return compare(source.model, _session(directory / MODEL), batches, "the ONNX graph")


def _export(source: Source, batch: int | None, opset: int | None) -> Any:
    # An axis of length 1 would be taken for a constant.
    example = images(source.model, batch or 2)
    free = None if batch else ({0: torch.export.Dim("batch")},)
    with _quiet():
        try:
            return torch.onnx.export(
                source.model,
                (example,),
                input_names=["images"],
                output_names=["logits"],
                opset_version=opset,
                dynamic_shapes=free,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(f"{source.name} can't be exported to ONNX: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def _quiet() -> Any:
    """Without the exporter's remarks about its own workings; what goes wrong is raised or found by the check."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _strip(model: Any) -> None:
    """Remove what the exporter notes about this program's source, file names and lines among it."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()


def _facts(source: Source, batch: int | None, opset: int) -> dict[str, Any]:
    model = source.model
    shape = [batch or "batch", model.in_chans, model.img_size, model.img_size]
    return {
        "model": source.name,
        "overrides": source.overrides,
        "input": {"name": "images", "shape": shape, "dtype": "float32"},
        "output": {"name": "logits", "shape": [batch or "batch", model.num_classes], "dtype": "float32"},
        "opset": opset,
        "preprocessing": Preprocessing.of(source).describe(),
        "classes": source.described["classes"],
        "figures": source.described["figures"],
    }


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class of their own
        raise UserError(f"onnxruntime can't load the graph: {str(error).splitlines()[0]}") from error
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
