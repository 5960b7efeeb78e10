"""Batches lie in memory that is filled again only when nothing of them is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from pipeline.data.batches import Batches, empty_to_send
from pipeline.data.ring import Receiver, Sender

SHAPE, PREFETCH = (4, 3, 8, 8), 2


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


class Numbered(Dataset):
    """Batch i is full of i; its images are permuted as those of the loader."""

    def __getitem__(self, i: int) -> Batch:
        images = empty_to_send((4, 8, 8, 3), torch.float32).fill_(i)
        images[:, 0] = -i
        return Batch(images.permute(0, 3, 1, 2), torch.full((4,), i))


def batches(n: int, workers: int = 2) -> Batches:
    return Batches(Numbered(), range(n), workers, PREFETCH, torch.device("cpu"))


def is_of(images: torch.Tensor, i: int) -> bool:
    return images.shape == SHAPE and bool((images[:, :, 0] == -i).all() and (images[:, :, 1:] == i).all())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_that_are_all_kept_stay_as_they_are(workers: int) -> None:
    kept = list(batches(25, workers))
    assert all(is_of(batch.images, i) and bool((batch.labels == i).all()) for i, batch in enumerate(kept))
    assert len({batch.images.data_ptr() for batch in kept}) == 25


def test_memory_is_used_again() -> None:
    places = set()
    for i, batch in enumerate(batches(60)):
        assert is_of(batch.images, i)
        places.add(batch.images.data_ptr())
        del batch
    assert len(places) <= 2 * (PREFETCH + 4)


def test_a_part_of_a_batch_keeps_it() -> None:
    parts = {}
    for i, batch in enumerate(batches(40)):
        if i % 5 == 0:
            parts[i] = batch.images[1:3, :, ::2]
    assert len(parts) == 8
    for i, part in parts.items():
        assert bool((part[:, :, 0] == -i).all() and (part[:, :, 1:] == i).all())


def test_what_a_backward_pass_needs_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    outputs = [(weight * batch.images).sum() for batch in batches(30)]
    for i, output in enumerate(outputs):
        [grad] = torch.autograd.grad(output, weight)
        assert grad == i * 4 * 3 * 8 * (7 - 1)


def test_the_next_iteration_does_not_mind_what_is_left_of_the_last() -> None:
    loader = batches(20)
    first = list(loader)
    second: Iterator[Batch] = iter(loader)
    for i in range(10):
        images = next(second).images
        first[i] = None
        assert is_of(images, i)
    assert all(is_of(batch.images, i) for i, batch in enumerate(first) if batch is not None)
    assert all(is_of(batch.images, i) for i, batch in enumerate(second, 10))


def test_a_copy_for_a_gpu_frees_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch's own function; only its last step, which needs a GPU, is replaced by a plain copy."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    receiver = Receiver(1, PREFETCH)
    sender = Sender(receiver.number, 0, receiver.used[0])
    for i in range(12):
        images = sender.empty(SHAPE, torch.float32).fill_(i)
        sent = sender.sent(images)
        assert sent is not None and (sent.memory is not None) == (i == 0) and receiver.used.sum() == 1
        copy = pin_memory(Batch(sent, torch.tensor(i)))
        assert isinstance(copy, Batch) and bool((copy.images == i).all()) and receiver.used.sum() == 0


def test_a_full_ring_and_other_sizes() -> None:
    receiver = Receiver(1, PREFETCH)
    sender = Sender(receiver.number, 0, receiver.used[0])
    slots = receiver.used.shape[1]
    taken = [sender.empty(SHAPE, torch.float32) for _ in range(slots + 2)]
    assert [sender.sent(tensor) is not None for tensor in taken] == [True] * slots + [False] * 2
    assert receiver.used.all()
    receiver.used[0, 3] = 0
    other = sender.empty((5, 5), torch.uint8).fill_(7)
    sent = sender.sent(other)
    assert sent is not None and sent.slot == 3 and sent.memory is not None and sent.memory.nbytes == 25
    seen = sent.tensor()
    assert bool((seen == 7).all()) and receiver.used[0, 3] == 1
    del seen
    assert receiver.used[0, 3] == 0
    sender.empty(SHAPE, torch.float32)  # of a batch that was not sent
    assert receiver.used[0, 3] == 1
    sender.drop_rest()
    assert receiver.used[0, 3] == 0
