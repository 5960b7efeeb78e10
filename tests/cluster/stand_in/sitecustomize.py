"""Python runs this first where it finds it: see `tests.cluster.short_runs`."""

import sys
from pathlib import Path

if [Path(word).name for word in sys.orig_argv[1:3]] == ["rookery", "train"]:
    from tests.cluster.short_runs import main

    main(sys.orig_argv[3:])
else:
    from tests.cluster.short_runs import watch_files

    watch_files()
