"""What Slurm knows about the job that this process runs in."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.train.walltime import job_here

_ASK_SECONDS = 60
# Below the ports that Linux hands out by itself (32768 and up).
_FIRST_PORT, _PORTS, _TRIES = 15000, 16000, 100


def slurm(command: str, *arguments: str, give: str | None = None) -> str:
    """Run one of Slurm's commands and return what it prints.

    Args:
        command, arguments: such as "scontrol", "requeue", "17".
        give: text for its standard input.

    Raises:
        UserError: the command is missing, or refuses; its own message is kept.
    """
    if shutil.which(command) is None:
        raise UserError(f"{command} is not installed here; run this where Slurm's commands are (a login node)")
    try:
        done = subprocess.run(
            [command, *arguments], input=give, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command} does not answer within {_ASK_SECONDS} s; try again later") from error
    if done.returncode:
        lines = [line.removeprefix(f"{command}: ").removeprefix("error: ") for line in done.stderr.split("\n") if line]
        raise UserError(f"{command} refuses: {'; '.join(lines) or f'exit status {done.returncode}'}")
    return done.stdout


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job.

    Attributes:
        job: its id; each task of an array has its own.
        name: what Slurm's commands know it by, `17` or, as a task of an array, `17_3`.
        num_nodes: nodes that it holds.
        seed: index in a job array, None outside of one.
        restarts: how often Slurm has started it again.
        facts: the fields of `scontrol show job`.
    """

    job: str
    name: str
    num_nodes: int
    seed: int | None
    restarts: int
    facts: dict[str, str]

    @classmethod
    def here(cls) -> Allocation:
        """The job around this process.

        Raises:
            UserError: there is none.
        """
        job, name = os.environ.get("SLURM_JOB_ID"), job_here()
        if job is None or name is None:
            raise UserError(
                "this is no Slurm job; submit one: sbatch slurm/train_nest.sh, or `rookery train ... --slurm`"
            )
        seed = os.environ.get("SLURM_ARRAY_TASK_ID")
        return cls(
            job,
            name,
            int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
            None if seed is None else int(seed),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            fields(slurm("scontrol", "show", "job", "--oneliner", name)),
        )

    def processes(self) -> int:
        """Training processes of a node: ROOKERY_NPROC, else its GPUs, else 1.

        Raises:
            UserError: ROOKERY_NPROC is no number.
        """
        asked = os.environ.get("ROOKERY_NPROC")
        if asked is not None:
            if not asked.isdecimal() or int(asked) < 1:
                raise UserError(f"ROOKERY_NPROC={asked}: set it to the number of training processes of a node")
            return int(asked)
        granted = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_GPUS_PER_NODE", "")
        counts = [int(count) for count in re.findall(r"(?:^|[:,])(\d+)(?=,|$)", granted)]
        if counts:
            return sum(counts)
        # The cluster does not count GPUs. torch takes seconds to import.
        import torch

        return torch.cuda.device_count() or 1

    def rendezvous(self) -> str:
        """`host:port` of the first node where the agents of all nodes meet."""
        first = slurm("scontrol", "show", "hostnames", self.facts["NodeList"]).split()[0]
        node = fields(slurm("scontrol", "show", "node", "--oneliner", first))
        is_here = os.environ.get("SLURMD_NODENAME") == first
        return f"{node.get('NodeAddr', first)}:{free_port(self.job) if is_here else port(self.job)}"


def fields(line: str) -> dict[str, str]:
    """`Key=value Key=value ...` as scontrol prints it, paths with spaces too; values that mean nothing are left out."""
    found = dict(re.findall(r"(?:^|\s)([\w/:]+)=(.*?)(?=\s+[\w/:]+=|\s*$)", line))
    return {key: value for key, value in found.items() if value not in ("", "(null)", "N/A")}


def port(job: str, attempt: int = 0) -> int:
    """The port that a job's id stands for; jobs one after the other have ports far apart."""
    return _FIRST_PORT + (int(job) * 37 + attempt) % _PORTS


def free_port(job: str) -> int:
    """The first port from the job's own on that nobody listens at on this host.

    Raises:
        UserError: all of a hundred are taken.
    """
    for attempt in range(_TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("", port(job, attempt)))
            except OSError:
                continue
            return port(job, attempt)
    raise UserError(f"ports {port(job)} to {port(job, _TRIES - 1)} of this node are all taken")
