"""Text files as people write them: what is wrong with one is said with its line, which `datasets` leaves out."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class JsonTable:
    """The rows of a JSON file, with the types that they have there.

    `datasets` makes a number among texts a text, and a text of a missing one, so that neither can be refused.
    """

    rows: list[dict[str, Any]]

    @property
    def column_names(self) -> list[str]:
        """All that any row has."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row.get(column) for row in self.rows]


def read_utf8(file: Path) -> str:
    """The text of a file.

    Raises:
        UserError: there is none in it, or it is in another encoding.
    """
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(
                f"{file}: is UTF-16, not UTF-8; save the file as UTF-8, "
                f"for instance: iconv -f UTF-16 -t UTF-8 {file.name} > utf8{file.suffix}"
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8, "
            f"for instance: iconv -f LATIN1 -t UTF-8 {file.name} > utf8{file.suffix}"
        ) from error
    if not text.strip():
        raise UserError(f"{file}: the file is empty; write the rows into it, or name another file")
    return text


def read_json(file: Path) -> JsonTable:
    """The rows of a list of objects, or of one object a line.

    Raises:
        UserError: it is not JSON, or something else than objects.
    """
    text = read_utf8(file)
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parsed(file, text, 1)))
        place = "row"
    else:
        # Not `splitlines`, which also ends lines at separators that a JSON text may hold.
        rows = [(i, _parsed(file, line, i)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        place = "line"
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f'{file}: {place} {number} is no JSON object; write each row as {{"sentence": "...", "label": 0}}'
            )
    return JsonTable([row for _, row in rows])


def _parsed(file: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        reason = getattr(error, "msg", str(error))
        raise UserError(
            f"{file}: line {first_line + line - 1}, column {column} is not JSON: {reason}; mend it: one object a line, "
            "or one list of objects"
        ) from error
