"""Counts in messages. The house has one way to write them; it is defined in its lowest room."""

from data_prep.wording import counted

__all__ = ["counted"]
