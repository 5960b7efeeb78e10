"""What is peculiar to the client libraries of stores: what each of them must leave to this code, and how it reads.

Trying again is the matter of `data_prep.attempts`, and so is telling: a library that waits by itself uses up the time
of a try, after which nobody knows what was wrong; one that logs prints tracebacks where one message is due.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

from data_prep.errors import UserError

# Google's client asks over gRPC what kind of bucket it is, before every request if it may not know: with a line on
# the standard error each time, and threads that no process should fork with. Only zonal buckets need it.
_GOOGLE_GRPC = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
_GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_HUB, _HUB_LEVEL = "huggingface_hub", "HF_HUB_VERBOSITY"
_LOGGERS = {
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "google.auth")),
    **dict.fromkeys(("abfs", "abfss", "az"), ("adlfs", "azure")),
    "hf": (_HUB,),
}


def before_connecting(protocol: str) -> None:
    """What has to be settled before a library is imported.

    Raises:
        UserError: the file with the credentials is not there, without which Google's client would go on as nobody.
    """
    file = os.environ.get(_GOOGLE_FILE)
    if protocol in ("gs", "gcs") and file and not (Path(file).exists() or "FSSPEC_GS" in os.environ):
        raise UserError(f"{_GOOGLE_FILE}={file}: no such file; name a key or the credentials that `gcloud` has written")
    os.environ.setdefault(_GOOGLE_GRPC, "false")
    _hush(protocol)


def _hush(protocol: str) -> None:
    """Let no library write to the standard error, unless its level was set by somebody."""
    for name in _LOGGERS.get(protocol, ()):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET or (name == _HUB and _HUB_LEVEL not in os.environ):  # which sets one itself
            logger.setLevel(logging.CRITICAL)


def connected(protocol: str, fs: Any) -> Any:
    """The same file system, which asks once where it would ask again and again, and is silent about it."""
    _hush(protocol)
    request = getattr(type(fs), "_request", None)
    once = getattr(request, "__wrapped__", None)
    if type(fs).__module__.startswith("gcsfs.") and once is not None:
        fs._request = MethodType(once, fs)
    policy = getattr(getattr(getattr(fs, "service_client", None), "_config", None), "retry_policy", None)
    if policy is not None:
        policy.total_retries = 0
    for module in ("huggingface_hub.hf_file_system", "huggingface_hub.utils._pagination"):
        for name in ("http_backoff", "http_stream_backoff"):
            asking = getattr(sys.modules.get(module), name, None)
            if asking is not None and not isinstance(asking, partial):
                setattr(sys.modules[module], name, partial(asking, max_retries=0))
    return fs


def reading(protocol: str, end: int | None = None) -> dict[str, Any]:
    """Options of `cat_file`, up to this byte or of all.

    Hugging Face's opens a file for it. By itself that would believe for ever what the folder held when it was first
    listed, and read 5 MB more than it was asked for.
    """
    if protocol != "hf":
        return {}
    return {"block_size": 0} if end is None else {"cache_type": "none", "size": end}
