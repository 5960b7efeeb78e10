"""Sentences that need no download: words with a polarity, some of them negated by a `not` before them.

The label is the sign of the sum. Counting words gets most of them right; the rest takes a look at neighbours.
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import UserError
from pipeline.hashing import hash64

_LENGTH, _WORD, _NEGATED = range(3)
_WORDS = 24
_SHORTEST, _LONGEST = 5, 15


def made_rows(address: str) -> tuple[list[str], list[int]]:
    """Sentences and labels of `made:COUNT` or `made:COUNT@SEED`; a function of the address.

    Raises:
        UserError: it is written another way.
    """
    try:
        count, _, seed = address.removeprefix("made:").partition("@")
        samples, number = int(count), int(seed or 0)
        if not (0 < samples < 2**31 and 0 <= number < 2**31):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{address}: write made:COUNT or made:COUNT@SEED, such as made:4096 or made:512@1") from error
    rows, places = np.arange(samples)[:, None], np.arange(_LONGEST)[None]
    # An odd number of words has no sum of 0.
    lengths = _SHORTEST + 2 * (hash64(number, _LENGTH, rows[:, 0]) % (1 + (_LONGEST - _SHORTEST) // 2)).astype(int)
    words = (hash64(number, _WORD, rows, places) % _WORDS).astype(int)
    negated = hash64(number, _NEGATED, rows, places) % 4 == 0
    signs = np.where((words % 2 == 0) ^ negated, 1, -1) * (places < lengths[:, None])
    sentences = [
        " ".join(f"not w{w}" if n else f"w{w}" for w, n in zip(words[i, :k], negated[i, :k], strict=True))
        for i, k in enumerate(lengths.tolist())
    ]
    return sentences, (signs.sum(1) > 0).astype(int).tolist()
