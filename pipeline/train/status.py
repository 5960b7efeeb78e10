"""Exit statuses of a training, for those who start one; imports nothing."""

FAILED = 1
MISTAKE = 2
INTERRUPTED = 130
# EX_TEMPFAIL of sysexits.h: try again later.
RESUBMIT = 75
