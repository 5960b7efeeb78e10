"""Copies to the GPU that go on while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pipeline.data.augment.finish import Finish
from pipeline.data.loader import TrainBatch
from pipeline.data.resident.augment import DeviceAugment


def on_device(
    batches: Iterable[TrainBatch], device: torch.device, finish: Finish, augment: DeviceAugment | None = None
) -> Iterator[TrainBatch]:
    """The batches on the device, images finished, but for what only the host reads: numbers and faults of samples.

    Args:
        augment: carries out the plans of batches that come without images.

    On a GPU copies, and what is done to pictures there, run in a stream of their own. The host is ahead of the GPU, so
    they run while the GPU still computes the step before; the step itself waits for them on the GPU, and the host never
    does.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _finished(batch, finish, augment)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which brought the pictures of `augment` there
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = TrainBatch(
                images=batch.images.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
                samples=batch.samples,
                drop_path=batch.drop_path.to(device, non_blocking=True),
                mix=batch.mix.to(device),
                tokens=None if batch.tokens is None else batch.tokens.to(device),
                erased=None
                if batch.erased is None
                else batch.erased._replace(noise=batch.erased.noise.to(device, non_blocking=True)),
                replaced=batch.replaced,
                plan=None if batch.plan is None else batch.plan.to(device),
            )
            ready = _finished(moved, finish, augment)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(stream)
        for tensor in _tensors(ready):
            if tensor.is_cuda:
                # Its memory, of the copying stream, must not be used again before the step has read it.
                tensor.record_stream(compute)
        yield ready


def _finished(batch: TrainBatch, finish: Finish, augment: DeviceAugment | None) -> TrainBatch:
    if batch.plan is not None:
        assert augment is not None, "whoever asks for plans has the pictures"
        batch = batch._replace(images=augment(batch.plan), plan=None)
    if batch.erased is None:
        return batch
    return batch._replace(images=finish(batch.images, batch.erased), erased=None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
