"""`rookery bench`: speed on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.store import is_remote
from launch.deaf import deaf_to_ctrl_c
from pipeline.errors import UserError

if TYPE_CHECKING:
    from launch.bench_model.runner import Phase
    from pipeline.config import RunConfig

bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Measure speed on this machine."""


@bench.command()
def step(
    config: Annotated[Path, typer.Argument(help="recipe, such as configs/nest/tiny_imagenet.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., such as engine.name=fsdp")] = None,
    nproc: Annotated[str, typer.Option(help="numbers of processes on this node, such as 1,2,4,8")] = "1",
    batch: Annotated[
        int | None, typer.Option(min=1, help="samples per process; default: the recipe's over the most processes")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps of a block")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="steps before the first block")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="blocks of each kind")] = 3,
    classes: Annotated[int | None, typer.Option(min=1, help="default: the recipe's, else the model's own")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process; default: shared evenly")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
) -> None:
    """Time training steps on made batches with several numbers of processes: no data set is needed.

    Every process has the same number of samples at any count (weak scaling). Communication is what a step takes longer
    than the same step of the same engine on each process by itself; both are measured in turn, in one run.

    Exit status: 0 measured, 2 a mistake in config or options, 1 a failure.
    """
    counts = _counts(nproc)
    _check_out(out)
    # torch takes seconds to import.
    from launch.bench_report import print_report, summarise
    from launch.workers import check_gpus
    from pipeline.config_load import load_config
    from pipeline.tracking.files import encode_floats, write_text

    check_gpus(max(counts))
    recipe = load_config(config, overrides or [])
    batch = batch or max(1, recipe.train.global_batch_size // max(counts))
    measured = []
    with tempfile.TemporaryDirectory(prefix="rookery-") as folder:
        for count in counts:
            filled = fill_in(recipe, batch, count, classes)
            output = Path(folder, f"{count}.json")
            status = _measure(filled, count, steps, warmup, repeats, threads, output)
            if status:
                raise typer.Exit(status)
            measured.append(json.loads(output.read_text()))
    settings = {
        "command": shlex.join(["rookery", *sys.argv[1:]]),
        "batch_per_process": batch,
        "steps": steps,
        "warmup": warmup,
        "repeats": repeats,
        "threads": threads or "shared evenly",
    }
    report = summarise(filled, settings, dict(zip(counts, measured, strict=True)))
    print_report(report)
    if out is not None:
        write_text(out, json.dumps(encode_floats(report), indent=1) + "\n")


@bench.command()
def loader(
    shards: Annotated[str, typer.Argument(help="a split with shards of real pictures, of either format")],
    recipe: Annotated[
        str, typer.Option(help="crop: random resized crop and flip; nest: all of NesT's ImageNet recipe")
    ] = "crop",
    side: Annotated[int, typer.Option(min=8, help="side of the inputs, pixels")] = 224,
    batch: Annotated[int, typer.Option(min=2, help="samples of a batch")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="loader processes; default: the usable cores")] = None,
    samples: Annotated[int, typer.Option(min=64, help="images at least, from the first shards on")] = 4000,
    repeats: Annotated[int, typer.Option(min=1, help="rounds of each loader, interleaved")] = 5,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="measure other loaders beside, if installed")
    ] = True,
    target: Annotated[float | None, typer.Option(min=1, help="images/s that your GPU trains, for advice")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
) -> None:
    """Time this loader beside others on your own shards, and tell where its time goes and which knob to turn.

    All read the same bytes with the same number of workers. Rounds are interleaved; a ratio compares figures of one
    round. The images are laid out again below TMPDIR in the other format, in class folders and in one FFCV file.

    Exit status: 0 measured, 2 a mistake in shards or options.
    """
    if recipe not in ("crop", "nest"):
        raise UserError(f"--recipe {recipe}: there is crop and nest")
    if is_remote(shards):
        raise UserError(f"{shards}: other loaders read files of this machine; copy the manifest and some shards here")
    _check_out(out)
    from launch.bench_loader.measure import bench_loader
    from launch.bench_loader.report import print_report
    from pipeline.tracking.files import encode_floats, write_text

    report = bench_loader(Path(shards), recipe, side, batch, workers, samples, repeats, peers, target)
    if as_json:
        typer.echo(json.dumps(encode_floats(report), indent=1))
    else:
        print_report(report)
    if out is not None:
        write_text(out, json.dumps(encode_floats(report), indent=1) + "\n")


@bench.command("generate")
def generators(
    names: Annotated[
        list[str] | None, typer.Argument(help="generators; default: the 64 px ones", metavar="[GENERATOR]...")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images of a forward")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="timed forwards of each, interleaved")] = 31,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    img_size: Annotated[
        int | None, typer.Option(min=8, help="side of the images; default: each generator's own")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
) -> None:
    """Time generators of images with random weights against the first one, and count their multiply-adds.

    plane_gen_64 has the depths, widths and parameters of nest_gen_64, and attention over the whole plane.

    Exit status: 0 measured, 2 a mistake in the options.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision}: there is fp32 and bf16")
    _check_out(out)
    load = os.getloadavg()[0]  # what else the machine does; before torch and the rounds make some of their own
    import torch

    from launch.bench_report import print_generators
    from pipeline.generate.bench import bench_generators
    from pipeline.tracking.environment import device_name, key_versions
    from pipeline.tracking.files import encode_floats, write_text
    from pipeline.train.determinism import use_whole_float32

    if threads is not None:
        torch.set_num_threads(threads)
    use_whole_float32()
    chosen = names or ["nest_gen_64", "plane_gen_64", "conv_gen_64"]
    rows = bench_generators(chosen, batch, rounds, precision, {"img_size": img_size})
    report = {
        "command": shlex.join(["rookery", *sys.argv[1:]]),
        "batch": batch,
        "rounds": rounds,
        "precision": precision,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "versions": key_versions(),
        "generators": rows,
    }
    if as_json:
        typer.echo(json.dumps(encode_floats(report), indent=1))
    else:
        print_generators(report)
    if out is not None:
        write_text(out, json.dumps(encode_floats(report), indent=1) + "\n")


@bench.command()
def model(
    names: Annotated[
        list[str],
        typer.Argument(
            help="such as nest_tiny, timm:nest_tiny_jx, refiner_vit_s, and this with +fold, +maps, +checkpoint, "
            "+compile, +layers, +triton"
        ),
    ],
    against: Annotated[str | None, typer.Option(help="one of them, to compare the others with")] = None,
    phase: Annotated[str, typer.Option(help="train, infer or train,infer")] = "train,infer",
    batch: Annotated[str, typer.Option(help="images of a step; auto: the most that fit on the GPU, per model")] = "64",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16; weights stay fp32")] = "bf16",
    compiled: Annotated[bool, typer.Option("--compile", help="through torch.compile")] = False,
    side: Annotated[int | None, typer.Option(min=4, help="of the pictures, pixels; default: each model's own")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds of each model, interleaved")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="of a round of one model, at least one step")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice")] = None,
    peak: Annotated[
        float | None, typer.Option(min=0, help="TFLOP/s of the device for MFU; default: by its name, A100, H100, H200")
    ] = None,
    count: Annotated[bool, typer.Option("--count", help="time nothing: count operations and bytes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
) -> None:
    """Time training and inference of models side by side with timm's, on made pictures: no data set is needed.

    Rounds are interleaved; a ratio compares figures of one round. On a machine with several GPUs the first is used.

    Exit status: 0 measured, 1 no model could be, 2 a mistake in names or options.
    """
    _check_out(out)
    import torch

    from launch.bench_model.measure import bench_model, count_models
    from launch.bench_model.report import print_counts, print_report
    from pipeline.tracking.files import encode_floats, write_text

    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["rookery", *sys.argv[1:]])
    if count:
        for given, option in ((against, "--against"), (compiled, "--compile"), (batch == "auto", "--batch auto")):
            if given:
                raise UserError(f"--count times nothing, and has no use for {option}: leave it out")
        report = count_models(names, _batch(batch) or 1, side, command)
    else:
        report = bench_model(
            names,
            against=against,
            phases=_phases(phase),
            batch=_batch(batch),
            precision=precision,
            compiled=compiled,
            side=side,
            repeats=repeats,
            seconds=seconds,
            peak=peak,
            command=command,
        )
    if as_json:
        typer.echo(json.dumps(encode_floats(report), indent=1))
    else:
        (print_counts if count else print_report)(report)
    if out is not None:
        write_text(out, json.dumps(encode_floats(report), indent=1) + "\n")
    if all("failed" in row for row in report["models"]):
        raise typer.Exit(1)


def _phases(text: str) -> list[Phase]:
    phases = [part for part in ("train", "infer") if part in text.split(",")]
    if sorted(text.split(",")) != sorted(phases):
        raise UserError(f"--phase {text}: give train, infer or train,infer")
    return phases


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch {text}: give a whole number from 1 on, or auto")
    return int(text)


def _check_out(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"{out}: no file can be written there; choose another --out")


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise UserError(f"--nproc {text}: give different whole numbers from 1 on, with commas between, such as 1,2,4")
    return counts


def fill_in(recipe: RunConfig, batch: int, count: int, classes: int | None) -> RunConfig:
    """The config of `count` processes with `batch` samples each, without a look at its data.

    Raises:
        UserError: the step of this recipe can't be measured, or its micro-batches don't fit.
    """
    from pipeline.data.order import default_lanes
    from pipeline.resolve import build_model

    if recipe.task.kind != "classify":
        raise UserError(f"bench step measures task=classify on made pictures; this recipe has task={recipe.task.kind}")
    if recipe.engine.name == "deepspeed":
        raise UserError("bench step measures engine.name=ddp and fsdp; deepspeed can't be in a world of one beside it")
    if recipe.objective.token_labels:
        raise UserError(
            "bench step makes no label maps; add objective.token_labels=false objective.mix_token=false "
            "model.options.aux_head=false"
        )
    if batch % recipe.train.accumulate:
        raise UserError(
            f"train.accumulate={recipe.train.accumulate} does not divide the {batch} samples of a process; set --batch"
        )
    tree = recipe.model_dump(mode="json")
    # Lanes of the same length at any count, so that mixing and BatchNorms do the same work.
    tree["data"]["lanes"] = default_lanes(batch) * count
    tree["train"]["global_batch_size"] = batch * count
    tree["model"]["num_classes"] = classes or recipe.model.num_classes
    tree["model"]["init"] = None
    tree["model"]["init_head"] = "keep"
    if batch == 1:
        tree["mix"]["prob"] = 0.0
    filled = type(recipe).model_validate(tree)
    model = build_model(filled, "meta")
    tree["model"] |= {"num_classes": model.num_classes, "img_size": model.img_size}
    return type(recipe).model_validate(tree)


def _measure(
    config: RunConfig, count: int, steps: int, warmup: int, repeats: int, threads: int | None, output: Path
) -> int:
    """Measure one count in processes of its own; returns the exit status."""
    from pipeline.train.bench_step import BenchJob, payload

    job = payload(BenchJob(config.model_dump_json(), steps, warmup, repeats, str(output)))
    process = multiprocessing.get_context("spawn").Process(target=_start, args=(job, count, threads))
    with deaf_to_ctrl_c():
        process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()  # at its end this process would wait for the measurement
        process.join()
        raise
    return abs(process.exitcode or 0)


def _start(job: str, count: int, threads: int | None) -> Any:
    from launch.workers import Nodes, start_workers
    from pipeline.train.again import AGENT_PID

    os.environ[AGENT_PID] = str(os.getppid())  # with which it ends
    os._exit(start_workers("pipeline.train.bench_step", job, Nodes(count), threads))
