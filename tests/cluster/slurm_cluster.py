"""A real Slurm cluster on this machine: munged, slurmctld, and a slurmd for each of its nodes."""

from __future__ import annotations

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from launch.slurm import fields
from tests.train.commands import environment

T = TypeVar("T")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"

_CONFIG = """\
ClusterName=rookery
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=30
SlurmdTimeout=10
ReturnToService=2
MinJobAge=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""
_NODE = "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


class SlurmCluster:
    """Use as a context manager: all processes end with it.

    Args:
        nodes: their names.

    Attributes:
        folder: configuration and logs.
        environment: of a user of the cluster.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = nodes
        # Not pytest's folder: sockets have short paths, and munged wants one that others may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="rookery-slurm-"))
        self.environment = environment() | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SlurmCluster:
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._stack.callback(self._kill_everything)
        with ExitStack() as undo:
            undo.push(self._stack)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        port, *ports = free_ports(1 + len(self.nodes))
        lines = [_NODE.format(name=n, host=host, port=p) for n, p in zip(self.nodes, ports, strict=True)]
        config = _CONFIG.format(
            host=host, port=port, user=getpass.getuser(), folder=self.folder, nodes="\n".join(lines)
        )
        (self.folder / "slurm.conf").write_text(config)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        wait_for(lambda: (self.folder / "munge" / "socket").exists(), "munged", self.logs)
        self._daemon("slurmctld", "slurmctld", "-c", "-D")
        for node in self.nodes:
            self.start_node(node)
        for node in self.nodes:
            self.wait_until_idle(node)

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def start_node(self, name: str) -> None:
        self._daemon(name, "slurmd", "-N", name, "-D")

    def wait_until_idle(self, name: str) -> None:
        wait_for(lambda: self.node_state(name) == "idle", f"{name} is idle", self.logs)

    def node_state(self, name: str) -> str:
        return self.run("sinfo", "--noheader", f"--nodes={name}", "--format=%T").strip()

    def kill_node(self, name: str) -> None:
        """As if its power failed: `kill -9` of slurmd and of all that it has started."""
        self._daemons[name].kill()
        self._daemons[name].wait()
        tasks = [process for process in psutil.process_iter() if _variable(process, "SLURMD_NODENAME") == name]
        families = [parent for task in tasks for parent in _parents(task) if parent.name() == "slurmstepd"]
        for process in [*families, *tasks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def run(self, *command: object, folder: Path | None = None, more: dict[str, str] | None = None) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            [*map(str, command)],
            env=self.environment | (more or {}),
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return fields(self.run("scontrol", "show", "job", "--oneliner", job))

    def hurry(self, job: str) -> None:
        """Skip the two minutes for which Slurm holds a job that it has requeued, but for some seconds.

        Nodes remember for a second or two that they were to end the job, and would refuse its next start.
        """
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+4")

    def logs(self) -> str:
        """The ends of all logs."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def _kill_everything(self) -> None:
        config = self.environment["SLURM_CONF"]
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for process in psutil.process_iter():
            if _variable(process, "SLURM_CONF") == config or str(self.folder) in _command(process):
                with suppress(psutil.Error):
                    process.kill()


def wait_for(met: Callable[[], T], what: str, logs: Callable[[], str], seconds: float = 300) -> T:
    """Poll until `met()` is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := met()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{logs()}"
        time.sleep(0.2)
    return value


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parents(process: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from process.parents()
    except psutil.Error:
        return


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
