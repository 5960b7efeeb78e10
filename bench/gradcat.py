"""The deletion test of GradCAT on the validation split of a trained NesT, for both signs, several masks and maps.

    rookery prep cifar10/ shards/cifar10
    rookery train configs/nest/tiny_cifar10.yaml
    python -m bench.gradcat runs/nest_tiny_cifar10 --images 1000

A block is masked in the image, and the logit of the predicted class is read. Per choice one line of JSON: in which part
of the images the block on GradCAT's path matters more than a random one, and than the one of the lowest score; and by
how much the logit falls on average for the three.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pipeline.config_load import parse_tree
from pipeline.data.augment.evaluation import EvalTransform
from pipeline.data.loader import load_sample
from pipeline.data.shards import ShardSet
from pipeline.explain.deletion import Deletion, delete_blocks
from pipeline.explain.gradcat import check_tree
from pipeline.export.source import Preprocessing, load_source
from pipeline.tracking.run_dir import RunDir

_BATCH = 50
# sign, before_norm, channel_weights
KINDS = (
    (1, False, False),
    (1, False, True),
    (1, True, False),
    (-1, False, False),
    (-1, False, True),
    (-1, True, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="spread evenly over the split")
    options = parser.parse_args()
    source = load_source(options.run)
    model = check_tree(source.model)
    prepare = Preprocessing.of(source)
    images = read(options.run, prepare, options.images, model.in_chans)
    black = -torch.tensor(prepare.mean) / torch.tensor(prepare.std)
    fills = {"mean colour": images.mean((0, 2, 3)), "black": black, "zero": torch.zeros(model.in_chans)}
    for sign, before_norm, channel_weights in KINDS:
        for name, fill in fills.items():
            for depth in range(1, len(model.levels)):
                parts = [
                    delete_blocks(
                        model, images[i : i + _BATCH], fill, depth, sign, before_norm, channel_weights, seed=i
                    )
                    for i in range(0, len(images), _BATCH)
                ]
                done = Deletion(*map(torch.cat, zip(*parts, strict=True)))
                line = {"sign": sign, "before_norm": before_norm, "channel_weights": channel_weights}
                line |= {"mask": name, "depth": depth}
                line |= {"beats_random": done.beats_random(), "beats_lowest": done.beats_lowest()}
                line |= {which: float(drops.mean()) for which, drops in done._asdict().items()}
                print(json.dumps(line), flush=True)


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
