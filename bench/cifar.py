"""The runs of bench/cifar.sh, and their file of results."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cifar_resnet import train_resnet
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.tracking.environment import device_name, key_versions
from pipeline.tracking.files import check_place, read_json, read_lines, write_text
from pipeline.tracking.metrics import read_metrics
from pipeline.tracking.run_dir import SESSIONS_NAME

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "nest" / "tiny_cifar10_fast.yaml"
TINY = [
    "model.name=nest_micro",
    "model.options={patch_size: 2, embed_dims: [16, 32, 48], num_heads: [1, 2, 3], depths: 1}",
    "train.epochs=4steps",
    "train.global_batch_size=64",
    "data.lanes=8",
    "data.workers=0",
    "train.compile=false",
    "train.precision=fp32",
    "optim.schedule.warmup=1steps",
    "eval.every=2steps",
    "checkpoint.every=2steps",
]


def main() -> int:
    """Run what was asked for, and write the file after each run."""
    try:
        return run(asked())
    except UserError as error:
        print(f"bench/cifar.sh: {error}", file=sys.stderr)
        return 2


def asked() -> argparse.Namespace:
    """The options, checked before anything is trained."""
    parser = argparse.ArgumentParser(description="NesT-T and a ResNet-18 on the same CIFAR-10; see bench/cifar.sh.")
    parser.add_argument("shards", type=Path, help="what `rookery prep` made: holds train/ and test/")
    parser.add_argument("--only", type=listed(kind_named), default=[resnet, nest])
    parser.add_argument("--seeds", type=listed(natural), default=[0, 1, 2])
    parser.add_argument("--epochs", type=natural, help="of both; default: the recipe's for NesT, 100 for the ResNet")
    parser.add_argument("--triton", action="store_true", help="NesT by kernels of this package, as runs of their own")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: runs/cifar_bench, with --tiny ..._tiny")
    parser.add_argument("--out", type=Path, help="default: bench/results/cifar10.json, with --tiny in --runs")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    for split in ("train", "test"):
        if not (options.shards / split / "manifest.json").exists():
            parser.error(f"{options.shards}: no {split}/manifest.json there; prepare it with `rookery prep`")
    if options.tiny and options.epochs is not None:
        parser.error("--tiny takes a few steps: leave --epochs out")
    if options.epochs == 0:
        parser.error("--epochs 0 trains nothing")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU here; --tiny tries the script on a CPU")
    options.runs = options.runs or Path("runs/cifar_bench_tiny" if options.tiny else "runs/cifar_bench")
    options.out = options.out or (options.runs if options.tiny else ROOT / "bench" / "results") / "cifar10.json"
    try:
        options.runs.mkdir(parents=True, exist_ok=True)
        check_place(options.runs, "--runs")
        check_place(options.out.parent, "--out")
    except OSError as error:
        raise UserError(f"{options.runs}: can't be made ({error.strerror}); choose another --runs") from error
    return options


def run(options: argparse.Namespace) -> int:
    """The runs, one after the other; the exit status of the first that fails."""
    for kind in options.only:
        for seed in options.seeds:
            status = kind(options, seed)
            write_text(options.out, json.dumps(report(options.runs), indent=1) + "\n")
            if status:
                return status
    return 0


def nest(options: argparse.Namespace, seed: int) -> int:
    """One training by the command that a user would give; the exit status."""
    kernels = "triton-" if options.triton else ""
    name = f"{'tiny-' if options.tiny else ''}nest-{kernels}{options.epochs or 'recipe'}-{seed}"
    command = [sys.executable, "-c", "from launch.cli import app; app()", "train", str(RECIPE), f"name={name}"]
    command += [f"out={options.runs}", *overrides(options, seed), "tracking.mlflow=false", "--nproc", "1"]
    command += ["model.options.kernels=triton"] if options.triton else []
    return subprocess.run(command).returncode


def resnet(options: argparse.Namespace, seed: int) -> int:
    """One training of the ResNet, unless it is done."""
    epochs = options.epochs or 100
    folder = options.runs / (f"tiny-resnet-{seed}" if options.tiny else f"resnet18-{epochs}-{seed}")
    if (folder / "result.json").exists():
        return 0
    length = [] if options.tiny else [f"train.epochs={epochs}", "eval.every=10ep"]
    config = load_config(RECIPE, [f"name={folder.name}", f"out={options.runs}", *overrides(options, seed), *length])
    result = train_resnet(config, width=8 if options.tiny else 64, told=lambda text: print(text, flush=True))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return 0


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What stands between commas."""

    def words(text: str) -> list[Any]:
        return [of(word) for word in text.split(",")]

    return words


def kind_named(word: str) -> Callable[[argparse.Namespace, int], int]:
    if word not in ("resnet", "nest"):
        raise argparse.ArgumentTypeError(f"{word!r}: there is resnet and nest")
    return resnet if word == "resnet" else nest


def natural(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is no number of 0 or more")
    return int(word)


def overrides(options: argparse.Namespace, seed: int) -> list[str]:
    """Of the recipe, for both kinds of runs."""
    own = [f"data.train={options.shards / 'train'}", f"data.val={options.shards / 'test'}", f"seed={seed}"]
    if options.tiny:
        return own + TINY
    return own + ([] if options.epochs is None else [f"train.epochs={options.epochs}"])


def report(runs: Path) -> dict[str, Any]:
    """All finished runs below a folder."""
    table = []
    for folder in sorted(runs.iterdir()):
        result = read_json(folder / "result.json")
        if result is None:
            continue
        row: dict[str, Any] = {"name": folder.name, "top1": result["top1"], "minutes": result["wall_seconds"] / 60}
        if (folder / "metrics.jsonl").exists():
            lines = list(read_metrics(folder))
            minutes = minutes_of(lines, read_lines(folder / SESSIONS_NAME))
            row["curve"] = [
                [line["epoch"], when, line["top1"]]
                for line, when in zip(lines, minutes, strict=True)
                if line["kind"] == "eval"
            ]
            rates = sorted(line["images_per_second"] for line in lines if line["kind"] == "train")
            row["images_per_second"] = rates[len(rates) // 2]
        else:
            row["curve"] = result["curve"]
        table.append(row)
    command = shlex.join(["bench/cifar.sh", *sys.argv[1:]])
    return {"command": command, "device": device_name(), "versions": key_versions(), "runs": table}


def minutes_of(lines: list[dict[str, Any]], sessions: list[dict[str, Any]]) -> list[float]:
    """When each line was written, by the time that the run was at work: without pauses, and what a kill threw away."""
    starts = [session["time"] for session in sessions if session["event"] == "start"]
    before, at, found = 0.0, 0, []
    last = starts[0]
    for line in lines:
        while at + 1 < len(starts) and line["time"] >= starts[at + 1]:
            before, at = before + last - starts[at], at + 1
            last = starts[at]
        last = line["time"]
        found.append((before + last - starts[at]) / 60)
    return found


if __name__ == "__main__":
    sys.exit(main())
