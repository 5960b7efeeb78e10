"""Batches come to the device whole, and the garbage collector only when it is called."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from pipeline.data.augment.finish import Erased, Finish
from pipeline.data.augment.mixing import MixParams
from pipeline.data.augment.settings import AugmentConfig, RandomErasingConfig
from pipeline.data.loader import TrainBatch
from pipeline.train.copies import on_device
from pipeline.train.garbage import collected_by_hand


def made(device: torch.device) -> Iterator[TrainBatch]:
    """Batches of 8 in pinned memory."""
    draw = torch.Generator().manual_seed(0)

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if device.type == "cuda" else tensor

    for _ in range(20):
        ints = (torch.randint(0, 8, shape, generator=draw) for shape in ((8,), (8,), (8,), (8, 4)))
        labels, samples, partner, box = map(pinned, ints)
        inside, outside, label = (pinned(torch.rand(8, generator=draw)) for _ in range(3))
        images, noise = pinned(torch.rand(8, 3, 256, 256, generator=draw)), pinned(torch.rand(8, 2, generator=draw))
        yield TrainBatch(images, labels, samples, noise, MixParams(partner, box, inside, outside, label, 0.1))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_come_whole(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device(kind)
    busy = torch.rand(4096, 4096, device=device) if kind == "cuda" else torch.ones(1, 1)
    finish = Finish(AugmentConfig(), 3)
    for batch, expected in zip(on_device(made(device), device, finish), made(torch.device("cpu")), strict=True):
        for _ in range(5):  # the GPU is behind, so that a step that doesn't wait for its copy reads rubbish
            busy = busy @ busy / busy.norm()
        assert batch.images.device.type == kind and batch.samples.device.type == "cpu"
        for name in ("images", "labels", "samples", "drop_path"):
            assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
        for name in ("partner", "box", "inside", "outside", "label"):
            assert torch.equal(getattr(batch.mix, name).cpu(), getattr(expected.mix, name))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_8_bit_images_are_finished(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device(kind)
    finish = Finish(AugmentConfig(random_erasing=RandomErasingConfig()), 3)
    [batch, *_] = made(torch.device("cpu"))
    pixels = (batch.images * 255).byte()
    erased = Erased(torch.tensor([[2, 10, 20, 3, 4], [5, 0, 0, 1, 2]]), torch.arange(42, dtype=torch.float32))
    [done] = on_device([batch._replace(images=pixels, erased=erased)], device, finish)
    expected = (pixels.float() / 255 - finish.mean.cpu()) / finish.std.cpu()
    expected[2, :, 10:13, 20:24] = torch.arange(36.0).view(3, 3, 4)
    expected[5, :, :1, :2] = torch.arange(36.0, 42.0).view(3, 1, 2)
    assert done.erased is None and done.images.device.type == kind
    assert torch.allclose(done.images.cpu(), expected, rtol=1e-6, atol=1e-6)


class Knot:
    """Refers to itself, so that only the collector can free it."""

    freed = 0

    def __init__(self) -> None:
        self.own = self

    def __del__(self) -> None:
        Knot.freed += 1


def test_garbage_waits_for_the_call() -> None:
    was = gc.isenabled()
    with collected_by_hand() as collect:
        for _ in range(2000):
            Knot()
        assert Knot.freed == 0
        collect()
        assert Knot.freed == 2000
        assert not gc.isenabled()
    assert gc.isenabled() == was
