"""Small files of a run directory: written aside and renamed, or appended line by line."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NON_FINITE_BYTES = (b'NaN"', b'Infinity"')


def write_aside(path: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Let `write` fill a file next to `path`, flush it to disk, then rename: a reader sees the old or the new content.

    A link stays one, and what it leads to is written; so does a device or a pipe, which is written to.

    Args:
        sync: False for one of many that can be made again: only what a power cut leaves is uncertain then.

    Raises:
        UserError: no space, no permission.
    """
    target = path.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                write(file)
            return
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, FileNotFoundError) and not target.parent.exists():
            raise UserError(
                f"{path} can't be written: no such folder {path.parent}; make it, or name another"
            ) from error
        raise UserError(f"{path} can't be written: {error.strerror}; free space or choose another folder") from error


def check_place(path: Path, option: str) -> None:
    """Find out before any work that no folder can be made at `path`, nor written to if there is one.

    Args:
        option: what the user should choose another value of.

    Raises:
        UserError: it can't.
    """
    place = path.absolute()
    try:
        while not _is_there(place):
            place = place.parent
        if place.is_dir() and os.access(place, os.W_OK) and not _is_of_the_kernel(place):
            return
        if place == path.absolute() and path.is_file():
            raise UserError(f"{path}: not a folder; choose another {option}")
        reason = f"{place} is not yours" if place.is_dir() else f"{place} is no folder"
    except OSError as error:
        reason = str(error.strerror)
    raise UserError(f"{path}: can't be written ({reason}); choose another {option}")


def _is_there(place: Path) -> bool:
    """Links that lead nowhere are; a name that is too long raises an OSError."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_of_the_kernel(place: Path) -> bool:
    """In /proc nothing can be made, though its permissions say so."""
    return place == Path("/proc") or Path("/proc") in place.parents


def write_text(path: Path, text: str) -> None:
    """`write_aside` for text."""
    write_aside(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`write_aside` for JSON; NaN and infinities become strings, so the file stays JSON for every reader."""
    write_text(path, json.dumps(encode_floats(value), indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none.

    Raises:
        UserError: the file isn't JSON.
    """
    try:
        return decode_floats(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}); restore it or delete it") from error


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Append one JSON line and flush it to disk; a torn line that a killed process left is cut off first."""
    append_lines(path, [entry])


def append_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """`append_line` for several: all of them, or on a full disk none."""
    try:
        cut_torn_tail(path)
        before = path.stat().st_size if path.exists() else 0
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; free space or choose another folder") from error
    try:
        with open(path, "ab") as file:
            file.writelines(map(json_line, entries))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, before)
        raise UserError(f"{path} can't be written: {error.strerror}; free space or choose another folder") from error


def json_line(entry: dict[str, Any]) -> bytes:
    return json.dumps(encode_floats(entry), default=str, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on one line, None for a line that is torn or not an object."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    return decode_floats(entry) if any(name in line for name in _NON_FINITE_BYTES) else entry


def iter_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every line with the object on it; a torn last line is left out.

    Raises:
        UserError: a broken line that isn't the last: the file was damaged, not cut short.
    """
    broken = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if broken:
                raise UserError(f"{path}:{broken} is not JSON; the file is damaged: remove that line to go on")
            entry = parse_line(line)
            if entry is None:
                broken = number
            else:
                yield line, entry


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file; an empty list where there is no file."""
    return [entry for _, entry in iter_lines(path)] if path.exists() else []


def cut_torn_tail(path: Path) -> None:
    """Remove what a killed writer (or a power cut) left after the last whole line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = _line_start(file, end)
            file.seek(start)
            if parse_line(file.read(end - start)) is not None:
                break
            end = start
        file.truncate(end)


def _line_start(file: BinaryIO, end: int, block: int = 1 << 16) -> int:
    """Offset of the line whose bytes end at `end` (its own line feed, if any, is the last of them)."""
    stop = end - 1
    while stop > 0:
        start = max(0, stop - block)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0


def encode_floats(value: Any) -> Any:
    """NaN and infinities as the strings "NaN", "Infinity", "-Infinity", which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): encode_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_floats(item) for item in value]
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        return encode_floats(value.item())
    return value


def decode_floats(value: Any) -> Any:
    """The inverse of `encode_floats`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_floats(item) for item in value]
    return value


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_reference(path: str | Path) -> dict[str, Any]:
    """A file by reference, for `checkpoints.json`: `{"path": absolute, "bytes": n, "sha256": hex}`."""
    path = Path(path).resolve()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
