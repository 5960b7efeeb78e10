"""task=generate through the one loop: exact, the same on any number of processes, evaluated, drawn and used."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save

from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.generate.latents import TRAIN, normal
from pipeline.models.generate import Gan
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.distributed import World
from pipeline.train.engines.whole import WholeState
from pipeline.train.tasks import make_task
from tests.train.conftest import Rookery
from tests.train.forked import ForkServer
from tests.train.test_resume import check_same_run

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
NEST: dict[str, Any] = {
    "latent_dim": 8,
    "patch_size": 1,
    "num_levels": 3,
    "embed_dims": 16,
    "depths": 1,
    "num_heads": 2,
}
CONV: dict[str, Any] = {"latent_dim": 8, "width": 4}
LOSSES = ("loss", "discriminator", "generator", "r1", "real_logit", "fake_logit", "grad_norm")
FIGURES = {"train": ("step", "samples", "lr", *LOSSES), "eval": ("step", "fid_small", "is_small", "count")}


@pytest.fixture
def tree(digits: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "run",
        "out": str(tmp_path / "runs"),
        "task": {
            "kind": "generate",
            "discriminator": {"width": 4, "max_width": 8, "group": 2},
            "features": "small",
            "samples": 40,
            "r1_every": 2,
        },
        "model": {"name": "nest_gen_micro", "img_size": 16, "in_chans": 1, "options": NEST},
        "data": {"train": str(digits / "train"), "val": str(digits / "test"), "lanes": 12, "workers": 0, "trace": True},
        "augment": {"resize": 16, "crop": "none", "hflip": 0, "normalize": "half"},
        "eval_transform": {"resize": "resize_only"},
        "train": {
            "epochs": "12steps",
            "global_batch_size": 24,
            "precision": "fp32",
            "ema_decay": 0.9,
            "log_every": "1steps",
        },
        "optim": {"lr": 1e-3, "betas": [0.0, 0.99], "weight_decay": 0},
        "eval": {"every": "6steps", "batch_size": 30, "weights": "ema"},
        "checkpoint": {"every": "3steps"},
        "tracking": {"mlflow": False},
    }


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["kind"] == kind]


def overrides_of(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    return f"model.name={name}", "model.options=null", *(f"model.options.{k}={v}" for k, v in options.items())


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of all that a run of 12 steps ends with: its networks, their averages and moments, figures, pages."""
    saved = WholeState.read(run / "checkpoints" / "step-00000012")
    assert saved.ema is not None
    moments = {f"{name}.{key}": value for name, of in saved.moments.items() for key, value in of.items()}
    found = {}
    for kind, tensors in {"weights": saved.model, "average": saved.ema, "moments": moments}.items():
        for net in ("generator", "discriminator"):
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{net}.")}
            assert own
            found[f"{kind} of the {net}"] = sha256(save({name: own[name].contiguous() for name in sorted(own)}))
    figures = [{key: line[key] for key in keys} for kind, keys in FIGURES.items() for line in lines(run, kind)]
    assert len(figures) == 12 + 2
    found["figures"] = sha256(json.dumps(figures).encode())
    pages = sorted((run / "samples").iterdir())
    expected = [f"{page}-{step:08d}.png" for page in ("interpolations", "samples") for step in (6, 12)]
    assert [page.name for page in pages] == expected
    return found | {page.name: sha256(page.read_bytes()) for page in pages}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (1, ("train.precision=bf16", "train.accumulate=2", "train.activation_checkpointing=true")),
        (3, overrides_of("conv_gen_micro", CONV)),
    ],
)
def test_killed_twice_and_resumed_is_bit_identical(
    nproc: int, overrides: tuple[str, ...], recipe: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    fork_server.train(recipe, *overrides, "name=whole", nproc=nproc)
    # Before there is a checkpoint, most likely, and between two of them with an evaluation behind.
    for count in (2, 9):
        job = fork_server.start(recipe, *overrides, "name=cut", nproc=nproc)
        deadline = time.monotonic() + 120
        while len(read_metrics(cut)) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        job.kill()
        assert set(job.wait()) == {-9}
    fork_server.train(recipe, *overrides, "name=cut", nproc=nproc)
    check_same_run(whole, cut)
    assert hashes(cut) == hashes(whole)


@pytest.mark.parametrize(
    ("overrides", "others"), [((), (2,)), ((*overrides_of("conv_gen_micro", CONV), "data.val=null"), (4,))]
)
def test_any_number_of_processes_trains_the_same(
    overrides: tuple[str, ...], others: tuple[int, ...], recipe: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    runs = {}
    for nproc in (1, *others):
        fork_server.train(
            recipe, *overrides, "train.epochs=4steps", "eval.every=4steps", f"name=on{nproc}", nproc=nproc
        )
        runs[nproc] = tmp_path / "runs" / f"on{nproc}"
    for nproc in others:
        for one, many in zip(lines(runs[1], "train"), lines(runs[nproc], "train"), strict=True):
            for key in LOSSES:
                assert many[key] == pytest.approx(one[key], rel=2e-3, abs=1e-4), key
        for first, second in zip(lines(runs[1], "eval"), lines(runs[nproc], "eval"), strict=True):
            for key in ("fid_small", "is_small"):
                assert second[key] == pytest.approx(first[key], rel=1e-2)
            assert second["count"] == first["count"] == 40


def test_steps_are_those_of_a_training_by_hand(recipe: Path) -> None:
    """Both networks one after the other, each with an Adam of its own and the losses of the papers."""
    run = resolve(load_config(recipe, []), 1)
    task = run.task
    work, engine, gan = task.begin(run, ALONE), task.make_engine(ALONE), task.initial_model(ALONE)
    assert isinstance(gan, Gan)
    generator, judge = gan.generator, gan.discriminator
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.99)) for net in (generator, judge)]
    batches = work.train_batches(0)
    for step in range(3):
        batch = next(batches)
        assert batch.step == step and batch.images.min() >= -1 and batch.images.max() <= 1
        expected = normal(8, run.config.seed, TRAIN, step, np.arange(24))
        assert torch.equal(batch.latents, expected)
        result = work.step(engine, batch, 1e-3)

        fake = generator(expected)
        loss_g = F.softplus(-judge(fake)).mean()
        grads_g = torch.autograd.grad(loss_g, list(generator.parameters()))
        real = batch.images.clone().requires_grad_()
        logits = judge(real)
        loss_d = F.softplus(-logits).mean() + F.softplus(judge(fake.detach())).mean()
        if step % 2 == 0:
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            penalty = slope.pow(2).sum((1, 2, 3)).mean()
            loss_d = loss_d + 2 * 10 * penalty
            torch.testing.assert_close(result.parts["r1"], 2 * penalty.detach(), rtol=1e-3, atol=1e-5)
        grads_d = torch.autograd.grad(loss_d, list(judge.parameters()))
        for net, grads, optimizer in zip((generator, judge), (grads_g, grads_d), optimizers, strict=True):
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter.grad = grad
            optimizer.step()
        torch.testing.assert_close(result.loss, (loss_d + loss_g).detach(), rtol=1e-3, atol=1e-5)
    # One value in a thousand has a gradient of about 0, whose sign Adam turns into a whole step.
    for name, parameter in engine.plain.named_parameters():
        near = (parameter - gan.get_parameter(name)).abs() < 1e-4
        assert near.float().mean() > 0.99, name


def test_evaluation_does_not_change_the_training(recipe: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    often, never = ("name=often", "eval.every=1steps"), ("name=never", "data.val=null")
    for overrides in (often, never):
        fork_server.train(recipe, *overrides, "train.epochs=4steps")
    weights = [load_file(tmp_path / "runs" / name / "final" / "model.safetensors") for name in ("often", "never")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_page_without_memory_costs_nothing(
    recipe: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolve(load_config(recipe, []), 1)
    work, engine = run.task.begin(run, ALONE), run.task.make_engine(ALONE)
    failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved memory is ...")
    monkeypatch.setattr("pipeline.train.tasks.generate.samples", Mock(side_effect=failure))
    generator = engine.plain.generator.train()
    work.evaluated(7, engine)
    why = "no memory for it (CUDA out of memory. Tried to allocate 2.00 GiB)"
    assert caplog.messages == [f"no pictures of step 7: {why}; training goes on"]
    assert generator.training


def test_generate_and_eval(recipe: Path, rookery: Rookery, tmp_path: Path) -> None:
    rookery("train", recipe)
    run = tmp_path / "runs" / "run"
    said = rookery("generate", run, "images", "--count", 5, "--seed", 3, "--interpolate", 4).stdout
    assert "wrote 5 images" in said and str(run / "final") in said
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(5)), "generated.json", "grid.png", "interpolations.png"]
    first = np.asarray(Image.open(tmp_path / "images" / "000000.png"))
    assert first.shape == (16, 16)
    page = np.asarray(Image.open(tmp_path / "images" / "interpolations.png"))
    assert np.array_equal(page[2:34:2, 2:34:2], first), "the first one begins at the first image"
    rookery("generate", run / "checkpoints" / "step-00000012", "again", "--count", 1, "--seed", 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "000000.png")), first)
    rookery("generate", run, "other", "--count", 1, "--seed", 4)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "other" / "000000.png")), first)
    result = json.loads((run / "result.json").read_text())
    evaluated = json.loads(rookery("eval", run).stdout.splitlines()[-1])
    for key in ("fid_small", "is_small"):
        assert evaluated[key] == pytest.approx(result[key], rel=1e-3) and math.isfinite(result[key])
    assert {"fid_small", "is_small"} == {*make_task(load_config(recipe)).figures}
    assert result["best"]["fid_small"] == min(line["fid_small"] for line in lines(run, "eval"))
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    (classifier / "config.json").write_text('{"model": "nest_tiny"}')
    (classifier / "model.safetensors").write_bytes(save({"weight": torch.zeros(1)}))
    for arguments, words in (
        (("generate", run, recipe), "not a folder"),
        (("generate", classifier, "x"), "task=classify"),
        (("generate", tmp_path, "x"), "no model here"),
        (("generate", run, "x", "--interpolate", 1), "two ends"),
        (("export", run, "x"), "task=generate"),
    ):
        failed = rookery(*arguments, check=2)
        assert words in failed.stderr and "Traceback" not in failed.stderr


def test_the_recipe_of_digits_learns(digits: Path, rookery: Rookery, tmp_path: Path) -> None:
    """The shipped recipe's first 352 of 1,760 steps: the distance falls by half, the images become different ones."""
    path = Path(__file__).parents[2] / "configs" / "generate" / "nest_digits32.yaml"
    place = (f"data.train={digits}/train", f"data.val={digits}/train", "name=learns", "tracking.mlflow=false")
    rookery("train", path, *place, "train.stop_after=8ep", "--threads", 1)
    first, last = lines(tmp_path / "runs" / "learns", "eval")
    assert 20 < first["fid_small"] < 80 and last["fid_small"] < first["fid_small"] / 2
    assert first["is_small"] < 2 < last["is_small"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("engine.name=fsdp",), "set engine.name=ddp"),
        (("engine.name=deepspeed",), "set engine.name=ddp"),
        (("train.compile=true",), "set train.compile=false"),
        (("augment.normalize=imagenet", "model.in_chans=3"), "set augment.normalize=half"),
        (("mix.mixup_alpha=0.8",), "set mix.prob=0"),
        (("explain.images=2",), "explain.images=2"),
        (("optim.layer_decay=0.75",), "optim.layer_decay=0.75 doesn't go with task=generate"),
        (("model.drop_path_rate=0.1",), "model.drop_path_rate=0.1"),
        (("tracking.register_model=mine",), "tracking.register_model=mine"),
        (("model.name=nest_tiny",), "unknown generator 'nest_tiny'"),
        (("model.options.depth=3",), "did you mean 'depths'"),
        (("model.img_size=18",), "img_size=18"),
        (("task.discriminator.group=5",), "task.discriminator.group=5"),
        (("task.samples=5",), "task.samples"),
        (("task.r1_weigth=5",), "r1_weight"),
    ],
)
def test_what_does_not_fit_is_named(overrides: tuple[str, ...], words: str, recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve(load_config(recipe, list(overrides)), 1)
    assert words in str(caught.value)
