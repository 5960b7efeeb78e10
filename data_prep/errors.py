"""The error a user can cause while preparing data."""

from data_prep.redact import redact


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and how to mend it; credentials in addresses are hidden.

    The command line prints the message alone and exits with status 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))
