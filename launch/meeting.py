"""Which of a node's addresses the other nodes reach it by, found without asking what its name stands for.

torchrun asks the name: whether the meeting point is this host, and what address the others are told of rank 0. Where a
host's name resolves to nothing, or to 127.0.1.1 as Debian has it, nodes wait for each other until a time-out.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True)
class Meeting:
    """Where the agents of all nodes meet, seen from one of them.

    Attributes:
        endpoint: `host:port` to go to; on the host itself, which then offers it, `localhost:port`.
        address: of this node as the others see it; None where all is on one host.
    """

    endpoint: str
    address: str | None

    @classmethod
    def at(cls, rendezvous: str) -> Meeting:
        """The meeting point `host:port`; nothing is sent to it.

        Raises:
            OSError: the host is unknown here, or there is no way to it.
        """
        host, _, port = rendezvous.rpartition(":")
        family, _, _, _, there = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            own = probe.getsockname()[0]
        if own.startswith("127.") or own == "::1":
            return cls(f"localhost:{port}", None)
        return cls(f"localhost:{port}" if own == there[0] else rendezvous, own)

    def parameters(self) -> dict[str, Any]:
        """What torch's `RendezvousParameters` is to know."""
        return {"endpoint": self.endpoint, "local_addr": self.address}

    def choose_network(self) -> None:
        """Have gloo, which asks the name too, use the network of the meeting, unless the user has chosen one."""
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == self.address for address in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
