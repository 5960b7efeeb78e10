"""FID and Inception score: against their formulas, of pictures known to be near or far; the small network."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import EvalBatch, load_sample
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.generate.features import SMALL_FILE, FeatureNet, Inception, SmallNet, small_net, to_bytes
from pipeline.generate.figures import Judge
from pipeline.generate.latents import fixed_latents
from pipeline.generate.pictures import sheet, to_pictures
from pipeline.models.generate import Generator, create_generator
from pipeline.train.distributed import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SIDE = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    prepare_splits("digits", out, PrepOptions(workers=1))
    return out


@pytest.fixture(scope="module")
def transform() -> Any:
    return build_eval_transform(EvalTransformConfig(resize="resize_only"), AugmentConfig(normalize="half"), SIDE, 1)


@pytest.fixture(scope="module")
def net(shards: Path, transform: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallNet:
    return small_net(tmp_path_factory.mktemp("run"), ShardSet(str(shards / "train")), transform, 1, ALONE)


def pixels(split: Path, transform: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    opened = ShardSet(str(split))
    samples = [load_sample(opened, i, 1) for i in range(count)]
    return torch.stack([transform(s.picture) for s in samples]), torch.tensor([s.label for s in samples])


class Stored(Generator):
    """Gives images away that it was given, one after the other."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(SIDE, 1, 4)
        self.stored, self.given = images, 0

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        self.given += len(latents)
        return self.stored[self.given - len(latents) : self.given]


def batches(images: torch.Tensor) -> Iterator[EvalBatch]:
    """With padding, which must not count."""
    for part in images.split(100):
        padded = torch.cat([part, torch.zeros(3, *part.shape[1:])])
        yield EvalBatch(padded, torch.zeros(len(padded)).long(), torch.arange(len(padded)) < len(part))


def test_small_network_knows_the_data(net: SmallNet, shards: Path, transform: Any) -> None:
    images, labels = pixels(shards / "test", transform, 360)
    with torch.no_grad():
        logits = net(to_bytes(images)).logits
    assert (logits.argmax(1) == labels).float().mean() > 0.9


def test_small_network_is_a_function_of_the_data(net: SmallNet, shards: Path, transform: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = small_net(tmp_path, ShardSet(str(shards / "train")), transform, 1, ALONE)
    assert torch.equal(torch.get_rng_state(), state), "training must not notice"
    kept = small_net(tmp_path, ShardSet(str(shards / "test")), transform, 1, ALONE)
    assert (tmp_path / SMALL_FILE).exists()
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(kept.state_dict()[name], tensor), "read, not trained again"


def test_figures_are_those_of_the_formulas(net: SmallNet, shards: Path, transform: Any) -> None:
    real, _ = pixels(shards / "train", transform, 300)
    noisy = (real[:260] + 0.4 * torch.randn(260, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))).clamp(
        -1, 1
    )
    judge = Judge(net, ALONE)
    judge.judge_split(batches(real))
    figures = judge.judge(Stored(noisy), 260, 50, nullcontext())
    with torch.no_grad():
        (theirs, _), (ours, logits) = net(to_bytes(real)), net(to_bytes(noisy))
    mean = [features.double().numpy().mean(0) for features in (theirs, ours)]
    cov = [np.cov(features.double().numpy(), rowvar=False) for features in (theirs, ours)]
    root = np.real(linalg.sqrtm(cov[0] @ cov[1]))
    fid = ((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * root)
    assert figures["fid_small"] == pytest.approx(fid, rel=1e-3)
    probabilities = logits.double().softmax(1)
    whole = (probabilities * (probabilities.log() - probabilities.mean(0).log())).sum(1).mean().exp().item()
    assert 1 < figures["is_small"] < 10 and figures["is_small"] == pytest.approx(whole, rel=0.2)
    assert figures["count"] == 260
    # The split is remembered; the images are not.
    assert judge.judge(Stored(noisy), 260, 7, nullcontext())["fid_small"] == pytest.approx(fid, rel=1e-3)
    near = judge.judge(Stored(real), 300, 50, nullcontext())
    assert abs(near["fid_small"]) < 1e-3 * fid and near["is_small"] > figures["is_small"]


def test_processes_share_the_latents(net: SmallNet, shards: Path, transform: Any) -> None:
    """Each takes its part of the fixed ones, no matter in which batches."""
    seen: list[torch.Tensor] = []

    class Noting(Stored):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents)
            return torch.zeros(len(latents), 1, SIDE, SIDE)

    for rank in range(3):
        judge = Judge(net, World(rank, 3, rank, torch.device("cpu")))
        judge.judge_split(batches(pixels(shards / "train", transform, 30)[0]))
        judge.judge(Noting(torch.zeros(0)), 32, 5, nullcontext())
    assert torch.equal(torch.cat(seen), fixed_latents(4, 0, np.arange(32)))


def test_one_class_can_not_be_learnt(transform: Any, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures" / "train" / "all"
    pictures.mkdir(parents=True)
    for number, picture in enumerate(to_pictures(torch.rand(4, 1, SIDE, SIDE))):
        picture.save(pictures / f"{number}.png")
    prepare_splits(tmp_path / "pictures", tmp_path / "shards", PrepOptions(workers=1))
    with pytest.raises(UserError, match=r"task.features=inception"):
        small_net(tmp_path, ShardSet(str(tmp_path / "shards" / "train")), transform, 1, ALONE)


def test_inception_says_what_to_do_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers at a closed port of this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # made at the first use, with the proxies of that moment
    with pytest.raises(UserError, match=r"put https://\S+ into \S+/hub/checkpoints/\S+\.pth yourself"):
        Inception()


def test_pages() -> None:
    generator = create_generator("nest_gen_micro", embed_dims=8, num_heads=1)
    images = generator(fixed_latents(32, 0, np.arange(5)))
    page = sheet(to_pictures(images), 3)
    assert page.size == (3 * 66 + 2, 2 * 66 + 2) and page.mode == "RGB"
    corner = np.asarray(page)[2:66:2, 2:66:2]
    assert np.array_equal(corner, to_bytes(images)[0].permute(1, 2, 0).numpy())
    assert to_bytes(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert issubclass(SmallNet, FeatureNet)
