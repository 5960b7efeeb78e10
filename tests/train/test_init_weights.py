"""Starting from the weights of another run: which values arrive, what is refused, and that a resumed run needs none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import RunConfig
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.models import ImageModel, resize_pos_embed
from pipeline.resolve import build_model, resolve
from pipeline.train.distributed import World
from pipeline.train.export import MODEL_CONFIG, SHA256, WEIGHTS
from pipeline.train.loop import train
from pipeline.train.setup import initial_model

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
HEAD = {"head.weight", "head.bias"}


@pytest.fixture
def weights(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run's `final/`."""
    return Path(shutil.copytree(trained / "final", tmp_path / "weights"))


def started(config: RunConfig) -> dict[str, torch.Tensor]:
    return initial_model(resolve(config, 1).config, ALONE).state_dict()


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(load_config(recipe, overrides), 1)
    return str(caught.value)


@pytest.mark.parametrize("name", ["", WEIGHTS])
def test_every_weight_is_the_one_of_the_file(name: str, recipe: Path, weights: Path) -> None:
    state = started(load_config(recipe, [f"model.init={weights / name}"]))
    expected = load_file(weights / WEIGHTS)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("size", [32, 8])
def test_position_embeddings_are_resized(size: int, recipe: Path, weights: Path) -> None:
    """32 px: larger blocks; 8 px: smaller ones."""
    config = load_config(recipe, [f"model.init={weights}", f"model.img_size={size}"])
    state, before = started(config), load_file(weights / WEIGHTS)
    model = build_model(config, "cpu")
    assert isinstance(model, ImageModel)
    expected = resize_pos_embed(before, model)
    changed = {key for key in state if state[key].shape != before[key].shape}
    assert changed == {key for key in state if key.endswith("pos_embed")}
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_new_head_is_drawn_as_without_init(recipe: Path, weights: Path) -> None:
    fresh = started(load_config(recipe))
    state = started(load_config(recipe, [f"model.init={weights}", "model.init_head=new"]))
    expected = load_file(weights / WEIGHTS)
    assert {
        key for key in state if torch.equal(state[key], fresh[key]) and not torch.equal(state[key], expected[key])
    } == HEAD
    assert all(torch.equal(state[key], expected[key]) for key in state.keys() - HEAD)


def other_head(weights: Path, classes: int) -> None:
    tensors = load_file(weights / WEIGHTS)
    tensors["head.weight"], tensors["head.bias"] = torch.zeros(classes, 48), torch.zeros(classes)
    save_file(tensors, weights / WEIGHTS)
    described = json.loads((weights / MODEL_CONFIG).read_text())
    del described[SHA256]  # the change is meant
    (weights / MODEL_CONFIG).write_text(json.dumps(described))


def test_weights_that_have_changed_are_refused(recipe: Path, weights: Path) -> None:
    save_file({name: 2 * tensor for name, tensor in load_file(weights / WEIGHTS).items()}, weights / WEIGHTS)
    assert f"{WEIGHTS}: changed since it was written" in refusal(recipe, f"model.init={weights}")


def test_a_head_of_other_classes_must_be_asked_to_be_new(recipe: Path, weights: Path) -> None:
    other_head(weights, 7)
    message = refusal(recipe, f"model.init={weights}")
    assert "its head doesn't fit nest_micro with 10 classes (head.bias, head.weight)" in message
    assert "set model.init_head=new" in message
    started(load_config(recipe, [f"model.init={weights}", "model.init_head=new"]))


def test_as_many_classes_with_other_names(recipe: Path, weights: Path) -> None:
    described = json.loads((weights / MODEL_CONFIG).read_text())
    (weights / MODEL_CONFIG).write_text(json.dumps(described | {"classes": described["classes"][::-1]}))
    assert "its head tells other classes apart than data.train holds; set model.init_head=new" in refusal(
        recipe, f"model.init={weights}"
    )
    started(load_config(recipe, [f"model.init={weights}", "model.init_head=new"]))
    (weights / MODEL_CONFIG).unlink()
    started(load_config(recipe, [f"model.init={weights}"]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.init={weights}/nowhere"], "no weights there; name a run's final/ directory or a file such as model."),
        (["model.init={run}"], "no weights there; name {run}/best or {run}/final"),
        (["model.init={weights}/config.json"], "can't read config.json"),
        (["model.init={weights}", "model.options.depths=2"], "not weights of nest_micro: it lacks "),
        (["model.init={weights}", "model.options.depths=2"], "; they were trained as nest_micro ("),
        (["model.init={weights}", "model.options.embed_dims=[16, 32, 96]"], "levels.2.pos_embed of shape (1, 1, "),
        (["model.init={weights}", "model.in_chans=3"], "nest_micro: it has in another shape patch_embed.weight; they"),
        (["model.init_head=new"], "model.init_head=new goes with weights to start from: set model.init"),
    ],
)
def test_mistakes(overrides: list[str], said: str, recipe: Path, weights: Path, trained: Path) -> None:
    paths = {"weights": weights, "run": trained}
    assert said.format(**paths) in refusal(recipe, *(override.format(**paths) for override in overrides))


@pytest.fixture
def short(recipe: Path, weights: Path) -> Iterator[Callable[..., Path]]:
    """Trains the recipe from the weights, in this process; returns the run's `model.safetensors`."""

    def run(*overrides: str) -> Path:
        short = (f"model.init={weights}", "train.epochs=4steps", "optim.schedule.warmup=1steps", "eval.every=9ep")
        config = load_config(recipe, [*short, *overrides])
        train(config, ALONE)
        return Path(config.out, config.name, "final", WEIGHTS)

    before = torch.are_deterministic_algorithms_enabled()
    yield run
    torch.use_deterministic_algorithms(before)


def test_a_run_starts_from_the_weights(short: Callable[..., Path], weights: Path) -> None:
    """At a learning rate of next to nothing it ends with them."""
    ended, expected = load_file(short("optim.lr=1e-12", "train.ema_decay=null")), load_file(weights / WEIGHTS)
    assert all(torch.allclose(ended[key], expected[key], rtol=0, atol=1e-9) for key in ended)


def test_a_resumed_run_needs_no_init(short: Callable[..., Path], weights: Path) -> None:
    """Stopped after step 2 and without the file it started from, it ends like the run that went through."""
    whole = short("name=whole")
    short("name=cut", "train.stop_after=2steps")
    shutil.rmtree(weights)
    assert short("name=cut").read_bytes() == whole.read_bytes()
    with pytest.raises(UserError, match="no weights there"):
        short("name=new")
