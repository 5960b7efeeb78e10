"""Counts in messages."""


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `1,437 samples`, `3 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{ending}"
