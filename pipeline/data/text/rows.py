"""Sentences and labels from where they lie: the hub, a folder, a file. The one module that imports `datasets`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.text.glue import TextTask
from pipeline.data.text.made import made_rows
from pipeline.errors import UserError

HUB, MADE = "hub:", "made:"
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


@dataclass(frozen=True)
class Rows:
    """A split.

    Attributes:
        sentences: one list for each column, equally long.
        labels: a class, or a number where the task has no classes.
    """

    sentences: list[list[str]]
    labels: list[int] | list[float]


def read_rows(address: str, name: str, task: TextTask, split: str) -> Rows:
    """Read a split.

    Args:
        address: `made:COUNT[@SEED]`; `hub:OWNER/NAME[@SPLIT]`; a file (.json, .jsonl, .parquet, .csv, .tsv) with the
            task's columns and `label`; a folder that `datasets` saved, or that holds `<split>.<one of these>`.
        name: of the task, which is a configuration on the hub.
        task: its columns and classes.
        split: which one of the hub or of a folder.

    Raises:
        UserError: it is not there, or has other columns or labels.
    """
    if address.startswith(MADE):
        if name != "polarity":
            raise UserError(f"{address}: made sentences belong to task.name=polarity, not {name}")
        sentences, labels = made_rows(address)
        return Rows([sentences], labels)
    table = _table(address, name, split)
    missing = [column for column in (*task.columns, "label") if column not in table.column_names]
    if missing:
        raise UserError(
            f"{address}: task.name={name} needs the columns {', '.join((*task.columns, 'label'))}; "
            f"{missing[0]} is not among {', '.join(table.column_names)}"
        )
    columns = [[str(text) for text in table[column]] for column in task.columns]
    return Rows(columns, _labels(list(table["label"]), task, address))


def _labels(values: list[Any], task: TextTask, address: str) -> list[int] | list[float]:
    if not task.classes:
        try:
            return [float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise UserError(f"{address}: a label that is no number: {error}") from error
    numbers = {name: i for i, name in enumerate(task.classes)} | {i: i for i in range(len(task.classes))}
    for row, value in enumerate(values):
        if value not in numbers:
            hidden = " (the labels of GLUE's test splits are hidden)" if value == -1 else ""
            raise UserError(
                f"{address}: row {row} has the label {value!r}{hidden}; there are "
                f"{', '.join(f'{i} or {name}' for i, name in enumerate(task.classes))}"
            )
    return [numbers[value] for value in values]


def _table(address: str, name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{address} is read by datasets; install it with: pip install 'rookery[nlp]'") from error
    datasets.disable_progress_bars()
    try:
        if address.startswith(HUB):
            repository, _, asked = address.removeprefix(HUB).partition("@")
            return datasets.load_dataset(repository, name, split=asked or split)
        path = Path(address)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        file = _file(path, split)
        options: dict[str, Any] = {"sep": "\t"} if file.suffix == ".tsv" else {}
        return datasets.load_dataset(_FILES[file.suffix], data_files=str(file), split="train", **options)
    except UserError:
        raise
    except Exception as error:  # of many libraries: of files, of the network, of the formats
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{address}: can't be read: {reason}") from error


def _file(path: Path, split: str) -> Path:
    if path.is_file() and path.suffix in _FILES:
        return path
    found = sorted(file for file in path.glob(f"{split}.*") if file.suffix in _FILES)
    if len(found) != 1:
        many = "more than one" if found else "no"
        raise UserError(
            f"{path}: {many} file {split}.({'|'.join(suffix[1:] for suffix in _FILES)}) there; name the file itself, "
            "hub:nyu-mll/glue, or made:COUNT"
        )
    return found[0]
