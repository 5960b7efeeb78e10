"""Exit statuses of a training, for those who start one; imports nothing."""

INTERRUPTED = 130
# EX_TEMPFAIL of sysexits.h: try again later.
RESUBMIT = 75
