"""The runs of bench/cifar.sh, and their file of results."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.cifar_resnet import train_resnet
from pipeline.config_load import load_config
from pipeline.tracking.environment import device_name, key_versions
from pipeline.tracking.files import read_json, write_text
from pipeline.tracking.metrics import read_metrics

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
    parser = argparse.ArgumentParser(description="NesT-T and a ResNet-18 on the same CIFAR-10; see bench/cifar.sh.")
    parser.add_argument("shards", type=Path, help="what `rookery prep` made: holds train/ and test/")
    parser.add_argument("--only", default="resnet,nest")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, help="of both; default: the recipe's for NesT, 100 for the ResNet")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar_bench"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cifar10.json")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    for split in ("train", "test"):
        if not (options.shards / split / "manifest.json").exists():
            parser.error(f"{options.shards}: no {split}/manifest.json there; prepare it with `rookery prep`")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU here; --tiny tries the script on a CPU")
    kinds = {"resnet": resnet, "nest": nest}
    if unknown := set(options.only.split(",")) - kinds.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: there is {', '.join(kinds)}")
    for kind in options.only.split(","):
        for seed in map(int, options.seeds.split(",")):
            status = kinds[kind](options, seed)
            write_text(options.out, json.dumps(report(options.runs), indent=1) + "\n")
            if status:
                return status
    return 0


def nest(options: argparse.Namespace, seed: int) -> int:
    """One training by the command that a user would give; the exit status."""
    name = f"nest-{options.epochs or 'recipe'}-{seed}"
    command = [sys.executable, "-c", "from launch.cli import app; app()", "train", str(RECIPE), f"name={name}"]
    command += [f"out={options.runs}", *overrides(options, seed), "tracking.mlflow=false", "--nproc", "1"]
    return subprocess.run(command).returncode


def resnet(options: argparse.Namespace, seed: int) -> int:
    """One training of the ResNet, unless it is done."""
    epochs = options.epochs or 100
    folder = options.runs / f"resnet18-{epochs}-{seed}"
    if (folder / "result.json").exists():
        return 0
    length = [] if options.tiny else [f"train.epochs={epochs}", "eval.every=10ep"]
    config = load_config(RECIPE, [f"name={folder.name}", f"out={options.runs}", *overrides(options, seed), *length])
    result = train_resnet(config, width=8 if options.tiny else 64, told=lambda text: print(text, flush=True))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return 0


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
            # By the clock of the run, which counts what each start took before its first step.
            began = max(line["time"] for line in lines) - result["wall_seconds"]
            seen = [line for line in lines if line["kind"] == "eval"]
            row["curve"] = [[line["epoch"], (line["time"] - began) / 60, line["top1"]] for line in seen]
            rates = sorted(line["images_per_second"] for line in lines if line["kind"] == "train")
            row["images_per_second"] = rates[len(rates) // 2]
        else:
            row["curve"] = result["curve"]
        table.append(row)
    command = shlex.join(["bench/cifar.sh", *sys.argv[1:]])
    return {"command": command, "device": device_name(), "versions": key_versions(), "runs": table}


if __name__ == "__main__":
    sys.exit(main())
