"""Every engine and precision against a plain single-process training written out by hand."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.config_load import load_config
from pipeline.data.augment.mixing import apply_mix, soft_target_cross_entropy
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.models import set_drop_path_noise
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.distributed import World
from pipeline.train.engines import make_engine
from pipeline.train.setup import initial_model, train_batches
from tests.train.conftest import Rookery, write_recipe
from tests.train.many_runs import train_all

STEPS = 20
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@cache
def reference_losses(recipe: Path, precision: str, lr_scale: float = 1.0) -> list[float]:
    """Losses of the run by a plain loop: whole batches, torch's own AdamW and clipping, data as the run has them."""
    run = resolve(load_config(recipe), 1)
    model = initial_model(run.config, ALONE)
    exempt = model.no_weight_decay()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in exempt], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=False, foreach=False)
    losses = []
    for step, batch in enumerate(train_batches(run, ShardSet(run.config.data.train), ALONE, 0)):
        if step == STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = run.schedule.lr(step) * lr_scale
        images, targets = apply_mix(batch.images, batch.labels, batch.mix, 10)
        set_drop_path_noise(model, batch.drop_path)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            logits = model(images)
        loss = soft_target_cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ENGINES = {
    "ddp": ["engine.name=ddp"],
    **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)},
    "offload": ["engine.name=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=true"],
    "compiled": ["engine.name=deepspeed", "engine.zero_stage=1", "train.compile=true"],
    "recomputed": ["engine.name=deepspeed", "engine.zero_stage=3", "train.activation_checkpointing=true"],
}
# Precision is the business of autocast, not of a stage, so the stages share the combinations of it and accumulation.
TABLE = [
    *itertools.product(["ddp", "zero1", "zero3"], ["fp32", "bf16"], [1, 2]),
    *itertools.product(["zero0", "zero2"], ["fp32"], [1, 2]),
    ("offload", "bf16", 2),
    ("compiled", "fp32", 1),
    ("recomputed", "bf16", 2),
]


@pytest.fixture(scope="module")
def table(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A recipe, next to the directories of its runs over `TABLE` on two processes, and what these printed."""
    folder = tmp_path_factory.mktemp("table")
    recipe = write_recipe(digits, folder)
    short = [f"train.stop_after={STEPS}steps", "data.val=null", "data.trace=false"]
    configs = [
        load_config(recipe, [*ENGINES[e], f"name={e}-{p}-{a}", f"train.precision={p}", f"train.accumulate={a}", *short])
        for e, p, a in TABLE
    ]
    done = train_all(configs, 2, folder)
    return recipe, done.stdout + done.stderr


@pytest.mark.parametrize(("engine", "precision", "accumulate"), TABLE)
def test_two_processes_train_as_one(engine: str, precision: str, accumulate: int, table: tuple[Path, str]) -> None:
    recipe, printed = table
    tolerance = {"fp32": 1e-5, "bf16": 5e-3}[precision]
    run = recipe.parent / "runs" / f"{engine}-{precision}-{accumulate}"
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    expected = reference_losses(recipe, precision)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=tolerance)
    # The comparison means something only if the updates change the losses by far more than the tolerance.
    untrained = reference_losses(recipe, precision, lr_scale=0.0)
    assert max(abs(a - b) / b for a, b in zip(expected, untrained, strict=True)) > 3 * tolerance
    assert not any(word in printed for word in ("DeepSpeed", "[INFO]", "[WARNING]"))


def test_a_missing_package_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve(load_config(recipe, ENGINES["zero1"]), 1)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'rookery\[deepspeed\]'"):
        make_engine(initial_model(run.config, ALONE), run.config, ALONE)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [*itertools.product(["ddp", "zero0", "zero1", "zero3"], ["fp32", "fp16"]), ("offload", "fp16")],
)
def test_a_bad_step_is_skipped_and_training_goes_on(engine: str, precision: str, recipe: Path) -> None:
    run = resolve(load_config(recipe, [*ENGINES[engine], f"train.precision={precision}"]), 1)
    spread = make_engine(initial_model(run.config, ALONE), run.config, ALONE)

    def one_step(scale: float) -> tuple[float, bool]:
        before = {name: p.clone() for name, p in spread.full_weights("model").items()}
        with spread.autocast():
            logits = spread.model(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
        spread.backward(logits.float().square().mean() * scale)
        norm, skipped = spread.step(1e-3)
        same = all(torch.equal(before[name], p) for name, p in spread.full_weights("model").items())
        assert same == bool(skipped)
        return norm.item(), bool(skipped)

    assert one_step(1.0)[1] is False
    assert one_step(float("nan"))[1] is True
    norm, skipped = one_step(1.0)
    assert not skipped and 0 < norm < float("inf")


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_the_average_follows_the_weights(name: str, recipe: Path) -> None:
    run = resolve(load_config(recipe, ENGINES[name]), 1)
    engine = make_engine(initial_model(run.config, ALONE), run.config, ALONE)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(4):
        with engine.autocast():
            engine.backward(engine.model(torch.ones(2, 1, 16, 16)).square().mean())
        engine.step(1e-2)
        for key, now in engine.full_weights("model").items():
            expected[key] = 0.9 * expected[key] + 0.1 * now if key in expected else now.clone()
    averaged = engine.full_weights("ema")
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key], value)
    for key, value in engine.eval_model("ema").state_dict().items():
        assert torch.equal(value, averaged[key])
    assert not torch.equal(averaged["head.weight"], engine.full_weights("model")["head.weight"])


@pytest.mark.parametrize("override", ["train.compile=true", "train.activation_checkpointing=true"])
def test_faster_or_smaller_but_the_same(override: str, recipe: Path, rookery: Rookery, tmp_path: Path) -> None:
    short = ("train.stop_after=3steps", "data.val=null")
    rookery("train", recipe, *short, "name=plain")
    rookery("train", recipe, *short, "name=other", override)
    plain, other = (
        [line["loss"] for line in read_metrics(tmp_path / "runs" / name) if line["kind"] == "train"]
        for name in ("plain", "other")
    )
    assert len(plain) == 3 and other == pytest.approx(plain, rel=1e-5)
