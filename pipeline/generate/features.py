"""The networks whose features FID and the Inception score are taken from; a figure always carries its network's name.

`inception` is the one that published figures mean: Inception of 2015, by torch-fidelity, which fetches its weights.
`small` is a classifier of a few layers that learns the run's own training split within seconds, for machines that can't
fetch anything and for pictures that are nothing like ImageNet's. Its figures tell generators apart on the same data;
they compare with no other data's and with no published ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.data.loader import load_sample
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.hashing import hash64
from pipeline.tracking.files import write_aside

if TYPE_CHECKING:
    from pipeline.train.distributed import World

SMALL_FILE = "features_small.safetensors"
# Samples of the training split that the small network sees, steps and samples of a step, its seed.
_SAMPLES, _STEPS, _BATCH, _SEED = 20_000, 200, 64, 0


class Seen(NamedTuple):
    """What a network made of images.

    Attributes:
        features: (B, num_features) float32.
        logits: (B, K) float32, of the classes.
    """

    features: Tensor
    logits: Tensor


class FeatureNet(nn.Module):
    """Attributes: name, part of every figure's; num_features."""

    name: str
    num_features: int

    @abstractmethod
    def forward(self, images: Tensor) -> Seen:
        """(B, C, H, W) uint8, C = 1 or 3."""


class SmallNet(FeatureNet):
    """Four convolutions; the features are the averages of the last one's 64 channels."""

    name = "small"
    num_features = 64

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64, self.num_features)
        self.convs = nn.ModuleList(nn.Conv2d(*pair, kernel_size=3, stride=2, padding=1) for pair in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, images: Tensor) -> Seen:
        x = images.float() / 127.5 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        features = x.mean(dim=(2, 3))
        return Seen(features, self.head(features))


class Inception(FeatureNet):
    """Inception of 2015 with the weights and the resizing of the original FID, by torch-fidelity."""

    name = "inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(
                "task.features=inception needs torch-fidelity: pip install 'rookery[generate]'; "
                "or choose task.features=small"
            ) from error
        try:
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", [str(self.num_features), "logits_unbiased"])
        except (URLError, OSError, RuntimeError) as error:
            place = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
            raise UserError(
                f"task.features=inception: its weights can't be fetched ({error}); put {URL_INCEPTION_V3} into {place} "
                "yourself, or choose task.features=small, whose figures compare with no published ones"
            ) from error

    def forward(self, images: Tensor) -> Seen:
        features, logits = self.net(images.expand(-1, 3, -1, -1))
        return Seen(features.float(), logits.float())


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, as they are written: what lies outside is cut off."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def inception(world: World) -> Inception:
    """On this process's device; rank 0 fetches the weights first. Collective."""

    def fetch() -> None:
        Inception()

    if world.size > 1:
        world.on_main(fetch)
    return Inception().to(world.device).eval()


def small_net(
    folder: Path, shards: ShardSet, transform: Callable[[Image.Image], Tensor], channels: int, world: World
) -> SmallNet:
    """The small network of a run: rank 0 trains it, or reads what it trained before; collective.

    The same data give the same network: samples, their order and the first weights are functions of nothing else.

    Args:
        folder: the run directory, which keeps it as `features_small.safetensors`.
        shards: the training split.
        transform: of the evaluation, to normalised pixels in [-1, 1].

    Raises:
        UserError: the data have one class only.
    """
    classes = shards.manifest.num_classes
    if classes < 2:
        raise UserError(
            "task.features=small learns to tell the classes of data.train apart, and there is one; "
            "choose task.features=inception"
        )
    file = folder / SMALL_FILE

    def on_main() -> dict[str, np.ndarray]:
        if file.exists():
            return {name: tensor.numpy() for name, tensor in load_file(file).items()}
        net = _trained(shards, transform, channels)
        weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
        if folder.is_dir():
            write_aside(file, lambda opened: opened.write(save(weights)))
        return {name: tensor.numpy() for name, tensor in weights.items()}

    weights = world.on_main(on_main)
    with torch.random.fork_rng(devices=[]):
        net = SmallNet(channels, classes)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return net.to(world.device).eval()


def _trained(shards: ShardSet, transform: Callable[[Image.Image], Tensor], channels: int) -> SmallNet:
    """On the CPU, so that it is the same one on every machine but for rounding."""
    count = min(len(shards), _SAMPLES)
    images, labels = [], []
    for position in np.unique(np.linspace(0, len(shards) - 1, count).astype(int)).tolist():
        sample = load_sample(shards, position, channels)
        images.append(to_bytes(transform(sample.picture)))
        labels.append(sample.label)
    pixels, targets = torch.stack(images), torch.tensor(labels)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(_SEED)
        net = SmallNet(channels, shards.manifest.num_classes)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=_STEPS)
        for step in range(_STEPS):
            chosen = torch.from_numpy(
                (hash64(_SEED, step, np.arange(_BATCH)) % np.uint64(len(pixels))).astype(np.int64)
            )
            loss = F.cross_entropy(net(pixels[chosen]).logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net
