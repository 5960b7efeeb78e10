"""Token numbers of a split: made once by a tokenizer, kept in the node's cache, looked up by sample."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import Manifest, Shard
from pipeline.data.text.glue import TextTask
from pipeline.data.text.rows import Rows
from pipeline.errors import UserError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_VERSION = 1
# Samples from which the wait is long enough to be told of: some seconds.
_MANY = 50_000
# OWNER/NAME or NAME; a path has more parts, or begins with a dot, ~ or /.
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class TokenSplit:
    """A tokenised split; also the record's `Source`.

    Attributes:
        name: `train` or `val`.
        ids, types: (T,) int32 token numbers and int8 sentence numbers of all samples, one after the other.
        starts: (n + 1,) int64, where each sample begins.
        labels: (n,) int64 classes, or float32 numbers.
        max_length: the longest that a sample may be.
    """

    name: str
    max_length: int
    ids: np.ndarray
    types: np.ndarray
    starts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each sample."""
        return np.diff(self.starts)

    def keys(self, samples: Sequence[int]) -> list[str]:
        """Names of samples."""
        return [f"{self.name}-{sample}" for sample in samples]

    def missing(self) -> tuple[str, ...]:
        """Nothing can be: all of it is in memory."""
        return ()

    def manifest(self, task: TextTask) -> Manifest:
        """The split as one shard, for the code that asks for samples, classes and a fingerprint."""
        arrays = (self.ids, self.types, self.starts, self.labels)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
        size = sum(array.nbytes for array in arrays)
        shard = Shard(f"{self.name}.npz", len(self), size, digest, "")
        return Manifest("tokens", self.name, list(task.classes), [shard])


def load_tokenizer(source: str) -> Any:
    """A `tokenizers.Tokenizer` from `tokenizer.json`, its folder, or a name on the hub.

    Raises:
        UserError: there is none.
    """
    from tokenizers import Tokenizer

    file = Path(source, "tokenizer.json") if Path(source).is_dir() else Path(source)
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if not Path(source).is_dir() and not _HUB_NAME.fullmatch(source):
            raise UserError(
                f"task.tokenizer={source}: no such folder or file; name a folder with tokenizer.json, that file, "
                "or OWNER/NAME on Hugging Face's hub"
            )
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source).backend_tokenizer
    except UserError:
        raise
    except Exception as error:  # the library raises bare ones for damaged files
        raise UserError(f"task.tokenizer={source}: no tokenizer there: {_why_not(file, source, error)}") from error


def _why_not(file: Path, source: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if file.is_file():
        return f"{file} is damaged ({reason}); write or fetch it again"
    if Path(source).is_dir():
        return "the folder has no tokenizer.json; save the tokenizer into it, or name another folder"
    return f"{reason}; no folder here has this name either: name one with tokenizer.json, or check the name on the hub"


def words_tokenizer(sentences: Sequence[Sequence[str]], size: int) -> Any:
    """A tokenizer of the `size` most frequent words, in lower case; equally frequent ones in the order of the alphabet.

    Args:
        sentences: columns of the training split.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    normal, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(
        word
        for column in sentences
        for text in column
        for word, _ in splitter.pre_tokenize_str(normal.normalize_str(text))
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *words][:size])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normal, splitter
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def tokenize(rows: Rows, name: str, tokenizer: Any, max_length: int, cache: Path) -> TokenSplit:
    """Token numbers of a split, from the cache where they are there.

    Args:
        name: of the split.
        max_length: tokens that are kept of a sample, the special ones counted.
        cache: folder of this node.
    """
    asked = [_VERSION, rows.sentences, rows.labels, json.loads(tokenizer.to_str()), max_length]
    fingerprint = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    path = cache / f"{fingerprint[:32]}.npz"
    arrays = _read(path)
    if arrays is None:
        if len(rows.labels) >= _MANY:
            print(f"{name}: making tokens of {len(rows.labels):,} samples, once; kept in {cache}", file=sys.stderr)
        arrays = _encode(rows, tokenizer, max_length)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.stem}.{os.getpid()}.npz")
            np.savez(aside, **arrays)  # type: ignore[arg-type]
            os.replace(aside, path)
        except OSError:
            pass  # a cache that can't be written costs the next process its time, nothing else
    return TokenSplit(name, max_length, **arrays)


def token_cache(directory: str | None) -> Path:
    """The folder: `data.cache`, else below `$XDG_CACHE_HOME` or `~/.cache`."""
    if directory is not None:
        return Path(directory, "tokens")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "rookery", "tokens")


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {key: saved[key] for key in ("ids", "types", "starts", "labels")}
    except Exception:  # not there, or damaged in one of many ways: it is made again
        return None


def _encode(rows: Rows, tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    inputs = rows.sentences[0] if len(rows.sentences) == 1 else list(zip(*rows.sentences, strict=True))
    encoded = tokenizer.encode_batch(inputs)
    starts = np.cumsum([0, *(len(one.ids) for one in encoded)], dtype=np.int64)
    return {
        "ids": np.array([i for one in encoded for i in one.ids], np.int32),
        "types": np.array([i for one in encoded for i in one.type_ids], np.int8),
        "starts": starts,
        "labels": np.array(rows.labels, np.int64 if all(isinstance(y, int) for y in rows.labels) else np.float32),
    }
