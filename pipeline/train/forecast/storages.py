"""Bytes of tensors as memory has them: storages, each counted once, of this process alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (`DTensor`); any other tensor as it is."""
    to_local = getattr(tensor.detach(), "to_local", None)
    return tensor if to_local is None else to_local()


def storage_key(tensor: Tensor) -> int:
    """The same for all views of a storage, as long as it lives. Addresses won't do: without memory they are all 0."""
    return tensor.untyped_storage()._cdata


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, padding and all."""
    storages = {storage_key(part): part.untyped_storage().nbytes() for part in map(local, tensors)}
    return sum(storages.values())
