"""The sbatch script in a run's directory, which starts the run or goes on with it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tracking.files import write_text
from pipeline.tracking.redact import redact

SCRIPT = "resubmit.sh"
LOGS = "logs"

_TEMPLATE = """\
#!/usr/bin/env bash
# Starts {run}, or goes on with it: submit this script with sbatch, or call it.
{directives}
set -euo pipefail
[[ ${{0##*/}} == slurm_script ]] || exec sbatch "$@" "$0"

cd {folder}
{exports}exec {command}
"""
# What a fresh shell would lack. Credentials are in none of them.
ENVIRONMENT = ("FI_", "GLOO_", "NCCL_", "OFI_", "TORCH_NCCL_", "UCX_")
_VARIABLES = ("PYTHONPATH", "ROOKERY_NPROC", "ROOKERY_THREADS")
# Field of `scontrol show job` -> option of sbatch that asks for it.
_OPTIONS = {
    "NumNodes": "nodes",
    "Partition": "partition",
    "Account": "account",
    "QOS": "qos",
    "TimeLimit": "time",
    "TresPerNode": "gres",
    "TresPerJob": "gpus",
    "MinMemoryNode": "mem",
    "MinMemoryCPU": "mem-per-cpu",
    "CPUs/Task": "cpus-per-task",
    "Features": "constraint",
    "Reservation": "reservation",
    "ExcNodeList": "exclude",
    "Licenses": "licenses",
}


@dataclass(frozen=True)
class Request:
    """What `rookery train` was asked for, as far as a job script repeats it.

    Attributes:
        config, overrides: the recipe and its changes.
        nproc: processes of a node; None: found out in the job.
        threads: CPU threads of a process; None: its share of the cores.
        restarts: how often all processes are started again; None: as often as usual.
    """

    config: Path
    overrides: tuple[str, ...]
    nproc: int | None
    threads: int | None
    restarts: int | None = None

    def arguments(self) -> list[str]:
        """Arguments of `rookery train` inside a job."""
        given = given_options({"--nproc": self.nproc, "--threads": self.threads, "--restarts": self.restarts})
        return [str(self.config), *self.overrides, *given, "--on-allocation"]


def given_options(values: Mapping[str, object]) -> list[str]:
    """Options with their values as words of a command; None: the option is left out."""
    return [text for option, value in values.items() if value is not None for text in (option, str(value))]


def standing_options(name: str, run: Path) -> list[str]:
    """What every job of a run asks for."""
    return [
        f"--job-name={name}",
        "--ntasks-per-node=1",
        f"--output={run.absolute() / LOGS}/slurm-%j.out",
        "--open-mode=append",
        "--signal=USR1@120",
        "--requeue",
    ]


def options_of(facts: dict[str, str]) -> list[str]:
    """The options of sbatch that ask again for what a job was given.

    Args:
        facts: fields of `scontrol show job`.
    """
    options = []
    for field, option in _OPTIONS.items():
        value = facts.get(field)
        if value is None or (option == "cpus-per-task" and value == "1"):
            continue
        value = value.removeprefix("gres:").removeprefix("gres/")
        if option == "gpus":
            value = value.removeprefix("gpu:")
        options.append(f"--{option}={value.split('-')[0] if option == 'nodes' else value}")
    # GPUs of tasks, of which a node has one here, or of sockets: as many of a node, which Slurm tells in the job alone.
    shares = " ".join(facts.get(field, "") for field in ("TresPerTask", "TresPerSocket"))
    count, share = os.environ.get("SLURM_GPUS_ON_NODE", ""), re.search(r"\bgpu(?::([A-Za-z][\w.-]*))?\b", shares)
    if share and count.isdecimal():
        options.append(f"--gpus-per-node={f'{share[1]}:' if share[1] else ''}{count}")
    if facts.get("OverSubscribe") == "NO":
        options.append("--exclusive")
    return options


def write_script(run: Path, options: Sequence[str], arguments: Sequence[str]) -> Path:
    """Write `<run>/resubmit.sh` for this working directory and environment.

    Args:
        run: the run directory; created when it is missing.
        options: of sbatch; of two that contradict each other the later one counts.
        arguments: of `rookery train`.

    Raises:
        UserError: an option of sbatch that would break the script, credentials that it would keep, or the directory
            can't be written.
    """
    for option in options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"--sbatch {option!r}: write an option of sbatch, such as --sbatch=--account=vision")
    for argument in arguments:
        if redact(argument) != argument:
            raise UserError(
                f"{redact(argument)}: the job script would keep these credentials; leave them out of the address and "
                "put them into variables of the environment (AWS_ACCESS_KEY_ID, ...), which sbatch passes on"
            )
    kept = {key: value for key, value in sorted(os.environ.items()) if key in _VARIABLES or key.startswith(ENVIRONMENT)}
    text = _TEMPLATE.format(
        run=run,
        directives="\n".join(f"#SBATCH {_quoted(option)}" for option in options),
        folder=shlex.quote(str(Path.cwd())),
        exports="".join(f"export {key}={shlex.quote(value)}\n" for key, value in kept.items()),
        command=shlex.join([executable(), "train", *arguments]),
    )
    path = run / SCRIPT
    try:
        (run / LOGS).mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"run directory {run} can't be written ({error.strerror}); choose another out=") from error
    return path


def _quoted(option: str) -> str:
    return f'"{option}"' if " " in option and '"' not in option else option


def executable() -> str:
    """The `rookery` command of this environment."""
    beside = Path(sys.executable).parent
    return shutil.which("rookery", path=str(beside)) or "rookery"
