"""Cases of kernels in Triton's interpreter, which wants a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def found_by(module: str) -> dict[str, Any]:
    """What `python -m tests.models.<module>` prints, with kernels interpreted."""
    command = [sys.executable, "-m", f"tests.models.{module}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
