"""Running the command line as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_command(folder: Path, *args: object, check: int = 0, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `rookery` in a folder and expect the exit status `check`."""
    done = subprocess.run(
        command(*args), cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == check, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from launch.cli import app; app()", *map(str, args)]


def environment() -> dict[str, str]:
    """The environment of a fresh shell, with one thread per process."""
    # The last three: what trainings within this process have set.
    others = {"MLFLOW_TRACKING_URI", "WORLD_SIZE", "RANK"}
    others |= {"DS_ACCELERATOR", "CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"}
    kept = {k: v for k, v in os.environ.items() if k not in others}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
