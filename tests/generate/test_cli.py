"""`rookery generate`: the folder it writes, what it refuses, and that it says how far it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from launch import cli
from pipeline.errors import UserError
from pipeline.models.generate import make_gan
from pipeline.train import eval_progress

NEST = {"latent_dim": 4, "num_levels": 2, "embed_dims": 8, "depths": 1, "num_heads": 2, "img_size": 16, "channels": 1}
JUDGE = {"width": 4, "max_width": 8, "group": 0}


def make_weights(folder: Path, seed: int) -> Path:
    """Exported weights of a very small generator that has learned nothing."""
    torch.manual_seed(seed)
    described = {"task": "generate", "model": "nest_gen_micro", "overrides": NEST, "discriminator": JUDGE}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    save_file(make_gan("nest_gen_micro", NEST, JUDGE).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "final", 0)


def generate(*arguments: Any) -> Result:
    return CliRunner().invoke(cli._commands, ["generate", *map(str, arguments)], env={"COLUMNS": "200"})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(done: Result) -> str:
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


@pytest.mark.parametrize("options", [("--count", 10), ("--count", 3, "--seed", 5, "--interpolate", 2)])
def test_the_same_command_again_writes_the_same(options: tuple[Any, ...], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert generate(weights, out, *options).exit_code == 0
    first = content(out)
    (out / "000001.png").unlink()
    assert generate(weights, out, *options).exit_code == 0
    assert content(out) == first


def test_more_of_the_same_may_be_added(weights: Path, tmp_path: Path) -> None:
    for count in (3, 70):
        (tmp_path / "notes.txt").write_text("no picture")
        assert generate(weights, tmp_path, "--count", count).exit_code == 0
    assert generate(weights, tmp_path / "whole", "--count", 70).exit_code == 0
    whole = content(tmp_path / "whole")
    assert len(whole) == 72 and {name: (tmp_path / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--count", 3, "--seed", 5, "--interpolate", 2), "it has 000003.png and 1 more, which this command doesn't"),
        (("--count", 4, "--interpolate", 2), "it has 000004.png, which this command doesn't write"),
        (("--count", 5), "it has interpolations.png, which this command doesn't write"),
        (("--count", 5, "--seed", 5, "--interpolate", 2), "it has pictures of seed 0 from .*final, not of seed 5 from"),
    ],
)
def test_pictures_of_another_command_are_refused(
    options: tuple[Any, ...], told: str, weights: Path, tmp_path: Path
) -> None:
    assert generate(weights, tmp_path, "--count", 5, "--interpolate", 2).exit_code == 0
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: {told}.*; name an empty folder, or remove them first"):
        raise generate(weights, tmp_path, *options).exception or AssertionError
    assert content(tmp_path) == before


def test_pictures_of_other_weights_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    run, out = make_weights(tmp_path / "run", 0), tmp_path / "out"
    assert generate(run, out, "--count", 2).exit_code == 0
    other = make_weights(tmp_path / "other", 1)
    assert f"pictures of seed 0 from {run}, not of seed 0 from {other}" in refused(generate(other, out, "--count", 2))
    make_weights(run, 1)
    assert f"from {run}, whose weights were others then, not" in refused(generate(run, out, "--count", 2))
    (out / "generated.json").unlink()
    assert "no generated.json says what made them" in refused(generate(run, out, "--count", 2))


@pytest.mark.parametrize("place", ["run", "out"])
def test_a_name_that_is_too_long_is_told(place: str, weights: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    done, told = {
        "run": (generate(long, tmp_path / "out"), "no model here"),
        "out": (generate(weights, long), "can't be used (File name too long); choose another folder"),
    }[place]
    assert refused(done).startswith(f"{long}: {told}")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--seed", 10**26, "less than or equal to 2147483647"),
        ("--seed", 2**31, "less than or equal to 2147483647"),
        ("--seed", -1, "greater than or equal to 0"),
        ("--interpolate", 100_000, "less than or equal to 1000"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(
    option: str, value: int, told: str, weights: Path, tmp_path: Path
) -> None:
    done = generate(weights, tmp_path / "out", option, value)
    assert (
        done.exit_code == 2 and f"'{option}': Input should be {told}" in done.output and not (tmp_path / "out").exists()
    )


def test_long_work_says_how_far_it_is(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_progress, "LINE_SECONDS", 0)
    done = generate(weights, tmp_path / "out", "--count", 130, "--interpolate", 10)
    assert "images: 64/130 samples" in done.stderr and "images between images: 0/80 samples" in done.stderr


def test_the_largest_seed_fits(weights: Path, tmp_path: Path) -> None:
    assert generate(weights, tmp_path / "out", "--count", 1, "--seed", 2**31 - 1).exit_code == 0
