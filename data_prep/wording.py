"""Counts and names in messages."""


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `1,437 samples`, `3 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{ending}"


def printable(text: str) -> str:
    """The text with escapes for what a terminal would act on or can't encode: names of files hold any bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
