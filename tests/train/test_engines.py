"""Every engine and precision against a plain single-process training written out by hand."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.models import attention as by_torch
from pipeline.models import layers
from pipeline.models.compiled import compile_model
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.engines import Engine, make_engine, saved_weights
from pipeline.train.engines import deepspeed as zero
from pipeline.train.engines.deepspeed_setup import import_deepspeed
from pipeline.train.loop import train
from pipeline.train.setup import initial_model
from tests.models.block_attention_cases import attention
from tests.train.conftest import TWO_LEVELS, write_recipe
from tests.train.many_runs import train_all
from tests.train.plain import ALONE, PlainTraining
from tests.train.process_group import leave_process_group

STEPS = 20


@pytest.fixture(autouse=True, scope="module")
def leave_group() -> Iterator[None]:
    """Leave the process group that an engine opens in a process without one. DeepSpeed wants the same all the time."""
    yield
    leave_process_group()


def engine_alone(recipe: Path, *overrides: str) -> Engine:
    run = resolve(load_config(recipe, list(overrides)), 1)
    return make_engine(initial_model(run.config, ALONE), run.config, ALONE)


@cache
def reference_losses(recipe: Path, precision: str, lr_scale: float, *overrides: str) -> list[float]:
    """Losses of the run by a plain loop."""
    plain = PlainTraining(recipe, precision, lr_scale, *overrides)
    return [plain.step(step, batch) for step, batch in zip(range(STEPS), plain.batches(), strict=False)]


ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)},
    "offload": ["engine.name=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=true"],
}
PLAIN = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
ENGINES |= {f"{name} compiled": [*ENGINES[name], "train.compile=true"] for name in PLAIN}
ENGINES |= {f"{name} compiled layers": [*ENGINES[name], "train.compile=layers"] for name in PLAIN}
ENGINES |= {f"{name} recomputed": [*ENGINES[name], "train.activation_checkpointing=true"] for name in PLAIN}
ENGINES |= {f"{name} by layers": ENGINES[name] for name in [*PLAIN, "offload"]}
ENGINES["ddp compiled by layers"] = ENGINES["ddp compiled"]

TABLE = [
    *itertools.product(PLAIN, ["fp32", "bf16"], [1, 2]),
    ("offload", "bf16", 2),
    *((f"{engine} compiled", "fp32", 1) for engine in ("ddp", "fsdp", "zero1")),
    ("zero3 compiled layers", "fp32", 1),
    *((f"{engine} recomputed", "bf16", 2) for engine in ("ddp", "fsdp", "zero3")),
    *((f"{engine} by layers", "fp32", 1) for engine in [*PLAIN, "offload", "ddp compiled"]),
]


# One run that goes from engine to engine, and for its last steps to one process. Its rates decay from layer to layer:
# the optimizer's groups are many, and each engine lays them out in its own way.
WANDERING = {"zero1": 5, "fsdp": 10, "zero3": 15, "ddp": STEPS}

# Norms are 0.8 to 2.3. Adam takes no notice of the scale of gradients unless its epsilon is of their size, and with it
# and this rate all matters: scale, second moments, number of steps.
CLIPPED = ("train.clip_grad_norm=0.05", "optim.eps=3e-3", "optim.lr=5e-3")
UNCLIPPED = ("train.clip_grad_norm=null", *CLIPPED[1:])


def options_of(engine: str, accumulate: int) -> tuple[str, ...]:
    """A level less to compile saves a minute. Rows of several micro-batches clip, once they are summed."""
    by_layers = ("optim.layer_decay=0.5",) if "by layers" in engine else ()
    return (TWO_LEVELS if "compiled" in engine else ()) + (CLIPPED if accumulate > 1 else ()) + by_layers


def run_name(engine: str, precision: str, accumulate: int) -> str:
    return f"{engine.replace(' ', '_')}-{precision}-{accumulate}"


@pytest.fixture(scope="module")
def table(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A recipe, next to the directories of its runs over `TABLE` on two processes, and what these printed."""
    folder = tmp_path_factory.mktemp("table")
    recipe = write_recipe(digits, folder, augment=False)
    short = [f"train.stop_after={STEPS}steps", "data.val=null", "data.trace=false"]
    configs = [
        load_config(
            recipe,
            [
                *(*ENGINES[e], *options_of(e, a), *short),
                *(f"name={run_name(e, p, a)}", f"train.precision={p}", f"train.accumulate={a}"),
            ],
        )
        for e, p, a in TABLE
    ]
    wandering = [
        load_config(
            recipe, [*ENGINES[e], "optim.layer_decay=0.5", *short, f"train.stop_after={to}steps", "name=wandering"]
        )
        for e, to in WANDERING.items()
    ]
    done = train_all([*configs, *wandering[:-1]], 2, folder)
    train(wandering[-1], ALONE)
    return recipe, done.stdout + done.stderr


@pytest.mark.parametrize(("engine", "precision", "accumulate"), TABLE)
def test_two_processes_train_as_one(engine: str, precision: str, accumulate: int, table: tuple[Path, str]) -> None:
    recipe, printed = table
    tolerance = {"fp32": 1e-5, "bf16": 5e-3}[precision]
    run = recipe.parent / "runs" / run_name(engine, precision, accumulate)
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    options = options_of(engine, accumulate)
    expected = reference_losses(recipe, precision, 1.0, *options)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=tolerance)
    # The comparison means something only if updates, and clipping, change the losses by far more than the tolerance.
    others = [reference_losses(recipe, precision, 0.0, *options)]
    if accumulate > 1:
        others.append(reference_losses(recipe, precision, 1.0, *UNCLIPPED))
    if "by layers" in engine:
        others.append(reference_losses(recipe, precision, 1.0, *options[:-1]))
    for other in others:
        assert max(abs(a - b) / b for a, b in zip(expected, other, strict=True)) > 3 * tolerance
    assert not any(word in printed for word in ("DeepSpeed", "[INFO]", "[WARNING]"))


def test_one_run_on_many_engines(table: tuple[Path, str]) -> None:
    recipe, _ = table
    lines = [line for line in read_metrics(recipe.parent / "runs" / "wandering") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    expected = reference_losses(recipe, "fp32", 1.0, "optim.layer_decay=0.5")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)


def test_a_missing_package_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve(load_config(recipe, ENGINES["zero1"]), 1)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'rookery\[deepspeed\]'"):
        make_engine(initial_model(run.config, ALONE), run.config, ALONE)


@pytest.mark.parametrize(
    ("engine", "package", "version", "message"),
    [
        ("zero0", "deepspeed", "0.19.0", r"DeepSpeed 0\.19\.0 is too old"),
        ("zero3 compiled", "torch", "2.14.1+cu130", r"PyTorch 2\.14\.1\+cu130 is too old.*train\.compile=false"),
        ("zero3 compiled layers", "torch", "2.11.0", "2.15 or newer"),
        ("zero3", "torch", "2.11.0", None),
        ("zero1 compiled", "torch", "2.11.0", None),
        ("zero3 compiled", "torch", "2.15.0+cu132", None),
        ("zero3 compiled", "deepspeed", "0.20.0", None),
    ],
)
def test_versions_that_compute_something_else(
    engine: str, package: str, version: str, message: str | None, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(load_config(recipe, ENGINES[engine]), 1).config
    import_deepspeed(config, ALONE)  # the versions of this environment are fine
    monkeypatch.setattr(sys.modules[package], "__version__", TorchVersion(version))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        import_deepspeed(config, ALONE)


@pytest.mark.parametrize("name", [*PLAIN, "offload"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bad_step_is_skipped_and_training_goes_on(precision: str, name: str, recipe: Path) -> None:
    engine = engine_alone(recipe, *ENGINES[name], f"train.precision={precision}")

    def one_step(scale: float) -> tuple[float, bool]:
        before = {name: tensor.clone() for name, tensor in engine.full_weights("model").items()}
        with engine.autocast():
            logits = engine.model(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
        engine.backward(logits.float().square().mean() * scale)
        norm, skipped = engine.step(1e-3)
        same = all(torch.equal(before[name], tensor) for name, tensor in engine.full_weights("model").items())
        assert same == bool(skipped)
        return norm.item(), bool(skipped)

    assert one_step(1.0)[1] is False
    assert one_step(float("nan"))[1] is True
    norm, skipped = one_step(1.0)
    assert not skipped and 0 < norm < float("inf")


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_average_follows_the_weights(name: str, recipe: Path) -> None:
    engine = engine_alone(recipe, *ENGINES[name])
    expected: dict[str, torch.Tensor] = {}
    for _ in range(4):
        train_on_ones(engine)
        for key, now in engine.full_weights("model").items():
            expected[key] = 0.9 * expected[key] + 0.1 * now if key in expected else now.clone()
        with torch.no_grad():
            # An evaluation between steps: the next one has to see the average as it is then.
            logits = engine.eval_model("ema").eval()(torch.ones(2, 1, 16, 16))
    averaged = engine.full_weights("ema")
    assert averaged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key], value)
    assert not torch.equal(averaged["head.weight"], engine.full_weights("model")["head.weight"])
    plain = initial_model(resolve(load_config(recipe), 1).config, ALONE).eval()
    plain.load_state_dict(expected)
    torch.testing.assert_close(logits, plain(torch.ones(2, 1, 16, 16)))


def train_on_ones(engine: Engine) -> float:
    with engine.autocast():
        loss = engine.model(torch.ones(2, 1, 16, 16)).square().mean()
    engine.backward(loss)
    engine.step(1e-2)
    return loss.item()


@pytest.mark.parametrize("compiled", ["false", "layers"])
def test_zero3_gathers_what_kernels_take(compiled: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the weights of layers that they don't call: whole encoder layers, compiled as well."""
    tree = yaml.safe_load(recipe.read_text())
    tree["model"] |= {"name": "hvt_ti_1", "img_size": 24, "drop_path_rate": 0.0}
    tree["model"]["options"] = {"patch_size": 4, "num_heads": 2, "head_dim": 32, "depth": 2}
    recipe.write_text(yaml.safe_dump(tree))
    images = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    calls = []

    def mlp(x: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor, bias2: None, *, tanh: bool, lean: bool) -> Any:
        assert not tanh and not lean and bias2 is None
        calls.append("mlp")
        return F.linear(F.gelu(F.linear(x, weight, bias)), weight2, bias2)

    def short(x: Tensor, weight: Tensor, bias: Tensor, heads: int, kv_heads: int) -> Tensor:
        assert heads == kv_heads
        calls.append("attention")
        return attention(F.linear(x, weight, bias), heads, kv_heads)

    def summed(x: Tensor, branch: Tensor, bias: Tensor, scale: None, times: float) -> Tensor:
        assert scale is None and times == 1.0
        calls.append("sum")
        return x + branch + bias

    def normed(x: Tensor, norm: nn.LayerNorm, *added: Any) -> tuple[Tensor, Tensor]:
        x = summed(x, *added) if added else x
        return x, F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    def losses(*overrides: str) -> list[float]:
        engine = engine_alone(recipe, *overrides, "train.precision=fp32")
        found = []
        for _ in range(3):
            loss = F.cross_entropy(engine.model(images), torch.tensor([0, 3]))
            engine.backward(loss)
            engine.step(1e-3)
            found.append(loss.item())
        return found

    expected = losses("engine.name=ddp")
    assert not calls
    # The kernels run on a GPU alone: here by definition, with the arguments that they would get.
    for module, takes, name, ours in (
        (layers, "takes", "fused_mlp", mlp),
        (layers, "takes", "sum_norm", normed),
        (layers, "takes", "add_branch", summed),
        (by_torch, "takes_short", "short_attention", short),
    ):
        monkeypatch.setattr(module, takes, lambda *_: True)
        monkeypatch.setattr(module, name, ours)
    monkeypatch.setattr(zero, "compile_model", partial(compile_model, backend="eager"))
    got = losses(*ENGINES["zero3"], f"train.compile={compiled}", "model.options.kernels=triton")
    assert got == pytest.approx(expected, rel=1e-5) and expected[2] < 0.9 * expected[0]
    assert set(calls) == {"mlp", "sum", "attention"}


@pytest.mark.parametrize("name", PLAIN)
def test_a_checkpoint_holds_all_that_training_needs(name: str, recipe: Path, tmp_path: Path) -> None:
    arguments = (recipe, *ENGINES[name], "train.precision=fp16", "model.drop_path_rate=0")
    engine, folder = engine_alone(*arguments), tmp_path / "checkpoint"
    folder.mkdir()
    for _ in range(3):
        train_on_ones(engine)
    engine.save(folder)
    for weights in ("model", "ema"):
        saved, full = saved_weights(folder, weights), engine.full_weights(weights)
        assert saved.keys() == full.keys()
        assert all(torch.equal(saved[key], full[key]) for key in full)
    other = engine_alone(*arguments, "seed=1")
    other.load(folder)
    assert [train_on_ones(other) for _ in range(3)] == [train_on_ones(engine) for _ in range(3)]
    for weights in ("model", "ema"):
        full = engine.full_weights(weights)
        assert all(torch.equal(tensor, full[key]) for key, tensor in other.full_weights(weights).items())

    for option in ("depths=2", "embed_dims=[16,32,24]", "depths=[1,1,0]"):
        with pytest.raises(UserError, match="is of another model"):
            engine_alone(*arguments, f"model.options.{option}").load(folder)
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises((OSError, RuntimeError)):
        saved_weights(folder, "model")
    with pytest.raises((OSError, RuntimeError)):
        engine.save(largest / "a-file-is-no-directory")
