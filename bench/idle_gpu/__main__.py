"""`python -m bench.idle_gpu FOLDER`: compile it, and print the environment of programs that shall see it."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.idle_gpu.build import Missing, environment

if __name__ == "__main__":
    try:
        settings = environment(Path(sys.argv[1]))
    except (Missing, OSError) as error:
        sys.exit(f"the idle GPU can't be compiled: {error}")
    print("\n".join(f"{name}={value}" for name, value in settings.items()))
