"""A sweep that goes on after a kill, without a cluster: what of its trials counts, and what is decided already."""

from __future__ import annotations

import errno
import socket

import pytest

from launch.sweep.trial import held_port

# --- where the nodes of a trial meet


def test_a_held_port_is_taken_for_all_but_the_store() -> None:
    from torch.distributed import TCPStore

    holders = [held_port() for _ in range(3)]
    ports = {holder.getsockname()[1] for holder in holders}
    assert len(ports) == 3
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError) as error:
            other.bind(("", port))
        assert error.value.errno == errno.EADDRINUSE
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        TCPStore("localhost", port, is_master=False).set("key", "value")
        assert store.get("key") == b"value"
        with socket.socket() as other, pytest.raises(OSError):  # even of those who would share it
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("", port))
            other.listen()
    for holder in holders:
        holder.close()
