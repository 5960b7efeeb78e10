"""safetensors and timm: what is written is the model, at its own and at another image size."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.export.check import CheckFailed, difference, images
from pipeline.export.source import Source
from pipeline.export.timm_format import NATIVE_FORMS
from pipeline.export.write import write
from pipeline.models import ModelError, create_model, list_models, resize_pos_embed
from pipeline.train.export import MODEL_CONFIG, SHA256, WEIGHTS, load_weights, whole_directory, write_weights
from pipeline.train.trained import Trained
from tests.export.sources import CLASSES, full_source, source

every_model = pytest.mark.parametrize("name", list_models())


@every_model
def test_safetensors_are_the_model_to_the_bit(name: str, tmp_path: Path) -> None:
    """At the model's own and at another image size."""
    given = source(name)
    size = 2 * given.model.img_size
    assert write(given, tmp_path / "own", "safetensors") == 0.0
    assert write(given.at(size), tmp_path / "other", "safetensors") == 0.0
    model, described = load_weights(tmp_path / "own")
    assert described == json.loads(json.dumps(given.described))
    state = given.model.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    model, described = load_weights(tmp_path / "other")
    assert model.img_size == described["overrides"]["img_size"] == size
    assert described["figures"] == {}  # they were measured at the other size
    expected = resize_pos_embed(given.model.state_dict(), model)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert given.at(given.model.img_size) is given


def test_a_description_that_was_changed_is_told_by_its_key(tmp_path: Path) -> None:
    write(source("nest_tiny"), tmp_path / "out", "safetensors")
    text = (tmp_path / "out" / MODEL_CONFIG).read_text()
    (tmp_path / "out" / MODEL_CONFIG).write_text(text.replace('"antialias"', '"antialiaS"'))
    with pytest.raises(UserError, match=r"config\.json: augment\.antialiaS: Extra inputs"):
        load_weights(tmp_path / "out")


def test_weights_can_be_read_while_better_ones_take_their_place(tmp_path: Path) -> None:
    given, best = source("nest_tiny"), tmp_path / "best"
    state = given.model.state_dict()

    def replace(number: int) -> None:
        described = given.described | {"figures": {"top1": float(number)}}
        with whole_directory(best, replace=True) as part:
            write_weights(part, {name: tensor * 0 + number for name, tensor in state.items()}, described)

    def train() -> None:
        for number in range(1, 25):
            replace(number)

    replace(0)
    writer = threading.Thread(target=train)
    writer.start()
    seen = []
    while writer.is_alive():
        model, described = load_weights(best)
        seen.append(described["figures"]["top1"])
        assert all((tensor == seen[-1]).all() for tensor in model.state_dict().values())
    writer.join()
    assert len(set(seen)) > 2
    best.rename(tmp_path / ".best.old")  # as if killed between two renames
    with pytest.raises(KeyboardInterrupt), whole_directory(best, replace=True):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["best"] and load_weights(best)[1]["figures"] == {"top1": 24.0}


def timm_model(folder: Path) -> torch.nn.Module:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


# name -> overrides, timm's name for it
NATIVE = {
    "nest_tiny": ({"img_size": 64, "gelu": "erf", "in_chans": 1}, "nest_tiny_jx"),
    "nest_tiny, padded on both sides": ({"img_size": 32, "gelu": "erf", "pool_pad": "symmetric"}, "nest_tiny"),
    "deit_tiny, other widths": (
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
        "deit_tiny_patch16_224",
    ),
}


@pytest.mark.parametrize("case", NATIVE)
def test_timm_computes_the_same(case: str, tmp_path: Path) -> None:
    import timm

    overrides, theirs = NATIVE[case]
    given = full_source(case.partition(",")[0], **overrides)
    if overrides.get("in_chans") == 1:
        given.described["augment"]["normalize"] = "half"
    assert write(given, tmp_path / "out", "timm") < 1e-5
    config = json.loads((tmp_path / "out" / MODEL_CONFIG).read_text())
    assert config["architecture"] == theirs
    assert config["label_names"] == CLASSES
    x = images(given.model, 2, seed=5)
    model = timm_model(tmp_path / "out")
    with torch.no_grad():
        assert difference(model(x), given.model(x)) < 1e-5
    data = timm.data.resolve_data_config(model=model)
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
    assert data["input_size"] == (given.model.in_chans, given.model.img_size, given.model.img_size)
    assert list(data["mean"]) == ([0.5] if given.model.in_chans == 1 else [0.4914, 0.4822, 0.4465])


def test_timms_gelu_differs_and_is_told(tmp_path: Path) -> None:
    import timm

    given, told = full_source("nest_tiny", img_size=32), []
    assert write(given, tmp_path / "out", "timm", say=told.append) < 1e-5
    assert any("exact GELU" in line and "gelu=erf" in line for line in told)
    x = images(given.model, 2)
    with torch.no_grad():
        assert difference(timm_model(tmp_path / "out")(x), given.model(x)) > 1e-5
        # The file alone, with the activation that the message names.
        file, tanh = str(tmp_path / "out" / WEIGHTS), functools.partial(torch.nn.GELU, approximate="tanh")
        args = {"num_classes": len(CLASSES), "img_size": 32, "act_layer": tanh}
        model = timm.create_model("nest_tiny_jx", checkpoint_path=file, **args).eval()
        assert difference(model(x), given.model(x)) < 1e-5


@pytest.mark.parametrize("name", ["nest_micro", "nest_tiny_cifar", "hvt_s_1", "refiner_vit_s"])
def test_what_timm_does_not_know(name: str, tmp_path: Path) -> None:
    import timm

    given, told = source(name), []
    assert write(given, tmp_path / "out", "timm", say=told.append) == 0.0
    assert f"load it as rookery_{name}" in " ".join(told)
    loading = told[-1].removeprefix("load it with ")
    model = eval(loading, {"timm": timm}).eval()
    x = images(given.model, 2)
    assert torch.equal(model(x), given.model(x))
    assert load_weights(tmp_path / "out")[1]["model"] == name


@pytest.mark.parametrize(
    ("overrides", "theirs"),
    [({}, "nest_tiny_jx"), ({"aggregation_plane": "block"}, None), ({"depths": [2, 2, 9]}, None)],
)
def test_a_nest_that_timm_can_not_build_is_not_given_timms_name(overrides: dict[str, Any], theirs: str | None) -> None:
    with torch.device("meta"):
        model = create_model("nest_tiny", **overrides)
    found = NATIVE_FORMS["nest"](Source(Path("-"), model, {"model": "nest_tiny", "overrides": overrides}))
    assert (found and found.name) == theirs


@pytest.mark.parametrize("format", ["safetensors", "timm"])
def test_nothing_is_left_of_a_failed_check(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are damaged on their way to the file are noticed."""
    monkeypatch.setattr("pipeline.export.check.TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="nothing is written"):
        write(source("nest_micro"), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_a_size_that_does_not_fit() -> None:
    with pytest.raises(ModelError, match="img_size=10 can't be cut into blocks"):
        source("nest_micro").at(10)


def test_a_directory_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(KeyboardInterrupt), whole_directory(out) as part:
        (part / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(out.parent.iterdir())
    with whole_directory(out) as part:
        (part / "file").write_text("first")
        assert not out.exists()
    with pytest.raises(UserError, match="can't be written"), whole_directory(out) as part:
        (part / "file").write_text("second")
    assert (out / "file").read_text() == "first"
    with whole_directory(out, replace=True) as part:
        (part / "file").write_text("third")
    assert (out / "file").read_text() == "third"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_whoever_reads_the_config_reads_the_weights(tmp_path: Path) -> None:
    write(source("nest_micro"), tmp_path / "out", "safetensors")
    config, weights = (tmp_path / "out" / name for name in (MODEL_CONFIG, WEIGHTS))
    assert weights.stat().st_mode == config.stat().st_mode


def described(out: Path, **changes: Any) -> None:
    """Change the description of exported weights."""
    old = json.loads((out / MODEL_CONFIG).read_text())
    (out / MODEL_CONFIG).write_text(json.dumps(old | changes))


def flipped(file: Path) -> None:
    """Change one bit of the last number."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_weights_without_a_hash_are_taken(tmp_path: Path) -> None:
    """Those of others, or changed on purpose; and what is read doesn't keep the hash of another file."""
    write(source("nest_micro"), tmp_path, "safetensors")
    assert SHA256 not in load_weights(tmp_path)[1]
    flipped(tmp_path / WEIGHTS)
    old = json.loads((tmp_path / MODEL_CONFIG).read_text())
    assert len(old.pop(SHA256)) == 64
    (tmp_path / MODEL_CONFIG).write_text(json.dumps(old))
    load_weights(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / WEIGHTS).unlink(), "model.safetensors is missing"),
        (lambda out: (out / MODEL_CONFIG).unlink(), "config.json is missing"),
        (lambda out: (out / WEIGHTS).write_bytes(b"short"), f"{WEIGHTS}: damaged or incomplete"),
        (lambda out: flipped(out / WEIGHTS), f"{WEIGHTS}: changed since it was written .*if the change is meant"),
        (lambda out: (out / MODEL_CONFIG).write_text("{"), f"{MODEL_CONFIG}: damaged or incomplete"),
        (lambda out: (out / MODEL_CONFIG).write_text("[]"), "not the description of a model"),
        (lambda out: (out / MODEL_CONFIG).write_text("{}"), "'model' is missing"),
        (lambda out: described(out, overrides={"depths": 7}), "don't fit the model"),
    ],
)
def test_damaged_exports_are_explained(damage: Any, message: str, tmp_path: Path) -> None:
    write(source("nest_micro"), tmp_path / "out", "safetensors")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "out")


def test_what_is_left_out_of_the_overrides_is_the_models_own(tmp_path: Path) -> None:
    write(full_source("nest_tiny_cifar"), tmp_path / "out", "safetensors")
    described(tmp_path / "out", overrides={"num_classes": len(CLASSES)})
    trained = Trained.from_export(tmp_path / "out")
    assert (trained.img_size, trained.in_chans) == (32, 3)
