"""What a dry run says of memory, shapes and reading, against what really running processes keep and read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config_load import load_config
from pipeline.data.order import DataOrder
from pipeline.errors import UserError
from pipeline.models import set_drop_path_noise
from pipeline.models.batch_norm import group_statistics
from pipeline.models.layers import EncoderLayer
from pipeline.resolve import Resolved, build_model, resolve
from pipeline.train.engines.fsdp import FsdpEngine
from pipeline.train.forecast import count_activations, count_node_bytes, count_reading, count_states, count_wire
from pipeline.train.objective import Objective, Targets, forward
from tests.train.commands import ROOT, environment
from tests.train.conftest import Rookery, write_recipe

ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)},
}
# Many groups, each padded and with its own count of steps.
STATES = ENGINES | {f"{name} by layers": [*ENGINES[name], "optim.layer_decay=0.7"] for name in ("zero1", "zero3")}


@pytest.fixture(scope="module")
def measured(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, int]]]]:
    """A recipe, and what each of two processes keeps of it, by engine."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = write_recipe(digits, folder, augment=False)
    trees = {name: load_config(recipe, options).model_dump(mode="json") for name, options in STATES.items()}
    job = folder / "job.json"
    job.write_text(json.dumps({"configs": trees, "out": str(folder)}))
    command = [sys.executable, "-m", "tests.train.kept_bytes", str(job), "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return recipe, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("engine", STATES)
@pytest.mark.parametrize("rank", [0, 1])
def test_states_are_those_of_running_processes(
    engine: str, rank: int, measured: tuple[Path, list[dict[str, dict[str, int]]]]
) -> None:
    recipe, kept = measured
    config = resolve(load_config(recipe, STATES[engine]), 2).config
    states = asdict(count_states(config, rank, 2))
    assert {name: states[name] for name in kept[rank][engine]} == kept[rank][engine]


MODELS = {
    "nest": [],
    "refiner": [
        *("model.name=refiner_vit_s", "model.options=null", "model.img_size=32"),
        *("model.options.depth=3", "model.options.aux_head=false"),
    ],
    "hvt": ["model.name=hvt_ti_1", "model.options=null", "model.img_size=64"],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_activations_are_those_of_a_real_forward(model: str, precision: str, recipe: Path) -> None:
    options = [*MODELS[model], f"train.precision={precision}", "data.lanes=3"]
    run = resolve(load_config(recipe, options), 3)
    total, layers, _ = really_kept(run, 16)
    counted = count_activations(run, 16, "cpu")
    # On a CPU torch keeps a LayerNorm's statistics in fp32 and says that they are bf16.
    assert counted.bytes == pytest.approx(total, rel=0 if precision == "fp32" else 0.01)
    assert counted.images == (16, 1, run.config.model.img_size, run.config.model.img_size)
    assert sum(n for n, _ in counted.layers) == len(layers)

    again = resolve(load_config(recipe, [*options, "train.activation_checkpointing=true"]), 3)
    between, _, inputs = really_kept(again, 16)
    # What is kept all the time, and the layer that keeps most while it is recomputed. Its input is there already.
    assert counted.bytes > count_activations(again, 16, "cpu").bytes > between + inputs
    assert count_activations(again, 16, "cpu").bytes <= between + inputs + max(layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_refiners_that_keep_few_maps(precision: str, recipe: Path) -> None:
    options = [*MODELS["refiner"], f"train.precision={precision}", "data.lanes=3", "model.options.patch_size=4"]
    plain, lean = (
        resolve(load_config(recipe, [*options, f"train.activation_checkpointing={how}"]), 3)
        for how in ("false", "maps")
    )
    counted = count_activations(lean, 16, "cpu").bytes
    total, _, _ = really_kept(lean, 16)
    assert counted == pytest.approx(total, rel=0 if precision == "fp32" else 0.01)
    assert counted < 0.8 * count_activations(plain, 16, "cpu").bytes
    assert count_activations(lean, 16).bytes < 0.8 * count_activations(plain, 16).bytes


def really_kept(run: Resolved, samples: int) -> tuple[int, list[int], int]:
    """Bytes that autograd keeps of a real forward and loss on the CPU: all, by layer, and of inputs of layers alone."""
    config = run.config
    model = build_model(config, "cpu")
    group_statistics(model, config.train.global_batch_size // (config.data.lanes or 1))
    set_drop_path_noise(model, torch.rand(samples, run.drop_paths))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    marks: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def size(tensors: dict[int, Tensor]) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors.values())

    def enter(_: object, arguments: tuple[Tensor | None, ...]) -> None:
        marks.append(size(kept))
        inputs.update({t.untyped_storage().data_ptr(): t for t in arguments if t is not None})

    for module in model.modules():
        if isinstance(module, EncoderLayer):
            module.register_forward_pre_hook(enter)
    images = torch.rand(samples, 1, model.img_size, model.img_size)
    objective = Objective(config.objective, 10, run.token_grid)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            output = forward(model, images, objective.request())
        marks.append(size(kept))
        loss, _ = objective.loss(output, Targets(torch.rand(samples, 10)))
    total = size(kept)
    del loss
    new = {key: t for key, t in inputs.items() if key not in kept}
    return total, [after - before for before, after in pairwise(marks)], size(new)


def test_a_gpu_keeps_norms_in_fp32_and_no_attention_maps(recipe: Path) -> None:
    big = ["model.name=nest_tiny", "model.options=null", "model.img_size=224", "train.precision=bf16"]
    run = resolve(load_config(recipe, big), 1)
    gpu, cpu = (count_activations(run, 2, device) for device in ("cuda", "cpu"))
    assert gpu.layers == cpu.layers == [(2, (2, 16, 196, 96)), (2, (2, 4, 196, 192)), (8, (2, 1, 196, 384))]
    # The maps alone would be 2 layers x 2 x 16 x 3 heads x 196 x 196, and so on: 44 MB in bf16.
    layers = [(2, 16, 96), (2, 4, 192), (8, 1, 384)]
    tokens = sum(n * 2 * t * 196 * c for n, t, c in layers)
    # Of a token's C channels, per layer: two norms' input in fp32, their bf16 output, q k v, attention's output, and
    # the MLP's 4 C before and after GELU; then bf16 copies of the weights.
    floor = tokens * (2 * 4 + 2 * 2 + 3 * 2 + 2 + 2 * 4 * 2)
    assert floor < gpu.bytes < 1.6 * floor + 2 * run.params
    assert gpu.bytes != cpu.bytes


@pytest.mark.parametrize(("samples", "lanes", "world"), [([50, 70, 30, 41], 8, 4), ([7] * 30, 12, 12), ([500], 4, 1)])
def test_reading_is_what_the_steps_read(samples: list[int], lanes: int, world: int) -> None:
    order = DataOrder(tuple(samples), seed=3, batch=24, lanes=lanes, window=16)
    starts = torch.cumsum(torch.tensor(samples), 0)
    shards = []
    for rank in range(world):
        steps = [order.step(step, rank, world).samples for step in range(order.steps_per_epoch)]
        read = {int(sample) for step in steps for sample in step}
        assert len(read) == count_reading(order, world).samples
        shards.append(len({int(torch.searchsorted(starts, sample, right=True)) for sample in read}))
    reading = count_reading(order, world)
    assert (reading.lanes, reading.shards, reading.opened) == (lanes // world, (min(shards), max(shards)), sum(shards))


@pytest.mark.parametrize(("samples", "lanes", "nproc", "nodes"), [([50, 70, 30, 41], 8, 2, 2), ([7] * 30, 12, 3, 4)])
@pytest.mark.parametrize("shuffle", ["window", "full", "none"])
def test_bytes_of_nodes_are_those_of_the_steps(
    samples: list[int], lanes: int, nproc: int, nodes: int, shuffle: str
) -> None:
    order = DataOrder(tuple(samples), seed=3, batch=24, lanes=lanes, shuffle=shuffle, window=2 * 24 // lanes)
    size_of = {shard: 1000 + shard for shard in range(len(samples))}
    starts = torch.cumsum(torch.tensor(samples), 0)

    def read(node: int, steps: range) -> int:
        chosen = [
            order.step(step, rank, nproc * nodes).samples
            for step in steps
            for rank in range(node * nproc, (node + 1) * nproc)
        ]
        found = {int(torch.searchsorted(starts, int(sample), right=True)) for part in chosen for sample in part}
        return sum(size_of[shard] for shard in found)

    whole = range(order.steps_per_epoch)
    length = {"window": 2, "full": len(whole), "none": 1}[shuffle]
    windows = [whole[start : start + length] for start in range(0, len(whole), length)]
    counted = count_node_bytes(order, list(size_of.values()), nproc, nodes)
    assert counted.epoch == max(read(node, whole) for node in range(nodes))
    assert counted.window == max(read(node, window) for node in range(nodes) for window in windows)


def test_fsdp_gathers_the_units_that_are_counted(recipe: Path) -> None:
    """The parameters that are whole while a layer computes are the model's own and that layer's."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from tests.train.test_engines import ALONE

    config = resolve(load_config(recipe, ["engine.name=fsdp"]), 1).config
    try:
        engine = FsdpEngine(build_model(config, "cpu"), config, ALONE)
        whole: list[int] = []

        def look(*_: object) -> None:
            gathered = [p for p in engine.plain.parameters() if not isinstance(p, DTensor)]
            whole.append(sum(p.numel() * 4 for p in gathered))

        for module in engine.plain.modules():
            if isinstance(module, EncoderLayer):
                module.mlp.register_forward_hook(look)
        engine.model(torch.ones(2, 1, 16, 16))
        sizes = [
            sum(p.numel() * 4 for p in m.parameters()) for m in engine.plain.modules() if isinstance(m, EncoderLayer)
        ]
        root = sum(p.numel() * 4 for p in engine.plain.parameters()) - sum(sizes)
    finally:
        dist.destroy_process_group()
    assert max(whole) == root + max(sizes)
    assert count_states(config, 0, 1).communication == 2 * root + 4 * max(sizes)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_64_nodes_on_one_processor(engine: str, recipe: Path, rookery: Rookery) -> None:
    options = ["model.name=nest_base", "model.options=null", "model.img_size=224", "augment.resize=224"]
    options += ["train.global_batch_size=1024", "data.lanes=512", "train.precision=bf16", f"engine.name={engine}"]
    job = ["--nodes", 64, "--nproc", 8, "--dry-run", "--images-per-second", 900]
    began = time.perf_counter()
    text = " ".join(rookery("train", recipe, *options, *job).stdout.split())
    assert time.perf_counter() - began < 60, "20 s on two free cores"
    assert "512 on 64 nodes; each 2 samples a step in 1 micro-batch" in text
    assert "2 x 16 x 196 x 128 in 2 layers; 2 x 4 x 196 x 256 in 2 layers; 2 x 1 x 196 x 512 in 20 layers" in text
    hours = 24 * 1024 / (900 * 512) / 3600
    assert f"{hours:,.2f} hours = {hours * 512:,.1f} GPU-hours at 900 images/s" in text
    params = resolve(load_config(recipe, list(map(str, options))), 512).params
    weights = f"{params * 4 / 1e6:,.1f}"
    assert (f"each {weights} {weights} {params * 8 / 1e6:,.1f}" in text) == (engine == "ddp")
    assert (" first " in text and " last " in text) == (engine == "fsdp")
    # An average over a ring sends (and receives) twice all numbers but one part; fsdp sends padding too.
    sent = float(text.partition("each process sends ")[2].partition(" MB")[0].replace(",", ""))
    assert (
        sent == pytest.approx(2 * 4 * params * 511 / 512 / 1e6, abs=0.06)
        if engine == "ddp"
        else sent > 3 * params * 4e-6
    )


def test_without_a_rate_the_hint_and_without_dry_run_a_mistake(recipe: Path, rookery: Rookery) -> None:
    assert "--images-per-second N" in rookery("train", recipe, "--dry-run").stdout
    assert "--dry-run" in rookery("train", recipe, "--images-per-second", 5, check=2).stderr


def test_a_world_that_does_not_fit_names_the_way_out(recipe: Path) -> None:
    config = load_config(recipe, ["train.global_batch_size=1024", "data.lanes=64"])
    with pytest.raises(UserError, match=r"16, 32 or 64, or start a new run with data\.lanes=512"):
        resolve(config, 512)
    config = load_config(recipe, ["train.global_batch_size=1024", "data.lanes=1024"])
    with pytest.raises(UserError, match=r"at most 512 processes, or train\.global_batch_size=2048"):
        resolve(config, 1024)


@pytest.mark.parametrize(
    ("engine", "passes"), [("ddp", 2), ("zero0", 2), ("zero1", 3), ("zero2", 3), ("zero3", 6), ("fsdp", 5)]
)
def test_bytes_on_the_wire(engine: str, passes: int, recipe: Path) -> None:
    """Two micro-batches on two processes; nothing is padded, so that it is so many times the weights."""
    run = resolve(load_config(recipe, [*ENGINES[engine], "train.accumulate=2"]), 2)
    sent = count_wire(run.config, count_states(run.config, 0, 2), run.params, 2)
    assert sent == passes * run.params * 4 // 2
