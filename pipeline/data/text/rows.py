"""Sentences and labels from where they lie: the hub, a folder, a file. The one module that imports `datasets`."""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.text.glue import TextTask
from pipeline.data.text.made import made_rows
from pipeline.data.text.text_file import read_json, read_utf8
from pipeline.errors import UserError

HUB, MADE = "hub:", "made:"
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
# Columns with the numbers of the rows: on the hub, and in the files of GLUE's website.
_NUMBERS = ("idx", "index")
# The label where it is not told.
_HIDDEN = -1
_TOLD = "the labels of GLUE's test splits are hidden; `rookery eval --predictions FILE` needs none"
_MEND = {
    ".csv": "every line needs as many cells as the first, with quotes around one that holds a comma or a line break",
    ".tsv": "every line needs as many cells as the first; none can hold a tab or a line break, quotes don't help here",
    ".parquet": "it is damaged or of another kind: write it again",
}


@dataclass(frozen=True)
class Rows:
    """A split.

    Attributes:
        sentences: one list for each column, equally long.
        labels: a class, or a number where the task has no classes.
        labelled: whether the split has labels; without them all are 0.
        numbers: of the rows, by their column `idx` or `index`; None where there is none of whole numbers.
    """

    sentences: list[list[str]]
    labels: list[int] | list[float]
    labelled: bool = True
    numbers: list[int] | None = field(default=None, compare=False)


def read_rows(address: str, name: str, task: TextTask, split: str, unlabelled: bool = False) -> Rows:
    """Read a split.

    Args:
        address: `made:COUNT[@SEED]`; `hub:OWNER/NAME[@SPLIT]`; a file (.json, .jsonl, .parquet, .csv, .tsv) with the
            task's columns and `label`, in UTF-8; a folder that `datasets` saved, or that holds `<split>.<one of
            these>`.
        name: of the task, which is a configuration on the hub.
        task: its columns and classes.
        split: which one of the hub or of a folder.
        unlabelled: take one without any labels too: no column of them, empty cells, or the -1 of GLUE's test splits.

    Raises:
        UserError: it is not there, can't be read, lacks a sentence, or has other columns or labels.
    """
    if address.startswith(MADE):
        if name != "polarity":
            raise UserError(f"{address}: made sentences belong to task.name=polarity, not {name}")
        sentences, labels = made_rows(address)
        return Rows([sentences], labels)
    table = _table(address, name, task, split)
    if not len(table):
        raise UserError(f"{address}: no rows in it; write some, or name other data")
    hidden = unlabelled and _no_labels(table)
    needed = task.columns if hidden else (*task.columns, "label")
    missing = [column for column in needed if column not in table.column_names]
    if missing:
        raise UserError(
            f"{address}: task.name={name} needs the columns {', '.join(needed)}; "
            f"{missing[0]} is not among {', '.join(table.column_names)}; name its columns so "
            "(a .csv or .tsv in its first line)"
        )
    columns = [_sentences(list(table[column]), column, address) for column in task.columns]
    numbers = next((found for column in _NUMBERS if (found := _row_numbers(table, column))), None)
    if hidden:
        return Rows(columns, [0 if task.classes else 0.0] * len(table), False, numbers)
    return Rows(columns, _labels(list(table["label"]), task, address), numbers=numbers)


def _no_labels(table: Any) -> bool:
    return "label" not in table.column_names or all(
        value is None or _number(value) == _HIDDEN for value in table["label"]
    )


def _row_numbers(table: Any, column: str) -> list[int] | None:
    values = list(table[column]) if column in table.column_names else []
    return values if all(type(value) is int for value in values) else None


def _sentences(values: list[Any], column: str, address: str) -> list[str]:
    """The texts of a column; a missing one must not be trained as the word "none"."""
    # What was published with empty ones, as QQP on the hub with two, can't be mended by who reads it.
    published = address.startswith(HUB) or _is_saved(Path(address))
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip() and not published):
            raise UserError(f"{address}: row {row} has no {column}; write its text, or take the row out")
        if not isinstance(value, str):
            raise UserError(f"{address}: row {row} has the {column} {value!r}, which is no text; put quotes around it")
    return values


def _labels(values: list[Any], task: TextTask, address: str) -> list[int] | list[float]:
    if not task.classes:
        numbers = [_number(value) for value in values]
        if all(number == _HIDDEN for number in numbers):
            raise UserError(f"{address}: all rows have the label -1 ({_TOLD}); name a split that has labels")
        for row, number in enumerate(numbers):
            if number is None or not math.isfinite(number):
                has = "no label" if values[row] is None else f"{values[row]!r}, a label that is no number"
                raise UserError(f"{address}: row {row} has {has}; write one (3.8, say), or take the row out")
        return [number for number in numbers if number is not None]
    labels = [_class_of(value, task.classes) for value in values]
    if None in labels:
        row = labels.index(None)
        hidden = f" ({_TOLD})" if _number(values[row]) == _HIDDEN else ""
        raise UserError(
            f"{address}: row {row} has the label {values[row]!r}{hidden}; there are "
            f"{', '.join(f'{i} or {name}' for i, name in enumerate(task.classes))}"
        )
    return [label for label in labels if label is not None]


def _class_of(value: Any, classes: tuple[str, ...]) -> int | None:
    """The class that a label names or numbers; a column with a word in it has its numbers as text."""
    if value in classes:
        return classes.index(value)
    number = _number(value)
    return None if number is None or number not in range(len(classes)) else int(number)


def _number(value: Any) -> float | None:
    """A number, however it is written; true and false are none, as no class is called so."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _table(address: str, name: str, task: TextTask, split: str) -> Any:
    try:
        if address.startswith(HUB):
            repository, _, asked = address.removeprefix(HUB).partition("@")
            return _datasets(address).load_dataset(repository, name, split=asked or split)
        path = Path(address)
        if _is_saved(path):
            datasets = _datasets(address)
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return _read_file(_file(path, split), task, address)
    except UserError:
        raise
    except Exception as error:  # of many libraries: of files, of the network, of the formats
        raise UserError(f"{address}: can't be read: {_reason(error)}") from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _datasets(address: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{address} is read by datasets; install it with: pip install 'rookery[nlp]'") from error
    datasets.disable_progress_bars()
    # What it logs as an error it raises too, and then it is said once, as the message of the command.
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _read_file(file: Path, task: TextTask, address: str) -> Any:
    kind = _FILES[file.suffix]
    if kind == "json":
        return read_json(file)
    options: dict[str, Any] = {}
    if kind == "csv":
        text, tabs = read_utf8(file), file.suffix == ".tsv"
        if len(text.strip().splitlines()) == 1:
            raise UserError(f"{file}: no rows below the names of the columns; write some, or name another file")
        options = {
            "sep": "\t" if tabs else ",",
            # As in GLUE's files: a quote is a letter there, and one without its fellow would swallow the rows after it.
            "quoting": csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            # Else the sentences "NA" and "null" would be missing ones, and "1.0" a number.
            # Labels too are read as they stand: one that is no number would make all of them text, or none of them fit.
            "converters": dict.fromkeys(task.columns, str) | {"label": _cell},
            "keep_default_na": False,
        }
        _check_width(file, text, options)
    elif not file.stat().st_size:
        raise UserError(f"{file}: the file is empty; write it again, or name another file")
    try:
        return _datasets(address).load_dataset(kind, data_files=str(file), split="train", **options)
    except UserError:
        raise
    except Exception as error:  # of pandas or Arrow
        mend = _MEND[file.suffix]
        raise UserError(f"{file}: can't be read as {file.suffix[1:]}: {_reason(error)}; {mend}") from error


def _check_width(file: Path, text: str, options: dict[str, Any]) -> None:
    """Refuse rows with more cells than columns: pandas would take the first cells for names of rows, and shift all."""
    lines = csv.reader(text.lstrip("\ufeff").splitlines(True), delimiter=options["sep"], quoting=options["quoting"])
    try:
        columns, cells, *_ = [*islice((len(line) for line in lines if line), 2), 0, 0]
    except csv.Error:  # a cell of over 131,072 letters, most likely a quote without its fellow: pandas tells of it
        return
    if cells > columns:
        raise UserError(
            f"{file}: the first row has {cells} cells for {columns} columns; name all of them in the first line"
        )


def _cell(text: str) -> str | None:
    """A label as it stands in a file; None where there is none."""
    return None if text.strip() in ("", "NA", "N/A", "NaN", "nan", "null", "None") else text


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; `datasets` wraps it into one that says that a dataset was being made."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _file(path: Path, split: str) -> Path:
    if path.is_file() and path.suffix in _FILES:
        return path
    if path.is_file():
        raise UserError(f"{path}: a file of another kind; name one of {', '.join(_FILES)}")
    found = sorted(file for file in path.glob(f"{split}.*") if file.suffix in _FILES)
    if len(found) != 1:
        many = "more than one" if found else "no"
        place = "there; name" if path.exists() else "there: no such file or folder; check the path, or name"
        raise UserError(
            f"{path}: {many} file {split}.({'|'.join(suffix[1:] for suffix in _FILES)}) {place} the file itself, "
            "hub:nyu-mll/glue, or made:COUNT"
        )
    return found[0]
