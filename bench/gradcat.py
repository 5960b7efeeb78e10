"""The deletion test of GradCAT on the validation split of a trained NesT, for all scores, both signs and several masks.

    rookery prep cifar10/ shards/cifar10
    rookery train configs/nest/tiny_cifar10.yaml
    python -m bench.gradcat runs/nest_tiny_cifar10 --images 1000 --out gradcat.json

A block is masked in the image, and the logit of the predicted class is read. Per choice one line of JSON, and with
`--out` all of them in a file: in which part of the images the block on GradCAT's path matters more than a random one,
and than the one of the lowest score; and by how much the logit falls on average for the three.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

from pipeline.config_load import parse_tree
from pipeline.data.augment.evaluation import EvalTransform
from pipeline.data.loader import load_sample
from pipeline.data.shards import ShardSet
from pipeline.explain.deletion import Deletion, delete_blocks
from pipeline.explain.gradcat import check_tree, grow_tree
from pipeline.explain.names import Scores
from pipeline.explain.scores import score_tree
from pipeline.export.source import Preprocessing, load_source
from pipeline.tracking.environment import device_name, key_versions
from pipeline.tracking.run_dir import RunDir

_BATCH = 50
_BEFORE = "gradient, before the last norm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="spread evenly over the split")
    parser.add_argument("--out", type=Path, help="a file for all figures, with command, device and versions")
    options = parser.parse_args()
    source = load_source(options.run)
    model = check_tree(source.model)
    prepare = Preprocessing.of(source)
    images = read(options.run, prepare, options.images, model.in_chans)
    black = -torch.tensor(prepare.mean) / torch.tensor(prepare.std)
    fills = {"mean colour": images.mean((0, 2, 3)), "black": black, "zero": torch.zeros(model.in_chans)}
    batches, lines = images.split(_BATCH), []
    for way, sign, name in product([*Scores, _BEFORE], (1, -1), fills):
        fill = fills[name]
        if way == _BEFORE:
            trees = [grow_tree(model, some, None, sign, before_norm=True) for some in batches]
        else:
            trees = [score_tree(Scores(way), model, some, None, sign, fill) for some in batches]
        for depth in range(1, len(model.levels)):
            parts = [
                delete_blocks(model, some, tree, fill, depth, seed=i)
                for i, (some, tree) in enumerate(zip(batches, trees, strict=True))
            ]
            done = Deletion(*map(torch.cat, zip(*parts, strict=True)))
            line = {"scores": way, "sign": sign, "mask": name, "depth": depth}
            line |= {"beats_random": done.beats_random(), "beats_lowest": done.beats_lowest()}
            line |= {which: float(drops.mean()) for which, drops in done._asdict().items()}
            lines.append(line)
            print(json.dumps(line), flush=True)
    if options.out is not None:
        command = " ".join(["python -m bench.gradcat", *sys.argv[1:]])
        about = {"command": command, "device": device_name(), "versions": key_versions(), "images": len(images)}
        options.out.write_text(json.dumps(about | {"figures": lines}, indent=1) + "\n")


def read(run: Path, prepare: Preprocessing, count: int, channels: int) -> torch.Tensor:
    """Images of the run's validation split, prepared as it evaluates."""
    config = parse_tree(RunDir.saved_config(run) or {}, str(run))
    assert config.data.val is not None, "the run has a validation split"
    shards = ShardSet(config.data.val)
    transform = EvalTransform(prepare.transform, prepare.img_size, prepare.mean, prepare.std)
    chosen = np.unique(np.linspace(0, len(shards) - 1, count).astype(int)).tolist()
    return torch.stack([transform(load_sample(shards, sample, channels).picture) for sample in chosen])


if __name__ == "__main__":
    main()
