"""What a run ran on and which code it ran: git state, versions, hardware, scheduler."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.cores import usable_cores
from pipeline.tracking.redact import is_secret_variable, redact

_VARIABLE_PREFIXES = (
    "SLURM_",
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "TORCH",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "MLFLOW_",
    "ROOKERY_",
    "RAY_",
    "NVIDIA_",
)
_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
}
_KEY_PACKAGES = ("rookery", "torch", "torchvision", "timm", "numpy", "mlflow")
_MAX_DIFF_BYTES = 10 << 20
_MAX_UNTRACKED = 100


def git_state(folder: str | Path | None = None) -> tuple[dict[str, Any] | None, str]:
    """Commit, branch and local changes of the repository that holds `folder`.

    Args:
        folder: any folder inside the repository; by default the code's own when it runs from a checkout, else the
            working directory.

    Returns:
        `{"commit", "branch", "dirty", "untracked"}` and the diff against the commit; (None, "") outside a repository or
        without git. `dirty` speaks of tracked files; untracked ones are listed by name, at most 100.
    """
    where = Path(folder) if folder is not None else _code_folder()
    top = _git(where, "rev-parse", "--show-toplevel")
    if top is None:
        return None, ""
    where = Path(top.strip())
    commit = (_git(where, "rev-parse", "--verify", "HEAD") or "").strip() or None
    status = (_git(where, "status", "--porcelain", "-z") or "").split("\0")
    diff = (_git(where, "diff", "--no-ext-diff", "HEAD") or "") if commit else ""
    if len(diff.encode()) > _MAX_DIFF_BYTES:
        diff = diff.encode()[:_MAX_DIFF_BYTES].decode(errors="ignore") + "\n... cut here: the diff is larger\n"
    state = {
        "commit": commit,
        "branch": (_git(where, "symbolic-ref", "--short", "HEAD") or "").strip() or None,
        "dirty": any(line and not line.startswith("??") for line in status),
        "untracked": [line[3:] for line in status if line.startswith("??")][:_MAX_UNTRACKED],
    }
    return state, diff


def environment() -> dict[str, Any]:
    """Python, torch, GPUs, CPU, memory, host, package versions and the variables that steer a run (never secrets)."""
    import psutil
    import torch

    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": _gpus(),
        "cpu": {"model": cpu_model(), "usable": usable_cores(), "total": os.cpu_count()},
        "memory_bytes": psutil.virtual_memory().total,
        "packages": packages(),
        "variables": variables(),
    }


def variables() -> dict[str, str]:
    """Environment variables of the scheduler, the launcher and the numeric libraries; no name or value of a secret."""
    return {
        name: redact(value)
        for name, value in sorted(os.environ.items())
        if (name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)) and not is_secret_variable(name)
    }


def packages() -> dict[str, str]:
    """Every installed distribution and its version."""
    found: dict[str, str] = {}
    for dist in metadata.distributions():
        # `dist.name` would parse the whole file, more than a second for all of them.
        head = (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "").partition("\n\n")[0]
        fields = dict(line.split(": ", 1) for line in head.splitlines() if line.startswith(("Name: ", "Version: ")))
        if fields.keys() >= {"Name", "Version"}:
            found.setdefault(fields["Name"], fields["Version"])
    return {name: found[name] for name in sorted(found, key=str.lower)}


def key_versions() -> dict[str, str]:
    """Versions of the few packages that decide a run's numbers."""
    versions = {"python": sys.version.split()[0]}
    for name in _KEY_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _code_folder() -> Path:
    here = Path(__file__).resolve().parent
    return Path.cwd() if "site-packages" in here.parts else here


def _git(folder: Path, *args: str) -> str | None:
    """Output of a git command, None when it fails; takes no lock in the repository and never waits long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def device_name() -> str:
    """What a measurement computes on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{usable_cores()} CPU cores, {cpu_model()}"


def cpu_model() -> str:
    """The processor, as it names itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
