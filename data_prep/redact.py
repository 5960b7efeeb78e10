"""Keeps secrets out of what is written down or shown: credentials in addresses, variables and options."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

HIDDEN = "***"

# Environment variables may have any name, so anything that looks like a secret is left out.
_SECRET_VARIABLE = re.compile(r"secret|token|passw|pwd|credential|auth|jwt|cookie|(^|_)key", re.IGNORECASE)
# Options are ours: words such as `token_dim` or `metric_key` are none.
_SECRET_OPTION = re.compile(
    r"(^|_)(secret|password|passwd|credentials?|(api|access|auth|secret|private)_?key|jwt)$"
    r"|^((api|access|auth|bearer|hf|session|security|tracking)_)?token$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^\s/?#'\"]*)@")
# `abfs://container@account...`: no secret.
_CONTAINER = re.compile(r"(abfss?|az)://[^:@]*", re.IGNORECASE)
# Secrets of S3 often hold slashes, and the names of its buckets no colon.
_S3_KEY = re.compile(r"(?P<scheme>\bs3a?://)[^\s/?#'\"@:]+:[^\s'\"@]+@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<name>[?&][^=&\s]*(?:token|signature|\bsig|secret|passw|credential|key)[^=&\s]*=)"
    r"(?!\*\*\*)[^&\s'\"]+",
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """The same tree of dicts, lists and text with every credential replaced by `***`.

    Hidden are the user part of addresses (`scheme://user:password@host`), signatures and tokens in their query, and
    text values of keys such as `password`, `api_key` or `secret`. Numbers stay.
    """
    if isinstance(value, str):
        value = _S3_KEY.sub(rf"\g<scheme>{HIDDEN}@", value)
        return _QUERY.sub(rf"\g<name>{HIDDEN}", _USER_INFO.sub(_without_user, value))
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(item, str) and is_secret_option(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def _without_user(found: re.Match[str]) -> str:
    is_container = _CONTAINER.fullmatch(found["scheme"] + found["user"])
    return found[0] if is_container else f"{found['scheme']}{HIDDEN}@"


def redact_command(argv: list[str]) -> list[str]:
    """A command line without secrets: `--password x`, `--password=x`, `a.b.secret=x` and addresses."""
    shown: list[str] = []
    hide_next = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        secret = is_secret_option(name.lstrip("-"))
        if hide_next:
            shown.append(HIDDEN)
        elif secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(redact(argument))
        hide_next = secret and not equals and argument.startswith("-")
    return shown


def is_secret_option(name: str) -> bool:
    """Whether the last part of a dotted option name is that of a secret."""
    return bool(_SECRET_OPTION.search(name.rpartition(".")[2].replace("-", "_")))


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable's name looks like a secret's."""
    return bool(_SECRET_VARIABLE.search(name))


def without_password(uri: str) -> str:
    """An address that can be stored and used again, credentials coming from elsewhere (variables, `.pgpass`).

    For http(s) the whole user part goes, because it would override MLFLOW_TRACKING_USERNAME; for databases the user
    name stays.
    """
    if "://" not in uri or uri.startswith("sqlite"):
        return uri
    parts = urlsplit(uri)
    user_info, at, host = parts.netloc.rpartition("@")
    user = user_info.partition(":")[0]
    netloc = host if not at or parts.scheme in ("http", "https") or not user else f"{user}@{host}"
    return str(redact_query(urlunsplit(parts._replace(netloc=netloc))))


def redact_query(uri: str) -> str:
    """Hide tokens and signatures of an address' query."""
    return _QUERY.sub(rf"\g<name>{HIDDEN}", uri)
