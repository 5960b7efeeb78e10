"""The error a user can cause. The house has one; it is defined in its lowest room."""

from data_prep.errors import UserError

__all__ = ["UserError"]
