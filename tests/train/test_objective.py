"""The loss of token labels: its terms by hand, runs against a plain loop, restarts, and what can't go together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from pipeline.config import ObjectiveConfig, RunConfig
from pipeline.data.augment.mix_token import draw_mix_token
from pipeline.data.augment.mixing import MixConfig, draw_mix, soft_target_cross_entropy
from pipeline.data.augment.token_labels import TokenLabelBatch, token_targets
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.models import DenseOutput, DenseRequest, set_drop_path_noise
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.distributed import World
from pipeline.train.export import WEIGHTS
from pipeline.train.loop import train
from pipeline.train.objective import Objective
from pipeline.train.setup import initial_model, train_batches
from tests.data_prep.helpers import make_folder
from tests.data_prep.label_maps import label_map, make_maps
from tests.train.conftest import Rookery

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
OFFICIAL = {"name": "refiner_vit_s", "options": {"stem": "conv"}}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums in one order, and no waiting for other processes' cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of three classes: `with/train` has label maps, `without/train` has none."""
    root = tmp_path_factory.mktemp("labelled")
    images = make_folder(root / "images", per_class=20)
    maps = make_maps(root / "maps", images, shape=(2, 2, 4, 6))
    prepare(images, root / "with", PrepOptions(workers=1, shard_samples=16, token_labels=maps))
    prepare(images, root / "without", PrepOptions(workers=1, shard_samples=16))
    return root


def tree(labelled: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of 6 steps with everything on; `sections` change keys of it."""
    run: dict[str, Any] = {
        "name": "run",
        "out": str(out / "runs"),
        "model": {
            "name": "refiner_vit_s_linear",
            "img_size": 32,
            "drop_path_rate": 0.2,
            "options": {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "stem": "patch"},
        },
        "data": {"train": str(labelled / "with" / "train"), "lanes": 4, "workers": 0},
        "augment": {"normalize": "half", "interpolation": "bilinear"},
        "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
        "objective": {"token_labels": True, "mix_token": True, "cos_weight": 0.1, "cos_pairs": 3},
        "train": {"epochs": "6steps", "global_batch_size": 16, "precision": "fp32", "log_every": "1steps"},
        "optim": {"lr": 1e-3},
        "tracking": {"mlflow": False},
        "checkpoint": {"every": "3steps"},
    }
    for section, changes in sections.items():
        options = run[section].get("options", {}) | changes.get("options", {})
        run[section] |= changes | ({"options": options} if options else {})
    return run


# --- terms


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def distributions(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.dirichlet(np.ones(shape[-1]), shape[:-1])


def test_loss_by_its_formula() -> None:
    generator = np.random.default_rng(0)
    logits, tokens = generator.normal(0, 2, (4, 5)), generator.normal(0, 2, (4, 9, 5))
    classes, of_tokens = distributions(generator, 4, 5), distributions(generator, 4, 9, 5)
    of_class = -(classes * log_softmax(logits)).sum(-1).mean()
    of_dense = -(of_tokens * log_softmax(tokens)).sum(-1).mean()
    config = ObjectiveConfig(token_labels=True, cls_weight=0.7, dense_weight=0.3, cos_weight=0.2, cos_pairs=4)
    output = DenseOutput(torch.tensor(logits), torch.tensor(tokens), torch.tensor(2.5))
    targets = Objective(config, 5, 3).targets(torch.tensor(classes), None, draw_mix(MixConfig(), 0, 0, [0], 4, 8))
    loss, parts = Objective(config, 5, 3).loss(output, targets._replace(tokens=torch.tensor(of_tokens)))
    assert loss.item() == pytest.approx(0.7 * of_class + 0.3 * of_dense + 0.2 * 2.5 / 4, rel=1e-6)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(
        {"loss_cls": of_class, "loss_tokens": of_dense, "map_similarity": 0.625}, rel=1e-6
    )


def test_plain_recipes_keep_their_loss_to_the_bit() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    classes = torch.softmax(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), -1)
    objective = Objective(ObjectiveConfig(), 5)
    loss, parts = objective.loss(logits, objective.targets(classes, None, draw_mix(MixConfig(), 0, 0, [0], 8, 8)))
    expected = soft_target_cross_entropy(logits, classes)
    assert torch.equal(loss, expected) and parts == {} and objective.request() is None
    assert torch.equal(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)))


def test_targets_are_mixed_with_the_pictures_and_with_the_tokens() -> None:
    maps = torch.stack([label_map(i, 5, shape=(2, 2, 4, 4)) for i in range(8)])
    warps = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(8, 1, 2, 3)
    mix = draw_mix(MixConfig(mixup_alpha=0.8, label_smoothing=0.1), 0, 0, [0, 1], 4, 8)
    tokens = TokenLabelBatch(maps, warps, draw_mix_token(0, 2, [0, 1], 4, 4))
    assert tokens.mix is not None and (tokens.mix.own < 1).any()
    raw_class, raw_tokens = (t.numpy() for t in token_targets(maps, warps, 4, 5, 0.1))
    other = [3, 2, 1, 0, 7, 6, 5, 4]
    share, own = mix.label.numpy(), tokens.mix.own.numpy()
    of_tokens = raw_tokens * share[:, None, None] + raw_tokens[other] * (1 - share)[:, None, None]
    of_class = raw_class * share[:, None] + raw_class[other] * (1 - share)[:, None]
    of_class = of_class * own[:, None] + of_class[other] * (1 - own)[:, None]
    objective = Objective(ObjectiveConfig(token_labels=True), 5, 4)
    whole = objective.targets(torch.zeros(8, 5), tokens, mix)
    np.testing.assert_allclose(whole.classes, of_class, atol=1e-6)
    assert whole.tokens is not None
    np.testing.assert_allclose(whole.tokens, of_tokens, atol=1e-6)
    for part in (slice(0, 4), slice(4, 8)):  # a micro-batch of one chunk
        its = objective.targets(torch.zeros(4, 5), tokens.rows(part), mix.rows(part))
        assert its.tokens is not None
        assert torch.equal(its.classes, whole.classes[part]) and torch.equal(its.tokens, whole.tokens[part])


# --- whole runs


def reference_losses(config: RunConfig) -> list[float]:
    """Losses of a run by a plain loop over whole batches: targets mixed one by one, torch's own AdamW."""
    run = resolve(config, 1)
    config, weights = run.config, run.config.objective
    model = initial_model(config, ALONE)
    exempt = model.no_weight_decay()  # type: ignore[operator]
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in exempt], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=False, foreach=False)
    losses = []
    for step, batch in enumerate(train_batches(run, ShardSet(config.data.train), ALONE, 0)):
        for group in optimizer.param_groups:
            group["lr"] = run.schedule.lr(step)
        mix, tokens = batch.mix, batch.tokens
        cls, dense = token_targets(tokens.maps, tokens.warps, 4, 3, 0.1)
        images, classes, of_tokens = batch.images.clone(), [], []
        for i, j in enumerate(mix.partner.tolist()):
            top, bottom, left, right = mix.box[i].tolist()
            weight = torch.full((32, 32), mix.outside[i].item())
            weight[top:bottom, left:right] = mix.inside[i]
            images[i] = batch.images[i] * weight + batch.images[j] * (1 - weight)
            classes.append(mix.label[i] * cls[i] + (1 - mix.label[i]) * cls[j])
            of_tokens.append(mix.label[i] * dense[i] + (1 - mix.label[i]) * dense[j])
        own = tokens.mix.own
        classes = [own[i] * classes[i] + (1 - own[i]) * classes[j] for i, j in enumerate(tokens.mix.partner.tolist())]
        set_drop_path_noise(model, batch.drop_path)
        with torch.autocast("cpu", torch.bfloat16) if config.train.precision == "bf16" else nullcontext():
            request = DenseRequest(tokens.mix.partner, tokens.mix.box, weights.cos_pairs)
            output = model(images, dense=request)
        of_class = -(torch.stack(classes) * output.logits.float().log_softmax(-1)).sum(-1).mean()
        of_dense = -(torch.stack(of_tokens) * output.tokens.float().log_softmax(-1)).sum(-1).mean()
        loss = of_class + 0.5 * of_dense + 0.1 * output.similarity / 3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logged(run: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run) if line["kind"] == "train"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_micro_batches_train_as_a_plain_loop(precision: str, tolerance: float, labelled: Path, tmp_path: Path) -> None:
    config = tree(labelled, tmp_path, train={"accumulate": 2, "precision": precision})
    train(RunConfig.model_validate(config), ALONE)
    lines = logged(tmp_path / "runs" / "run")
    expected = reference_losses(RunConfig.model_validate(config))
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=tolerance) and len(expected) == 6
    for line in lines:
        terms = line["loss_cls"] + 0.5 * line["loss_tokens"] + 0.1 * line["map_similarity"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
    assert max(expected) - min(expected) > 3 * 1e-5 * max(expected)


def test_two_processes_train_as_a_plain_loop(labelled: Path, tmp_path: Path, rookery: Rookery) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree(labelled, tmp_path, train={"accumulate": 2})))
    rookery("train", recipe, "--nproc", 2)
    expected = reference_losses(RunConfig.model_validate(tree(labelled, tmp_path)))
    assert [line["loss"] for line in logged(tmp_path / "runs" / "run")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", [OFFICIAL, {}], ids=["official", "linear"])
def test_stopped_and_continued_is_bit_identical(model: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    config = tree(labelled, tmp_path, model=model, train={"ema_decay": 0.9, "precision": "bf16"})
    train(RunConfig.model_validate(config | {"name": "whole"}), ALONE)
    cut = copy.deepcopy(config)
    cut["train"]["stop_after"] = "3steps"
    train(RunConfig.model_validate(cut), ALONE)
    train(RunConfig.model_validate(config), ALONE)
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "run"
    assert (run / "final" / WEIGHTS).read_bytes() == (whole / "final" / WEIGHTS).read_bytes()
    columns = ("step", "loss", "loss_cls", "loss_tokens", "map_similarity", "grad_norm")
    assert [[line[c] for c in columns] for line in logged(run)] == [
        [line[c] for c in columns] for line in logged(whole)
    ]


def test_every_switch_changes_the_first_loss_or_gradient(labelled: Path, tmp_path: Path) -> None:
    """Each key of the objective does something, and the plain loss has no terms of it."""
    switches: dict[str, dict[str, Any]] = {
        "all": {},
        "no MixToken": {"mix_token": False},
        "no cosine": {"cos_weight": 0},
        "two pairs": {"cos_pairs": 2},
        "official order": {"official_roi_order": True},
        "dense weight": {"dense_weight": 1.0},
        "class weight": {"cls_weight": 0.5},
    }
    first = {}
    for name, changes in switches.items():
        config = tree(labelled, tmp_path, objective=changes, train={"stop_after": "1steps"})
        train(RunConfig.model_validate(config | {"name": name.replace(" ", "_")}), ALONE)
        [line] = logged(tmp_path / "runs" / name.replace(" ", "_"))
        first[name] = (round(line["loss"], 6), round(line["grad_norm"], 6))
        assert ("map_similarity" in line) == (name != "no cosine")
    assert len(set(first.values())) == len(switches), first
    # Without labels for tokens: the cosine alone, then nothing at all.
    for name, changes, expected in (
        ("cosine", {"token_labels": False, "mix_token": False}, {"loss_cls", "map_similarity"}),
        ("plain", {"token_labels": False, "mix_token": False, "cos_weight": 0}, set()),
    ):
        model = {"options": {"aux_head": False}}
        config = tree(labelled, tmp_path, model=model, objective=changes, train={"stop_after": "1steps"})
        train(RunConfig.model_validate(config | {"name": name}), ALONE)
        [line] = logged(tmp_path / "runs" / name)
        assert line.keys() & {"loss_cls", "loss_tokens", "map_similarity"} == expected


# --- what can't go together


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_labels": False}, "objective.mix_token=true goes with labels for tokens: set objective.token_labels="),
        (
            {"token_labels": False, "mix_token": False, "official_roi_order": True},
            "objective.official_roi_order=true goes with labels for tokens",
        ),
        ({"token_labels": False, "mix_token": False, "cls_weight": 0}, "objective.cls_weight=0 leaves no labels"),
        ({"cls_weight": 0, "dense_weight": 0}, "objective.cls_weight=0 and objective.dense_weight=0 leave nothing"),
    ],
)
def test_conflicts_in_a_config(changes: dict[str, Any], said: str, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate(tree(labelled, tmp_path, objective=changes))


PLAIN = {"token_labels": False, "mix_token": False, "cos_weight": 0}


@pytest.mark.parametrize(
    ("sections", "world_size", "said"),
    [
        (
            {"data": {"train": "without"}},
            1,
            r"no label maps; prepare them with `rookery prep SOURCE OUT --token-labels",
        ),
        ({"model": {"options": {"aux_head": False}}}, 1, r"and it has none; set model.options.aux_head=true"),
        ({"objective": PLAIN}, 1, r"has an aux head, which only token labels train; set model.options.aux_head=false"),
        ({"objective": {"cos_pairs": 4}}, 1, r"objective.cos_pairs=4: 4 pairs .* 4 layers; choose fewer"),
        ({"data": {"lanes": 16}}, 1, r"mix_token=true takes partners .* data.lanes=16 .* set data.lanes to 8 or fewer"),
        ({"train": {"accumulate": 4}}, 2, r"accumulate=4 does not divide the 2 lanes .* set train.accumulate to a div"),
        ({"model": {"name": "nest_tiny"}}, 1, r"objective.token_labels=true, but model.name=nest_tiny gives neither"),
        (
            {"model": {"name": "nest_tiny"}, "objective": PLAIN | {"cos_weight": 0.1}},
            1,
            r"objective.cos_weight=0.1, but model.name=nest_tiny gives neither token logits nor attention maps",
        ),
    ],
)
def test_conflicts_of_model_data_and_batch(
    sections: dict[str, dict[str, Any]], world_size: int, said: str, labelled: Path, tmp_path: Path
) -> None:
    config = tree(labelled, tmp_path, **sections)
    if config["data"]["train"] == "without":
        config["data"]["train"] = str(labelled / "without" / "train")
    if config["model"]["name"] == "nest_tiny":
        config["model"] = {"name": "nest_tiny"}
    if config["data"]["lanes"] == 16:
        config["mix"] = {}
    with pytest.raises(UserError, match=said):
        resolve(RunConfig.model_validate(config), world_size)
