"""A stand-in for Google Cloud Storage that speaks its JSON interface: gcp-storage-emulator, in a process of its own."""

from __future__ import annotations

from tests.store_server import StoreServer


class GoogleServer(StoreServer):
    """See `StoreServer`."""

    name = "Google Cloud Storage"
    packages = ("gcp_storage_emulator", "gcsfs")
    probe = ("GET", "/storage/v1/b/bucket")

    def arguments(self) -> list[str]:
        start = ["-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        return [*start, "--in-memory", "--default-bucket", "bucket"]
