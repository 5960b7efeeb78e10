"""Keeping secrets out of what is written down. The house has one way; it is defined in its lowest room."""

from data_prep.redact import (
    HIDDEN,
    is_secret_option,
    is_secret_variable,
    redact,
    redact_command,
    redact_query,
    without_password,
)

__all__ = [
    "HIDDEN",
    "is_secret_option",
    "is_secret_variable",
    "redact",
    "redact_command",
    "redact_query",
    "without_password",
]
