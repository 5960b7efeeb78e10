"""The Ray cluster of a sweep: one that runs already, or one of this machine for the time being."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_prep.cores import usable_cores
from launch.sweep.config import Resources
from pipeline.errors import UserError

_STORE_BYTES = 100_000_000
# A head that has only just been started may not listen yet.
_PROBE_SECONDS = 8.0
_TRY_SECONDS = 3.0
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class ClusterFacts:
    """What a cluster has.

    Attributes:
        gpus: of each process of a trial.
        lacks: what a trial asks for that no node has now; None when it fits.
    """

    gpus: int
    lacks: str | None


def import_ray() -> Any:
    """Ray, set up to be quiet and to tell nobody; clusters that this process starts are as well.

    Raises:
        UserError: it is not installed.
    """
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        # Else 15: trials would get only the cores that nothing else on the machine wants.
        "RAY_worker_niceness": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.tune
    except ImportError as error:
        raise UserError("rookery sweep needs Ray Tune: pip install 'rookery[ray]'") from error
    return ray


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at an address (or RAY_ADDRESS), or started here.

    Raises:
        UserError: no cluster answers there.
    """
    ray = import_ray()
    if address in (None, "", "auto"):  # Ray, too, takes its variable for what auto means
        address = os.environ.get("RAY_ADDRESS") or address or None
    if address is not None:
        probe(address)
    own: dict[str, Any] = {
        "num_cpus": usable_cores(),
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else own),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_answer(address, str(error).splitlines()[0]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def probe(address: str, seconds: float = _PROBE_SECONDS) -> None:
    """See that something listens at HOST:PORT: Ray itself would wait for it without an end.

    `auto`, `local` and addresses with a scheme (`ray://`) are left to Ray.

    Raises:
        UserError: the address has another form, or nobody listens there after several tries.
    """
    if address in ("auto", "local") or "://" in address:
        return
    form = re.fullmatch(r"\[?([^\[\]]+?)\]?:([0-9]{1,5})", address)
    if form is None or not 0 < int(form[2]) < 1 << 16:
        raise UserError(f"Ray's address {address} is no HOST:PORT; write it as in 10.0.0.1:6379, or auto")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((form[1], int(form[2])), _TRY_SECONDS).close()
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that can't be a name
            unknown = isinstance(error, UnicodeError) or getattr(error, "errno", None) == socket.EAI_NONAME
            if unknown or time.monotonic() + _PAUSE_SECONDS > deadline:
                raise _no_answer(address, getattr(error, "strerror", None) or str(error)) from error
        time.sleep(_PAUSE_SECONDS)


def _no_answer(address: str | None, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address}: {reason}; start one (ray start --head), see that RAY_AUTH_TOKEN is "
        "the cluster's, or leave --address out to use this machine"
    )


def cluster_facts(ray: Any, resources: Resources) -> ClusterFacts:
    """What the cluster has for trials now; nodes may still come."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node["Resources"].get("GPU", 0) for node in nodes)
    gpus = int(has_gpus) if resources.gpus is None else resources.gpus
    wanted = {"CPU": resources.nproc * resources.cpus, "GPU": resources.nproc * gpus}
    fits = [n for n in nodes if all(n["Resources"].get(kind, 0) >= count for kind, count in wanted.items())]
    lacks = None
    if len(fits) < resources.nodes:
        asked = ", ".join(f"{count} {kind}s" for kind, count in wanted.items() if count)
        lacks = f"a trial asks for {resources.nodes} nodes with {asked}; the cluster has {len(fits)} of them"
    return ClusterFacts(gpus, lacks)


class NodeNames:
    """The nodes of the cluster as a reader knows them; new ones too."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._names: dict[str, str] = {}

    def name(self, node_id: str) -> str:
        """A node's host name; of several nodes on one host, with the beginning of Ray's id."""
        if node_id not in self._names:
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in self._ray.nodes()}
            alone = {node: [*hosts.values()].count(host) == 1 for node, host in hosts.items()}
            self._names |= {node: host if alone[node] else f"{host}/{node[:6]}" for node, host in hosts.items()}
        return self._names.get(node_id, node_id[:6])
