"""The error a user can cause while preparing data."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and how to mend it.

    The command line prints the message alone and exits with status 2.
    """
