"""The error a user can cause, and its kinds; they are defined in the lowest room of the house."""

from data_prep.errors import DamagedFile, Unreachable, UserError

__all__ = ["DamagedFile", "Unreachable", "UserError"]
