"""What torch's C++ code logs in a launcher of several nodes: stack frames, at every end of a connection."""

from __future__ import annotations

import os

_LEVEL = "TORCH_CPP_LOG_LEVEL"
_QUIET = "ERROR"


def quiet_torch() -> None:
    """Before torch is imported: only errors. A level that the user has set stays."""
    os.environ.setdefault(_LEVEL, _QUIET)


def unquiet_workers() -> None:
    """Before the workers are started: they log as usual."""
    if os.environ.get(_LEVEL) == _QUIET:
        del os.environ[_LEVEL]
