"""The folder of `rookery explain`: what a call draws, and nothing of an earlier one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import UserError
from pipeline.tracking.files import read_json, write_aside

if TYPE_CHECKING:
    from PIL.Image import Image

JSON_NAME, SHEET_NAME, CHART_NAME = "explain.json", "contact_sheet.png", "similarity.png"
_PAGE = re.compile(r"\d{4,}_[^/]*\.png")
# In every picture: a killed call leaves no list of its pages, and one with --json leaves it elsewhere.
_SOFTWARE = {"Software": "rookery explain"}


def clear_folder(out: Path) -> None:
    """Make the folder, and take out what an earlier call drew: what is left over would seem to belong to this one.

    Raises:
        UserError: it can't be made, or an old page can't be removed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            if (_PAGE.fullmatch(path.name) or path.name in (SHEET_NAME, CHART_NAME)) and _is_ours(path):
                path.unlink()
        with suppress(UserError):  # no JSON: another's file
            told = read_json(out / JSON_NAME)
            if isinstance(told, dict) and {"run", "method", "images"} <= told.keys():
                (out / JSON_NAME).unlink()
    except OSError as error:
        raise UserError(f"{out}: can't be used ({error.strerror}); choose another --out") from error


def page_name(number: int, file: Path) -> str:
    """Short enough for a file system, whatever the image is called."""
    return f"{number:04d}_{os.fsencode(file.stem)[:200].decode(errors='ignore')}.png"


def save_picture(picture: Image, path: Path) -> None:
    """Write a picture that the next call knows as one of ours.

    Raises:
        UserError: no space, no permission.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in _SOFTWARE.items():
        info.add_text(key, text)
    write_aside(path, lambda file: picture.save(file, "PNG", pnginfo=info))


def save_chart(draw: Callable[[BinaryIO, dict[str, str]], None], path: Path) -> None:
    """The same for what `draw` writes, with the texts that it is handed, as PNG."""
    write_aside(path, lambda file: draw(file, _SOFTWARE))


def _is_ours(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == _SOFTWARE["Software"]
    except (OSError, ValueError, SyntaxError):  # a folder, another kind of file, a damaged one
        return False
