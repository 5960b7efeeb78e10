"""Where raw images come from: one module per kind of source."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.options import PrepOptions, flag
from data_prep.sources.base import Source, hidden, reading
from data_prep.sources.cifar import CifarSource
from data_prep.sources.digits import DigitsSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.ilsvrc import IlsvrcSource
from data_prep.sources.parquet import ParquetSource
from data_prep.store import is_remote, local_path
from data_prep.wording import counted

# In the order of detection: a folder of class folders is what remains when nothing more particular fits.
SOURCES = {source.kind: source for source in (DigitsSource, IlsvrcSource, CifarSource, ParquetSource, FolderSource)}

# Options that only these kinds read; elsewhere they would be ignored without a word.
_KINDS_OF = {
    "devkit": ("ilsvrc",),
    "coarse_labels": ("cifar", "parquet"),
    "image_column": ("parquet",),
    "label_column": ("parquet",),
}

UNDERSTOOD = """\
  folder    <class>/<images>, or train/<class>/<images> and val/<class>/<images>
  ilsvrc    ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (with --devkit), or a folder with them
  parquet   a Hugging Face parquet file, or a folder of {split}.parquet or {split}-00000-of-000NN.parquet
  cifar     CIFAR-10 or CIFAR-100, python or binary: the tar.gz or its extracted folder
  digits    the word `digits`: scikit-learn's 1,797 scans"""


def open_source(where: str | Path, options: PrepOptions | None = None) -> Source:
    """Find out what `where` is, or take `options.kind` for it.

    Raises:
        UserError: there is nothing there, nothing that is understood, or an option is for another kind.
    """
    options = options or PrepOptions()
    if is_remote(where):
        raise UserError(f"{where}: a source must lie on this machine (OUT need not); copy it here first")
    path = local_path(where)
    if options.kind is not None and options.kind not in SOURCES:
        raise UserError(f"--kind {options.kind}: no such kind of source; there are\n{UNDERSTOOD}")
    with reading(path):  # looking around may already be forbidden
        if not DigitsSource.matches(path) and options.kind != DigitsSource.kind and not path.exists():
            raise UserError(f"{where}: no such file or folder; a source is one of\n{UNDERSTOOD}")
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise UserError(f"{where}: neither a file nor a folder; a source is one of\n{UNDERSTOOD}")
        for kind in [SOURCES[options.kind]] if options.kind else SOURCES.values():
            if options.kind or kind.matches(path):
                _check_options(where, kind.kind, options)
                return kind(path, options)
        what = _what_is(path)
    raise UserError(f"{where}: {what}; a source is one of\n{UNDERSTOOD}")


def _check_options(where: str | Path, kind: str, options: PrepOptions) -> None:
    for name, kinds in _KINDS_OF.items():
        if getattr(options, name) not in (None, False) and kind not in kinds:
            raise UserError(
                f"{where}: {flag(name)} is for sources of kind {' or '.join(kinds)}, and this one is {kind}; "
                "leave it out"
            )


def _what_is(path: Path) -> str:
    if not path.is_dir():
        return "not a source that is understood"
    files = sum(not hidden(entry.name) for entry in path.iterdir())
    return f"a folder with {counted(files, 'file')}, but no class folders" if files else "an empty folder"
