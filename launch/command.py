"""The `rookery` command as it is installed: without a word if it is stopped while its modules are read."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the console script."""
    # Nothing has begun yet that would have to be put in order: Ctrl-C ends the process as if this were no Python.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch.cli import app

    signal.signal(signal.SIGINT, before)
    app()
