"""Every engine and precision against a plain single-process training written out by hand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from pipeline.config_load import load_config
from pipeline.data.augment.mixing import apply_mix, soft_target_cross_entropy
from pipeline.data.shards import ShardSet
from pipeline.models import set_drop_path_noise
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.distributed import World
from pipeline.train.engines import make_engine
from pipeline.train.setup import initial_model, train_batches
from tests.train.conftest import Rookery

STEPS = 20
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


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


@pytest.mark.parametrize("engine", ["ddp"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(
    engine: str, precision: str, tolerance: float, accumulate: int, recipe: Path, rookery: Rookery, tmp_path: Path
) -> None:
    overrides = (f"engine.name={engine}", f"train.precision={precision}", f"train.accumulate={accumulate}")
    rookery("train", recipe, *overrides, f"train.stop_after={STEPS}steps", "data.val=null", "--nproc", 2)
    lines = [line for line in read_metrics(tmp_path / "runs" / "run") if line["kind"] == "train"]
    expected = reference_losses(recipe, precision)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=tolerance)
    # The comparison means something only if the updates change the losses by far more than the tolerance.
    untrained = reference_losses(recipe, precision, lr_scale=0.0)
    assert max(abs(a - b) / b for a, b in zip(expected, untrained, strict=True)) > 3 * tolerance


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bad_step_is_skipped_and_training_goes_on(precision: str, recipe: Path) -> None:
    run = resolve(load_config(recipe, [f"train.precision={precision}"]), 1)
    engine = make_engine(initial_model(run.config, ALONE), run.config, ALONE)

    def one_step(scale: float) -> tuple[float, bool]:
        before = {name: p.detach().clone() for name, p in engine.plain.named_parameters()}
        with engine.autocast():
            logits = engine.model(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
        engine.backward(logits.float().square().mean() * scale)
        norm, skipped = engine.step(1e-3)
        same = all(torch.equal(before[name], p) for name, p in engine.plain.named_parameters())
        assert same == bool(skipped)
        return norm.item(), bool(skipped)

    assert one_step(1.0)[1] is False
    assert one_step(float("nan"))[1] is True
    norm, skipped = one_step(1.0)
    assert not skipped and 0 < norm < float("inf")


def test_the_average_follows_the_weights(recipe: Path) -> None:
    run = resolve(load_config(recipe), 1)
    engine = make_engine(initial_model(run.config, ALONE), run.config, ALONE)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(4):
        with engine.autocast():
            engine.backward(engine.model(torch.ones(2, 1, 16, 16)).square().mean())
        engine.step(1e-2)
        for name, parameter in engine.plain.named_parameters():
            now = parameter.detach().clone()
            expected[name] = 0.9 * expected[name] + 0.1 * now if name in expected else now
    averaged = engine.full_weights("ema")
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)
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
