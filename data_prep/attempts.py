"""Trying again what a network gets wrong now and then; what a user has to mend is told at once."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from data_prep.errors import Unreachable, UserError

T = TypeVar("T")

TRIES = "ROOKERY_STORE_TRIES"
SECONDS = "ROOKERY_STORE_SECONDS"

# Libraries whose exceptions speak of a connection.
_CLIENTS = (
    *("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpcore", "httpcore2", "httpx", "httpx2"),
    *("requests", "urllib3"),
)
_NO_FILE_ERRORS = ("azure.", "huggingface_hub.")  # with an exception of their own for what is not there
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_LASTING_NAME = re.compile(r"OfflineMode")  # Hugging Face's, which is a ConnectionError
_NO_CREDENTIALS = re.compile(r"Credential|Token|Authentication|Unauthori[sz]ed|ProfileNotFound|RefreshError")
_AZURE_DETAILS = re.compile(r"\s*(?:RequestId:|ErrorCode:None|Attempted credentials:)")  # and then a page
_PASSING_STATUS = (408, 425, 429)
_DENIED = (401, 403)
_MEND = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "for a public bucket FSSPEC_S3='{\"anon\": true}'",
    "gs": "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS; "
    'for a public bucket FSSPEC_GS=\'{"token": "anon"}\'',
    "hf": "set HF_TOKEN to a token that may read it, or run `hf auth login`",
    "abfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING; "
    "for a public container AZURE_STORAGE_ANON=true",
    "http": "give an address that holds what the server asks for: user:password@, or a signature that has not expired",
}
_ALIASES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "https": "http"}

# Python's own generator belongs to augmentation libraries.
_draw = random.Random()


@dataclass(frozen=True)
class Patience:
    """How long to go on with a store that does not answer as it should.

    Attributes:
        tries: of one request.
        seconds: that a try may take: a request for a piece of `remote.PIECE` bytes at most, or what is in proportion.
        first_pause, longest_pause: seconds between tries; they double from the first on, each shortened at random, so
            that processes that failed together do not come back together.
        longest: seconds after which no other try begins, however many there may be.
    """

    tries: int = 6
    seconds: float = 60.0
    first_pause: float = 0.5
    longest_pause: float = 15.0
    longest: float = 300.0

    @classmethod
    def of_environment(cls, tries: int | None = None) -> Patience:
        """`ROOKERY_STORE_TRIES` and `ROOKERY_STORE_SECONDS`, or the defaults.

        Args:
            tries: another default.

        Raises:
            UserError: one of them is no number above 0.
        """
        return cls(int(_number(TRIES, tries or cls.tries)), _number(SECONDS, cls.seconds))

    def pause(self, attempt: int) -> float:
        """Seconds to wait after this attempt, counted from 1."""
        return float(min(self.longest_pause, self.first_pause * 2 ** (attempt - 1)) * _draw.uniform(0.5, 1))


def attempt(request: Callable[[], T], where: str, protocol: str, patience: Patience) -> T:
    """The answer to a request, which is repeated as long as its failures look like passing ones.

    Args:
        request: raises what the client library raises.
        where: what was asked for, in messages.
        protocol: `s3`, `https`, ...

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no use to ask again.
        Unreachable: it was none `patience.tries` times.
    """
    began = time.monotonic()
    for number in range(1, patience.tries + 1):
        try:
            return request()
        except UserError:
            raise
        except FileNotFoundError as error:
            if _of_repository(error):
                raise UserError(f"{where}: {_text(error)}; {mend(protocol)}") from error
            raise
        except Exception as error:
            if type(error).__module__.startswith(_NO_FILE_ERRORS) and _status(error) == 404:
                raise FileNotFoundError(errno.ENOENT, _text(error), where) from error
            if not _may_pass(error) and not (number == 1 < patience.tries and _may_be_stale(error, protocol)):
                raise _refused(error, where, protocol) from error
            if number == patience.tries or time.monotonic() - began > patience.longest:
                raise Unreachable(
                    f"{where}: no success in {number} tries, the last: {_text(error)}; see whether the store "
                    f"can be reached from here, and set {TRIES} or {SECONDS} higher if it is slow"
                ) from error
            time.sleep(patience.pause(number))
    raise AssertionError("there is at least one try")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, _LASTING) or _LASTING_NAME.search(type(error).__name__):
        return False
    if any(_is_passing_login(one) for one in _chain(error)):
        return True
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if _NO_CREDENTIALS.search(type(error).__name__):
        return False
    if isinstance(error, RuntimeError) and "client has been closed" in str(error):
        return True  # Hugging Face's connections are one for all threads, and the first that finds no way closes it
    return isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in _CLIENTS


def _may_be_stale(error: Exception, protocol: str) -> bool:
    """Whether Google's answer is 401: a token may end while a request is on its way, and the next one gets a new."""
    return _ALIASES.get(protocol, protocol) == "gs" and _status(error) == 401


def _is_passing_login(error: Any) -> bool:
    """Whether Google's servers for credentials were not there: its client calls that 401, as if they had been."""
    kind = type(error)
    return kind.__module__ == "google.auth.exceptions" and (
        kind.__name__ == "TransportError" or bool(getattr(error, "retryable", False))
    )


def _of_repository(error: FileNotFoundError) -> bool:
    """Whether Hugging Face doesn't find, or doesn't show, the whole repository or this revision of it."""
    return type(error.__cause__).__module__.startswith("huggingface_hub.")


def mend(protocol: str) -> str:
    """Where the credentials for such addresses come from."""
    return _MEND.get(_ALIASES.get(protocol, protocol), f"see how {protocol}:// gets its credentials (fsspec)")


def _refused(error: Exception, where: str, protocol: str) -> UserError:
    if isinstance(error, PermissionError) or _status(error) in _DENIED:
        return UserError(f"{where}: access denied ({_text(error)}); {mend(protocol)}")
    if _NO_CREDENTIALS.search(type(error).__name__):
        return UserError(f"{where}: no credentials that could be used ({_text(error)}); {mend(protocol)}")
    return UserError(f"{where}: {_text(error)}; see whether the address is right and the file whole")


def refuses_range(error: BaseException) -> bool:
    """Whether the store says that the file doesn't reach to what was asked for."""
    return _status(error) == 416 or getattr(error, "errno", None) == errno.EINVAL


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of any client library, or of what caused it."""
    for one in _chain(error):
        if type(one).__module__ == "aiohttp.http_exceptions":  # its own, made for an answer that ended too early
            continue
        for value in _statuses(one):
            if str(value).isdecimal() and 400 <= int(str(value)) < 600:
                return int(str(value))
    return None


def _statuses(error: Any) -> Iterator[Any]:
    """Where client libraries keep the status."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        yield response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    yield getattr(response, "status_code", None)
    for name in ("status", "status_code", "code"):
        yield getattr(error, name, None)
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # of gcsfs
        yield 403


def _chain(error: BaseException | None) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__


def _text(error: Exception) -> str:
    said = (getattr(error, "strerror", None) or str(error)).strip()
    said = _AZURE_DETAILS.split(said)[0]
    if isinstance(error, TimeoutError) and not said:
        said = "no answer in time"
    name = type(error).__name__
    return " ".join(said.split()) if isinstance(error, OSError) and said else f"{name}: {' '.join(said.split())}"


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (variable == TRIES and value < 1):
        raise UserError(f"{variable}={text}: write a number above 0")
    return value
