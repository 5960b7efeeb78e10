"""`ray up configs/ray/onprem.yaml` against three hosts in network namespaces, reached by SSH."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing_programs
from tests.cluster.slurm_cluster import wait_for
from tests.conftest import missing
from tests.train.commands import ROOT

pytestmark = pytest.mark.ray_cluster

NODES = ("head", "worker1", "worker2")

# Runs on the head: waits for all nodes, then one task on each of them says where it ran, in the shared folder.
JOB = """
import os, pathlib, socket, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At

ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=1)
def sign(folder):
    import pipeline
    name = socket.gethostname()
    pathlib.Path(folder, name).write_text(pipeline.__file__)

def alive():
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

deadline = time.monotonic() + 120
while len(alive()) < 3 and time.monotonic() < deadline:
    time.sleep(0.5)
folder = os.path.abspath("runs")
ray.get([sign.options(scheduling_strategy=At(node, soft=False)).remote(folder) for node in alive()])
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        missing("hosts in network namespaces left out: they need root")
    absent = missing_programs()
    if absent:
        missing(f"ray up left out: {', '.join(absent)} not installed (bash .ci/system-packages names the packages)")
    pytest.importorskip("ray")
    with Hosts(tmp_path, NODES) as hosts:
        yield hosts


def filled_in(hosts: Hosts, shared: Path) -> Path:
    """The shipped file with what a user has to fill in.

    Installing 7 GB of packages three times is left out by `ROOKERY_ENV`, which is there for users too: it names an
    environment that exists. All else that `ray up` does on the hosts is as shipped.
    """
    text = (ROOT / "configs" / "ray" / "onprem.yaml").read_text()
    replaced = {
        "192.168.0.10 ": f"{hosts.address['head']} ",
        "[192.168.0.11, 192.168.0.12]": f"[{hosts.address['worker1']}, {hosts.address['worker2']}]",
        "ssh_user: ubuntu ": "ssh_user: root ",
        "~/.ssh/id_ed25519 ": f"{hosts.key} ",
        "ROOKERY_SHARED=/mnt/rookery bash": f"ROOKERY_SHARED={shared} ROOKERY_ENV={sys.prefix} bash",
    }
    assert len(re.findall("(?m)^(?!#).*FILL IN", text)) == len(replaced)
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    filled = hosts.folder / "onprem.yaml"
    filled.write_text(text)
    return filled


def submit(hosts: Hosts, cluster: Path) -> str:
    """What the job prints, which is started on the head and uses all of the cluster."""
    (hosts.folder / "job.py").write_text(JOB)
    return hosts.run("ray", "exec", cluster, f"cd ~/rookery && python {hosts.folder}/job.py")


def ray_processes(hosts: Hosts, name: str) -> list[str]:
    return [line for line in hosts.processes(name) if line and not line.startswith("sshd")]


def test_up_submit_down(hosts: Hosts, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    cluster = filled_in(hosts, shared)
    hosts.run("ray", "get-auth-token", "--generate")
    hosts.run("ray", "up", "--yes", cluster)

    def joined() -> bool:
        return all("raylet" in " ".join(hosts.processes(name)) for name in NODES)

    wait_for(joined, "Ray runs on three hosts", hosts.logs)
    submit(hosts, cluster)
    for name in NODES:
        # Each node ran the checkout that was copied to it, whatever the environment has installed.
        assert (shared / "runs" / name).read_text() == f"{hosts.home}/rookery/pipeline/__init__.py"

    hosts.run("ray", "down", "--yes", cluster)
    wait_for(lambda: not any(ray_processes(hosts, name) for name in NODES), "no Ray anywhere", hosts.logs)
