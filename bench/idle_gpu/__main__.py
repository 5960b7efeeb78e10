"""`python -m bench.idle_gpu FOLDER`: compile it, and print the environment of programs that shall see it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.idle_gpu.build import Missing, environment

if __name__ == "__main__":
    megabytes = os.environ.get("IDLE_GPU_MB", "1")
    if not megabytes.isdecimal() or int(megabytes) < 1:
        print(f"IDLE_GPU_MB={megabytes}: give the megabytes of the idle GPU as a whole number", file=sys.stderr)
        sys.exit(2)
    try:
        settings = environment(Path(sys.argv[1]))
    except (Missing, OSError) as error:
        sys.exit(f"the idle GPU can't be compiled: {error}")
    print("\n".join(f"{name}={value}" for name, value in settings.items()))
