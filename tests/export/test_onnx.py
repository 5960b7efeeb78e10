"""ONNX: what onnxruntime computes, over every registered architecture, and what the file says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.export import check, onnx_file
from pipeline.export.check import CheckFailed, images
from pipeline.export.onnx_file import MODEL, OPSETS, SIDECAR, write_onnx
from tests.conftest import missing
from tests.export.sources import CLASSES, source
from tests.models.structures import one_of_each

try:
    onnx_file.require_packages()
except UserError as error:
    _absent: str | None = str(error)
else:
    _absent = None


@pytest.fixture(autouse=True)
def _packages() -> None:
    if _absent is not None:
        missing(f"ONNX left out: {_absent}")


@pytest.mark.parametrize("name", one_of_each())
def test_onnxruntime_agrees(name: str, tmp_path: Path) -> None:
    found = write_onnx(tmp_path, source(name))
    assert 0 < found < 1e-5  # rounding, not luck: two programs never agree to the bit


def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path / MODEL), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nest_micro` in ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(folder, source("nest_micro"))
    return folder


def test_any_batch_size_fits(written: Path) -> None:
    model, runner = source("nest_micro").model, session(written)
    assert runner.get_inputs()[0].shape == ["batch", 3, model.img_size, model.img_size]
    for batch in (1, 2, 5):
        x = images(model, batch, seed=9)
        (got,) = runner.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_file_says_how_to_use_it(written: Path) -> None:
    beside = json.loads((written / SIDECAR).read_text())
    assert json.loads(session(written).get_modelmeta().custom_metadata_map["rookery"]) == beside
    assert beside["classes"] == CLASSES
    assert beside["model"] == "nest_micro"
    assert beside["preprocessing"]["mean"] == [0.4914, 0.4822, 0.4465]
    assert beside["preprocessing"]["std"] == [0.2471, 0.2435, 0.2616]
    side = source("nest_micro").model.img_size
    assert beside["preprocessing"]["steps"][:2] == [
        f"resize the shorter side to {int(side / 0.9)}",
        f"cut out the central {side}x{side}, black outside",
    ]
    assert beside["input"] == {"name": "images", "shape": ["batch", 3, side, side], "dtype": "float32"}


def test_the_file_holds_no_paths_of_this_machine(written: Path) -> None:
    content = (written / MODEL).read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_fixed_batch_and_operator_set(opset: int, tmp_path: Path) -> None:
    import onnx

    write_onnx(tmp_path, source("nest_micro"), batch=4, opset=opset)
    proto = onnx.load(tmp_path / MODEL)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == json.loads((tmp_path / SIDECAR).read_text())["opset"] == opset
    assert session(tmp_path).get_inputs()[0].shape[0] == 4


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[-1] + 1])
def test_unknown_operator_set(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--opset {opset}: choose one from 18 to 25"):
        write_onnx(tmp_path, source("nest_micro"), opset=opset)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_PACKAGES", ("onnx", "no_such_package", "nor_this_one"))
    with pytest.raises(UserError, match=r"needs no_such_package and nor_this_one: .*rookery\[onnx\]"):
        write_onnx(tmp_path, source("nest_micro"))
    assert not list(tmp_path.iterdir())


class FixedBatch(nn.Module):
    """Stands before a model and makes a constant of the batch size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.img_size, self.in_chans = model, model.img_size, model.in_chans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.view(len(x), *x.shape[1:]))


def test_a_fixed_batch_size_is_noticed(tmp_path: Path) -> None:
    from dataclasses import replace

    given = source("nest_micro")
    with pytest.raises(UserError, match=r"fixed batch size .* --batch N"):
        write_onnx(tmp_path, replace(given, model=FixedBatch(given.model)))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_another_result_is_refused(error: float) -> None:
    model = source("nest_micro").model

    def wrong(x: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        logits[-1, 0] += error * logits.abs().max()
        return logits

    with pytest.raises(CheckFailed, match=r"differs from the model by (2.00e-04|nan) of the largest logit"):
        check.compare(model, wrong, (1, 3), "it")
    check.compare(model, lambda x: model(x) * (1 + 0.9e-4), (1, 3), "it")
