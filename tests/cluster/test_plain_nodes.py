"""`rookery train --nodes 2` on two hosts that no name stands for, and no scheduler knows."""

from __future__ import annotations

import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.hosts import hosts_with_ssh
from tests.cluster.test_ray_up import SHORT
from tests.train.commands import ROOT, command

NODES = ("node1", "node2")


def test_two_hosts_without_names(digits: Path, tmp_path: Path) -> None:
    with hosts_with_ssh(tmp_path, NODES) as hosts:
        for name in NODES:  # as Debian's installer leaves it: its own name stands for its loopback
            (tmp_path / name / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        shutil.copytree(digits, tmp_path / "shards" / "digits")
        meeting = ("--nodes", 2, "--rendezvous", f"{hosts.address['node1']}:29500")
        demo = ROOT / "configs" / "demo.yaml"
        train = shlex.join(command("train", demo, *SHORT, "name=run", "--threads", 1, *meeting))
        ssh = ["ssh", "-i", hosts.key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]

        def run(name: str) -> str:
            there = f"root@{hosts.address[name]}"
            return hosts.run(*ssh, there, f"cd {tmp_path} && PYTHONPATH={ROOT} exec {train}", timeout=120)

        with ThreadPoolExecutor() as pool:
            node1, node2 = pool.map(run, NODES)
        assert "2 processes" in node1 and "top1=" in node1 and "top1=" not in node2
        assert (tmp_path / "runs" / "run" / "result.json").exists()
