"""Stores of Google, Azure and Hugging Face as far as one machine has them, behind a network that can fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.azure_server import azure, connection_string
from tests.faulty_server import FaultyServer, another
from tests.gs_server import GoogleServer
from tests.hub_server import REPOSITORY, hub

WRITABLE = ("gs", "abfs")


@dataclass(frozen=True)
class Service:
    """One of the stores.

    Attributes:
        address: a folder of it.
        options: what its file system needs to know to reach it.
        variables: the same for a process, as its own tools call them.
        files: the folder that it shows, where it can't be written.
    """

    kind: str
    network: FaultyServer
    address: str
    options: dict[str, str]
    variables: dict[str, str]
    files: Path | None = None


@contextmanager
def service(kind: str, folder: Path) -> Iterator[Service]:
    """Start a store; what is left of the environment's settings for such stores is out of the way."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("GOOGLE_", "AZURE_", "HF_", "FSSPEC_", "STORAGE_EMULATOR")):
                patch.delenv(name)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("NO_GCE_CHECK", "true")
        if kind == "gs":
            with GoogleServer(folder) as server, FaultyServer(another(server.port)) as network:
                options = {"endpoint_url": network.uri, "token": "anon"}
                yield Service(kind, network, "gs://bucket", options, {"STORAGE_EMULATOR_HOST": network.uri})
        elif kind == "abfs":
            with azure(folder) as answer, FaultyServer(answer) as network:
                connected = connection_string(network.uri)
                variables = {"AZURE_STORAGE_CONNECTION_STRING": connected}
                options = {"connection_string": connected}
                yield _with_container(Service(kind, network, "abfs://bucket", options, variables))
        else:
            (folder / "hub").mkdir()
            with FaultyServer(hub(folder / "hub")) as network:
                variables = {"HF_ENDPOINT": network.uri}
                address, options = f"hf://datasets/{REPOSITORY}", {"endpoint": network.uri}
                yield Service(kind, network, address, options, variables, folder / "hub")


def _with_container(made: Service) -> Service:
    import fsspec

    fsspec.filesystem("abfs", **made.options).mkdir("bucket")
    return made
