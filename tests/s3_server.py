"""A real S3 server: moto's, in a process of its own."""

from __future__ import annotations

from tests.store_server import StoreServer


class S3Server(StoreServer):
    """See `StoreServer`."""

    name = "S3"
    packages = ("moto", "s3fs", "flask_cors")
    probe = ("PUT", "/bucket")

    def arguments(self) -> list[str]:
        return ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
