"""`ray up configs/ray/onprem.yaml` against three hosts in network namespaces, reached by SSH."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.tracking.metrics import read_metrics
from tests.cluster.hosts import Hosts, hosts_with_ssh
from tests.cluster.slurm_cluster import wait_for
from tests.train.commands import ROOT

pytestmark = pytest.mark.ray_cluster

NODES = ("head", "worker1", "worker2")

# The demo with a smaller model, for a few steps.
SHORT = [
    "model.options={patch_size: 1, num_levels: 3, embed_dims: [8, 8, 8], depths: [1, 1, 1], num_heads: [1, 1, 1]}",
    "data.augment_by=pillow",
    "data.workers=0",
    "train.epochs=2steps",
    "train.global_batch_size=16",
    "train.log_every=1steps",
    "optim.schedule.warmup=1steps",
    "eval.every=2steps",
    "checkpoint.every=2steps",
    "tracking.mlflow=false",
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    pytest.importorskip("ray")
    with hosts_with_ssh(tmp_path, NODES) as hosts:
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


def submit(hosts: Hosts, cluster: Path, shared: Path) -> str:
    """What a sweep prints that is submitted as a job: as many trials as nodes, each as large as a node."""
    from ray._private.utils import get_num_cpus

    sweep = {
        "name": "sweep",
        "recipe": f"{hosts.home}/rookery/configs/demo.yaml",
        "overrides": SHORT,
        "space": {"optim.lr": {"grid": [1e-3, 2e-3, 3e-3]}},
        "resources": {"cpus": get_num_cpus()},
    }
    (shared / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    # As docs/clusters.md has it: a tunnel to the dashboard, and a job through it. Ctrl-C ends the tunnel and its ssh.
    job = f"bash -c '. ~/.rookery.sh; cd ~/rookery; exec rookery sweep {shared}/sweep.yaml --address auto'"
    script = f"""
        set -m; ray dashboard {cluster} >{hosts.folder}/dashboard.log 2>&1 & trap "kill -INT -- -$!" EXIT
        until ray job list >{hosts.folder}/jobs.log 2>&1; do kill -0 $! || exit; sleep 1; done
        ray job submit -- {job}
    """
    address = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://localhost:8265"}
    return hosts.run("bash", "-c", script, env=address)


def ray_processes(hosts: Hosts, name: str) -> list[str]:
    return [line for line in hosts.processes(name) if line and not line.startswith("sshd")]


def test_up_sweep_down(hosts: Hosts, digits: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(digits, shared / "shards" / "digits")
    cluster = filled_in(hosts, shared)
    hosts.run("ray", "get-auth-token", "--generate")
    hosts.run("ray", "up", "--yes", cluster)

    def joined() -> bool:
        return all("raylet" in " ".join(hosts.processes(name)) for name in NODES)

    wait_for(joined, "Ray runs on three hosts", hosts.logs)
    said = submit(hosts, cluster, shared)
    runs = [path.parent for path in sorted(shared.glob("runs/sweep/trials/*/facts.json"))]
    facts = [json.loads((run / "facts.json").read_text()) for run in runs]
    assert {fact["environment"]["host"] for fact in facts} == set(NODES), said
    # Each ran what was copied to its node, whatever the environment has installed.
    assert {fact["folder"] for fact in facts} == {f"{hosts.home}/rookery"}
    for run in runs:
        assert read_metrics(run)[-1]["step"] == 2 and (run / "result.json").exists()

    hosts.run("ray", "down", "--yes", cluster)
    wait_for(lambda: not any(ray_processes(hosts, name) for name in NODES), "no Ray anywhere", hosts.logs)
