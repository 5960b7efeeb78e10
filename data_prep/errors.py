"""The error a user can cause while preparing data, and those of stores that are told apart from it."""

from data_prep.redact import redact


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and how to mend it; credentials in addresses are hidden.

    The command line prints the message alone and exits with `status`.

    Attributes:
        told: whether the message was printed already.
        agreed: whether all processes of a training end for it, at the same place.
    """

    status = 2
    told = False
    agreed = False

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


class Unreachable(UserError):
    """A store gave no answer, however often it was asked: nobody's mistake, and it may pass.

    Its status is that of a failure, after which a run is started again where somebody does that.
    """

    status = 1


class DamagedFile(UserError):
    """A file of a store has other bytes than its manifest says, however often it is fetched.

    Args:
        name: the file, as messages call it.
        reason: what is wrong with it.
        mend: what to do about it.
    """

    def __init__(self, name: str, reason: str, mend: str) -> None:
        super().__init__(f"{name}: {reason}; {mend}")
        self.name, self.reason, self.mend = name, reason, mend

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.name, self.reason, self.mend)
